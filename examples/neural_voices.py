"""Text-to-speech that sounds like people: Kokoro (82 million parameters, Apache-2.0) says AN4's words in many voices.

    hf download onnx-community/Kokoro-82M-v1.0-ONNX --include onnx/model_quantized.onnx --include 'voices/*.bin' \\
        --local-dir kokoro
    python examples/neural_voices.py --kokoro kokoro --clips 2600 --out kokoro.npz

flite and espeak-ng have four voices that were somebody's, and synthetic ones. Kokoro has 54, and the vectors that are a
voice may be mixed from two, its timbre from one pair and its manner of speaking from another: hundreds of people who
spell, count and give dates. All processor cores are used; each makes a second of speech in about a second.

Needs onnxruntime (the ``bench`` extra) and espeak-ng. What it writes is for ``train_bundled.py --kokoro``.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from pronounce import espeak_ipa
from tqdm import tqdm
from training_data import LETTERS, RATE, SPOKEN_WORDS, TEENS, Array, Clip, as_samples, random_text, save_clips

KOKORO_RATE = 24_000
TIMBRE = 128  # of a voice's 256 numbers the first ones; the others say how it speaks
SPEAKERS = 240
HASTE = np.log(0.6), np.log(1.25)  # natural logarithm of the speed: some spell as one does for a clerk who writes
# Of Kokoro's signs those that AN4's words need, with the numbers that its tokenizer.json gives them.
SIGNS = {
    " ": 16, ",": 3, "A": 24, "I": 25, "O": 31, "W": 39, "b": 44, "d": 46, "f": 48, "h": 50, "i": 51, "j": 52, "k": 53,
    "l": 54, "m": 55, "n": 56, "p": 58, "s": 61, "t": 62, "u": 63, "v": 64, "w": 65, "z": 68, "ɑ": 69, "æ": 72, "ɔ": 76,
    "ʤ": 82, "ə": 83, "ɛ": 86, "ɜ": 87, "ɡ": 92, "ɪ": 102, "θ": 119, "ɹ": 123, "ɾ": 125, "ʧ": 133, "ʌ": 138, "ˈ": 156,
    "ˌ": 157, "ᵻ": 177,
}  # fmt: skip
# How Kokoro writes what espeak-ng writes with two signs, or with ones that it does not know.
REWRITTEN = {
    "eɪ": "A", "aɪ": "I", "oʊ": "O", "aʊ": "W", "dʒ": "ʤ", "tʃ": "ʧ", "ɜː": "ɜɹ", "ɚ": "əɹ", "ɐ": "ə", "ː": "",
    "oɹ": "ɔɹ",
}  # fmt: skip
# People say these in other ways too.
OTHERWISE = {
    "AND": ["ənd", "ən", "ænd"], "OF": ["əv", "ʌv"], "HUNDRED": ["hˈʌndɹəd", "hˈʌnəɹd"], "TWENTY": ["twˈʌni", "twˈɛni"],
    "SEVENTY": ["sˈɛvəndi", "sˈɛvəni"], "NINETY": ["nˈIndi"], "W": ["dˈʌbəlju", "dˈʌbju"], "ZERO": ["zˈɪɹO"],
    "FEBRUARY": ["fˈɛbjuˌɛɹi"], "FIFTH": ["fˈɪθ"], "THOUSAND": ["θˈWzən"], "RUBOUT": ["ɹˈʌbˌWt"],
}  # fmt: skip


def pronunciations() -> dict[str, list[str]]:
    """Each of AN4's words in Kokoro's signs, in the ways it may be said."""
    found = {}
    for word, said in espeak_ipa(sorted(SPOKEN_WORDS)).items():
        for old, new in REWRITTEN.items():
            said = said.replace(old, new)
        ways = [said]
        if word.removesuffix("TH") in TEENS and "TEEN" in word:  # stressed at the end too, unlike the tens
            ways.append("ˌ" + said.replace("ˈ", "").replace("ˌ", "").replace("tin", "tˈin"))
        found[word] = ways + OTHERWISE.get(word, [])
    return found


class Kokoro:
    """The model and its voices, read from a folder; ``speakers`` of them, which are voices or mixtures of voices.

    Where the model, its voices or espeak-ng are not to be found the script ends, and says so.
    """

    def __init__(self, folder: Path, seed: int, speakers: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        files, packs = sorted(folder.rglob("*.onnx")), sorted(folder.glob("voices/*.bin"))
        if len(files) != 1 or len(packs) < 2:
            raise SystemExit(
                f"{folder} has {len(files)} models (.onnx) and {len(packs)} voices (voices/*.bin), "
                "where one model and two voices or more are needed; see the top of neural_voices.py."
            )
        self.session = onnxruntime.InferenceSession(str(files[0]), options, providers=["CPUExecutionProvider"])
        self.tokens = self.session.get_inputs()[0].name
        self.ways = pronunciations()
        if not self.ways:
            raise SystemExit("espeak-ng, which says how words are pronounced, is not found; install it.")
        voices = [np.fromfile(pack, np.float32).reshape(-1, 256) for pack in packs]
        rng = np.random.default_rng(seed)
        self.speakers = voices[:speakers]
        while len(self.speakers) < speakers:
            timbre, manner = (self._mixed(voices, rng) for _ in range(2))
            self.speakers.append(np.concatenate([timbre[:, :TIMBRE], manner[:, TIMBRE:]], 1))

    @staticmethod
    def _mixed(voices: list[Array], rng: np.random.Generator) -> Array:
        one, other = rng.choice(len(voices), 2, replace=False)
        share = np.float32(rng.random())
        return share * voices[one] + (1 - share) * voices[other]

    def say(self, text: str, speaker: int, rng: np.random.Generator) -> Array:
        """Samples (n,) int16 at 16 kHz, silence around them cut off. Haste and the pauses between words at random."""
        pauses = rng.choice([0.0, 0.3, 1.0])
        signs = ""
        for word in text.split():
            joint = ", " if rng.random() < pauses else " "
            signs += (joint if signs else "") + str(rng.choice(self.ways[word]))
        ids = [SIGNS[sign] for sign in signs]
        style = self.speakers[speaker][len(ids)][None]
        feeds = {
            self.tokens: np.array([[0, *ids, 0]]),
            "style": style,
            "speed": np.full(1, np.exp(rng.uniform(*HASTE)), np.float32),
        }
        wave = soxr.resample(self.session.run(None, feeds)[0].ravel(), KOKORO_RATE, RATE)
        loud = np.flatnonzero(np.abs(wave) > 0.01)
        start, end = (loud[0], loud[-1]) if len(loud) else (0, len(wave))
        return as_samples(wave[max(start - RATE // 10, 0) : end + RATE // 10])

    def clip(self, number: int, seed: int) -> Clip:
        """Clip ``number`` of those that ``seed`` makes: letters, or a string as AN4's speakers read, by one speaker."""
        rng = np.random.default_rng([seed, number])
        letters = rng.random() < 0.35
        text = " ".join(rng.choice(LETTERS, rng.integers(4, 9))) if letters else random_text(rng)
        speaker = number % len(self.speakers)
        return Clip(self.say(text, speaker, rng), text, f"kokoro {seed} {speaker}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kokoro", type=Path, required=True, help="folder of the model and its voices")
    parser.add_argument("--clips", type=int, default=2600, help="strings to be said, of two seconds on average")
    parser.add_argument("--out", type=Path, default=Path("kokoro.npz"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    say = partial(_clip, seed=options.seed)
    Kokoro(options.kokoro, options.seed, 2)  # says what is missing, if anything is
    with ProcessPoolExecutor(os.cpu_count(), initializer=_load, initargs=(options.kokoro, options.seed)) as workers:
        clips = list(tqdm(workers.map(say, range(options.clips), chunksize=8), total=options.clips))
    save_clips(clips, options.out)
    print(f"{len(clips)} clips, {sum(clip.seconds for clip in clips) / 60:.0f} minutes")


_kokoro: Any = None  # each worker's own


def _load(folder: Path, seed: int) -> None:
    global _kokoro
    _kokoro = Kokoro(folder, seed, SPEAKERS)


def _clip(number: int, seed: int) -> Clip:
    clip: Clip = _kokoro.clip(number, seed)
    return clip


if __name__ == "__main__":
    main()
