"""What a user gets: a transcript with its words and its evidence, labels with their scores; read from a model's logits.

Logits that are no numbers, and a tokenizer that means another blank than the model, are refused here: either would be
read as a text that nobody said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sewd_np.decoding import Word
    from sewd_np.model import SEWDModel


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a transcript was read from: what ``plot.transcript`` draws.

    wave_n: the sound as the model's processor got it, one channel of ``sampling_rate`` samples a second. log_probs_sv:
    log-probability of every token in every frame, float32. tokens: the v tokens by id; ``blank`` is the id of CTC's
    blank among them. seconds_per_frame: 0.02 for every published model.
    """

    wave_n: np.ndarray
    sampling_rate: int
    log_probs_sv: np.ndarray
    tokens: tuple[str, ...]
    blank: int
    seconds_per_frame: float


@dataclass(frozen=True)
class Transcript:
    """What was said in one recording.

    text: as transformers' processor decodes it, so with two spaces where the model emits two word delimiters. words:
    the same words in order, with times in seconds. duration: seconds. evidence: only where it was asked for; two
    transcripts are equal whatever evidence they keep.
    """

    text: str
    words: tuple[Word, ...]
    duration: float
    evidence: Evidence | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Label:
    """A label and its score: its softmax probability, 0 to 1. The scores of all labels sum to 1."""

    label: str
    score: float


def check_blank(name: str, model: SEWDModel) -> None:
    """Raise ``ValueError`` unless a CTC model and its tokenizer mean the same token by the blank."""
    assert model.processor is not None and model.processor.tokenizer is not None
    blank, tokenizer = model.config.pad_token_id, model.processor.tokenizer
    if tokenizer.pad_token_id != blank:
        raise ValueError(
            f"{name} has the blank {blank} (pad_token_id in config.json), but its tokenizer's pad_token has the id "
            f"{tokenizer.pad_token_id}; they must be one token, so mend config.json or tokenizer_config.json."
        )


def _check_logits(logits: np.ndarray) -> None:
    """Raise ``ValueError`` for NaN and +∞; −∞ is a token that an edit forbids, unless it forbids them all."""
    if not np.isfinite(logits.max(axis=-1)).all():
        raise ValueError(
            "the model's logits are NaN or infinite, so nothing can be read from them; its weights overflow "
            "float32, or an edit makes such numbers."
        )


def read_transcript(model: SEWDModel, wave_n: np.ndarray, logits_sv: np.ndarray, evidence: bool = False) -> Transcript:
    """The transcript of logits (s, v) that a CTC model gave for ``wave_n``, with its evidence where asked for.

    Raises ``ValueError`` for logits that no text can be read from, for NaN would be read as one token or the other.
    """
    from sewd_np.decoding import greedy, words
    from sewd_np.losses import log_softmax

    _check_logits(logits_sv)
    processor = model.processor
    assert processor is not None and processor.tokenizer is not None
    tokenizer, rate = processor.tokenizer, processor.feature_extractor.sampling_rate
    duration, seconds_per_frame = len(wave_n) / rate, model.config.inputs_to_logits_ratio / rate
    kept = None
    if evidence:
        kept = Evidence(
            wave_n=wave_n.copy(),
            sampling_rate=rate,
            log_probs_sv=log_softmax(logits_sv).astype(np.float32),
            tokens=tuple(tokenizer.tokens(np.arange(logits_sv.shape[-1]))),
            blank=model.config.pad_token_id,
            seconds_per_frame=seconds_per_frame,
        )
    return Transcript(
        text=tokenizer.decode(greedy(logits_sv)),
        words=tuple(words(logits_sv, tokenizer, seconds_per_frame, duration)),
        duration=duration,
        evidence=kept,
    )


def read_labels(model: SEWDModel, logits_l: np.ndarray) -> list[Label]:
    """All labels of a classifier's logits (labels,), best first; of equal scores the lower id first.

    Raises ``ValueError`` for logits that have no order.
    """
    from sewd_np.losses import log_softmax

    _check_logits(logits_l)
    scores_l = np.exp(log_softmax(logits_l))
    order = np.argsort(-scores_l, kind="stable")
    return [Label(model.config.id2label[int(i)], float(scores_l[i])) for i in order]
