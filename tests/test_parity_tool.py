"""``make parity``: the tool itself on small models, and, on request, on every published checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sewd_np.trace import points
from tests import parity
from tests.test_transcribe import small_model

PUBLISHED = [
    "asapp/sew-d-tiny-100k",
    "asapp/sew-d-tiny-100k-ft-ls100h",
    "asapp/sew-d-small-100k",
    "asapp/sew-d-mid-100k",
    "asapp/sew-d-mid-400k-ft-ls100h",
    "asapp/sew-d-mid-k127-400k-ft-ls100h",
    "asapp/sew-d-base-100k",
    "asapp/sew-d-base-plus-100k",
    "asapp/sew-d-base-plus-400k-ft-ls100h",
    "anton-l/sew-d-mid-400k-ft-keyword-spotting",
]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def recording(tmp_path: Path) -> str:
    path = tmp_path / "noise.wav"
    soundfile.write(path, np.random.default_rng(0).standard_normal(9_000) / 10, 16_000)
    return str(path)


@pytest.mark.parametrize("head", ["model", "ctc", "classification"])
def test_every_point_agrees(head: str, recording: str, tmp_path: Path, capsys: Captured) -> None:
    model = small_model(head)
    model.save_pretrained(tmp_path / "model")
    count = len(points(model.config, head))
    arguments = [str(tmp_path / "model"), "--audio", recording]
    for more, tolerance, said in (
        (["--double"], "1e-07", "backend numpy; b: transformers"),
        ([], "0.0001", "backend numpy; b: transformers"),
        (["--backend", "numba", "--precision", "highest"], "0.0001", "backend numba; b: transformers"),
    ):
        assert parity.main([*arguments, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert said in lines[0] and lines[-1] == f"{count} of {count} points agree within {tolerance}"


def test_what_differs_is_named_and_fails(
    recording: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_model("ctc").save_pretrained(tmp_path / "model")
    honest = parity.points_of

    def off(*arguments: Any) -> Any:
        theirs, out = honest(*arguments)
        theirs["encoder.pool"] = theirs["encoder.pool"] + np.float32(1e-3)
        return theirs, out

    monkeypatch.setattr(parity, "points_of", off)
    assert parity.main([str(tmp_path / "model"), "--audio", recording]) == 1
    assert "the first that does not: encoder.pool (DIFF)" in capsys.readouterr().out


def test_what_cannot_be_used_is_one_sentence(recording: str, capsys: Captured) -> None:
    for arguments, said in (
        (["an4", "--audio", "nowhere.wav"], "nowhere.wav"),
        (["nobody", "--audio", recording], "nobody"),
        (["an4", "--double", "--backend", "numba"], "computes in float32"),
    ):
        with pytest.raises(SystemExit) as stop:
            parity.main(arguments)
        assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parity_full
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints(name: str) -> None:
    """Downloads up to 710 MB each."""
    assert parity.main([name, "--double"]) == 0
