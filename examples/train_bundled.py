"""Train the bundled model ``an4``: a small SEW-D that recognises spoken letters, digits, numbers, dates and commands.

    python examples/train_bundled.py --speech SPEECH --out trained --minutes 120

SPEECH holds ``an4/`` (CMU AN4) and ``mini_librispeech_opus/`` (LibriSpeech train-clean-5, <https://www.openslr.org/31/>),
each with 16 kHz recordings that libsndfile reads, its licence (``LICENSE``, ``LICENSE.TXT``) and ``transcripts.tsv``:
path, text (upper case), speaker and part (train or dev), a line each, tabs between them, these names on top.

transformers' SEWDForCTC is the trainable twin; sewd_np reads what it learns. What happens, in order:

1. *Data* (``training_data.py``, ``sources.py``): AN4's 38 minutes, five hours of LibriSpeech for the variety of voices,
   hours of text-to-speech, with ``--kokoro`` also by some hundred voices like people's (``neural_voices.py``); AN4's
   words, Kokoro's, and those of AN4's that LibriSpeech has too, put together anew by each speaker, the rare ones more
   often, half of them as spelled names; each clip at another speed and tempo, from another vocal tract, in another
   room, over another line, in other noise, every time.
2. *Warm the front end.* From random weights the CTC loss stays on a plateau where the model emits nothing. The 13
   convolutions see 25 ms and step 20 ms, exactly as a spectrogram does, so they first learn to give log-mel energies.
   ``--init FOLDER`` starts from a checkpoint instead.
3. *CTC*, with a second CTC loss halfway up, of phonemes (``pronounce.py``; arXiv 1807.06234), dropout and SpecAugment,
   by the clock: learning rate and mixture depend on the share of ``--minutes`` that has passed, so a slower machine
   makes fewer steps of the same course. LibriSpeech's sentences go no higher than halfway: they teach the sounds of
   more voices, while the upper layers learn to tell AN4's hundred words apart rather than to spell English. Every clip
   is seen twice at once with other stretches masked, and the model is also asked to say the same both times (CR-CTC),
   and later to get few words wrong, rather than letters: what its frames might say is drawn, and its errors counted.
   The lower convolutions are a filter bank by then and stay as they are; what they give for an augmented clip is kept,
   for several steps, in a store of some hours that is renewed all the time (``sources.py``, ``fast_twin.py``). Muon
   moves the matrices.
4. *Choose.* Every few minutes the average of the last checkpoints is tried on the dev speakers; the best is kept. At
   the end it is compared with the last average and, with ``--init``, with that half of the way back to the first
   checkpoint: by the CTC loss on clean recordings and in six worse conditions, for one word more or less on 103
   recordings is chance.
5. *Export* to float16 safetensors and a model card, with the blank's logit a little lower, for greedy decoding; and
   check that sewd_np gives the same text as PyTorch.

It may be stopped at any time and goes on from its last checkpoint when started again with the same ``--out``.
Needs the ``train`` extra; runs on a GPU where PyTorch finds one. On a processor two threads are hardly faster than one
with matrices as small as these, but two processes are, each with its own batches and the mean of their gradients:

    torchrun --nproc-per-node 2 examples/train_bundled.py --speech SPEECH --minutes 120
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle OpenMP threads must not take the cores from the data

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bundle import average, check_twin, choose, export, finalists, lowered
from fast_twin import has_bfloat16, upper
from hearing import ctc, encode, expected_word_errors, word_error_rate
from muon import Muon
from pronounce import Pronunciations
from sources import BATCH_SECONDS, Sources, Store
from training_data import SPOKEN_WORDS, Clip, load_clips, log_mel, normalize, read_corpus, synthesize, whole
from transformers import SEWDConfig, SEWDForCTC
from word_pieces import CutWords

RANK = int(os.environ.get("RANK", 0))  # which of torchrun's processes this is; the first one writes and prints
CONFIG: dict[str, Any] = {
    "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768,
    "conv_dim": (32, *[64] * 4, *[128] * 4, *[256] * 4), "num_conv_pos_embeddings": 31, "vocab_size": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DROPOUT = 0.1
MIDDLE = 0.4  # weight of the loss after the middle layer
CONSISTENCY = 0.2  # weight of the two views' disagreement
WORD_ERRORS = 2.0  # weight of the expected word error rate
WORDS_COUNT = 0.3  # of the course; from there on it is a part of the loss
RENEWED = 0.25  # seconds of sound put into the store for every second that is trained on
PEAK_RATE = 7e-4
TRAINED_CONVOLUTIONS = 0.6  # of the course; from there on only the upper two are
MUON_FACTOR = 2.5  # its learning rate by AdamW's


# ----------------------------------------------------------------------------- warming the front end


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


def rate_at(progress: float, peak: float = PEAK_RATE) -> float:
    """Learning rate: up to ``peak`` over the first 3 %, then a cosine down to a hundredth."""
    rise = min(progress / 0.03, 1.0)
    return peak * (0.05 + 0.95 * rise) * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress)))


def disagreement(logits: Any, frames: Any, letters: int) -> Any:
    """How far two views of the same clips, one batch after the other, are from each other: per letter, like the loss.

    Each view's distributions are the other's target (Kullback-Leibler, both ways, summed over the clips' own frames):
    CR-CTC, arXiv 2410.05101. A model that must say the same whichever frames are hidden from it has to use the context.
    """
    one, other = torch.log_softmax(logits.float(), -1).chunk(2)
    inside = torch.arange(one.shape[1], device=one.device) < frames[:, None].to(one.device)
    both = F.kl_div(one, other.detach(), reduction="none", log_target=True)
    both = both + F.kl_div(other, one.detach(), reduction="none", log_target=True)
    return (both.sum(-1) * inside).sum() / 2 / max(letters, 1)


def empty_frame(bias: Any) -> Any:
    """Cross-entropy of the blank in a frame of zeros, for which the head gives its bias and nothing else.

    Such a frame ends every recording with an odd number of them: it is squeezed away and put back empty. No batch here
    has one, so CTC alone leaves it nearly undecided, and what a frame says would hang on the last digit.
    """
    return F.cross_entropy(bias.float()[None], torch.zeros(1, dtype=torch.long, device=bias.device))


def train_step(
    model: Any,
    clips: list[tuple[Any, str, int]],
    frozen: int,
    pool: Any,
    pronunciations: Pronunciations,
    words_count: bool = False,
) -> tuple[Any, float]:
    """Loss of one batch, seen twice, and the part of it that is CTC at the top, which the curve shows.

    CTC of letters at the top, CTC of phonemes after the middle layer (of letters, through the same head, where there
    are no phonemes), how far both views differ, and that an empty frame says nothing; where ``words_count``, also the
    word error rate that is to be expected. Sentences of other words than AN4's, LibriSpeech's, end at the middle layer:
    they teach what sounds there are, and the layers above need not spell English, but tell a hundred words from each
    other. A batch of these alone has a CTC loss of not a number.
    """
    batch = torch.nn.utils.rnn.pad_sequence([features for features, _, _ in clips], batch_first=True)
    batch = batch.to(pool.device, pool.dtype)
    frames = torch.tensor([count // 2 * 2 for _, _, count in clips])  # an odd last one is squeezed away
    known = torch.tensor([SPOKEN_WORDS.issuperset(text.split()) for _, text, _ in clips])
    with torch.autocast(pool.device.type, torch.bfloat16, enabled=pool.dtype == torch.bfloat16):
        head = model.phoneme_head if pronunciations.phonemes else None
        lengths, above = frames.to(pool.device), known.to(pool.device)
        top, middle = upper(model, batch, lengths, frozen, pool, views=2, middle=head, above=above)
    texts = [text for _, text, _ in clips]
    sounds = [pronunciations.labels(text) if head else encode(text) for text in texts]
    total = MIDDLE * ctc(middle, frames.repeat(2), sounds * 2) + empty_frame(model.lm_head.bias)
    if not known.any():
        return total, float("nan")
    texts = [text for text, knows in zip(texts, known.tolist(), strict=True) if knows]
    letters = [encode(text) for text in texts]
    frames = frames[known]
    loss = ctc(top, frames.repeat(2), letters * 2)
    if words_count:
        total = total + WORD_ERRORS * expected_word_errors(top, frames.repeat(2), texts * 2)
    differ = disagreement(top, frames, sum(map(len, letters)))
    return total + loss + CONSISTENCY * differ, loss.item()


def optimizers_for(model: Any, dtype: Any) -> list[Any]:
    """Muon, in ``dtype``, for the matrices between layers, which learns from fewer steps, and AdamW for all else."""
    matrices: list[Any] = []
    rest: list[Any] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and "rel_embeddings" not in name and "head" not in name
        (matrices if matrix else rest).append(parameter)
    muon = Muon(matrices, PEAK_RATE, weight_decay=0.05, momentum=0.95, dtype=dtype)
    return [muon, torch.optim.AdamW(rest, PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.02, fused=True)]


def dropout_pool(size: int) -> Any:
    """Dropout's factors, to be taken from any place: 0 for a share of DROPOUT, and what keeps the mean at 1."""
    return (torch.rand(size) >= DROPOUT) / (1 - DROPOUT)


def shared_mean(parameters: list[Any], seconds: float) -> float:
    """Make every process's gradients the mean of all, and give the mean of ``seconds``: all keep the same clock.

    A step of more than ten seconds was a pause of the machine, and counts as ten.
    """
    if not dist.is_initialized():
        return min(seconds, 10.0)
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in learned:
        if parameter.grad is None:  # this batch ended below it; another process's may not have
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in learned]
    clock = torch.full((1,), min(seconds, 10.0), device=gradients[0].device)
    flat = torch.cat([clock, *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    mean_seconds, *means = torch.split(flat, [1, *(gradient.numel() for gradient in gradients)])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
    return float(mean_seconds)


def copied(model: Any, device: str | None = None) -> dict[str, Any]:
    return {name: value.detach().to(device, copy=True) for name, value in model.state_dict().items()}


def train(
    model: Any,
    sources: Sources,
    dev: list[Clip],
    pronunciations: Pronunciations,
    options: argparse.Namespace,
    device: str,
) -> None:
    """Train until ``options.minutes`` of training are over; leaves best.pt, state.pt and curve.png in the folder."""
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    optimizers = optimizers_for(model, dtype)
    pool = dropout_pool(1 << 22).to(device, dtype)
    state_file, best_file, words_file = (options.out / f"{name}.pt" for name in ("state", "best", "words"))
    history: list[dict[str, float]] = []
    snapshots: deque[dict[str, Any]] = deque(maxlen=8)
    losses: list[float] = []
    elapsed, step, store = 0.0, 0, Store(0, sources.rng)
    if state_file.exists():
        state = torch.load(state_file, weights_only=False)
        model.load_state_dict(state["model"])
        for optimizer, found in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(found)
        history, elapsed, step, snapshots = state["history"], state["elapsed"], state["step"], state["snapshots"]
        sources.rng = np.random.default_rng([options.seed, step, RANK])
        print(f"going on from step {step}, {elapsed / 60:.1f} minutes", flush=True)
    limit, evaluated, kept, aligned = options.minutes * 60, elapsed if history else -1e9, elapsed, -1.0
    if words_file.exists():
        cut = torch.load(words_file, weights_only=False)
        sources.words, aligned = {source: CutWords(speakers) for source, speakers in cut.items()}, elapsed / limit
    while True:
        progress = min(elapsed / limit, 1.0)
        if elapsed - evaluated > min(300, limit / 15) or progress == 1:
            evaluated, now = elapsed, copied(model)
            model.load_state_dict(average(snapshots) if snapshots else now)
            wer = word_error_rate(model, dev)
            if wer < min((row["wer"] for row in history), default=2.0) and RANK == 0:
                with whole(best_file) as part:
                    torch.save(model.state_dict(), part)
            if wer < 0.6 and progress - aligned > 0.3:
                sources.cut(model)
                aligned = progress
                if RANK == 0:
                    with whole(words_file) as part:
                        torch.save({source: words.speakers for source, words in sources.words.items()}, part)
                for source, words in sources.words.items():
                    print(f"{source}: {sum(map(len, words.speakers))} pieces cut", flush=True)
            model.load_state_dict(now)
            mean = float(np.nanmean(losses)) if losses else float("nan")
            history.append({"step": step, "minutes": elapsed / 60, "loss": mean, "wer": wer})
            print(" ".join(f"{key} {value:.3f}" for key, value in history[-1].items()), flush=True)
            losses = []
            if RANK == 0:
                state = {"model": now, "optimizers": [o.state_dict() for o in optimizers], "history": history}
                state |= {"elapsed": elapsed, "step": step, "snapshots": snapshots}
                with whole(state_file) as part:
                    torch.save(state, part)
                draw_curve(history, options.out / "curve.png")
        if progress == 1:
            break
        # Short clips first: a first letter is easier to find in a short one.
        longest = 18.0 if options.init or progress > 0.1 else 2.0 + 160 * progress
        # The first convolutions run at 3,200 to 400 steps a second, which would make everything slower by half, and
        # remain a filter bank; those down to 100 steps a second have learned what they will well before the end.
        frozen = 11 if progress > TRAINED_CONVOLUTIONS else 7
        if store.frozen != frozen:
            model.sew_d.feature_extractor.conv_layers.requires_grad_(True)
            model.sew_d.feature_extractor.conv_layers[:frozen].requires_grad_(False)
            store.freeze(model, frozen)
        if not store.clips:
            store.add(model, sources.draw(options.hours * 3600, progress, longest))
        model.train()
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        started = time.monotonic()
        for clips in store.batches():
            store.add(model, sources.draw(RENEWED * BATCH_SECONDS, progress, longest))
            loss, ctc_loss = train_step(model, clips, frozen, pool, pronunciations, progress > WORDS_COUNT)
            loss.backward()
            ended = time.monotonic()
            elapsed += shared_mean(learned, ended - started)
            started = ended
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            for optimizer, factor in zip(optimizers, (MUON_FACTOR, 1.0), strict=True):
                optimizer.param_groups[0]["lr"] = factor * rate_at(progress, options.rate)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(ctc_loss)
            step += 1
            if elapsed - kept > limit / 50:
                kept = elapsed
                snapshots.append(copied(model, "cpu"))


def draw_curve(history: list[dict[str, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    minutes = [row["minutes"] for row in history]
    top.plot(minutes, [100 * row["wer"] for row in history], "o-", color="#0072b2")
    top.set(ylabel="dev WER [%]", ylim=(0, None))
    bottom.plot(minutes, [row["loss"] for row in history], "o-", color="#d55e00")
    bottom.set(xlabel="minutes of training", ylabel="training loss per letter", ylim=(0, None))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--speech", type=Path, required=True, help="folder of the corpora")
    parser.add_argument("--out", type=Path, default=Path("trained"), help="checkpoints, curve and the export")
    parser.add_argument("--minutes", type=float, default=120, help="training time, evaluation left out")
    parser.add_argument("--init", type=Path, help="checkpoint folder to start from, instead of warming the front end")
    parser.add_argument("--strength", type=float, default=1.0, help="of augmentation; 0.5 for a short training")
    parser.add_argument("--rate", type=float, default=PEAK_RATE, help="highest learning rate; less to refine a model")
    parser.add_argument("--strings", type=int, default=12000, help="text-to-speech strings")
    parser.add_argument("--kokoro", type=Path, nargs="+", help="more natural ones: files that neural_voices.py made")
    parser.add_argument("--hours", type=float, default=2.0, help="of sound in the store before the first step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_flush_denormal(True)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    rng = np.random.default_rng([options.seed, RANK])
    clips = {"an4": read_corpus(options.speech / "an4", "train")}
    options.out.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        synthesize(options.strings, options.out, options.seed)  # the others read what this one has written
    if dist.is_initialized():
        dist.barrier()
    clips["spoken"] = synthesize(options.strings, options.out, options.seed)
    if options.kokoro:
        clips["kokoro"] = [clip for path in options.kokoro for clip in load_clips(path)]
    # Its dev part too: nothing is measured on LibriSpeech, and two more voices are worth having.
    clips["librispeech"] = [
        clip for part in ("train", "dev") for clip in read_corpus(options.speech / "mini_librispeech_opus", part)
    ]
    dev = read_corpus(options.speech / "an4", "dev")
    for name, corpus in clips.items():
        print(f"{name}: {len(corpus)} clips, {sum(clip.seconds for clip in corpus) / 60:.0f} minutes", flush=True)
    sources = Sources(clips, rng, options.strength)
    if options.init:
        model: Any = SEWDForCTC.from_pretrained(options.init, dtype=torch.float32)
        # A checkpoint made without SpecAugment lacks this vector, and transformers leaves it as memory was.
        torch.nn.init.uniform_(model.sew_d.masked_spec_embed)
        model.lm_head.bias.data[0] += lowered(options.init)
    else:
        model = SEWDForCTC(SEWDConfig(**CONFIG))
    pronunciations = Pronunciations(clip.text for corpus in clips.values() for clip in corpus)
    if pronunciations.phonemes:  # a head that is thrown away afterwards
        model.phoneme_head = torch.nn.Linear(model.config.hidden_size, len(pronunciations.phonemes) + 1)
    model = model.to(device)
    if not options.init and not (options.out / "state.pt").exists():
        warm_front_end(model, lambda seconds: sources.draw(seconds, longest=4.0), 600, device)
    if dist.is_initialized():
        for value in model.state_dict().values():
            dist.broadcast(value, 0)
        torch.manual_seed(options.seed + RANK)  # dropout and SpecAugment differ, as the batches do
    initial = copied(model, "cpu") if options.init else None
    train(model, sources, dev, pronunciations, options, device)
    if RANK:
        return
    best = torch.load(options.out / "best.pt", weights_only=True)
    snapshots = torch.load(options.out / "state.pt", weights_only=False)["snapshots"]
    chosen, figures = choose(model, finalists(best, snapshots, initial), dev, options.seed)
    if pronunciations.phonemes:
        del model.phoneme_head
    export(model, options.out / "an4", chosen, figures, options)
    check_twin(model, options.out / "an4", dev)


if __name__ == "__main__":
    if "WORLD_SIZE" in os.environ:  # set by torchrun
        dist.init_process_group()
    with contextlib.redirect_stdout(None if RANK else sys.stdout):
        main()
    if dist.is_initialized():
        dist.destroy_process_group()
