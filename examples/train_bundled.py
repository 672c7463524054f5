"""Train the bundled model ``an4``: a small SEW-D that recognises spoken letters, digits, numbers, dates and commands.

    python examples/train_bundled.py --speech ../shared/speech --out trained --minutes 120

transformers' SEWDForCTC is the trainable twin; sewd_np reads what it learns. What happens, in order:

1. *Data* (``training_data.py``): AN4's 38 minutes, five hours of LibriSpeech for the variety of voices, hours of
   text-to-speech, AN4's words put together anew; each clip is heard at another speed, in another room, over another
   line, in other noise, every time.
2. *Warm the front end.* From random weights the CTC loss stays on a plateau where the model emits nothing. The 13
   convolutions see 25 ms and step 20 ms, exactly as a spectrogram does, so they first learn to give log-mel energies.
   ``--init FOLDER`` starts from a checkpoint instead.
3. *CTC*, with a second CTC loss halfway up, dropout and SpecAugment, by the clock: learning rate and mixture depend on
   the share of ``--minutes`` that has passed, so a slower machine makes fewer steps of the same course.
4. *Choose.* Every few minutes the average of the last checkpoints is tried on the dev speakers; the best is kept.
5. *Export* to float16 safetensors and a model card, and check that sewd_np gives the same text as PyTorch.

It may be stopped at any time and goes on from its last checkpoint when started again with the same ``--out``.
Needs the ``train`` extra; runs on a GPU where PyTorch finds one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle OpenMP threads must not take the cores from the data

import jiwer
import numpy as np
import torch
from safetensors.torch import save_file
from training_data import (
    RATE,
    Array,
    Clip,
    add_noise,
    augment,
    change_speed,
    coloured_noise,
    cut_words,
    noise_clip,
    normalize,
    padded,
    read_corpus,
    recombine,
    synthesize,
)
from transformers import SEWDConfig, SEWDForCTC

VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
TOKEN = {token: index for index, token in enumerate(VOCABULARY)}
FRAME = 320 / RATE  # seconds between two frames of logits
CARD = Path(__file__).with_name("an4_card.md")

CONFIG: dict[str, Any] = {
    "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768,
    "conv_dim": (32, *[64] * 4, *[128] * 4, *[256] * 4), "num_conv_pos_embeddings": 31, "vocab_size": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True,
}  # fmt: skip
REGULARIZATION: dict[str, Any] = {
    "hidden_dropout": 0.05, "attention_dropout": 0.05, "activation_dropout": 0.05, "feat_proj_dropout": 0.05,
    "final_dropout": 0.0, "apply_spec_augment": True, "mask_time_prob": 0.05, "mask_time_length": 6,
    "mask_time_min_masks": 0, "mask_feature_prob": 0.05, "mask_feature_length": 12,
}  # fmt: skip
BATCH_SECONDS = 36.0
PEAK_RATE = 6e-4
FROZEN = 5  # convolutions that CTC does not change
# Share of the sound that comes from each source, at the start and at the end.
MIXTURE = {
    "an4": (0.46, 0.52), "recombined": (0.24, 0.24), "spoken": (0.22, 0.18), "librispeech": (0.06, 0.04),
    "noise": (0.02, 0.02),
}  # fmt: skip


def encode(text: str) -> list[int]:
    return [TOKEN.get(letter, TOKEN["<unk>"]) for letter in text.replace(" ", "|")]


def decode(ids: Array) -> str:
    """Greedy CTC: repeats collapse, blanks and special tokens go, delimiters become spaces."""
    kept = [int(i) for n, i in enumerate(ids) if i >= 4 and (n == 0 or i != ids[n - 1])]
    return " ".join("".join(VOCABULARY[i] for i in kept).replace("|", " ").split())


# ------------------------------------------------------------------------------------ evaluation


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


def align(log_probs_sv: Array, text: str) -> list[tuple[float, float]]:
    """Best CTC path through ``text``: seconds of each word's (first, last) letter. Viterbi over blank-letter states."""
    labels = encode(text)
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


def words_by_speaker(model: Any, clips: list[Clip]) -> list[list[tuple[str, Array]]]:
    """Every speaker's words, cut apart, for ``recombine``; recordings that the model does not hear at all are left."""
    model.eval()
    words: dict[str, list[tuple[str, Array]]] = {}
    for clip in clips:
        scores = log_probs(model, clip.wave())
        if len(scores) > 2 * len(clip.text) and jiwer.cer(clip.text, decode(scores.argmax(-1)) or "-") < 0.3:
            pieces = cut_words(clip.wave(), clip.text, align(scores, clip.text))
            words.setdefault(clip.speaker, []).extend(pieces)
    return [pieces for pieces in words.values() if len(pieces) > 10]


