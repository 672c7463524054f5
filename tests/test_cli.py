"""The command line and the counting behind ``sewd-np info``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import soundfile
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import sewd_np
from sewd_np import cli, cpu_kernels, info
from sewd_np.config import SEWDConfig
from tests.reference import HF_CLASSES, SMALL
from tests.test_transcribe import SPOKEN, small_model

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("classifier")
    small_model("classification").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def broken_file(tmp_path: Path) -> str:
    path = tmp_path / "broken.wav"
    path.write_bytes(b"RIFF, but nothing that follows from it")
    return str(path)


# ------------------------------------------------------------------------ transcribe


def test_without_a_file_the_bundled_clip(capsys: Captured) -> None:
    assert cli.main(["transcribe"]) == 0
    out, err = capsys.readouterr()
    assert out == SPOKEN + "\n"
    assert "bundled clip" in err


def test_one_file_is_its_text_and_several_have_names(capsys: Captured) -> None:
    clip = str(cli.CLIP)
    assert cli.main(["transcribe", clip]) == 0
    assert capsys.readouterr() == (SPOKEN + "\n", "")
    assert cli.main(["transcribe", clip, clip]) == 0
    assert capsys.readouterr() == (f"{clip}: {SPOKEN}\n" * 2, "")


def test_files_stand_before_between_and_after_options(capsys: Captured, tmp_path: Path) -> None:
    one, other, dashed = str(cli.CLIP), str(tmp_path / "b.wav"), "-dash.wav"
    shutil.copy(cli.CLIP, other)
    assert cli.main(["transcribe", one, "--backend", "numpy", other]) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [one, other]
    assert cli.main(["transcribe", "--backend", "numpy", "--", dashed]) == 2
    assert f"no file '{dashed}'" in capsys.readouterr().err
    assert cli.main(["plot", "transcript", "-o", str(tmp_path / "a.png"), "--backend", "numpy", "--", dashed]) == 2
    assert f"no file '{dashed}'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["transcribe", one, "--backend", "numpy", other, "--no-such-option"])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_backends_say_the_same_and_numba_is_the_default(capsys: Captured) -> None:
    said = {}
    for backend in ([], ["--backend", "numba"], ["--backend", "numpy"]):
        assert cli.main(["transcribe", "--output-format", "json", *backend]) == 0
        said[" ".join(backend)] = json.loads(capsys.readouterr().out)
    default, numba, numpy = said.values()
    assert default == numba
    for a, b in zip(default["words"], numpy["words"], strict=True):
        assert (a["text"], a["start"], a["end"]) == (b["text"], b["start"], b["end"])
        assert a["confidence"] == pytest.approx(b["confidence"], abs=0.01)  # logits up to 20 agree to 2e-4 of that
    for command in ("transcribe", "classify", "plot", "explain"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "(default: numba)" in " ".join(capsys.readouterr().out.split())


def test_precisions_say_the_same(capsys: Captured) -> None:
    for arguments in (["--precision", "high"], ["--precision", "highest"], []):
        assert cli.main(["transcribe", str(cli.CLIP), *arguments]) == 0
        assert capsys.readouterr() == (SPOKEN + "\n", "")
    assert sewd_np.transcribe(str(cli.CLIP), precision="highest").text == SPOKEN
    labels = [sewd_np.classify(str(cli.CLIP), precision=precision) for precision in ("high", "highest")]
    for high, highest in zip(*labels, strict=True):
        assert high.label == highest.label and high.score == pytest.approx(highest.score, abs=0.01)


def test_info_says_how_products_are_computed(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    for has_unit, precision, said in (
        (True, [], "products on the matrix unit (AMX, precision high)"),
        (True, ["--precision", "high"], "products on the matrix unit (AMX, precision high)"),
        (True, ["--precision", "highest"], "products in float32"),
        (False, ["--precision", "high"], "products in float32"),
    ):
        monkeypatch.setattr(cpu_kernels, "available", lambda has_unit=has_unit: has_unit)
        for backend in [["--backend", "numba"]] + [[]] * bool(precision):
            assert cli.main(["info", "an4", *backend, *precision]) == 0
            line = next(line for line in capsys.readouterr().out.splitlines() if "kernels: Numba, on" in line)
            assert line.endswith(said)


def test_json_is_one_object_a_line(capsys: Captured) -> None:
    clip = str(cli.CLIP)
    assert cli.main(["transcribe", clip, clip, "--output-format", "json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    expected = sewd_np.transcribe(clip)
    assert first == second
    assert (first["file"], first["text"], first["duration"]) == (clip, SPOKEN, expected.duration)
    assert [word["text"] for word in first["words"]] == SPOKEN.split()
    assert [word["start"] for word in first["words"]] == [word.start for word in expected.words]
    assert first["words"][0].keys() == {"text", "start", "end", "confidence"}


def test_a_bad_file_costs_only_itself(capsys: Captured, broken_file: str) -> None:
    clip = str(cli.CLIP)
    assert cli.main(["transcribe", "nowhere.wav", clip, broken_file, clip]) == 2
    out, err = capsys.readouterr()
    assert out == f"{clip}: {SPOKEN}\n" * 2
    complaints = err.splitlines()
    assert len(complaints) == 2
    assert all(line.startswith("sewd-np: ") for line in complaints)
    assert "nowhere.wav" in complaints[0] and broken_file in complaints[1]


def test_too_short_a_file_is_named(capsys: Captured, tmp_path: Path) -> None:
    short = str(tmp_path / "short.wav")
    soundfile.write(short, np.zeros(719), 16000)
    assert cli.main(["transcribe", short]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"sewd-np: {short}: ") and "720" in err and err.count("\n") == 1


def test_a_file_whose_name_is_part_of_the_sentence_is_named_too(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    soundfile.write("e", np.zeros(719), 16000, format="WAV")
    assert cli.main(["transcribe", "e"]) == 2
    assert capsys.readouterr().err.startswith("sewd-np: e: ")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["transcribe", "--model", "no-such-model"], "no-such-model"),
        (["transcribe", "--backend", "abacus"], "'abacus'"),
        (["transcribe", "--backend", "numpy", "--precision", "high"], "precision is given for backend 'numpy'"),
        (["info", "an4", "--backend", "numpy", "--precision", "high"], "precision is given for backend 'numpy'"),
        (["classify", "x.wav"], "x.wav"),
        (["classify", "x.wav", "--model", "an4"], "has a CTC head, but classify needs"),
        (["info", "no-such-model"], "no-such-model"),
        (["info", "an4", "--seconds", "0"], "seconds is 0"),
        (["info", "an4", "--seconds", "nan"], "seconds is nan"),
        (["info", "an4", "--seconds", "0.01"], "too short for this model; it needs at least 0.045"),
        (["info", "an4", "--seconds", "1e308"], "seconds is 1e+308; it must be a number above 0, and 1e+09 at most"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys: Captured, arguments: list[str], said: str) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sewd-np: ") and err.count("\n") == 1 and said in err


def test_wrong_arguments_exit_with_2(capsys: Captured) -> None:
    unknown = ["transcribe", "--precision", "low"]
    for arguments in ([], ["sing"], ["transcribe", "--output-format", "xml"], unknown, ["classify"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "transcribe", interrupted)
    assert cli.main(["transcribe", str(cli.CLIP)]) == 130
    assert capsys.readouterr() == ("", "sewd-np: interrupted.\n")


def test_a_lack_of_memory_is_no_traceback(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sewd_np.memory.available_memory", lambda: 1000)
    assert cli.main(["transcribe", str(cli.CLIP)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and str(cli.CLIP) in err and "cut the recording" in err and err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break with another error on Windows")
def test_a_reader_that_goes_away_is_no_traceback() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sewd_np", "info", "an4"], stdout=write_end, stderr=subprocess.PIPE, text=True
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device /dev/full")
def test_a_full_disk_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sewd_np", "transcribe", "--backend", "numpy"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert "the output cannot be written (No space left on device); free some" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_streams_are_no_traceback() -> None:
    def run(arguments: str) -> tuple[int, str, str]:
        command = f"{sys.executable} -m sewd_np {arguments}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    assert run("info an4 --seconds 1 >&-") == (0, "", "")
    assert run("transcribe nowhere.wav --backend numpy 2>&-") == (2, "", "")


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sewd-np {sewd_np.__version__}\n"


# -------------------------------------------------------------------------- classify


def test_classify_prints_labels_best_first(capsys: Captured, classifier_folder: str) -> None:
    clip = str(cli.CLIP)
    expected = sewd_np.classify(clip, model=classifier_folder, top_k=2)
    assert cli.main(["classify", clip, "--model", classifier_folder, "--top-k", "2"]) == 0
    assert capsys.readouterr().out == "".join(f"{label.score:.4f} {label.label}\n" for label in expected)
    arguments = ["classify", clip, "--model", classifier_folder, "--output-format", "json"]
    assert cli.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["file"] == clip
    assert printed["labels"][:2] == [{"label": label.label, "score": label.score} for label in expected]


@pytest.mark.parametrize("command", ["transcribe", "classify", "plot", "explain"])
def test_every_command_loads_what_it_is_asked_for(
    command: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(
        source: Any, backend: Any = None, dtype: Any = None, threads: Any = None, precision: Any = None
    ) -> NoReturn:
        asked.append((source, backend, threads, precision))
        raise ValueError("nothing is loaded here.")

    monkeypatch.setattr(sewd_np, "load", load)
    monkeypatch.setattr(sys.modules["sewd_np.transcribe"], "load", load)
    there = {"plot": ["features", "-o", str(tmp_path / "a.png")], "explain": ["-o", str(tmp_path / "page")]}
    arguments = [command, *there.get(command, []), str(cli.CLIP)]
    assert cli.main(arguments) == 2
    assert cli.main([*arguments, "--model", "m", "--backend", "numpy", "--threads", "3", "--precision", "highest"]) == 2
    bundled = "keywords" if command == "classify" else "an4"
    assert asked == [(bundled, "numba", None, None), ("m", "numpy", 3, "highest")]
    assert capsys.readouterr().err == "sewd-np: nothing is loaded here.\n" * 2


@pytest.mark.parametrize("option", ["--top-k", "--batch-size", "--threads"])
@pytest.mark.parametrize("value", ["0", "-1", "2.5", "many"])
def test_counts_are_checked_once_and_before_the_files(capsys: Captured, option: str, value: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["classify", "a.wav", "b.wav", option, value])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count(f"argument {option}: '{value}' is given; it must be a whole number of at least 1") == 1
    assert "a.wav" not in err


# ------------------------------------------------------------------------------ info


def test_info_prints_everything(capsys: Captured) -> None:
    assert cli.main(["info", "an4", "--seconds", "2"]) == 0
    page = capsys.readouterr().out
    for said in (
        "50/s, 25/s",
        "400 samples (25 ms)",
        "720 samples (45 ms)",
        "3,431,039",
        "for 2 s",
        "hidden_size: 192",
    ):
        assert said in page
    assert "# Model card: an4" in page


def test_info_follows_the_preprocessor(capsys: Captured, classifier_folder: str, tmp_path: Path) -> None:
    folder = shutil.copytree(classifier_folder, tmp_path / "model")
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "sampling_rate": 8_000}))
    assert cli.main(["info", str(folder), "--seconds", "2"]) == 0
    page = capsys.readouterr().out
    for said in ("8000 Hz", "25/s, 12.5/s", "400 samples (50 ms)", "720 samples (90 ms)", "for 2 s: 16,000 samples"):
        assert said in page
    path.write_text(json.dumps({**settings, "do_normalize": "yes"}))
    assert cli.main(["info", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "do_normalize in preprocessor_config.json is 'yes'" in err


def test_info_of_a_folder_has_no_card(capsys: Captured, classifier_folder: str) -> None:
    assert cli.main(["info", classifier_folder]) == 0
    page = capsys.readouterr().out
    assert "sequence classification" in page and "Model card" not in page


TINY = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_conv_pos_embeddings": 31}
MID = {"hidden_size": 512, "num_hidden_layers": 24, "num_attention_heads": 8, "intermediate_size": 2048}
BASE_PLUS = {
    "num_hidden_layers": 24,
    "num_conv_pos_embeddings": 31,
    "conv_dim": (96, *[192] * 4, *[384] * 4, *[768] * 4),
}
KEYWORDS = {i: str(i) for i in range(12)}


@pytest.mark.parametrize(
    "options, head, total",
    [  # totals of the published checkpoints, as the hub gives them
        (TINY, "model", 24_115_103),
        (TINY, "ctc", 24_127_423),
        ({**MID, "num_conv_pos_embeddings": 31}, "ctc", 78_816_063),
        ({**MID, "num_conv_pos_embeddings": 127}, "ctc", 80_389_023),
        ({**MID, "num_conv_pos_embeddings": 31, "id2label": KEYWORDS}, "classification", 78_934_059),
        (BASE_PLUS, "ctc", 177_003_711),
    ],
)
def test_parameters_add_up_to_the_published_totals(options: dict, head: str, total: int) -> None:
    assert sum(info.count_parameters(SEWDConfig(**options), head).values()) == total


@pytest.mark.parametrize("samples", [1040, 16161, 40000])
@pytest.mark.parametrize("head", ["model", "ctc", "classification"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_conv_pos_embeddings": 32, "squeeze_factor": 3},
        {"relative_attention": False, "share_att_key": False},
        {"conv_kernel_size": 3, "conv_groups": 2, "hidden_dropout_prob": 0.0},
        {"hidden_size": 24, "num_conv_pos_embedding_groups": 4, "use_weighted_layer_sum": True},
    ],
)
def test_multiply_adds_are_what_pytorch_counts(samples: int, head: str, change: dict) -> None:
    """Exactly half of the FLOP of transformers' model, which projects the position table in every pass."""
    options = {**SMALL, **change}
    model = HF_CLASSES[head](transformers.SEWDConfig(**options)).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, samples))
    config = SEWDConfig.from_dict(options)
    ours = sum(info.count_multiply_adds(config, head, samples).values()) + info.position_table_multiply_adds(config)
    assert 2 * ours == counter.get_total_flops()


