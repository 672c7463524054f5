"""CPU benchmarks: this package beside transformers and ONNX Runtime, in one process, taking turns.

    python -m benchmarks.cpu                       # everything (about 15 minutes on two cores)
    python -m benchmarks.cpu speed stages          # some of it
    python -m benchmarks.cpu plot -o picture.png   # time against length of recording

Speeds are compared by medians of calls that take turns, because absolute times on a shared machine mean little; in the
plot, peers have recordings beyond a minute in processes of their own, where they may fail. Weights are random: the
arithmetic is the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sewd_np
from benchmarks import peers
from sewd_np.info import count_multiply_adds
from sewd_np.memory import available_memory

SPEED = [  # shape, seconds of sound, threads, rounds; goals: transformers' time and ONNX Runtime's over ours
    ("tiny", 10, 2, 15, 2.0, 1.4),
    ("tiny", 60, 2, 5, 4.5, 3.0),
    ("mid", 10, 2, 9, 1.8, 1.3),
    ("tiny", 10, 1, 9, 1.5, 1.3),
]


def reference_call(model: torch.nn.Module, wave_bn: np.ndarray) -> Callable[[], torch.Tensor]:
    """transformers, eager, in inference mode."""
    inputs = torch.from_numpy(wave_bn)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(inputs).logits
        return logits

    return call


def speed() -> None:
    """Time of one recording: transformers and ONNX Runtime over ours, as it comes and with float32 products only."""
    print("\n## Speed: peers' median time over ours; in brackets with precision highest\n")
    print("| shape | audio | threads | ours [ms] | transformers / ours | goal | ONNX Runtime / ours | goal |")
    print("|---|---|---|---|---|---|---|---|")
    for shape, seconds, threads, rounds, goal, onnx_goal in SPEED:
        torch.set_num_threads(threads)
        reference = peers.transformers_model(shape)
        wave_bn = peers.audio(seconds)
        session = peers.onnx_session(reference, wave_bn.shape[1], threads)
        calls: dict[str, Callable[[], Any]] = {
            "transformers": reference_call(reference, wave_bn),
            "onnx": lambda session=session, wave_bn=wave_bn: session.run(None, {"x": wave_bn}),
        }
        for precision in ("high", "highest"):
            model = peers.our_model(reference, "numba", threads, precision)
            calls[precision] = lambda model=model, wave_bn=wave_bn: model(wave_bn)
        t = peers.alternate(calls, rounds)
        eager, onnx = (f"{t[peer] / t['high']:.2f} ({t[peer] / t['highest']:.2f})" for peer in ("transformers", "onnx"))
        times = f"{1e3 * t['high']:.0f} ({1e3 * t['highest']:.0f})"
        print(f"| {shape} | {seconds} s | {threads} | {times} | {eager} | {goal} | {onnx} | {onnx_goal} |", flush=True)


def throughput(clips: int = 64, seconds: float = 3) -> None:
    """Many short recordings, in each one's best batch size; and a list of unequal ones in ``transcribe``."""
    torch.set_num_threads(2)
    reference = peers.transformers_model("tiny")
    ours = peers.our_model(reference, "numba", 2)
    waves = np.concatenate([peers.audio(seconds, seed) for seed in range(clips)])
    calls: dict[str, Callable[[], Any]] = {}
    for batch in (1, 4, 8, 16):
        parts = [waves[i : i + batch] for i in range(0, clips, batch)]
        theirs = [reference_call(reference, part) for part in parts]
        calls[f"ours, {batch}"] = lambda parts=parts: [ours(part) for part in parts]
        calls[f"theirs, {batch}"] = lambda theirs=theirs: [part() for part in theirs]
    ours.processor = sewd_np.load("an4").processor
    middle = clips // 2
    cut = [np.resize(wave, len(wave) + 97 * (i - middle)) for i, wave in enumerate(waves)]  # no two of one length
    calls["a list"] = lambda: sewd_np.transcribe(cut, ours)
    calls["a list, one by one"] = lambda: sewd_np.transcribe(cut, ours, batch_size=1)
    t = peers.alternate(calls, 3)
    best = {who: min((name for name in t if who in name), key=lambda name: t[name]) for who in ("ours", "theirs")}
    print(f"\n## Throughput: {clips} clips of {seconds} s, tiny, 2 threads; batch sizes 1, 4, 8, 16\n")
    print("; ".join(f"{name}: {value:.2f} s" for name, value in t.items()))
    print(f"transformers' best ({best['theirs']}) / our best ({best['ours']}): ", end="")
    print(f"{t[best['theirs']] / t[best['ours']]:.2f} (goal 2.5)")


