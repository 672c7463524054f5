"""What Kokoro is given to say, by whom, and what is made of it. The model itself is a stand-in that hums."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import neural_voices
import numpy as np
import pronounce
import pytest
import training_data as data

RNG = np.random.default_rng


class Humming:
    """An onnxruntime session: a second of tone between two half seconds of silence, whatever is asked for."""

    asked: ClassVar[list[dict[str, np.ndarray]]] = []

    def __init__(self, path: str, options: Any, providers: list[str]) -> None:
        assert Path(path).name == "model.onnx" and options.intra_op_num_threads == 1

    def get_inputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="input_ids")]

    def run(self, outputs: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.asked.append(feeds)
        tone = np.sin(np.arange(24_000) / 9).astype(np.float32) / 2
        return [np.pad(tone, 12_000)[None]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    (tmp_path / "voices").mkdir()
    for n in range(3):
        RNG(n).standard_normal((510, 256), dtype=np.float32).tofile(tmp_path / "voices" / f"v{n}.bin")
    fake = SimpleNamespace(SessionOptions=SimpleNamespace, InferenceSession=Humming)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    monkeypatch.setattr(neural_voices, "pronunciations", lambda: {word: ["tˈɛn"] for word in data.SPOKEN_WORDS})
    Humming.asked.clear()
    return tmp_path


def test_every_word_can_be_written_in_kokoros_signs() -> None:
    if not pronounce.shutil.which("espeak-ng"):
        pytest.skip("espeak-ng is not installed")
    ways = neural_voices.pronunciations()
    assert ways.keys() == data.SPOKEN_WORDS and all(ways.values())
    assert {sign for said in ways.values() for way in said for sign in way} | {",", " "} == neural_voices.SIGNS.keys()
    assert ways["A"] == ["ˈA"] and ways["FOUR"] == ["fˈɔɹ"] and ways["FIRST"] == ["fˈɜɹst"] and "ən" in ways["AND"]
    assert ways["SIXTEENTH"] == ["sˈɪkstinθ", "ˌsɪkstˈinθ"] and ways["SIXTY"] == ["sˈɪksti"] and ways["TEN"] == ["tˈɛn"]


def test_speakers_are_voices_and_mixtures(folder: Path) -> None:
    """Timbre is a mixture of two voices, and so is the manner, but not the same one."""
    kokoro = neural_voices.Kokoro(folder, seed=0, speakers=9)
    voices = np.stack([RNG(n).standard_normal((510, 256), dtype=np.float32) for n in range(3)])
    np.testing.assert_array_equal(kokoro.speakers[:3], voices)
    for speaker in kokoro.speakers[3:]:
        shares = []
        for part in (slice(0, 128), slice(128, 256)):
            columns = voices[:, :, part].reshape(3, -1).T
            share, *_ = np.linalg.lstsq(columns, speaker[:, part].ravel(), rcond=None)
            np.testing.assert_allclose(columns @ share, speaker[:, part].ravel(), atol=1e-4)
            assert share.sum() == pytest.approx(1, abs=1e-4) and np.sort(share)[0] == pytest.approx(0, abs=1e-4)
            shares.append(share)
        assert np.abs(shares[0] - shares[1]).max() > 1e-3
    again = neural_voices.Kokoro(folder, seed=0, speakers=9)
    np.testing.assert_array_equal(again.speakers, kokoro.speakers)


def test_what_is_missing_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=r"voices has 0 models \(.onnx\) and 0 voices"):
        neural_voices.Kokoro(folder / "voices", seed=0, speakers=3)
    monkeypatch.setattr(neural_voices, "pronunciations", dict)
    with pytest.raises(SystemExit, match="is not found; install it"):
        neural_voices.Kokoro(folder, seed=0, speakers=3)


def test_words_are_said_by_the_speaker_asked_for(folder: Path) -> None:
    kokoro = neural_voices.Kokoro(folder, seed=0, speakers=3)
    samples = kokoro.say("A B C", 1, RNG(0))
    assert samples.dtype == np.int16
    assert len(samples) == pytest.approx(16_000 + 3200, abs=20)  # a tenth of a second is left on both sides
    (feeds,) = Humming.asked
    word = [neural_voices.SIGNS[sign] for sign in "tˈɛn"]
    space, comma = neural_voices.SIGNS[" "], neural_voices.SIGNS[","]
    ids = feeds["input_ids"]
    assert ids.shape[0] == 1 and ids[0, 0] == ids[0, -1] == 0
    assert [n for n in ids[0, 1:-1] if n not in (space, comma)] == word * 3 and list(ids[0]).count(space) == 2
    np.testing.assert_array_equal(feeds["style"], kokoro.speakers[1][None, ids.shape[1] - 2])
    assert feeds["speed"].dtype == np.float32 and 0.6 <= feeds["speed"][0] <= 1.25


def test_a_file_of_clips_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By as many workers as there are; the same again from the same seed, by speakers in turn."""
    monkeypatch.setattr(neural_voices, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(neural_voices, "SPEAKERS", 5)
    texts = []
    for out in ("one.npz", "two.npz"):
        command = [
            "neural_voices.py",
            "--kokoro",
            str(folder),
            "--out",
            str(folder / out),
            *"--clips 40 --seed 3".split(),
        ]
        monkeypatch.setattr(sys, "argv", command)
        neural_voices.main()
        clips = data.load_clips(folder / out)
        assert [clip.speaker for clip in clips] == [f"kokoro 3 {n % 5}" for n in range(40)]
        texts.append([clip.text for clip in clips])
    assert texts[0] == texts[1] and len(set(texts[0])) > 35
    spelled = [text for text in texts[0] if set(text.split()) <= set(data.LETTERS) and len(text.split()) > 3]
    assert 8 < len(spelled) < 30
