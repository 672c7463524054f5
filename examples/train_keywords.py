"""Train the bundled keyword classifier: control words, ten digits, or something else, from the bundled recogniser.

    python examples/train_keywords.py --speech SPEECH --recognizer trained/an4 --out trained/keywords

The recogniser's convolutions and lower layers already know what letters sound like: they are kept as they are and
shared, so the classifier stores only what it learns, its last two transformer layers, the upsampling and its head. What
the lower layers give is computed once for thousands of augmented words; training on that is quick.
The words are AN4's, cut apart by forced alignment, and text-to-speech; "unknown" is every other word, pieces of
LibriSpeech, keywords played backwards, several in a row, noise, tones and silence. Each is heard at another place in
another stretch of silence, room and noise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fast_twin import block, has_bfloat16, position_rows
from hearing import words_by_speaker
from safetensors.torch import save_file
from training_data import (
    COMMANDS,
    DIGITS,
    LETTERS,
    MONTHS,
    ORDINALS,
    RATE,
    TEENS,
    TENS,
    Array,
    Clip,
    augment,
    change_speed,
    noise_clip,
    normalize,
    read_corpus,
    synthesize,
)
from transformers import SEWDForCTC, SEWDForSequenceClassification

KEYWORDS = [word for word in COMMANDS if word != "RUBOUT"] + [word for word in DIGITS if word != "OH"]
LABELS = [*(word.lower() for word in KEYWORDS), "unknown"]
UNKNOWN = len(KEYWORDS)
UNCLEAR = {"OH", "O"}  # the digit 0 to some and another word to others: in no class
OWN_LAYERS = 2  # transformer layers that are trained, from the top
PEAK_RATE = 1e-3
CARD = Path(__file__).with_name("keywords_card.md")
Word = tuple[str, Array]


def label_of(word: str) -> int:
    return KEYWORDS.index(word) if word in KEYWORDS else UNKNOWN


@dataclass
class Words:
    """Words to draw from: every keyword as often, "unknown" as seven of them."""

    by_label: list[list[Array]]
    other: list[Array]
    rng: np.random.Generator

    def keyword(self, longest: int = RATE) -> Array:
        """Any keyword, ``longest`` samples of it at most."""
        said = self.by_label[int(self.rng.integers(UNKNOWN))]
        return said[int(self.rng.integers(len(said)))][:longest]

    def draw(self, samples: int) -> tuple[Array, int]:
        """An augmented word somewhere in ``samples`` of silence or noise, and its label."""
        rng = self.rng
        weights = np.ones(len(LABELS))
        weights[UNKNOWN] = 7
        label = int(rng.choice(len(LABELS), p=weights / weights.sum()))
        pool = self.by_label[label]
        wave = pool[int(rng.integers(len(pool)))]
        kind = rng.random()
        if label == UNKNOWN and kind < 0.25:
            wave = noise_clip(rng).wave()
        elif label == UNKNOWN and kind < 0.55:
            sentence = self.other[int(rng.integers(len(self.other)))]
            wave = sentence[int(rng.integers(len(sentence) // 2)) :][: int(rng.uniform(0.3, 1.5) * RATE)]
        elif label == UNKNOWN and kind < 0.65:  # a keyword's sounds in the wrong order are not the keyword
            wave = self.keyword()[::-1]
        elif label == UNKNOWN and kind < 0.77:  # nor are several of them, of which at least two are heard
            wave = np.concatenate([self.keyword(samples // 2) for _ in range(rng.integers(2, 5))])
        wave = change_speed(wave, rng.uniform(0.85, 1.18))[:samples]
        before = int(rng.integers(samples - len(wave) + 1))
        canvas = np.pad(wave, (before, samples - len(wave) - before))
        heard = augment(canvas, lambda: self.other[int(rng.integers(len(self.other)))], rng)
        return np.resize(heard, samples) if len(heard) >= samples else np.pad(heard, (0, samples - len(heard))), label


def below(model: Any, waves: Sequence[Array]) -> Any:
    """What the layers that are kept give for recordings of one length: (b, t, d). Nothing is padded."""
    with torch.no_grad():
        out = model.sew_d(torch.from_numpy(np.stack([normalize(wave) for wave in waves])), output_hidden_states=True)
    return out.hidden_states[-1 - OWN_LAYERS]


def above(model: Any, x: Any, dropped: Any = lambda y: y) -> Any:
    """Logits (b, classes) from what ``below`` gave for an even number of frames: none was squeezed away."""
    encoder, t = model.sew_d.encoder, x.shape[1]
    table = position_rows(model, t)
    for layer in encoder.encoder.layer[-OWN_LAYERS:]:
        x = block(layer, x, table, torch.zeros(t), dropped)
    return model.classifier(model.projector(dropped(encoder.upsample(x))).mean(1))


def learned_parts(model: Any) -> list[Any]:
    encoder = model.sew_d.encoder
    return [*encoder.encoder.layer[-OWN_LAYERS:], encoder.upsample, model.projector, model.classifier]


def store(model: Any, words: Words, count: int) -> list[tuple[Any, Any]]:
    """``count`` batches of 32 augmented words, each batch of one length: what ``below`` gives and the labels."""
    model.eval()
    batches = []
    for _ in range(count):
        samples = 720 + 640 * int(words.rng.integers(22, 44))  # an even number of frames, 0.9 to 1.8 s
        waves, labels = zip(*[words.draw(samples) for _ in range(32)], strict=True)
        batches.append((below(model, waves), torch.tensor(labels)))
    return batches


def train(model: Any, batches: Sequence[tuple[Any, Any]], epochs: int, rng: np.random.Generator) -> None:
    """Cross-entropy with label smoothing; the learning rate rises for a while and falls to nothing."""
    model.requires_grad_(False)
    for part in learned_parts(model):
        part.requires_grad_(True)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, PEAK_RATE, weight_decay=0.05, fused=True)
    quick = has_bfloat16("cpu")
    order = np.concatenate([rng.permutation(len(batches)) for _ in range(epochs)])
    losses = []
    for step, index in enumerate(order):
        progress = step / len(order)
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1, step / 100) * 0.5 * (1 + np.cos(np.pi * progress))
        x, labels = batches[index]
        kept = torch.rand(len(x), 1, x.shape[2]) > 0.1  # some of the lower layers' channels are not heard, clip by clip
        with torch.autocast("cpu", torch.bfloat16, enabled=quick):
            logits = above(model, (x if quick else x.float()) * kept, lambda y: torch.nn.functional.dropout(y, 0.1))
        loss: Any = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.05)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 200 == 199:
            print(f"step {step + 1} of {len(order)}, loss {np.mean(losses[-200:]):.3f}", flush=True)
    model.eval()


def words_to_measure(recognizer: Any, clips: list[Clip]) -> dict[str, list[Word]]:
    """What a classifier is measured on, each word in silence: keywords, other words, and those recorded alone."""
    cut = [pair for speaker in words_by_speaker(recognizer, clips) for pair in speaker]
    groups = {
        "keywords, cut from sentences": [pair for pair in cut if pair[0] in KEYWORDS],
        "other words, cut from sentences": [pair for pair in cut if pair[0] not in KEYWORDS],
        "words recorded alone": [(clip.text, clip.wave()) for clip in clips if " " not in clip.text],
    }
    return {
        name: [(word, np.pad(wave, RATE // 5)) for word, wave in words if word not in UNCLEAR]
        for name, words in groups.items()
    }


def accuracy(model: Any, words: Sequence[Word]) -> tuple[float, int]:
    """Share of words that get their label, and how many there are."""
    right = []
    for word, wave in words:
        with torch.inference_mode():
            logits = model(torch.from_numpy(normalize(wave))[None]).logits
        right.append(int(logits.argmax()) == label_of(word))
    return float(np.mean(right)), len(right)


def export(folder: Path, recognizer: Path, model: Any, figures: dict[str, tuple[float, int]], minutes: float) -> None:
    """The folder that sewd_np bundles: the tensors that were trained, and a configuration naming the encoder shared."""
    learned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {name: value.half().contiguous() for name, value in model.state_dict().items() if name in learned}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((recognizer / "config.json").read_text(encoding="utf-8"))
    config |= {
        "architectures": ["SEWDForSequenceClassification"],
        "shared_encoder": "an4",
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: index for index, label in enumerate(LABELS)},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in ("preprocessor_config.json", "NOTICE-AN4.txt", "NOTICE-LIBRISPEECH.txt"):
        shutil.copyfile(recognizer / name, folder / name)
    rows = "\n".join(f"| {name} | {100 * share:.1f} % | {count} |" for name, (share, count) in figures.items())
    card = CARD.read_text(encoding="utf-8").replace("{FIGURES}", rows).replace("{MINUTES}", f"{minutes:.0f}")
    (folder / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--speech", type=Path, required=True, help="folder of the corpora, as for train_bundled.py")
    parser.add_argument("--recognizer", type=Path, default=Path("trained/an4"), help="what train_bundled.py exported")
    parser.add_argument("--out", type=Path, default=Path("trained/keywords"))
    parser.add_argument("--batches", type=int, default=800, help="augmented words that are heard, in batches of 32")
    parser.add_argument("--epochs", type=int, default=6, help="how often each is trained on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    recognizer: Any = SEWDForCTC.from_pretrained(options.recognizer, dtype=torch.float32)
    recognizer.eval()
    train_clips, dev = (read_corpus(options.speech / "an4", part) for part in ("train", "dev"))
    words = [pair for speaker in words_by_speaker(recognizer, train_clips) for pair in speaker]
    options.out.mkdir(parents=True, exist_ok=True)
    others = [word for word in (*LETTERS, *TEENS, *TENS, *MONTHS, *ORDINALS) if word not in UNCLEAR]
    spoken = synthesize(0, options.out, options.seed, [*KEYWORDS * 30, *others * 4])
    words += [(clip.text, clip.wave()) for clip in spoken]
    other = [clip.wave() for clip in read_corpus(options.speech / "mini_librispeech_opus", "train")[::5]]
    by_label = [
        [wave for word, wave in words if word not in UNCLEAR and label_of(word) == i] for i in range(UNKNOWN + 1)
    ]
    print(f"{len(words)} words, the rarest keyword {min(map(len, by_label))} times", flush=True)
    model = SEWDForSequenceClassification.from_pretrained(
        options.recognizer, num_labels=len(LABELS), dtype=torch.float32
    )
    rng = np.random.default_rng(options.seed)
    batches = store(model, Words(by_label, other, rng), options.batches)
    print(f"{32 * len(batches)} augmented words, {(time.monotonic() - start) / 60:.1f} minutes", flush=True)
    train(model, batches, options.epochs, rng)
    minutes = (time.monotonic() - start) / 60
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    figures = {name: accuracy(model, group) for name, group in words_to_measure(recognizer, dev).items()}
    for name, (share, count) in figures.items():
        print(f"{name}: {100 * share:.1f} % of {count}")
    export(options.out, options.recognizer, model, figures, minutes)


if __name__ == "__main__":
    main()