def stages(seconds: float = 10) -> None:
    """Where the time goes, beside what the same multiply-adds take in plain matrix products."""
    reference = peers.transformers_model("tiny")
    ours, wave_bn = peers.our_model(reference, "numba", 2), peers.audio(seconds)
    spent: dict[str, list[float]] = {}

    def timed(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = operation(*arguments, **options)
            spent.setdefault(name, []).append(time.perf_counter() - start)
            return result

        return call

    table = {field.name: getattr(ours.ops, field.name) for field in dataclasses.fields(ours.ops)}
    plain = ours.ops
    del table["run"]  # which calls all the others
    ours.ops = dataclasses.replace(plain, **{name: timed(name, op) for name, op in table.items() if callable(op)})
    rounds = 9
    ours(wave_bn)  # the first call loads the kernels
    spent.clear()
    for _ in range(rounds):
        ours(wave_bn)
    ours.ops = plain
    parts = count_multiply_adds(ours.config, "ctc", wave_bn.shape[1])
    total = sum(parts.values())
    rate = product_rate(threads=2)
    bound = total / rate
    print(f"\n## Stages: tiny, {seconds} s, 2 threads\n")
    print(f"multiply-adds {total / 1e9:.2f} G; measured product rate {rate / 1e9:.0f} G multiply-adds a second")
    whole = peers.alternate({"ours": lambda: ours(wave_bn)}, 9)["ours"]
    print(f"matrix-product bound {1e3 * bound:.0f} ms, whole pass {1e3 * whole:.0f} ms: {whole / bound:.2f} times\n")
    print("| operation | share of the time |\n|---|---|")
    seconds_of = {name: sum(times) for name, times in spent.items()}
    everything = sum(seconds_of.values())
    for name, value in sorted(seconds_of.items(), key=lambda item: -item[1])[:8]:
        print(f"| {name} | {100 * value / everything:.0f} % |")


def product_rate(threads: int) -> float:
    """Multiply-adds a second of NumPy's products, one a thread on ``threads`` threads, over the model's shapes."""
    from threadpoolctl import threadpool_limits

    shapes = [(125, 384, 1152), (125, 384, 1536), (125, 1536, 384), (1024, 384, 128), (512, 384, 256), (128, 1024, 512)]
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal((m, k), np.float32), rng.standard_normal((k, n), np.float32)) for m, k, n in shapes]

    def work() -> None:
        for _ in range(10):
            for a, b in pairs:
                np.matmul(a, b)  # lets other threads run meanwhile, as SciPy's own sgemm does not

    best = 0.0
    with threadpool_limits(1):
        for _ in range(5):
            members = [threading.Thread(target=work) for _ in range(threads)]
            start = time.perf_counter()
            for member in members:
                member.start()
            for member in members:
                member.join()
            done = threads * 10 * sum(m * k * n for m, k, n in shapes)
            best = max(best, done / (time.perf_counter() - start))
    return best


