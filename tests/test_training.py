"""The training scripts' own pieces: alignment, cutting, augmentation, and a shortcut that must not change a result."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SEWDForCTC

from tests.reference import SMALL, build

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import train_bundled as script
import training_data as data

RNG = np.random.default_rng


def spiky(labels: list[int | None], vocabulary: int = 32) -> np.ndarray:
    """Log-probabilities that favour one label a frame, None the blank."""
    scores = np.full((len(labels), vocabulary), -8.0)
    for frame, label in enumerate(labels):
        scores[frame, 0 if label is None else label] = -0.01
    return scores


def test_text_survives_encoding() -> None:
    text = "ENTER SIX TWO"
    ids = script.encode(text)
    frames = [i for label in ids for i in (label, label, 0)]
    assert script.decode(np.array(frames)) == text
    assert script.decode(np.zeros(9, int)) == ""


def test_alignment_finds_the_frames_that_fire() -> None:
    t, w, o, bar, s, i, x = script.encode("TWO SIX")
    path = [None, t, w, o, o, None, bar, None, s, i, i, x, None, None]
    assert script.align(spiky(path), "TWO SIX") == [
        pytest.approx((1 * 0.02, 5 * 0.02)),
        pytest.approx((8 * 0.02, 12 * 0.02)),
    ]


def test_alignment_keeps_a_doubled_letter_apart() -> None:
    """Two of the same letter need a blank between them, however the scores are."""
    labels = script.encode("LL")
    (span,) = script.align(spiky([labels[0]] * 3), "LL")
    assert span == pytest.approx((0, 0.06))


def test_words_are_cut_where_it_is_quiet() -> None:
    wave = RNG(0).standard_normal(16_000).astype(np.float32)
    wave[7000:8500] = 0
    pieces = data.cut_words(wave, "TWO SIX", [(0.1, 0.3), (0.7, 0.9)])
    assert [word for word, _ in pieces] == ["TWO", "SIX"]
    assert 7000 <= len(pieces[0][1]) <= 8500
    np.testing.assert_array_equal(np.concatenate([wave for _, wave in pieces]), wave)


def test_recombined_words_say_what_the_text_says() -> None:
    words = [(name, np.full(1000 + 500 * i, 0.1 * (i + 1), np.float32)) for i, name in enumerate(["A", "B", "C"])]
    for seed in range(20):
        clip = data.recombine(words, RNG(seed))
        said = clip.text.split()
        assert 1 <= len(said) <= 8
        assert len(clip.samples) == sum(len(dict(words)[word]) for word in said)
    assert len({data.recombine(words, RNG(seed)).text for seed in range(20)}) > 10


def test_noise_has_the_ratio_asked_for() -> None:
    wave = np.sin(np.arange(16_000) / 7).astype(np.float32)
    noise = data.coloured_noise(5000, 1.0, RNG(0))
    added = data.add_noise(wave, noise, 15.0) - wave
    assert 10 * np.log10(np.mean(wave**2) / np.mean(added**2)) == pytest.approx(15, abs=0.01)


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_augmented_sound_is_sound(strength: float) -> None:
    wave = RNG(1).standard_normal(8000).astype(np.float32) * 0.1
    changed = 0
    for seed in range(40):
        heard = data.augment(wave, lambda: wave, RNG(seed), strength)
        assert heard.dtype == np.float32 and np.isfinite(heard).all()
        assert 8000 / (1 + 0.21 * strength) <= len(heard) <= 8000 / (1 - 0.17 * strength) + 2 * data.RATE / 3
        changed += len(heard) != len(wave) or not np.allclose(heard, wave)
    assert changed > 20


def test_random_text_stays_in_the_vocabulary() -> None:
    texts = [data.random_text(RNG(seed)) for seed in range(300)]
    assert all(script.TOKEN["<unk>"] not in script.encode(text) for text in texts)
    assert len(set(texts)) > 250


def test_mel_frames_are_the_models_frames() -> None:
    for samples in (720, 8000, 16_001):
        mel = script.log_mel(RNG(0).standard_normal(samples).astype(np.float32))
        assert mel.shape == ((samples - 400) // 320 + 1, 64) and np.isfinite(mel).all()


@pytest.mark.parametrize("frames", [3, 8, 9, 20])
def test_narrow_positions_do_not_change_the_result(frames: int) -> None:
    """With few frames only the middle rows of the table are used; beyond half the span all of them are."""
    hf = build({**SMALL, "position_buckets": 16, "max_position_embeddings": 32}, "ctc", torch.float32)
    assert isinstance(hf, SEWDForCTC)
    hf.eval()
    x = torch.randn(2, 640 * frames + 400, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hf(x).logits
        script.narrow_positions(hf, frames + 1)
        torch.testing.assert_close(hf(x).logits, expected, rtol=1e-5, atol=1e-5)
        script.narrow_positions(hf, 16)
        torch.testing.assert_close(hf(x).logits, expected, rtol=0, atol=0)


def test_learning_rate_rises_and_falls() -> None:
    rates = [script.rate_at(progress) for progress in np.linspace(0, 1, 101)]
    top = int(np.argmax(rates))
    assert 0 < top < 10 and rates[top] <= script.PEAK_RATE
    assert all(np.diff(rates[: top + 1]) > 0) and all(np.diff(rates[top:]) < 0)
    assert rates[-1] < 0.02 * script.PEAK_RATE
