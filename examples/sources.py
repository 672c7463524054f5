"""What the bundled model is trained on, in which mixture, and a store of what its lower convolutions made of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fast_twin import lower, onward
from hearing import words_by_speaker
from training_data import FRAME, RATE, READ_WORDS, Array, Clip, augment, noise_clip
from word_pieces import CutWords

BATCH_SECONDS = 24.0  # of sound, which is seen twice
BATCHES = 8  # made at a time
STORE_HOURS = 4.0
SPELLED = 0.5  # of the clips put together from words, those that spell a name
# Share of the sound that comes from each source, at the start and at the end; of those that there are.
MIXTURE = {
    "an4": (0.20, 0.30), "an4 words": (0.20, 0.26), "kokoro": (0.22, 0.17), "kokoro words": (0.15, 0.12),
    "librispeech words": (0.05, 0.04), "spoken": (0.05, 0.02), "librispeech": (0.10, 0.06), "noise": (0.03, 0.03),
}  # fmt: skip


@dataclass
class Sources:
    """What clips are drawn from; every clip is augmented anew each time."""

    clips: dict[str, list[Clip]]
    rng: np.random.Generator
    strength: float
    words: dict[str, CutWords] = field(default_factory=dict)

    def cut(self, model: Any) -> None:
        """Cut words out of AN4, anew by every better model, and once out of LibriSpeech's and Kokoro's sentences.

        LibriSpeech's say AND, FIRST or HUNDRED by more voices than AN4 has; of those with nothing but AND, OF and I
        there are more than enough.
        """
        found = {"an4 words": words_by_speaker(model, self.clips["an4"], neighbours=True)}
        if "librispeech words" not in self.words:
            rarer = READ_WORDS - {"AND", "OF", "I"}
            sentences = [clip for clip in self.clips["librispeech"] if rarer & set(clip.text.split())]
            found["librispeech words"] = words_by_speaker(model, sentences, READ_WORDS, errors=0.5)
            found["kokoro words"] = words_by_speaker(model, self.clips.get("kokoro", []))
        self.words |= {source: CutWords(speakers) for source, speakers in found.items() if speakers}

    def clip(self, source: str) -> Clip:
        if source == "noise":
            return noise_clip(self.rng)
        if source in self.words:
            return self.words[source].clip(self.rng, 0.0 if source == "librispeech words" else SPELLED)
        return self.clips[source][int(self.rng.integers(len(self.clips[source])))]

    def draw(self, seconds: float, progress: float = 0.0, longest: float = 18.0) -> list[tuple[Array, str]]:
        """Augmented (wave, text) pairs of at least ``seconds`` in all, in the mixture for ``progress`` (0 to 1)."""
        shares = {}
        for source, (start, end) in MIXTURE.items():
            if source == "noise" or source in self.words or self.clips.get(source):
                made = {"noise": 1.8, "an4 words": 2.8, "kokoro words": 2.5, "librispeech words": 1.5}
                mean = made.get(source) or np.mean([clip.seconds for clip in self.clips[source]])
                shares[source] = (start + (end - start) * progress) / mean  # by sound, not by clips
        names, weights = list(shares), np.array(list(shares.values()))
        pairs: list[tuple[Array, str]] = []
        while sum(len(wave) for wave, _ in pairs) < seconds * RATE:
            clip = self.clip(str(self.rng.choice(names, p=weights / weights.sum())))
            if clip.seconds <= longest:
                wave = augment(clip.wave(), lambda: self.clip("an4").wave(), self.rng, self.strength)
                pairs.append((wave if len(wave) > RATE // 4 else np.pad(wave, RATE // 8), clip.text))
        return pairs


@dataclass
class Store:
    """Some hours of what the lower convolutions gave, with the texts; the oldest make room for new ones."""

    frozen: int
    rng: np.random.Generator
    clips: deque[tuple[Any, str, int]] = field(default_factory=deque)
    seconds: float = 0.0

    def add(self, model: Any, pairs: list[tuple[Array, str]]) -> None:
        for wave, text in pairs:
            frames = int(model._get_feat_extract_output_lengths(len(wave)))
            self.clips.append((lower(model, wave, self.frozen), text, frames))
            self.seconds += frames * FRAME
            while self.seconds > STORE_HOURS * 3600:
                self.seconds -= self.clips.popleft()[2] * FRAME

    def freeze(self, model: Any, frozen: int) -> None:
        """From now on keep what ``frozen`` convolutions give; what is there goes through those that are new."""
        for _ in range(len(self.clips)):
            features, text, frames = self.clips.popleft()
            self.clips.append((onward(model, features, self.frozen, frozen), text, frames))
        self.frozen = frozen

    def batches(self) -> list[list[tuple[Any, str, int]]]:
        """BATCHES batches of clips of like length, in random order: little is padded.

        Never more or fewer: processes that train together must take every step together.
        """
        chosen: list[tuple[Any, str, int]] = []
        while sum(frames for _, _, frames in chosen) * FRAME < BATCHES * BATCH_SECONDS:
            chosen.append(self.clips[int(self.rng.integers(len(self.clips)))])
        batches: list[list[tuple[Any, str, int]]] = [[]]
        for clip in sorted(chosen, key=lambda clip: clip[2]):
            if batches[-1] and clip[2] * FRAME * (len(batches[-1]) + 1) > BATCH_SECONDS:
                batches.append([])
            batches[-1].append(clip)
        return [batches[i] for i in self.rng.permutation(len(batches))[:BATCHES]]
