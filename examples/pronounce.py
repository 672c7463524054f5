"""How words are pronounced, by espeak-ng: what the middle layer is asked for while ``train_bundled.py`` trains.

Spelling hides what AN4's letters share with LibriSpeech's words: the letter B sounds like "be", the letter W like
"double you". In phonemes it shows, so that what five hours of other speech teach serves 38 minutes of letters too.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable

from training_data import RESPELLED, SPOKEN_WORDS

ARTICLE = "ə"  # espeak-ng reads a lone A as the letter
# Stress and length are left out, and sounds that few words have are taken for their neighbours.
SIMPLER = str.maketrans({**dict.fromkeys("ˈˌː̩ "), "ᵻ": "ɪ", "ɐ": "ə", "ɾ": "t", "ʔ": "t"})


def espeak_ipa(words: list[str]) -> dict[str, str]:
    """Each word as espeak-ng writes it, spoken alone, with stress and length; nothing where it is not found."""
    program = shutil.which("espeak-ng")
    if not program:
        return {}
    # A paragraph each, so that none runs on.
    listed = "\n\n".join(RESPELLED.get(word, word) for word in words) + "\n"
    command = [program, "-q", "-v", "en-us", "--ipa", "--stdin"]
    spoken = subprocess.run(command, input=listed, check=True, capture_output=True, encoding="utf-8").stdout
    return dict(zip(words, (line.strip() for line in spoken.split("\n") if line), strict=True))


class Pronunciations:
    """Texts as CTC labels: phonemes numbered from 1, 0 being the blank.

    texts: all that will be asked for. ``phonemes`` is empty where espeak-ng is not found.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        ipa = espeak_ipa(sorted({word for text in texts for word in text.split()}))
        # A sign each: a diphthong is two.
        self.by_word = {word: said.translate(SIMPLER) for word, said in ipa.items()}
        self.phonemes = sorted(set("".join(self.by_word.values()) + ARTICLE)) if self.by_word else []
        self.number = {phoneme: n for n, phoneme in enumerate(self.phonemes, 1)}

    def labels(self, text: str) -> list[int]:
        """The phonemes of a text. A is an article in a sentence, and a letter among letters, numbers and commands."""
        words = text.split()
        article = not SPOKEN_WORDS.issuperset(words)
        sounds = (ARTICLE if article and word == "A" else self.by_word[word] for word in words)
        return [self.number[phoneme] for word in sounds for phoneme in word]
