"""Words cut out of recordings, by the best CTC path through what was said, and put together anew.

Used by ``train_bundled.py`` (strings of them) and ``train_keywords.py`` (one at a time). Nothing here knows a model.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from spelled_names import random_name
from training_data import FRAME, RATE, Array, Clip, as_samples


def align(log_probs_sv: Array, labels: Sequence[int], text: str) -> list[tuple[float, float]]:
    """Best CTC path through ``text``: seconds of each word's (first, last) letter. Viterbi over blank-letter states.

    labels: the text's letters and spaces as the columns of ``log_probs_sv``; column 0 is the blank.
    """
    states = np.zeros(2 * len(labels) + 1, int)
    states[1::2] = labels
    skip = np.zeros(len(states), bool)
    skip[3::2] = states[3::2] != states[1:-2:2]
    score = np.full(len(states), -1e9)
    score[:2] = log_probs_sv[0, states[:2]]
    back = np.zeros((len(log_probs_sv), len(states)), int)
    for s in range(1, len(log_probs_sv)):
        moves = np.stack([score, np.r_[-1e9, score[:-1]], np.where(skip, np.r_[-1e9, -1e9, score[:-2]], -1e9)])
        back[s] = moves.argmax(0)
        score = moves.max(0) + log_probs_sv[s, states]
    state = len(states) - 1 - int(score[-2] > score[-1])
    seen: dict[int, list[int]] = {}
    for s in range(len(log_probs_sv) - 1, -1, -1):
        if state % 2:
            seen.setdefault(state // 2, []).append(s)
        state -= back[s, state]
    spans, start = [], 0
    for word in text.split():
        frames = [s for letter in range(start, start + len(word)) for s in seen.get(letter, [])]
        spans.append((min(frames) * FRAME, (max(frames) + 1) * FRAME))
        start += len(word) + 1
    return spans


def cut_words(wave: Array, text: str, spans: Sequence[tuple[float, float]]) -> list[tuple[str, Array]]:
    """A recording's words, apart: cut where it is quietest between one word's last letter and the next one's first.

    spans: (first letter, last letter) of every word in seconds, by a forced alignment. The quietest 30 ms are looked
    for, since CTC fires letters somewhere in a sound rather than at its edges.
    """
    energy = np.convolve(wave.astype(np.float64) ** 2, np.ones(480) / 480, "same")
    edges = [0]
    for (_, end), (start, _) in itertools.pairwise(spans):
        first, last = int(end * RATE), max(int(start * RATE), int(end * RATE) + 1)
        edges.append(first + int(np.argmin(energy[first:last])) if first < len(energy) - 1 else len(energy) - 1)
    edges.append(len(wave))
    return [(word, wave[a:b]) for word, a, b in zip(text.split(), edges, edges[1:], strict=False) if b - a > 800]


def runs(pieces: Sequence[tuple[str, Array]], known: Collection[str]) -> list[tuple[str, Array]]:
    """Of a sentence's words, those that are ``known``; neighbours stay together as they were said, as one piece."""
    kept = []
    for inside, group in itertools.groupby(pieces, lambda piece: piece[0] in known):
        if inside:
            said, waves = zip(*group, strict=True)
            kept.append((" ".join(said), np.concatenate(waves)))
    return kept


@dataclass
class CutWords:
    """What speakers have said, cut apart: a list of (text, samples) for each of them."""

    speakers: list[list[tuple[str, Array]]]

    def __post_init__(self) -> None:
        """Each piece's chance, by how often all speakers say its rarest word: 1 / √count."""
        counts = Counter(word for pieces in self.speakers for said, _ in pieces for word in said.split())
        self.chances = []
        for pieces in self.speakers:
            weights = np.array([min(counts[word] for word in said.split()) ** -0.5 for said, _ in pieces])
            self.chances.append(weights / weights.sum())

    def clip(self, rng: np.random.Generator, spelled: float = 0.0) -> Clip:
        """``recombine`` of a speaker drawn at random."""
        speaker = int(rng.integers(len(self.speakers)))
        return recombine(self.speakers[speaker], rng, spelled, self.chances[speaker])


def recombine(
    words: Sequence[tuple[str, Array]], rng: np.random.Generator, spelled: float = 0.0, chances: Array | None = None
) -> Clip:
    """Words of one speaker in a new order, with the joints faded over 10 ms: one to eight of them, or a spelled name.

    What is said becomes unpredictable, so that a small corpus does not teach its own sentences by heart. With chance
    ``spelled`` it is a name instead, as far as the speaker's letters go: in what order letters come can be learned.
    ``chances`` are those of each word, all alike without them.
    """
    chosen = [words[int(i)] for i in rng.choice(len(words), rng.integers(1, 9), p=chances)]
    if rng.random() < spelled:
        takes: dict[str, list[Array]] = {}
        for word, wave in words:
            takes.setdefault(word, []).append(wave)
        drawn = (random_name(rng) for _ in range(100))
        possible = next((name for name in drawn if takes.keys() >= set(name)), "")
        if possible:
            chosen = [(letter, takes[letter][int(rng.integers(len(takes[letter])))]) for letter in possible]
    fade = np.linspace(0, 1, 160, dtype=np.float32)
    pieces = []
    for _, wave in chosen:
        piece = wave.copy()
        piece[:160] *= fade
        piece[-160:] *= fade[::-1]
        pieces.append(piece)
    return Clip(as_samples(np.concatenate(pieces)), " ".join(word for word, _ in chosen), "")
