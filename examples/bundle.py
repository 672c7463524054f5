"""What ``train_bundled.py`` leaves: of several averages the one with the lowest loss, also on worse recordings, and
the folder that sewd_np bundles, checked.

float16 safetensors, configuration, vocabulary, model card and the notices of the data.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
from hearing import TOKEN, decode, log_probs, loss_per_letter, word_error_rate
from safetensors import safe_open
from safetensors.torch import save_file
from training_data import RATE, Array, Clip, add_noise, change_speed, coloured_noise

CARD = Path(__file__).with_name("an4_card.md")
BLANK = 0.5  # taken off its logit in what is exported
LOWERED = "blank_lowered"  # where an exported file says that this was done, for a training that starts from it
KEPT = 0.5  # share of the checkpoint of --init in the mixture with it


def conditions(rng: np.random.Generator) -> dict[str, Any]:
    """Ways in which a recording may be worse than AN4's own."""

    def telephone(wave: Array) -> Array:
        return change_speed(change_speed(wave, 2.0), 0.5)  # down to 8 kHz and back

    return {
        "clean": None,
        "at 8 kHz": telephone,
        "20 dB quieter": lambda wave: np.round(wave * 0.1 * 32768).astype(np.float32) / 32768,
        "white noise, 15 dB SNR": lambda wave: add_noise(wave, coloured_noise(len(wave), 0, rng), 15),
        "pink noise, 15 dB SNR": lambda wave: add_noise(wave, coloured_noise(len(wave), 1, rng), 15),
        "10 % faster": lambda wave: change_speed(wave, 1.1),
        "10 % slower": lambda wave: change_speed(wave, 0.9),
    }  # fmt: skip


def average(snapshots: Any) -> dict[str, Any]:
    return {name: sum(s[name] for s in snapshots) / len(snapshots) for name in snapshots[0]}


def finalists(best: dict[str, Any], snapshots: Any, initial: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """What may be exported: the best so far, the mean of the last checkpoints, and that mixed with the first one.

    Between two models of which one came from the other the loss is often lower than at either (arXiv 2109.01903).
    """
    found = {"the best by clean WER": best}
    if snapshots:
        mean = found["the mean of the last checkpoints"] = average(snapshots)
        if initial is not None:
            mixed = {name: (1 - KEPT) * mean[name] + KEPT * initial[name] for name in mean}
            found[f"{1 - KEPT:.0%} of the mean of the last checkpoints, {KEPT:.0%} of the first"] = mixed
    return found


def finished(weights: dict[str, Any]) -> dict[str, Any]:
    """As they are exported: in float16's precision, the blank's logit lower by BLANK.

    The greedy path asks in each frame for the likeliest symbol. Where the model wavers between two letters that is the
    blank, although some letter is likelier than none; and a wrong letter is no worse than a missing one.
    """
    weights = dict(weights)
    weights["lm_head.bias"] = weights["lm_head.bias"].clone()
    weights["lm_head.bias"][0] -= BLANK
    return {name: value.half().float() for name, value in weights.items()}


def lowered(folder: Path) -> float:
    """By how much the blank's logit of an exported checkpoint is lower than it came out of training."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        return 0.0
    with safe_open(weights, "pt") as file:
        return float((file.metadata() or {}).get(LOWERED, 0))


def choose(model: Any, found: dict[str, dict[str, Any]], dev: list[Clip], seed: int) -> tuple[str, dict[str, float]]:
    """Give the model that of ``found``, finished, with the lowest CTC loss in all conditions together.

    The loss rather than the word error rate: it hears every letter, and one wrong word more or less is chance. Returns
    the name of what was chosen and its word error rate in each condition. The noise is the same for all.
    """
    losses = {}
    for name, weights in found.items():
        model.load_state_dict(weights)
        changes = conditions(np.random.default_rng(seed)).values()
        losses[name] = float(np.mean([loss_per_letter(model, dev, change) for change in changes]))
        print(f"{name}: loss per letter {losses[name]:.4f}", flush=True)
    chosen = min(losses, key=losses.__getitem__)
    model.load_state_dict(finished(found[chosen]))
    changed = conditions(np.random.default_rng(seed))
    figures = {condition: word_error_rate(model, dev, change) for condition, change in changed.items()}
    print(f"chosen: {chosen}; " + ", ".join(f"{condition} {100 * wer:.1f} %" for condition, wer in figures.items()))
    return chosen, figures


def export(model: Any, folder: Path, chosen: str, figures: dict[str, float], options: argparse.Namespace) -> None:
    """The folder that sewd_np bundles: float16 weights, configuration, vocabulary, model card, the data's notice.

    ``chosen`` says, for the card, which weights these are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tensors = {name: value.detach().half().contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", LOWERED: f"{BLANK:g}"})
    files = {
        "vocab.json": TOKEN,
        "tokenizer_config.json": {
            "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
            "word_delimiter_token": "|", "do_lower_case": False, "tokenizer_class": "Wav2Vec2CTCTokenizer",
        },
        "preprocessor_config.json": {
            "do_normalize": True, "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1,
            "padding_side": "right", "padding_value": 0.0, "return_attention_mask": False, "sampling_rate": RATE,
        },
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    rows = "\n".join(f"| {name} | {100 * wer:.1f} % |" for name, wer in figures.items())
    card = CARD.read_text(encoding="utf-8")
    facts = {
        "FIGURES": rows, "MINUTES": f"{options.minutes:g}", "SEED": str(options.seed),
        "STRINGS": f"{options.strings:,}", "CHOSEN": chosen, "BLANK": f"{BLANK:g}",
        "INIT": f", from the checkpoint {options.init.name}" if options.init else "",
        "KOKORO": ",\n  and others by Kokoro-82M (Apache-2.0) in mixtures of its voices" if options.kokoro else "",
    }  # fmt: skip
    for key, value in facts.items():
        card = card.replace(f"{{{key}}}", value)
    (folder / "README.md").write_text(card, encoding="utf-8")
    shutil.copy(options.speech / "an4" / "LICENSE", folder / "NOTICE-AN4.txt")
    licence = (options.speech / "mini_librispeech_opus" / "LICENSE.TXT").read_text(encoding="utf-8")
    (folder / "NOTICE-LIBRISPEECH.txt").write_text(
        "The weights were trained on, among other things, LibriSpeech train-clean-5, re-encoded and augmented, from\n"
        "<https://www.openslr.org/31/>.\n\n" + licence, encoding="utf-8"
    )  # fmt: skip


def check_twin(model: Any, folder: Path, dev: list[Clip]) -> None:
    """sewd_np must hear in the exported files what PyTorch hears: the same word error rate, clip by clip the same."""
    import sewd_np

    twin = sewd_np.load(folder)
    ours = [" ".join(sewd_np.transcribe(clip.wave(), model=twin).text.split()) for clip in dev]
    theirs = [decode(log_probs(model, clip.wave()).argmax(-1)) for clip in dev]
    texts = [clip.text for clip in dev]
    print(f"dev WER: sewd_np {100 * jiwer.wer(texts, ours):.2f} %, PyTorch {100 * jiwer.wer(texts, theirs):.2f} %")
    if ours != theirs:
        raise SystemExit("sewd_np and PyTorch differ on a clip; the export is wrong.")