def error() -> None:
    """Largest error of the logits against float64, ours at both precisions and PyTorch's own."""
    reference, wave_bn = peers.transformers_model("tiny"), peers.audio(10)
    logits = {
        f"ours, {precision}": peers.our_model(reference, "numba", 2, precision)(wave_bn).logits
        for precision in ("high", "highest")
    }
    logits["PyTorch, float32"] = reference_call(reference, wave_bn)().numpy()
    exact = reference_call(reference.double(), wave_bn.astype(np.float64))().numpy()
    print("\n## Error against float64, tiny, 10 s, relative to the largest logit (2e-4 allowed)\n")
    print(", ".join(f"{name} {np.abs(some - exact).max() / np.abs(exact).max():.1e}" for name, some in logits.items()))


MEMORY = """
import ctypes, sys
from benchmarks import peers
which, seconds = sys.argv[1], float(sys.argv[2])
reference = peers.transformers_model("tiny")
if which == "ours":
    model = peers.our_model(reference, "numba", 2)
    del reference
    call = lambda wave: model(wave)
else:
    from benchmarks.cpu import reference_call
    call = lambda wave: reference_call(reference, wave)()
call(peers.audio(1))
wave = peers.audio(seconds)
def rss():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be had again for nothing
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = rss()
call(wave)
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
print((peak - before) / 1024)
"""


def memory() -> None:
    """Peak memory during one call beyond what stood before it (Linux)."""
    print("\n## Peak memory of one call, tiny, beyond what stood before\n")
    print("| audio | ours [MB] | transformers [MB] |\n|---|---|---|")
    for seconds in (10, 60, 600):
        row = []
        for which in ("ours", "transformers"):
            if which == "transformers" and seconds > 60:
                row.append("not run")
                continue
            done = subprocess.run([sys.executable, "-c", MEMORY, which, str(seconds)], capture_output=True, text=True)
            row.append(f"{float(done.stdout):.0f}" if done.returncode == 0 else last_words(done))
        print(f"| {seconds} s | {' | '.join(row)} |", flush=True)


COLD = """
import time; start = time.perf_counter()
import numpy as np, sewd_np
sewd_np.transcribe(np.random.default_rng(0).standard_normal(48000).astype(np.float32), backend="numba")
print(time.perf_counter() - start)
"""


def cold() -> None:
    """First transcript of a 3 s clip in a fresh process, before and after the kernels are compiled."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        times = []
        for _ in range(3):
            done = subprocess.run([sys.executable, "-c", COLD], env=environment, stdout=subprocess.PIPE, check=True)
            times.append(float(done.stdout))
    print("\n## Cold start: import, load an4, first transcript of 3 s\n")
    print(f"first time, compiling: {times[0]:.0f} s (goal 60); later: {min(times[1:]):.1f} s (goal 2)")


PEER = """
import sys, time
import torch
from benchmarks import cpu, peers
which, seconds = sys.argv[1], float(sys.argv[2])
torch.set_num_threads(2)
reference, wave_bn = peers.transformers_model("tiny"), peers.audio(seconds)
if which == "transformers":
    call = cpu.reference_call(reference, wave_bn)
else:
    try:
        session = peers.onnx_session(reference, wave_bn.shape[1], 2)
    except Exception:
        sys.exit(cpu.NO_EXPORT)
    call = lambda: session.run(None, {"x": wave_bn})
