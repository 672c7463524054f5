"""The command line: ``sewd-np transcribe``, ``classify`` and ``info``.

Results go to standard output, everything else to standard error. Exit codes: 0 all well; 2 something the user can mend,
said in one sentence (a recording that cannot be used costs only its own line: the others are still printed);
130 interrupted; 141 whoever read the output went away.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sewd_np
from sewd_np.transcribe import DEFAULT_BACKEND, DEFAULT_MODEL, Label, Transcript, classify, load_for, transcribe

ASSETS = Path(__file__).parent / "assets"
CLIP = ASSETS / "clips" / "enter-six-two-four.flac"

# What a user can cause: a bad value, a bad file, a bad type in a file's contents, too long a recording.
MENDABLE = (ValueError, OSError, TypeError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` defaults to the process's own arguments. Returns the exit code."""
    # A file name need not be printable in the terminal's encoding; that must not cost the transcript.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        _complain("interrupted.")
        code = 130
    except BrokenPipeError:
        code = 141
    except MENDABLE as error:
        _complain(_sentence(error))
        code = 2
    try:
        sys.stdout.flush()
    except OSError:
        # What cannot be written now cannot be written on exit either: Python would complain again, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sewd-np", description="SEW-D speech recognition in NumPy.")
    parser.add_argument("--version", action="version", version=f"sewd-np {sewd_np.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("transcribe", help="print what is said in recordings")
    command.add_argument("files", nargs="*", metavar="FILE", help="recordings; a bundled clip where none is given")
    command.add_argument("--model", default=DEFAULT_MODEL, help=f"{_MODEL_HELP} (default: {DEFAULT_MODEL})")
    _add_common(command)
    command.set_defaults(run=_transcribe)

    command = commands.add_parser("classify", help="print the likeliest labels of recordings")
    command.add_argument("files", nargs="+", metavar="FILE", help="recordings")
    command.add_argument("--model", help=f"{_MODEL_HELP}; no classifier is bundled, so it must be given")
    command.add_argument("--top-k", type=int, default=5, metavar="K", help="labels to print (default: 5)")
    _add_common(command)
    command.set_defaults(run=_classify)

    command = commands.add_parser("info", help="print a model's configuration, size, rates and cost")
    command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    command.add_argument(
        "--seconds", type=float, default=10.0, help="length of recording to count multiply-adds for (default: 10)"
    )
    command.set_defaults(run=_info)
    return parser


PATIENCE = 3.0  # seconds before the first result's delay is explained
_COMPILING = (
    "still at work: on its first run backend numba compiles its kernels, up to a minute, and keeps them on disk."
)
_MODEL_HELP = "a bundled name, a folder, a weights file or a Hugging Face hub id"


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--backend", default=DEFAULT_BACKEND, help=f"numpy or numba (default: {DEFAULT_BACKEND})")
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads of backend numba (default: all cores)")
    command.add_argument(
        "--output-format",
        choices=("text", "json"),
        default="text",
        help="json: one object a line for each recording (default: text)",
    )


def _transcribe(options: argparse.Namespace) -> int:
    model = load_for("ctc", options.model, options.backend, options.threads)
    if not options.files:
        _complain(f"no file given, so this is the bundled clip {CLIP.name}, made by text-to-speech.")
    return _for_each_file(
        options.files or [str(CLIP)],
        lambda path: transcribe(path, model=model),
        _transcript_json if options.output_format == "json" else _transcript_text,
        options.backend == "numba",
    )


def _classify(options: argparse.Namespace) -> int:
    model = load_for("classification", options.model, options.backend, options.threads)
    return _for_each_file(
        options.files,
        lambda path: classify(path, model=model, top_k=options.top_k),
        _labels_json if options.output_format == "json" else _labels_text,
        options.backend == "numba",
    )


def _info(options: argparse.Namespace) -> int:
    from sewd_np.checkpoint import read_checkpoint
    from sewd_np.info import describe

    checkpoint = read_checkpoint(options.model)
    print(describe(checkpoint.config, checkpoint.head, options.seconds))
    if checkpoint.folder is not None and checkpoint.folder.parent == ASSETS:
        print("\n" + (checkpoint.folder / "README.md").read_text(encoding="utf-8"), end="")
    sys.stdout.flush()
    return 0


def _for_each_file(
    files: Sequence[str], recognize: Callable[[str], Any], form: Callable[[str, Any, bool], str], compiles: bool
) -> int:
    """Print each file's result as soon as it is there; a file that fails is complained of and passed over.

    ``form`` gets the file, its result and whether it is one of several. ``compiles``: the first result may be long in
    coming because kernels are compiled, and the user is told so.
    """
    code = 0
    waiting = threading.Timer(PATIENCE, _complain, [_COMPILING]) if compiles else None
    if waiting is not None:
        waiting.daemon = True
        waiting.start()
    for path in files:
        try:
            result = recognize(path)
        except MENDABLE as error:
            _complain(_sentence(error), path)
            code = 2
        else:
            print(form(path, result, len(files) > 1), flush=True)
        if waiting is not None:
            waiting.cancel()
    return code


def _transcript_text(path: str, transcript: Transcript, several: bool) -> str:
    return f"{path}: {transcript.text}" if several else transcript.text


def _transcript_json(path: str, transcript: Transcript, several: bool) -> str:
    return json.dumps({"file": path, **dataclasses.asdict(transcript)})


def _labels_text(path: str, labels: list[Label], several: bool) -> str:
    start = f"{path}: " if several else ""
    return "\n".join(f"{start}{label.score:.4f} {label.label}" for label in labels)


def _labels_json(path: str, labels: list[Label], several: bool) -> str:
    return json.dumps({"file": path, "labels": [dataclasses.asdict(label) for label in labels]})


def _sentence(error: BaseException) -> str:
    """An error's text on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) and not text:
        return "not enough memory; try a shorter recording."
    return text or type(error).__name__


def _complain(sentence: str, path: str = "") -> None:
    """One line on standard error, beginning with the file it is about unless the sentence names it itself."""
    start = f"{path}: " if path and path not in sentence else ""
    print(f"sewd-np: {start}{sentence}", file=sys.stderr)
