"""What each rung of the CPU kernels gains: ``python -m benchmarks.ladder`` prints the table of docs/kernels.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit
from threadpoolctl import threadpool_limits

from benchmarks import peers
from sewd_np import attention, layers
from sewd_np.cpu_amx import available, pack_split
from sewd_np.cpu_gemm import pack, product, product_v1
from sewd_np.cpu_lines import LINE
from sewd_np.cpu_math import ACTIVATION_CODES, activate
from sewd_np.cpu_positions import add_by_key, add_by_key_v1, distances
from sewd_np.cpu_rows import layer_norm_v1, normalize_rows
from sewd_np.cpu_split import product_split, room_for

GELU = ACTIVATION_CODES["gelu"]


@njit(nogil=True, error_model="numpy")
def gelu_v1(x, out):  # type: ignore[no-untyped-def]
    """GELU by the C library's erf, one number at a time."""
    for i in range(len(x)):
        out[i] = 0.5 * x[i] * (1.0 + math.erf(x[i] * math.sqrt(0.5)))


@njit(nogil=True, error_model="numpy")
def gelu(x, out):  # type: ignore[no-untyped-def]
    """The kernels' own, which works in place: on a copy, for numbers that shrink at every call soon cost less."""
    out[:] = x
    activate(out, GELU)


@njit(nogil=True, error_model="numpy")
def walk(step, scores, width, by_key, first, buckets, shear):  # type: ignore[no-untyped-def]
    """``step`` over all keys of a block of 48 queries."""
    for key in range(0, width, LINE):
        step(scores, width, 48, by_key, width, 0, key, first + key, buckets, shear)


def row(what: str, calls: dict[str, Callable[[], Any]]) -> None:
    """One line: each step's time over the next one's. Without a matrix unit there is no such step."""
    if not available():
        calls.pop("matrix unit", None)
    times = peers.alternate(calls, 9)
    names = list(times)
    gains = [f"{b} {times[a] / times[b]:.1f}×" for a, b in pairwise(names)]
    print(f"| {what} | {names[0]} → {', → '.join(gains)} | {times[names[0]] / times[names[-1]]:.1f}× |", flush=True)


def main() -> None:
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    print("| kernel | steps, each over the one before | in all |\n|---|---|---|")
    m, k, n = 125, 384, 1536
    a, b, bias, c = noise(m * k), noise(k, n), noise(n), noise(m * n)
    panels = pack(b).reshape(-1)
    products = {
        "loops (v1)": lambda: product_v1(a, 0, k, m, k, b, bias, c, 0, n),
        "NumPy": lambda: a.reshape(m, k) @ b + bias,
        "register tiles, packed": lambda: product(a, 0, k, m, k, panels, 0, n, bias, c, 0, n),
    }
    halves = pack_split(b)
    room = room_for(halves, m * k, k)
    products["matrix unit"] = lambda: product_split(a, 0, k, m, k, halves, 0, n, bias, c, 0, n, room)
    row("product 125 × 384 × 1536", products)
    x, activated = noise(200_000), noise(200_000)
    row(
        "gelu of 200,000 numbers",
        {
            "loops, math.erf (v1)": lambda: gelu_v1(x, activated),
            "NumPy, scipy.special.erf": lambda: layers.gelu(x),
            "polynomial, vectors": lambda: gelu(x, activated),
        },
    )
    rows, weight = noise(500, 384), noise(384)
    out = np.empty_like(rows)
    flat = (rows.reshape(-1), 500, 384, weight, weight, 1e-7, out.reshape(-1), 0, 1)
    row(
        "layer norm 500 × 384",
        {
            "loops (v1)": lambda: layer_norm_v1(rows, weight, weight, 1e-7, out),
            "NumPy": lambda: layers.layer_norm(rows, weight, weight, 1e-7),
            "vectors": lambda: normalize_rows(*flat),
        },
    )
    frames, width, band = 1499, 1504, 512  # a minute
    buckets = distances(frames, 256, 512, 256).buckets
    terms = (noise(48 * width), width, noise(band * width), frames // 2, buckets, noise((48 + LINE) * LINE))
    row(
        "position to content, 48 × 1,499 pairs",
        {
            "down the diagonals (v1)": lambda: walk(add_by_key_v1, *terms),
            "sheared lines": lambda: walk(add_by_key, *terms),
        },
    )
    reference = peers.transformers_model("tiny")
    plain = peers.our_model(reference, "numba", 1, "highest")
    one, two = (peers.our_model(reference, "numba", threads) for threads in (1, 2))
    numpy = peers.our_model(reference, "numpy")
    config, wave_bn = one.config, peers.audio(10)
    encoder = (config.conv_stride, "group", 1e-5, "gelu")
    row(
        "feature encoder, 10 s",
        {
            "NumPy, layer by layer": lambda: layers.feature_encoder(wave_bn, numpy.weights.feature_encoder, *encoder),
            "tiles of time": lambda: plain.ops.feature_encoder(wave_bn, plain.weights.feature_encoder, *encoder),
            "matrix unit": lambda: one.ops.feature_encoder(wave_bn, one.weights.feature_encoder, *encoder),
            "two threads": lambda: two.ops.feature_encoder(wave_bn, two.weights.feature_encoder, *encoder),
        },
    )
    heads, scale, qkv = config.num_attention_heads, config.score_scale, noise(1, 250, 3 * 384)
    span = (config.position_buckets, config.max_relative_distance, config.position_span)
    index, by_difference = attention.relative_index(250, *span), one.ops.relative_index(250, *span)
    positions, packed, halved = (model.weights.layers[0].attention.positions for model in (numpy, plain, one))
    row(
        "attention, 10 s, one layer",
        {
            "NumPy, head by head": lambda: attention.disentangled_attention(qkv, heads, positions, index, scale),
            "fused blocks, band": lambda: plain.ops.disentangled_attention(qkv, heads, packed, by_difference, scale),
            "matrix unit": lambda: one.ops.disentangled_attention(qkv, heads, halved, by_difference, scale),
        },
    )
    row(
        "tiny, 10 s, whole",
        {
            "NumPy": lambda: numpy(wave_bn),
            "Numba, float32": lambda: plain(wave_bn),
            "matrix unit": lambda: one(wave_bn),
            "two threads": lambda: two(wave_bn),
        },
    )


if __name__ == "__main__":
    with threadpool_limits(1):  # NumPy's products on one thread, as ours are in the first steps
        main()
