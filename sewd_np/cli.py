"""The command line: ``sewd-np transcribe``, ``classify``, ``info``, ``plot`` and ``explain``.

Results go to standard output, everything else to standard error. Exit codes: 0 all well; 2 something the user can mend,
said in one sentence (a recording that cannot be used costs only its own line: the others are still printed);
130 interrupted; 141 whoever read the output went away.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sewd_np
from sewd_np.backend import DEFAULT_BACKEND, PRECISIONS
from sewd_np.clips import clip
from sewd_np.page import KINDS
from sewd_np.results import Label, Transcript
from sewd_np.transcribe import DEFAULT_CLASSIFIER, DEFAULT_MODEL, classify, load_for, transcribe

CLIP = clip()

# What a user can cause: a bad value, a bad file, a bad type in a file's contents, too long a recording, a library that
# belongs to an extra.
MENDABLE = (ValueError, OSError, TypeError, MemoryError, ModuleNotFoundError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` defaults to the process's own arguments. Returns the exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller (>&-); print would take the other one in its place
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open to the end)
    # A file name need not be printable in the terminal's encoding; that must not cost the transcript.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = _options(argv)
    try:
        with np.errstate(all="ignore"):  # what comes of an overflow is said in a sentence, where it is read
            code: int = options.run(options)
        sys.stdout.flush()  # while there is still somebody to say that it cannot be written
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


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments. Files may stand before, between and after the options, unlike argparse's own."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    dashed = rest[:1] == ["--"]  # then files follow, whatever they begin with
    files = rest[1:] if dashed else rest
    if dashed or not any(name.startswith("-") for name in files):
        if hasattr(options, "files"):
            options.files += files
            return options
        if len(files) == 1 and getattr(options, "file", None) == str(CLIP):
            options.file = files[0]
            return options
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


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
    default = f"(default: {DEFAULT_CLASSIFIER}, control words and digits)"
    command.add_argument("--model", default=DEFAULT_CLASSIFIER, help=f"{_MODEL_HELP} {default}")
    command.add_argument("--top-k", type=_count, default=5, metavar="K", help="labels to print (default: 5)")
    _add_common(command)
    command.set_defaults(run=_classify)

    command = commands.add_parser("info", help="print a model's configuration, size, rates and cost")
    command.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    command.add_argument(
        "--seconds", type=float, default=10.0, help="length of recording to count multiply-adds for (default: 10)"
    )
    command.add_argument("--backend", help=f"also say what this backend would run on: {_BACKENDS}")
    command.add_argument("--precision", choices=PRECISIONS, help=f"and with which products: {_PRECISION}")
    command.set_defaults(run=_info)

    command = commands.add_parser("plot", help="draw one picture of what happens inside the model")
    command.add_argument("kind", metavar="KIND", choices=KINDS, help=", ".join(KINDS))
    _add_look(command, "PICTURE", "file to write: .png, .svg or .pdf")
    command.set_defaults(run=_plot)

    command = commands.add_parser("explain", help="draw all pictures and a page that explains them")
    _add_look(command, "FOLDER", "folder to write: a new or empty one, or an earlier page's")
    command.set_defaults(run=_explain)
    return parser


PATIENCE = 3.0  # seconds before the first result's delay is explained
_COMPILING = (
    "still at work: on its first run backend cuda compiles its kernels, up to a minute, and keeps them on disk."
)
_BACKENDS = "numba: compiled kernels; numpy: the definitions, slower; cuda: an NVIDIA GPU"
_PRECISION = "of backend numba: high uses the processor's matrix unit where there is one, highest float32 everywhere"
_MODEL_HELP = "a bundled name, a folder, a weights file or a Hugging Face hub id"


def _count(text: str) -> int:
    """An option's whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is given; it must be a whole number of at least 1.")
    return value


def _add_backend(command: argparse.ArgumentParser) -> None:
    command.add_argument("--backend", default=DEFAULT_BACKEND, help=f"{_BACKENDS} (default: {DEFAULT_BACKEND})")
    command.add_argument(
        "--threads", type=_count, metavar="N", help="CPU threads of backend numba (default: all cores)"
    )
    command.add_argument("--precision", choices=PRECISIONS, help=f"{_PRECISION} (default: {PRECISIONS[0]})")


def _add_common(command: argparse.ArgumentParser) -> None:
    _add_backend(command)
    command.add_argument(
        "--batch-size",
        type=_count,
        default=1,
        metavar="N",
        help="take N files at a time, those of about one length together, not on numpy: quicker where they are short, "
        "and the results are the same (default: 1, each is printed as soon as it is there)",
    )
    command.add_argument(
        "--output-format",
        choices=("text", "json"),
        default="text",
        help="json: one object a line for each recording (default: text)",
    )


def _add_look(command: argparse.ArgumentParser, target: str, what: str) -> None:
    command.add_argument(
        "file", nargs="?", default=str(CLIP), metavar="FILE", help="recording (default: a bundled clip)"
    )
    command.add_argument("-o", "--output", required=True, type=Path, metavar=target, help=what)
    command.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="transformer layer, from 0, of attention, disentangle and position-profile (default: the middle one) and "
        "of heads (default: all)",
    )
    command.add_argument(
        "--head", type=int, default=0, metavar="N", help="head, from 0, of attention and disentangle (default: 0)"
    )
    command.add_argument("--model", default=DEFAULT_MODEL, help=f"{_MODEL_HELP} (default: {DEFAULT_MODEL})")
    _add_backend(command)