def test_multiply_adds_of_the_tiny_model() -> None:
    """24.8 GFLOP for 10 s in transformers, of which 3.6 project the position table."""
    config = SEWDConfig(**TINY)
    work = sum(info.count_multiply_adds(config, "ctc", 160_000).values())
    table = info.position_table_multiply_adds(config)
    assert round(2 * (work + table) / 1e9, 1) == 24.8
    assert round(2 * table / 1e9, 1) == 3.6


def test_counting_refuses_what_cannot_be() -> None:
    config = SEWDConfig(**TINY)
    with pytest.raises(ValueError, match="head is 'x'; it must be one of model, ctc, classification"):
        info.count_multiply_adds(config, "x", 16_000)
    with pytest.raises(ValueError, match="head is 'x'"):
        info.describe(config, "x", 1)
    with pytest.raises(ValueError, match="sampling_rate is 0; it must be a number above 0"):
        info.describe(config, "ctc", 1, 0)


def test_a_slow_first_run_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def slowly(path: str, **options: object) -> sewd_np.Transcript:
        time.sleep(0.3)
        return sewd_np.Transcript("GO", (), 1.0)

    monkeypatch.setattr(cli, "transcribe", slowly)
    monkeypatch.setattr(cli, "load_for", lambda *_: small_model("ctc"))
    monkeypatch.setattr(cli, "PATIENCE", 0.05)
    assert cli.main(["transcribe", str(cli.CLIP), "--backend", "cuda"]) == 0
    said = capsys.readouterr()
    assert said.out == "GO\n"
    assert said.err.count("backend cuda compiles its kernels") == 1
    for backend in ("numpy", "numba"):  # the latter says what it does itself
        assert cli.main(["transcribe", str(cli.CLIP), "--backend", backend]) == 0
        assert capsys.readouterr().err == ""
