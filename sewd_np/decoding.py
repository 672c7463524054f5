"""From logits to words with times: the greedy CTC path.

The model gives one distribution over the vocabulary per frame, 50 frames a second. The greedy path takes the likeliest
token of each frame; runs of the same token are one token, and the blank (the pad token) separates:

    frame    0    1    2    3    4    5    6    7    8    9
    path     _    H    H    _    I    |    |    O    _    _        →  "HI O"
    word          [---- HI -----]               [O]

A word begins with the first frame of its first character and ends after the last frame of its last. CTC trains no
alignment: characters fire late and briefly, so times are good to a few frames, and the end of a word is early.

Source: Graves et al. 2006 (CTC); the grouping is that of ``tokenizer.py``, so words here are those of
``CTCTokenizer.decode(ids, output_word_offsets=True)``. As there, and as in transformers' pipeline for CTC models,
special tokens are not hidden: an ``<unk>`` in a transcript says that the model heard something outside its alphabet.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from sewd_np.losses import log_softmax
from sewd_np.tokenizer import CTCTokenizer, Span, runs

SECONDS_PER_FRAME = 0.02  # 320 samples at 16 kHz


@dataclasses.dataclass(frozen=True)
class Word:
    """A word, or a single character, of a transcript.

    text: as it stands in the transcript. start, end: seconds from the beginning of the recording, start < end unless
    cut off by the recording's end. confidence: 0 to 1, the mean over the word's frames, blanks left out, of the
    probability of the token emitted there. It is the model's own opinion: it ranks words, but is too sure of itself.
    """

    text: str
    start: float
    end: float
    confidence: float


def greedy(logits_sv: np.ndarray) -> np.ndarray:
    """Likeliest token per frame: (s, v) → (s,) int64; (b, s, v) → (b, s). The lowest id wins a tie."""
    return np.argmax(logits_sv, axis=-1)


def ctc_collapse(ids: np.ndarray, blank: int) -> np.ndarray:
    """CTC's many-to-one map: ids of a path (s,) with runs merged, then blanks removed; (u,) with u ≤ s, int64."""
    path = [int(value) for value in ids]
    return np.array([run.value for run in runs(path) if run.value != blank], dtype=np.int64)


def words(
    logits_sv: np.ndarray,
    tokenizer: CTCTokenizer,
    seconds_per_frame: float = SECONDS_PER_FRAME,
    duration: float | None = None,
) -> list[Word]:
    """Words of the greedy path, in order, with times and confidence.

    logits_sv: (s, v), one recording. seconds_per_frame: ``config.inputs_to_logits_ratio`` over the sampling rate.
    duration: seconds of the recording; no time lies beyond it.

    Raises ``ValueError`` where the logits are not two-dimensional.
    """
    characters_, timing = _path(logits_sv, tokenizer, seconds_per_frame, duration)
    return [timing.word(tokenizer.cased(span.text), span.parts) for span in tokenizer.word_spans(characters_)]


def characters(
    logits_sv: np.ndarray,
    tokenizer: CTCTokenizer,
    seconds_per_frame: float = SECONDS_PER_FRAME,
    duration: float | None = None,
) -> list[Word]:
    """Characters of the greedy path, spaces between words included; arguments and errors as for ``words``."""
    characters_, timing = _path(logits_sv, tokenizer, seconds_per_frame, duration)
    return [timing.word(tokenizer.cased(span.text), (span,)) for span in characters_]


@dataclasses.dataclass(frozen=True)
class _Timing:
    """What turns frames into seconds and confidence."""

    probability_s: np.ndarray  # of the token emitted in each frame
    seconds_per_frame: float
    duration: float

    def seconds(self, frame: int) -> float:
        # 35 · 0.02 is 0.7000000000000001; rounded to the nanosecond it is the float nearest to 0.7.
        return min(round(frame * self.seconds_per_frame, 9), self.duration)

    def word(self, text: str, parts: tuple[Span, ...]) -> Word:
        probabilities = np.concatenate([self.probability_s[part.start : part.end] for part in parts])
        # A mean of numbers ≤ 1 may exceed 1 by a rounding error.
        confidence = min(float(probabilities.mean()), 1.0)
        return Word(text, self.seconds(parts[0].start), self.seconds(parts[-1].end), confidence)


def _path(
    logits_sv: np.ndarray, tokenizer: CTCTokenizer, seconds_per_frame: float, duration: float | None
) -> tuple[list[Span], _Timing]:
    """Character spans of the greedy path, and what times them."""
    logits_sv = np.asarray(logits_sv)
    if logits_sv.ndim != 2:
        raise ValueError(f"The logits have shape {logits_sv.shape}, expected (frames, vocabulary): one recording.")
    ids_s = greedy(logits_sv)
    probability_s = np.exp(np.take_along_axis(log_softmax(logits_sv), ids_s[:, None], axis=-1))[:, 0]
    timing = _Timing(probability_s, seconds_per_frame, math.inf if duration is None else duration)
    return tokenizer.character_spans(tokenizer.tokens(ids_s)), timing
