"""The bundled clips."""

from __future__ import annotations

import pytest

import sewd_np
from sewd_np.audio import load_audio
from sewd_np.clips import CLIPS

NAMES = sorted(path.stem for path in CLIPS.glob("*.flac"))


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_is_short_and_the_bundled_model_hears_its_words(name: str) -> None:
    path = sewd_np.clip(name)
    assert 8_000 <= len(load_audio(path)) <= 160_000  # one word, or a sentence
    assert path.stat().st_size < 40_000
    words = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    assert words and sewd_np.transcribe(path).text == words


def test_the_bundled_classifier_knows_the_keywords_from_a_sentence() -> None:
    for name in NAMES:
        label = sewd_np.classify(sewd_np.clip(name))[0].label
        assert label == (name if name in ("yes", "seven") else "unknown")
    assert {"yes", "seven", sewd_np.clip().stem} <= set(NAMES)


def test_a_clip_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"clip 'nothing' is not bundled; choose one of .*'enter-six-two-four'"):
        sewd_np.clip("nothing")
