"""GPU benchmarks: this package beside transformers (eager and compiled), in one process, taking turns.

    python -m benchmarks.gpu                    # everything
    python -m benchmarks.gpu attention long     # some of it

Float32 with TF32 off on both sides. Times are medians by device events, which bracket a call on its own stream; a call
of a whole model includes the copies of samples to the device and of logits back. Our attention alone is recorded as a
graph, as the model does with short clips; peers are called by Python, as they are used. Weights are random: the
arithmetic is the same. Ratios are what counts: a peer's time over ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.models.sew_d import modeling_sew_d as reference

from benchmarks import peers
from sewd_np import cuda_attention
from sewd_np.backend import device_operations
from sewd_np.cuda_device import describe
from sewd_np.cuda_graph import capture_graph
from sewd_np.cuda_intrinsics import cuda
from sewd_np.cuda_launch import open_device, raw
from sewd_np.model import CONV_NORM_EPS

ROUNDS = 30
REPEATS = 10  # of a single kernel between two events: one takes less time than Python does to start it
WARM_UP = 5  # kernels are compiled, graphs recorded, torch.compile done
PEAK = 67e12  # float32 FLOP a second of an H200, by its data sheet
NEAR = 510  # frames apart beyond which all pairs of the published tables share a bucket

Call = Callable[[], Any]


def torch_events() -> tuple[Call, Callable[[], float]]:
    """Start, and stop with the milliseconds between, on PyTorch's stream."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def stop() -> float:
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    return first.record, stop


def our_events(stream: Any) -> tuple[Call, Callable[[], float]]:
    """The same on the stream of a ``Device``."""
    first, last = cuda.event(), cuda.event()

    def stop() -> float:
        last.record(stream)
        last.synchronize()
        return float(cuda.event_elapsed_time(first, last))

    return lambda: first.record(stream), stop


def medians(calls: dict[str, Call], stream: Any) -> dict[str, float]:
    """Median milliseconds of each call, "ours" on ``stream``; they take turns, so that a busy spell meets them all."""
    events = {name: our_events(stream) if name.startswith("ours") else torch_events() for name in calls}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(WARM_UP + ROUNDS):
        for name, call in calls.items():
            start, stop = events[name]
            torch.cuda.synchronize()
            cuda.synchronize()
            start()
            call()
            took = stop()
            if number >= WARM_UP:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def repeated(calls: dict[str, Call]) -> dict[str, Call]:
    """Each call REPEATS times."""
    return {name: lambda call=call: [call() for _ in range(REPEATS)] for name, call in calls.items()}


def recorded(stream: Any, call: Call) -> Call:
    """The same as one graph, as the model replays short clips: Python starts it once."""
    call()  # compiled and loaded before: a recording must do neither
    return capture_graph(stream, lambda: [call() for _ in range(REPEATS)])


def compiled(module: Any) -> Any:
    """``torch.compile`` for this one size, whatever other sizes of the same code came before."""
    torch._dynamo.reset()
    return torch.compile(module, dynamic=False)


def row(what: str, t: dict[str, float], goal: str, more: str = "") -> None:
    """A line of the table: ours, and each peer over ours."""
    ratios = " | ".join(f"{t[name] / t['ours']:.2f} ×" for name in t if not name.startswith("ours"))
    print(f"| {what} | {t['ours']:.3f} | {ratios} | {goal} | {more} |", flush=True)


