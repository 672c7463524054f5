"""Greedy CTC decoding: words, times and confidence against a frame-by-frame oracle, transformers and the tokenizer."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Wav2Vec2CTCTokenizer

from sewd_np.decoding import Word, characters, ctc_collapse, greedy, words
from sewd_np.losses import log_softmax
from sewd_np.tokenizer import CTCTokenizer

TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
VOCAB = {token: i for i, token in enumerate(TOKENS)}
TOKENIZER = CTCTokenizer(VOCAB, {})
# Few tokens, so that runs, double letters and repeated delimiters are common.
paths = st.lists(st.sampled_from([0, 0, 4, 4, 5, 6, 3]), max_size=40)


def logits_of(ids: list[int], seed: int = 0) -> np.ndarray:
    """Random logits (s, v), float32, whose greedy path is ``ids``."""
    logits_sv = np.random.default_rng(seed).standard_normal((len(ids), len(TOKENS))).astype(np.float32)
    logits_sv[np.arange(len(ids)), ids] = logits_sv.max(axis=1, initial=0) + np.float32(0.5)
    return logits_sv


@functools.cache
def reference(folder: Path) -> Any:
    (folder / "vocab.json").write_text(json.dumps(VOCAB), encoding="utf-8")
    return Wav2Vec2CTCTokenizer(folder / "vocab.json")


def frame_by_frame(logits_sv: np.ndarray) -> list[tuple[str, int, int, float]]:
    """The definition in words: (text, first frame, frame after the last, mean probability) of each word."""
    found: list[tuple[str, int, int, float]] = []
    text, start, end, probabilities, previous = "", 0, 0, [], None
    for frame, row in enumerate([*logits_sv.astype(float), None]):
        token = TOKENS[int(np.argmax(row))] if row is not None else "|"
        if token == "|":
            if text:
                found.append((text, start, end, sum(probabilities) / len(probabilities)))
            text, probabilities = "", []
        elif token != "<pad>":
            assert row is not None
            if not text:
                start = frame
            if token != previous:
                text += token
            end = frame + 1
            probabilities.append(float(np.exp(row.max()) / np.exp(row).sum()))
        previous = token
    return found


@given(ids=paths, seed=st.integers(0, 99))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_words_equal_the_oracle(ids: list[int], seed: int) -> None:
    logits_sv = logits_of(ids, seed)
    expected = frame_by_frame(logits_sv)
    found = words(logits_sv, TOKENIZER, 0.02)
    assert [word.text for word in found] == [text for text, *_ in expected]
    for word, (_, start, end, confidence) in zip(found, expected, strict=True):
        assert (word.start, word.end) == (start / 50, end / 50)
        # Probabilities are taken in float64, of which 1e-12 leaves room for another order of summation.
        assert abs(word.confidence - confidence) < 1e-12


@given(ids=paths)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_words_agree_with_the_tokenizer_and_transformers(
    ids: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    logits_sv = logits_of(ids)
    assert greedy(logits_sv).tolist() == ids
    found = words(logits_sv, TOKENIZER, 1.0)
    as_offsets = [{"word": w.text, "start_offset": int(w.start), "end_offset": int(w.end)} for w in found]
    assert as_offsets == TOKENIZER.decode(ids, output_word_offsets=True).word_offsets
    assert as_offsets == reference(tmp_path_factory.getbasetemp()).decode(ids, output_word_offsets=True).word_offsets
    # The text may hold two spaces where two delimiters stand with a blank between them.
    assert " ".join(word.text for word in found) == " ".join(TOKENIZER.decode(ids).split())


@given(ids=paths)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_characters_agree_with_words(ids: list[int]) -> None:
    logits_sv = logits_of(ids)
    found = characters(logits_sv, TOKENIZER)
    assert "".join(c.text for c in found).strip() == TOKENIZER.decode(ids)
    letters = [c for c in found if c.text != " "]
    for word in words(logits_sv, TOKENIZER):
        inside = [c for c in letters if word.start <= c.start and c.end <= word.end]
        assert "".join(c.text for c in inside) == word.text
        assert (inside[0].start, inside[-1].end) == (word.start, word.end)


@given(ids=paths, duration=st.floats(0, 1))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_times_are_in_order_and_within_the_recording(ids: list[int], duration: float) -> None:
    found = words(logits_of(ids), TOKENIZER, duration=duration)
    times = [time for word in found for time in (word.start, word.end)]
    assert times == sorted(times)
    assert all(0 <= time <= duration for time in times)
    assert all(0 < word.confidence <= 1 for word in found)


@given(ids=paths)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_collapse_gives_the_tokens_of_the_text(ids: list[int]) -> None:
    collapsed = ctc_collapse(np.array(ids, dtype=np.int64), blank=0)
    assert collapsed.dtype == np.int64
    assert TOKENIZER.decode(collapsed, group_tokens=False) == TOKENIZER.decode(ids)


def test_collapse_by_hand() -> None:
    assert ctc_collapse(np.array([0, 5, 5, 0, 5, 6, 6, 0]), blank=0).tolist() == [5, 5, 6]
    assert ctc_collapse(np.array([5, 0, 5]), blank=5).tolist() == [0]
    assert ctc_collapse(np.array([], dtype=np.int64), blank=0).tolist() == []


def test_greedy_over_a_batch_and_ties() -> None:
    logits_bsv = np.zeros((2, 3, 4), np.float32)
    logits_bsv[1, 2, 3] = 1
    assert greedy(logits_bsv).tolist() == [[0, 0, 0], [0, 0, 3]]


def test_log_softmax() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 7, 32)) * 20
    expected = torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()
    # Both in float64; logarithms of about −100 with an ulp of 1e-14.
    assert np.abs(log_softmax(logits) - expected).max() < 1e-12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(
            log_softmax(np.float32([[3e38, -3e38]])), [[0.0, -np.float64(np.float32(3e38)) * 2]]
        )


def test_word_by_hand() -> None:
    logits_sv = np.full((10, 32), -np.inf)
    for frame, (token, probability) in enumerate(
        [("<pad>", 1.0), ("H", 0.9), ("H", 0.5), ("<pad>", 0.6), ("I", 0.8), ("|", 0.7), ("|", 0.7), ("O", 1.0)]
    ):
        logits_sv[frame, VOCAB[token]] = np.log(probability)
        if probability < 1:
            logits_sv[frame, VOCAB["Z"]] = np.log1p(-probability)
    logits_sv[8:, 0] = 0.0
    hi, o = words(logits_sv, TOKENIZER)
    assert (hi.text, hi.start, hi.end) == ("HI", 0.02, 0.1)
    assert hi.confidence == pytest.approx((0.9 + 0.5 + 0.8) / 3, abs=1e-12)
    assert o == Word("O", 0.14, 0.16, 1.0)


def test_special_tokens_stay_visible() -> None:
    ids = [5, 4, 3, 0, 6]
    assert [word.text for word in words(logits_of(ids), TOKENIZER)] == ["E", "<unk>T"]
    assert TOKENIZER.decode(ids) == "E <unk>T"


def test_lower_case_tokenizer() -> None:
    tokenizer = CTCTokenizer(VOCAB, {"do_lower_case": True})
    logits_sv = logits_of([11, 10, 4, 5])
    assert [word.text for word in words(logits_sv, tokenizer)] == ["hi", "e"]
    assert "".join(c.text for c in characters(logits_sv, tokenizer)) == "hi e" == tokenizer.decode(greedy(logits_sv))


def test_times_are_the_floats_nearest_to_the_grid() -> None:
    found = words(logits_of([5, 4] * 1000), TOKENIZER, 0.02)
    # Not 35 · 0.02 = 0.7000000000000001, but 0.7.
    assert [word.start for word in found] == [frame / 50 for frame in range(0, 2000, 2)]
    assert [word.end for word in found] == [frame / 50 for frame in range(1, 2000, 2)]


def test_nothing_heard() -> None:
    assert words(logits_of([0, 0, 4, 0]), TOKENIZER) == []
    assert words(np.zeros((0, 32), np.float32), TOKENIZER) == []


def test_one_recording_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 5, 32\), expected \(frames, vocabulary\)"):
        words(np.zeros((1, 5, 32)), TOKENIZER)