def _transcribe(options: argparse.Namespace) -> int:
    model = load_for("ctc", options.model, options.backend, options.threads, options.precision)
    if not options.files:
        _complain(f"no file given, so this is the bundled clip {CLIP.name}, made by text-to-speech.")
    return _for_each_file(
        options.files or [str(CLIP)],
        lambda paths: transcribe(paths, model=model, batch_size=options.batch_size),
        _transcript_json if options.output_format == "json" else _transcript_text,
        options,
    )


def _classify(options: argparse.Namespace) -> int:
    model = load_for("classification", options.model, options.backend, options.threads, options.precision)
    return _for_each_file(
        options.files,
        lambda paths: classify(paths, model=model, batch_size=options.batch_size, top_k=options.top_k),
        _labels_json if options.output_format == "json" else _labels_text,
        options,
    )


def _info(options: argparse.Namespace) -> int:
    from sewd_np.checkpoint import ASSETS, read_checkpoint
    from sewd_np.info import describe
    from sewd_np.processor import Processor

    checkpoint = read_checkpoint(options.model)
    # As loading does, so that what cannot be used is said here too.
    processor = Processor.from_files(checkpoint.preprocessor, checkpoint.tokenizer, checkpoint.vocab)
    rate = processor.feature_extractor.sampling_rate
    page = describe(checkpoint.config, checkpoint.head, options.seconds, rate)
    if options.backend is not None or options.precision is not None:
        from sewd_np.backend import get_operations

        runs_on = get_operations(options.backend, precision=options.precision).describe()
        page += "\n\nRuns on\n" + "\n".join(f"  {name}: {value}" for name, value in runs_on.items())
    print(page)
    if checkpoint.folder is not None and checkpoint.folder.parent == ASSETS:
        print("\n" + (checkpoint.folder / "README.md").read_text(encoding="utf-8"), end="")
    return 0


def _plot(options: argparse.Namespace) -> int:
    from sewd_np import explain

    explain.check_picture(options.output)
    picture = explain.figure(_look(options, options.kind), options.kind)
    explain.write_picture(picture, options.output)
    return 0


def _explain(options: argparse.Namespace) -> int:
    from sewd_np import explain

    explain.check_folder(options.output)
    explain.write_page(_look(options, None), options.output, f"{Path(options.file).name} in {options.model}")
    _complain(f"{options.output / 'index.html'} shows {Path(options.file).name}; open it in a browser.")
    return 0


def _look(options: argparse.Namespace, kind: str | None) -> Any:
    """One run over the recording, with what this kind of picture needs, or (None) all of them."""
    from sewd_np import explain

    waiting = _patience(options.backend)
    try:
        model = sewd_np.load(
            options.model, backend=options.backend, threads=options.threads, precision=options.precision
        )
        return explain.look(model, options.model, options.file, kind, options.layer, options.head)
    finally:
        waiting.cancel()


def _for_each_file(
    files: Sequence[str],
    recognize: Callable[[Any], Any],
    form: Callable[[str, Any, bool], str],
    options: argparse.Namespace,
) -> int:
    """Print each file's result as soon as it is there; a file that fails is complained of and passed over.

    ``recognize`` gets a list of files, ``--batch-size`` of them, or one by itself. ``form`` gets a file, its result and
    whether it is one of several. A GPU's first result is long in coming, and the user is told why.
    """
    together = options.batch_size
    code = 0
    waiting = _patience(options.backend)
    for start in range(0, len(files), together):
        for path, result in _results(files[start : start + together], recognize):
            if isinstance(result, MENDABLE):
                _complain(_sentence(result), path)
                code = 2
            else:
                print(form(path, result, len(files) > 1), flush=True)
        waiting.cancel()
    return code


def _results(paths: Sequence[str], recognize: Callable[[Any], Any]) -> list[tuple[str, Any]]:
    """Each file with its result, or with the error that kept it from one; where one of several fails, one by one."""
    try:
        if len(paths) == 1:  # by itself: an error should not say which of a list it is about
            return [(paths[0], recognize(paths[0]))]
        return list(zip(paths, recognize(list(paths)), strict=True))
    except MENDABLE as error:
        if len(paths) == 1:
            return [(paths[0], error)]
    return [pair for path in paths for pair in _results([path], recognize)]


def _patience(backend: str) -> threading.Timer:
    """A timer that explains a long wait for the GPU's compiler; cancel it when the first result is there.

    The CPU's kernels announce themselves (``cpu_compiling``); of the GPU's nothing says beforehand what is on disk.
    """
    waiting = threading.Timer(PATIENCE, _complain, [_COMPILING])
    waiting.daemon = True
    if backend == "cuda":
        waiting.start()
    return waiting


def _transcript_text(path: str, transcript: Transcript, several: bool) -> str:
    return f"{path}: {transcript.text}" if several else transcript.text


def _transcript_json(path: str, transcript: Transcript, several: bool) -> str:
    words = [dataclasses.asdict(word) for word in transcript.words]
    return json.dumps({"file": path, "text": transcript.text, "words": words, "duration": transcript.duration})


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
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the output cannot be written ({error.strerror}); free some of the disk or write elsewhere."
    if isinstance(error, MemoryError) and not text:
        return "not enough memory; try a shorter recording."
    return text or type(error).__name__


def _complain(sentence: str, path: str = "") -> None:
    """One line on standard error, beginning with the file it is about unless the sentence names it itself."""
    named = not path or sentence.startswith(f"{path}:") or f"'{path}'" in sentence
    start = "" if named else f"{path}: "
    print(f"sewd-np: {start}{sentence}", file=sys.stderr)
