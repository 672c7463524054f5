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


def cut_words(wave: Array, words: Sequence[str], spans: Sequence[tuple[float, float]]) -> list[tuple[str, Array]]:
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
    return [(word, wave[a:b]) for word, a, b in zip(words, edges, edges[1:], strict=False) if b - a > 800]


def together(pieces: Sequence[tuple[str, Array]]) -> tuple[str, Array]:
    """Neighbours as they were said, as one piece."""
    said, waves = zip(*pieces, strict=True)
    return " ".join(said), np.concatenate(waves)


def runs(pieces: Sequence[tuple[str, Array]], known: Collection[str]) -> list[tuple[str, Array]]:
    """Of a sentence's words, those that are ``known``; neighbours stay together."""
    grouped = itertools.groupby(pieces, lambda piece: piece[0] in known)
    return [together(list(group)) for inside, group in grouped if inside]


def pairs(pieces: Sequence[tuple[str, Array]]) -> list[tuple[str, Array]]:
    """Each two neighbours of a sentence, together."""
    return [together(two) for two in itertools.pairwise(pieces)]


def quiet_edges(wave: Array, floor: float) -> tuple[int, int]:
    """How many samples at the start and at the end are hardly louder than ``floor``, less 20 ms each."""
    loud = np.flatnonzero(np.convolve(wave**2, np.ones(160, np.float32) / 160, "same") > 8 * floor)
    if not len(loud):
        return 0, 0
    return max(int(loud[0]) - 320, 0), max(len(wave) - int(loud[-1]) - 321, 0)


@dataclass
class CutWords:
    """What speakers have said, cut apart: a list of (text, samples) for each of them."""

    speakers: list[list[tuple[str, Array]]]

    def __post_init__(self) -> None:
        """Each piece's chance, by how often all speakers say its rarest word, 1 / √count; and its quiet edges."""
        counts = Counter(word for pieces in self.speakers for said, _ in pieces for word in said.split())
        self.chances, self.quiet = [], []
        for pieces in self.speakers:
            weights = np.array([min(counts[word] for word in said.split()) ** -0.5 for said, _ in pieces])
            self.chances.append(weights / weights.sum())
            everything = np.concatenate([wave for _, wave in pieces])
            whole = everything[: len(everything) // 160 * 160].reshape(-1, 160)
            floor = float(np.percentile((whole**2).mean(1), 5))
            self.quiet.append([quiet_edges(wave, floor) for _, wave in pieces])

    def clip(self, rng: np.random.Generator, spelled: float = 0.0) -> Clip:
        """Words of a speaker drawn at random, in a new order: one to eight of them, or a spelled name.

        What is said becomes unpredictable, so that a small corpus does not teach its own sentences by heart. With
        chance ``spelled`` it is a name instead, as far as the speaker's letters go: in what order letters come can be
        learned.

        A clip has a haste of its own: that share of the joints loses the pause there, if there is one, and up to 20 ms
        more. Words would otherwise stand apart, having been cut where it is quiet, and a space would mean a pause.
        """
        speaker = int(rng.integers(len(self.speakers)))
        pieces = self.speakers[speaker]
        chosen = self.name(speaker, rng) if rng.random() < spelled else []
        if not chosen:
            drawn = rng.choice(len(pieces), 8, p=self.chances[speaker])
            lengths = np.cumsum([len(pieces[i][0].split()) for i in drawn])
            chosen = [int(i) for i in drawn[: 1 + np.searchsorted(lengths, rng.integers(1, 9))]]
        haste = rng.random()
        tight = rng.random(len(chosen) + 1) < haste
        tight[[0, -1]] = False
        waves = []
        for place, i in enumerate(chosen):
            before, after = self.quiet[speaker][i]
            wave = pieces[i][1]
            waves.append(wave[before * tight[place] : len(wave) - after * tight[place + 1]])
        overlaps = (rng.integers(0, 320, len(chosen) - 1) * tight[1:-1]).tolist()
        return Clip(as_samples(joined(waves, overlaps)), " ".join(pieces[i][0] for i in chosen), "")

    def name(self, speaker: int, rng: np.random.Generator) -> list[int]:
        """Pieces of a speaker that spell a name; none where a hundred random names had a letter too many."""
        takes: dict[str, list[int]] = {}
        for i, (said, _) in enumerate(self.speakers[speaker]):
            takes.setdefault(said, []).append(i)
        drawn = (random_name(rng) for _ in range(100))
        possible = next((name for name in drawn if takes.keys() >= set(name)), "")
        return [takes[letter][int(rng.integers(len(takes[letter])))] for letter in possible]


def joined(waves: Sequence[Array], overlaps: Sequence[int]) -> Array:
    """Waves one after another, faded over 10 ms at the joints, each over the one before by so many samples."""
    fade = np.linspace(0, 1, 160, dtype=np.float32)
    starts = np.cumsum([0, *(len(wave) - over for wave, over in zip(waves, overlaps, strict=False))])
    out = np.zeros(int(starts[-1]) + len(waves[-1]), np.float32)
    for start, wave in zip(starts, waves, strict=True):
        piece = wave.copy()
        piece[:160] *= fade
        piece[-160:] *= fade[::-1]
        out[start : start + len(piece)] += piece
    return out
