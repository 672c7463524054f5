"""Measure again what the cards of the bundled models say, with sewd_np itself, on AN4's dev speakers.

    python examples/measure.py --speech SPEECH

SPEECH is the folder that ``train_bundled.py`` describes; only its ``an4/`` is needed. A recogniser's word error rate is
counted on clean recordings and in six worse conditions, greedy, without a language model, each recording as it is heard
alone; a classifier's accuracy on words cut from the sentences by forced alignment. ``--seed`` draws the noise; between
two draws a rate moves by a point. Needs the ``train`` extra.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from bundle import conditions
from train_keywords import LABELS, label_of, words_to_measure
from training_data import Clip, read_corpus
from transformers import SEWDForCTC

import sewd_np
from sewd_np.checkpoint import ASSETS


def recognition(model: Any, dev: list[Clip], seed: int) -> dict[str, float]:
    """Word error rate in each condition."""
    rates = {}
    for name, change in conditions(np.random.default_rng(seed)).items():
        waves = [clip.wave() if change is None else change(clip.wave()) for clip in dev]
        heard = [transcript.text for transcript in sewd_np.transcribe(waves, model=model)]
        rates[name] = float(jiwer.wer([clip.text for clip in dev], heard))
    return rates


def classification(model: Any, dev: list[Clip]) -> dict[str, tuple[float, int]]:
    """Share of words that get their label, and how many there are."""
    twin: Any = SEWDForCTC.from_pretrained(ASSETS / "an4", dtype=torch.float32)
    shares = {}
    for name, words in words_to_measure(twin, dev).items():
        found = sewd_np.classify([wave for _, wave in words], model=model, top_k=1)
        right = [LABELS[label_of(word)] == best.label for (word, _), (best,) in zip(words, found, strict=True)]
        shares[name] = (sum(right) / max(len(right), 1), len(right))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--speech", type=Path, required=True, help="folder that holds an4/")
    parser.add_argument("--recognizer", default="an4", help="any CTC model: a bundled name, a folder, a hub id")
    parser.add_argument("--classifier", default="keywords", help="a classifier with the bundled one's labels")
    parser.add_argument("--seed", type=int, default=3, help="of the noise (default: 3, as for the cards)")
    options = parser.parse_args()
    dev = read_corpus(options.speech / "an4", "dev")
    print(f"| {options.recognizer}, {len(dev)} recordings | WER |\n|---|---|")
    for name, rate in recognition(sewd_np.load(options.recognizer), dev, options.seed).items():
        print(f"| {name} | {100 * rate:.1f} % |", flush=True)
    print(f"\n| {options.classifier} | right | of |\n|---|---|---|")
    for name, (share, count) in classification(sewd_np.load(options.classifier), dev).items():
        print(f"| {name} | {100 * share:.1f} % | {count} |")


if __name__ == "__main__":
    main()