def attention(heads: int = 12, size: int = 64) -> None:
    """The fused kernel alone, positions already projected, beside the eager core of transformers' module."""
    device = open_device()
    rng = np.random.default_rng(0)
    for frames, goal in ((500, "≥ 2 ×"), (4000, "≥ 3 ×, ≥ 50 % of peak")):
        qkv = device.from_numpy(rng.standard_normal((1, frames, 3 * heads * size)))
        tables = [device.from_numpy(rng.standard_normal((heads, 512, size))) for _ in range(2)]
        out, rows = device.from_numpy(np.zeros((1, frames, heads * size))), device.relative_index(frames, 256, 512, 256)
        wanted = cuda_attention.attention_scratch(1, frames, heads, size)
        scratch = device.from_numpy(np.zeros(wanted)) if wanted else None
        inputs = (qkv.data, heads, tables[0].data, tables[1].data, rows.data, (3 * size) ** 0.5, None, False)
        given = (*inputs, out.data, raw(scratch))

        config = reference.SEWDConfig(hidden_size=heads * size, num_attention_heads=heads)
        module = reference.DisentangledSelfAttention(config).eval().cuda()
        # What is given is projected already: the module's own projections stand aside.
        module.query_proj = module.key_proj = module.value_proj = torch.nn.Identity()
        x, mask = torch.randn(1, frames, heads * size, device="cuda"), torch.ones(1, 1, frames, frames, device="cuda")
        table = torch.randn(512, heads * size, device="cuda")
        relative = reference.build_relative_position(frames, frames, 256, 512, device=torch.device("cuda"))

        def peer(run: Any, x: Any = x, mask: Any = mask, relative: Any = relative, table: Any = table) -> Call:
            return torch.inference_mode()(lambda: run(x, mask, relative_pos=relative, rel_embeddings=table))

        def ours(given: Any = given) -> None:
            cuda_attention.disentangled_attention(device.stream, *given)

        started = {"ours one by one": ours, "eager": peer(module), "compiled": peer(compiled(module))}
        calls = {"ours": recorded(device.stream, ours), **repeated(started)}
        t = {name: took / REPEATS for name, took in medians(calls, device.stream).items()}
        near = frames * frames - max(frames - 1 - NEAR, 0) * max(frames - NEAR, 0)  # pairs at most NEAR apart
        flops = heads * (4 * frames * frames * size + 4 * size * near)
        share = flops / (t["ours"] / 1e3) / PEAK
        more = f"{100 * share:.0f} % of an H200's fp32 peak; {t['ours one by one']:.3f} ms if Python starts each call"
        row(f"attention, t = {frames}", t, goal, more)


def encoder(batch: int = 8, seconds: float = 30) -> None:
    """The feature encoder alone, beside PyTorch's: cuDNN convolutions, group norm, GELU."""
    device = open_device()
    theirs = peers.transformers_model("tiny")
    ours = peers.our_model_on(theirs, device_operations(device))
    wave_bn = np.concatenate([peers.audio(seconds, seed) for seed in range(batch)])
    on_device, config = device.from_numpy(wave_bn), ours.config
    module = theirs.sew_d.feature_extractor.cuda()
    samples = torch.from_numpy(wave_bn).cuda()
    quick = compiled(module)
    calls = {
        "ours": lambda: device.feature_encoder(
            on_device, ours.weights.feature_encoder, config.conv_stride, "group", CONV_NORM_EPS, "gelu"
        ),
        "eager": torch.inference_mode()(lambda: module(samples)),
        "compiled": torch.inference_mode()(lambda: quick(samples)),
    }
    row(f"feature encoder, {batch} × {seconds:g} s", medians(calls, device.stream), "≥ 1.2 ×")


def whole(shape: str, batch: int, seconds: float, goal: str) -> None:
    """A whole model, samples in and logits out, and the device memory that it takes: of a short clip both the first
    pass's and the recorded one's.
    """
    device = open_device()
    theirs = peers.transformers_model(shape)
    ours = peers.our_model_on(theirs, device_operations(device))
    theirs.cuda()
    weights = device.queue.pool.held
    wave_bn = np.concatenate([peers.audio(seconds, seed) for seed in range(batch)])

    def peer(run: Any) -> Call:
        return torch.inference_mode()(lambda: run(torch.from_numpy(wave_bn).cuda()).logits.cpu())

    calls = {"ours": lambda: ours(wave_bn).logits, "eager": peer(theirs), "compiled": peer(compiled(theirs))}
    t = medians(calls, device.stream)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    calls["eager"]()
    eager_memory = torch.cuda.max_memory_allocated() - before
    memory = 4 * (device.queue.pool.held - weights)
    memory += sum(4 * recording.pool.held for recording in device.queue.recordings.kept.values())
    more = f"peak memory {memory / 1e6:.0f} MB, eager {eager_memory / 1e6:.0f} MB"
    row(f"{shape}, {batch} × {seconds:g} s", t, goal, more)


def models() -> None:
    """One short clip, and batches."""
    whole("tiny", 1, 10, "≥ 2 ×")
    whole("tiny", 32, 10, "≥ 1.2 ×")
    whole("base-plus", 32, 10, "≥ 1.2 ×")


def long() -> None:
    """A recording of 160 s in one piece."""
    whole("tiny", 1, 160, "≥ 2.5 ×, ≤ 1/5 of the memory")


PARTS: dict[str, Callable[[], None]] = {"attention": attention, "encoder": encoder, "models": models, "long": long}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure (default: all)")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_grad_enabled(False)
    device = open_device()
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU; install one with CUDA, as pip's own on Linux is.")
    said = "; ".join(f"{name}: {value}" for name, value in describe(cuda, device.products).items())
    print(f"# {said}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    columns = ["work", "ours [ms]", "transformers eager / ours", "torch.compile / ours", "goal (eager)", "more"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for part in options.parts or PARTS:
        PARTS[part]()


if __name__ == "__main__":
    main()