call()
start = time.perf_counter()
call()
print(time.perf_counter() - start)
"""
PEER_MEMORY, PEER_SECONDS = 16 * 2**30, 200  # the most that a peer may take in the plot
NO_EXPORT = "not exported"  # for that transformers' own pass is run


def peer_time(which: str, seconds: float) -> float | str:
    """Seconds of a peer's second pass, in a process of its own; or in words why there is none."""
    memory = int(min(PEER_MEMORY, available_memory() or PEER_MEMORY))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    command = [sys.executable, "-c", PEER, which, str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PEER_SECONDS, preexec_fn=limit)
    except subprocess.TimeoutExpired:
        return f"not done after {PEER_SECONDS} s"
    if done.returncode == 0:
        return float(done.stdout)
    if last_words(done) == NO_EXPORT:
        return f"{NO_EXPORT} within {memory / 2**30:.0f} GiB"
    no_memory = any(word in done.stderr for word in ("allocate", "bad_alloc", "MemoryError"))
    return f"more than {memory / 2**30:.0f} GiB" if no_memory else last_words(done)


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process ended: the last line of its complaint, or the signal that ended it."""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"ended by signal {-done.returncode}"


def draw(path: Path, lines: dict[str, list[tuple[float, float]]], stops: dict[str, str]) -> None:
    """The plot of ``plot``: (seconds of sound, seconds of a pass) of each, and why some stop before the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, points), colour, marker in zip(lines.items(), ("#0072b2", "#e69f00", "#555555"), "os^", strict=True):
        label = f"{name} (at {stops[name]})" if name in stops else name
        axes.loglog(*zip(*points, strict=True), marker=marker, color=colour, label=label)
    axes.set(xlabel="length of recording [s]", ylabel="time of one pass [s]")
    axes.set_title(f"SEW-D tiny, two CPU threads\n{machine()}", fontsize="medium")  # names of processors are long
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def plot(path: Path) -> None:
    """Time against length, 1 s to 10 min; the peers as far as memory allows, ONNX Runtime with one export a length."""
    torch.set_num_threads(2)
    reference = peers.transformers_model("tiny")
    ours = peers.our_model(reference, "numba", 2)
    lines: dict[str, list[tuple[float, float]]] = {"sewd_np, numba": [], "ONNX Runtime": [], "transformers": []}
    stops: dict[str, str] = {}
    for seconds in (1, 3, 10, 30, 60, 180, 600):
        wave_bn = peers.audio(seconds)
        calls: dict[str, Callable[[], Any]] = {"sewd_np, numba": lambda wave_bn=wave_bn: ours(wave_bn)}
        if seconds <= 60:
            session = peers.onnx_session(reference, wave_bn.shape[1], 2)
            calls["ONNX Runtime"] = lambda session=session, wave_bn=wave_bn: session.run(None, {"x": wave_bn})
            calls["transformers"] = reference_call(reference, wave_bn)
        for name, value in peers.alternate(calls, 9 if seconds <= 10 else 3 if seconds <= 60 else 1).items():
            lines[name].append((seconds, value))
        for name in ("ONNX Runtime", "transformers") if seconds > 60 else ():  # by themselves: they may not survive it
            if name not in stops:
                found = peer_time(name, seconds)
                if isinstance(found, str):
                    stops[name] = f"{seconds} s: {found}"
                else:
                    lines[name].append((seconds, found))
        found_now = {who: time for who, points in lines.items() for at, time in points[-1:] if at == seconds}
        print(f"{seconds} s: " + ", ".join(f"{who} {time:.3f} s" for who, time in found_now.items()), stops, flush=True)
    draw(path, lines, stops)
    print(f"\n{path}: " + "; ".join(f"{name} {points}" for name, points in lines.items()))
    print("; ".join(f"{name} stops at {reason}" for name, reason in stops.items()) or "Nobody stops.")


PARTS: dict[str, Callable[[], None]] = {
    "speed": speed,
    "throughput": throughput,
    "stages": stages,
    "error": error,
    "memory": memory,
    "cold": cold,
}


def machine() -> str:
    """Processor, cores and date."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "plot", []], help="what to measure (default: all)")
    parser.add_argument("-o", "--output", type=Path, default=Path("time-against-length.png"), help="picture of `plot`")
    options = parser.parse_args()
    if not options.output.parent.is_dir():  # said now, not after fifteen minutes
        parser.error(f"the picture {str(options.output)!r} is in a folder that does not exist.")
    print(f"# {machine()}")
    for part in options.parts or [*PARTS, "plot"]:
        if part == "plot":
            plot(options.output)
        else:
            PARTS[part]()


if __name__ == "__main__":
    main()
