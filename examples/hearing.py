"""What a model hears: letters from its scores, how wrong they are, in words and by CTC, and where each word is.

Used by both training scripts. Greedy CTC throughout: no language model, no beam.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from training_data import FRAME, Array, Clip, normalize
from word_pieces import align, cut_words, pairs, runs

VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
TOKEN = {token: index for index, token in enumerate(VOCABULARY)}


def encode(text: str) -> list[int]:
    return [TOKEN.get(letter, TOKEN["<unk>"]) for letter in text.replace(" ", "|")]


def decode(ids: Array) -> str:
    """Greedy CTC: repeats collapse, blanks and special tokens go, delimiters become spaces."""
    kept = [int(i) for n, i in enumerate(ids) if i >= 4 and (n == 0 or i != ids[n - 1])]
    return " ".join("".join(VOCABULARY[i] for i in kept).replace("|", " ").split())


def log_probs(model: Any, wave: Array) -> Array:
    """(s, v) for one recording, alone: padding would change the group norm's statistics."""
    with torch.inference_mode():
        device = next(model.parameters()).device
        logits = model(torch.from_numpy(normalize(wave))[None].to(device)).logits[0]
        return np.asarray(torch.log_softmax(logits.float(), -1).cpu().numpy())


def word_error_rate(model: Any, clips: list[Clip], change: Any = None) -> float:
    """Word error rate, greedy. ``change`` does something to each wave before."""
    model.eval()
    waves = [clip.wave() if change is None else change(clip.wave()) for clip in clips]
    heard = [decode(log_probs(model, wave).argmax(-1)) for wave in waves]
    return float(jiwer.wer([clip.text for clip in clips], heard))


def ctc_each(scores: Any, frames: Any, labels: list[list[int]]) -> Any:
    """CTC loss (b,) of each clip of a batch, from its log-probabilities (b, s, v)."""
    sizes = torch.tensor([len(ids) for ids in labels])
    flat = torch.tensor([i for ids in labels for i in ids], dtype=torch.long)
    frames = frames.clamp(max=scores.shape[1])
    return F.ctc_loss(scores.transpose(0, 1), flat, frames, sizes, reduction="none", zero_infinity=True)


def ctc(logits: Any, frames: Any, labels: list[list[int]]) -> Any:
    """Mean CTC loss per letter, or per phoneme, of a batch."""
    losses = ctc_each(torch.log_softmax(logits.float(), -1), frames, labels)
    return losses.sum() / max(sum(map(len, labels)), 1)


def expected_word_errors(logits: Any, frames: Any, texts: list[str], draws: int = 8) -> Any:
    """Word error rate that the model may expect of itself, which it learns to lower (Graves & Jaitly, ICML 2014).

    CTC asks for the letters and treats every frame alone, so parts of two spellings may meet: EIGH and GHT in EIGHGHT.
    Counted in words, that is as wrong as anything. Of each clip ``draws`` paths are drawn from the distributions of its
    frames; what they say, each once, is weighed by its CTC probability among these (arXiv 1712.01818, equation 4).
    """
    scores = torch.log_softmax(logits.float(), -1)
    with torch.no_grad():
        drawn = torch.multinomial(scores.flatten(0, 1).exp(), draws, replacement=True)
    paths = drawn.view(*scores.shape[:2], draws).cpu().numpy()
    said = [
        sorted({decode(paths[clip, :count, draw]) for draw in range(draws)})
        for clip, count in enumerate(frames.tolist())
    ]
    clips = [clip for clip, hypotheses in enumerate(said) for _ in hypotheses]
    losses = ctc_each(scores[clips], frames[clips], [encode(text) for hypotheses in said for text in hypotheses])
    expected: Any = 0.0
    words = 0
    for text, hypotheses, loss in zip(texts, said, torch.split(losses, [*map(len, said)]), strict=True):
        count = max(len(text.split()), 1)
        # Where nothing is said jiwer (from version 4 on) counts words instead of dividing by none.
        wrong = torch.tensor([jiwer.wer(text, hypothesis) * count for hypothesis in hypotheses])
        expected = expected + (torch.softmax(-loss, 0) * wrong.to(loss)).sum()
        words += count
    return expected / words


def loss_per_letter(model: Any, clips: list[Clip], change: Any = None) -> float:
    """CTC loss, by the letters and spaces of all texts. ``change`` does something to each wave before."""
    model.eval()
    total, letters = 0.0, 0
    for clip in clips:
        scores = torch.from_numpy(log_probs(model, clip.wave() if change is None else change(clip.wave())))
        labels = encode(clip.text)
        total += float(ctc_each(scores[None], torch.tensor([len(scores)]), [labels]))
        letters += len(labels)
    return total / letters


def words_by_speaker(
    model: Any, clips: list[Clip], known: Collection[str] = (), errors: float = 0.3, neighbours: bool = False
) -> list[list[tuple[str, Array]]]:
    """Every speaker's words, cut apart, for ``CutWords``; with ``neighbours`` each two that follow each other, too.

    Recordings of which the model mistakes a share of ``errors`` of the letters, or more, are left: its alignment of
    what it does not hear could not be trusted. Where some words are ``known``, only these are cut out, as far as each
    is heard where the alignment says; here neighbours stay together.
    """
    model.eval()
    found: dict[str, list[tuple[str, Array]]] = {}
    for clip in clips:
        scores = log_probs(model, clip.wave())
        path = scores.argmax(-1)
        if len(scores) <= 2 * len(clip.text) or jiwer.cer(clip.text, decode(path) or "-") >= errors:
            continue
        words, spans = clip.text.split(), align(scores, encode(clip.text), clip.text)
        if known:
            said = zip(words, spans, strict=True)
            words = [word if word in known and heard(word, path, span) else "" for word, span in said]
        pieces = cut_words(clip.wave(), words, spans)
        more = pairs(pieces) if neighbours else []
        found.setdefault(clip.speaker, []).extend(runs(pieces, known) if known else pieces + more)
    return [pieces for pieces in found.values() if len(pieces) > 10]


def heard(word: str, path: Array, span: tuple[float, float]) -> bool:
    """Whether the greedy ``path`` says a word, or nearly so, between its first and last letter in seconds."""
    first, last = (round(seconds / FRAME) for seconds in span)
    return bool(jiwer.cer(word, decode(path[max(first - 2, 0) : last + 2]) or "-") <= 0.4)