# ----------------------------------------------------------------------------- warming the front end


def log_mel(wave: Array, bands: int = 64) -> Array:
    """Log-mel energies (s, bands) of 400-sample windows every 320 samples, normalised band by band."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 400)[::320]
    power = np.abs(np.fft.rfft(frames * np.hanning(400), 512)) ** 2
    mel = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = np.linspace(0, RATE / 2, 257)[:, None]
    rise, fall = (hertz - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - hertz) / np.diff(edges)[1:]
    energies = np.log(power @ np.maximum(np.minimum(rise, fall), 0) + 1e-6)
    return np.asarray((energies - energies.mean(0)) / (energies.std(0) + 1e-3), np.float32)


def warm_front_end(model: Any, draw: Any, steps: int, device: str) -> None:
    """Regress log-mel energies from the feature encoder through a linear layer that is thrown away afterwards."""
    head = torch.nn.Linear(CONFIG["conv_dim"][-1], 64).to(device)
    parts = [*model.sew_d.feature_extractor.parameters(), *model.sew_d.layer_norm.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parts, 2e-3)
    for step in range(steps):
        waves = [normalize(wave) for wave, _ in draw(BATCH_SECONDS)]
        shortest = min(map(len, waves))  # cut rather than padded: every frame counts
        targets = np.stack([log_mel(wave[:shortest]) for wave in waves])
        batch = torch.from_numpy(np.stack([wave[:shortest] for wave in waves])).to(device)
        features = model.sew_d.layer_norm(model.sew_d.feature_extractor(batch).transpose(1, 2))
        loss: Any = torch.nn.functional.mse_loss(head(features), torch.from_numpy(targets).to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"warming, step {step + 1}: mean squared error {loss.item():.3f}", flush=True)


# ---------------------------------------------------------------------------------------- training


@dataclass
class Sources:
    """What batches are drawn from; every clip is augmented anew each time."""

    clips: dict[str, list[Clip]]
    rng: np.random.Generator
    strength: float
    words: list[list[tuple[str, Array]]] = field(default_factory=list)

    def clip(self, source: str) -> Clip:
        if source == "noise":
            return noise_clip(self.rng)
        if source == "recombined":
            return recombine(self.words[int(self.rng.integers(len(self.words)))], self.rng)
        return self.clips[source][int(self.rng.integers(len(self.clips[source])))]

    def draw(self, seconds: float, progress: float = 0.0, longest: float = 18.0) -> list[tuple[Array, str]]:
        """Augmented (wave, text) pairs of at least ``seconds`` in all, in the mixture for ``progress`` (0 to 1)."""
        shares = {}
        for source, (start, end) in MIXTURE.items():
            if source == "noise" or (self.words if source == "recombined" else self.clips.get(source)):
                mean = {"noise": 1.8, "recombined": 3.0}.get(source) or np.mean([c.seconds for c in self.clips[source]])
                shares[source] = (start + (end - start) * progress) / mean  # by sound, not by clips
        names, weights = list(shares), np.array(list(shares.values()))
        pairs: list[tuple[Array, str]] = []
        while sum(len(wave) for wave, _ in pairs) < seconds * RATE:
            clip = self.clip(str(self.rng.choice(names, p=weights / weights.sum())))
            if clip.seconds <= longest:
                wave = augment(clip.wave(), lambda: self.clip("an4").wave(), self.rng, self.strength)
                pairs.append((wave if len(wave) > RATE // 4 else np.pad(wave, RATE // 8), clip.text))
        return pairs

    def batches(self, progress: float, longest: float) -> list[list[tuple[Array, str]]]:
        """Eight batches of clips of like length, in random order: little padding, which disturbs the group norm."""
        pairs = sorted(self.draw(8 * BATCH_SECONDS, progress, longest), key=lambda pair: len(pair[0]))
        batches: list[list[tuple[Array, str]]] = [[]]
        for pair in pairs:
            if batches[-1] and len(pair[0]) * (len(batches[-1]) + 1) > BATCH_SECONDS * RATE:
                batches.append([])
            batches[-1].append(pair)
        return [batches[i] for i in self.rng.permutation(len(batches))]


def rate_at(progress: float) -> float:
    """Learning rate: up over the first 3 %, then a cosine down to a hundredth."""
    rise = min(progress / 0.03, 1.0)
    return PEAK_RATE * (0.05 + 0.95 * rise) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress)))


def ctc(logits: Any, frames: Any, texts: list[str]) -> Any:
    """Mean CTC loss per letter of a batch."""
    labels = [encode(text) for text in texts]
    sizes = torch.tensor([len(ids) for ids in labels])
    flat = torch.tensor([i for ids in labels for i in ids], dtype=torch.long)
    scores = torch.log_softmax(logits.float(), -1).transpose(0, 1)
    loss = torch.nn.functional.ctc_loss(scores, flat, frames, sizes, reduction="sum", zero_infinity=True)
    return loss / max(int(sizes.sum()), 1)


def narrow_positions(model: Any, frames: int) -> None:
    """Let attention project only the rows of the position table that ``frames`` squeezed frames can use.

    The reference projects all 2S rows in every layer, about a tenth of a step on short clips. Distances up to S / 2
    have a bucket each, so for no more frames than that only the 2 · frames rows around the middle are used, and the
    result is the same.
    """
    encoder, span = model.sew_d.encoder.encoder, model.config.position_buckets
    reach = frames if frames <= span // 2 else span
    whole = type(encoder).get_rel_embedding
    encoder.get_rel_embedding = lambda: whole(encoder)[span - reach : span + reach]
    for layer in encoder.layer:
        layer.attention.self.pos_ebd_size = reach


def train_step(model: Any, pairs: list[tuple[Array, str]], device: str) -> Any:
    """Loss of one batch: CTC at the top, and with less weight after the middle layer through the same head."""
    waves, lengths = padded(normalize(wave) for wave, _ in pairs)
    narrow_positions(model, waves.shape[1] // 640)
    mask = torch.from_numpy((np.arange(waves.shape[1]) < lengths[:, None]).astype(np.int64))
    batch = torch.from_numpy(waves).to(device)
    with torch.autocast(device, torch.bfloat16):  # without it half as long again, on a CPU with AMX
        out = model(batch, attention_mask=mask.to(device), output_hidden_states=True)
        middle = out.hidden_states[model.config.num_hidden_layers // 2]
        lower = model.lm_head(model.sew_d.encoder.upsample(middle))
    narrow_positions(model, model.config.position_buckets)
    texts = [text for _, text in pairs]
    frames = model._get_feat_extract_output_lengths(torch.from_numpy(lengths)).clamp(max=out.logits.shape[1])
    return ctc(out.logits, frames, texts) + 0.4 * ctc(lower, frames.clamp(max=lower.shape[1]), texts)


def average(snapshots: Any) -> dict[str, Any]:
    return {name: sum(s[name] for s in snapshots) / len(snapshots) for name in snapshots[0]}


def train(model: Any, sources: Sources, dev: list[Clip], options: argparse.Namespace, device: str) -> None:
    """Train until ``options.minutes`` of training are over; leaves best.pt, state.pt and curve.png in the folder."""
    # The first convolutions run at 3,200 to 800 steps a second; to train them too would take a third longer. Warmed,
    # they are a filter bank, and stay as they are.
    model.sew_d.feature_extractor._requires_grad = False
    for layer in model.sew_d.feature_extractor.conv_layers[:FROZEN]:
        layer.requires_grad_(False)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    state_file, best_file = options.out / "state.pt", options.out / "best.pt"
    history: list[dict[str, float]] = []
    snapshots: deque[dict[str, Any]] = deque(maxlen=8)
    elapsed, step, losses = 0.0, 0, []
    if state_file.exists():
        state = torch.load(state_file, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, elapsed, step, snapshots = state["history"], state["elapsed"], state["step"], state["snapshots"]
        sources.rng = np.random.default_rng([options.seed, step])
        print(f"going on from step {step}, {elapsed / 60:.1f} minutes", flush=True)
    limit, evaluated, aligned = options.minutes * 60, elapsed, 0.0
    while elapsed < limit:
        progress = elapsed / limit
        # Short clips first: a first letter is easier to find in a short one.
        longest = 18.0 if options.init or progress > 0.1 else 2.0 + 160 * progress
        for pairs in sources.batches(progress, longest):
            started = time.monotonic()
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = rate_at(progress)
            loss = train_step(model, pairs, device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item() / 1.4)
            step += 1
            elapsed += time.monotonic() - started
            if step % 100 == 0:
                snapshots.append({name: value.detach().clone().cpu() for name, value in model.state_dict().items()})
        if elapsed - evaluated > min(300, limit / 20) or elapsed >= limit or not history:
            evaluated = elapsed
            now = {name: value.detach().clone() for name, value in model.state_dict().items()}
            model.load_state_dict(average(snapshots) if snapshots else now)
            wer = word_error_rate(model, dev)
            if wer < min((row["wer"] for row in history), default=2.0):
                torch.save(model.state_dict(), best_file)
            if wer < 0.6 and (not sources.words or aligned < 0.5 <= progress):
                sources.words, aligned = words_by_speaker(model, sources.clips["an4"]), progress
                print(f"{sum(map(len, sources.words))} words cut from AN4", flush=True)
            model.load_state_dict(now)
            history.append({"step": step, "minutes": elapsed / 60, "loss": float(np.mean(losses)), "wer": wer})
            print(" ".join(f"{key} {value:.3f}" for key, value in history[-1].items()), flush=True)
            losses = []
            state = {"model": now, "optimizer": optimizer.state_dict(), "history": history}
            state |= {"elapsed": elapsed, "step": step, "snapshots": snapshots}
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
            draw_curve(history, options.out / "curve.png")
    model.load_state_dict(torch.load(best_file, weights_only=True))


def draw_curve(history: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    minutes = [row["minutes"] for row in history]
    upper.plot(minutes, [100 * row["wer"] for row in history], "o-", color="#0072b2")
    upper.set(ylabel="dev WER [%]", ylim=(0, None))
    lower.plot(minutes, [row["loss"] for row in history], "o-", color="#d55e00")
    lower.set(xlabel="minutes of training", ylabel="training loss per letter", ylim=(0, None))
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------ export


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


def export(model: Any, folder: Path, figures: dict[str, float], options: argparse.Namespace) -> None:
    """The folder that sewd_np bundles: float16 weights, configuration, vocabulary, model card, the data's notice."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tensors = {name: value.detach().half().contiguous().cpu() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
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
        "STRINGS": f"{options.strings:,}",
        "INIT": f", from the checkpoint {options.init.name}" if options.init else "",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--speech", type=Path, default=Path("../shared/speech"), help="folder of the corpora")
    parser.add_argument("--out", type=Path, default=Path("trained"), help="checkpoints, curve and the export")
    parser.add_argument("--minutes", type=float, default=120, help="training time, evaluation left out")
    parser.add_argument("--init", type=Path, help="checkpoint folder to start from, instead of warming the front end")
    parser.add_argument("--strength", type=float, default=1.0, help="of augmentation; 0.5 for a short training")
    parser.add_argument("--strings", type=int, default=5000, help="text-to-speech strings")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng(options.seed)
    clips = {"an4": read_corpus(options.speech / "an4", "train")}
    clips["spoken"] = synthesize(options.strings, options.out, options.seed)
    clips["librispeech"] = read_corpus(options.speech / "mini_librispeech_opus", "train")
    dev = read_corpus(options.speech / "an4", "dev")
    for name, corpus in clips.items():
        print(f"{name}: {len(corpus)} clips, {sum(clip.seconds for clip in corpus) / 60:.0f} minutes", flush=True)
    sources = Sources(clips, rng, options.strength)
    if options.init:
        model: Any = SEWDForCTC.from_pretrained(options.init, **REGULARIZATION)
        # A checkpoint made without SpecAugment lacks this vector, and transformers leaves it as memory was.
        torch.nn.init.uniform_(model.sew_d.masked_spec_embed)
    else:
        model = SEWDForCTC(SEWDConfig(**CONFIG, **REGULARIZATION))
    model = model.to(device)
    if not options.init and not (options.out / "state.pt").exists():
        warm_front_end(model, lambda seconds: sources.draw(seconds, longest=4.0), 600, device)
    train(model, sources, dev, options, device)
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    model.eval()
    figures = {name: word_error_rate(model, dev, change) for name, change in conditions(rng).items()}
    for name, wer in figures.items():
        print(f"{name}: {100 * wer:.1f} % WER")
    export(model, options.out / "an4", figures, options)
    check_twin(model, options.out / "an4", dev)


if __name__ == "__main__":
    main()
