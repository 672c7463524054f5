"""The bundled clips."""

from __future__ import annotations

import pytest

import sewd_np
from sewd_np.audio import load_audio
from sewd_np.clips import CLIPS


def test_every_clip_can_be_read_and_says_its_words() -> None:
    names = [path.stem for path in CLIPS.glob("*.flac")]
    assert sewd_np.clip().stem in names
    for name in names:
        path = sewd_np.clip(name)
        assert 8_000 <= len(load_audio(path)) <= 160_000  # one word, or a sentence
        assert path.stat().st_size < 40_000
        assert path.with_suffix(".txt").read_text(encoding="utf-8").strip().isupper()


def test_a_clip_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"clip 'nothing' is not bundled; choose one of .*'enter-six-two-four'"):
        sewd_np.clip("nothing")
