"""The stages of attention one by one on the GPU, for a trace that asks what lies inside the fused kernel.

Each writes a whole matrix (b, h, i, j), as in ``attention``, where every stage is defined: here they are to look at and
to compare with, not for speed, and none does more than its name says. One thread writes one number, neighbouring
threads neighbouring numbers; only the softmax puts a warp on a row. The stages take ``rows``, r by difference
(``cuda_attention.relative_rows``), instead of r by pair.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from sewd_np.cuda_intrinsics import cuda, exp2, float32, group_max, group_sum, kernel, load, store
from sewd_np.cuda_tiled_attention import MASKED, ZERO

LOG2_E = float32(math.log2(math.e))
THREADS = 256
LANES = 32  # of the warp that a softmax row is given; the simulator's too
ROWS = THREADS // LANES  # softmax rows of one block


def blocks(numbers: int) -> int:
    return -(-numbers // THREADS)


# ------------------------------------------------------------------------- the kernels


@cache
def split_kernel() -> Any:
    """Thread (b, t, c): one number of q, of k and of v. At most 32 registers."""

    @kernel(threads=THREADS)
    def split(qkv, numbers, width, q, k, v):
        at = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if at < numbers:
            source = at // width * 3 * width + at % width
            store(q, at, load(qkv, source))
            store(k, at, load(qkv, source + width))
            store(v, at, load(qkv, source + 2 * width))

    return split


@cache
def content_kernel() -> Any:
    """Thread (b, h, i, j): q_i · k_j / scale. At most 48 registers."""

    @kernel(threads=THREADS)
    def content(q, k, frames, heads, size, scale, out):
        at = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if at < frames * frames:
            i = at // frames
            j = at % frames
            pair = cuda.blockIdx.y
            start = pair // heads * frames * heads * size + pair % heads * size
            score = ZERO
            for c in range(size):
                score += load(q, start + i * heads * size + c) * load(k, start + j * heads * size + c)
            store(out, pair * frames * frames + at, score / scale)

    return content


@cache
def position_kernel(of_query: bool) -> Any:
    """Thread (b, h, i, j): x_i · table[r(i−j)] / scale, or x_j · … where x is the key. At most 48 registers."""

    @kernel(threads=THREADS)
    def position(x, table, rows, frames, heads, buckets, size, scale, out):
        at = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if at < frames * frames:
            i = at // frames
            j = at % frames
            pair = cuda.blockIdx.y
            h = pair % heads
            frame = j
            if of_query:
                frame = i
            own = (pair // heads * frames + frame) * heads * size + h * size
            place = (h * buckets + load(rows, i - j + frames - 1)) * size
            score = ZERO
            for c in range(size):
                score += load(x, own + c) * load(table, place + c)
            store(out, pair * frames * frames + at, score / scale)

    return position


@cache
def add_kernel(terms: int) -> Any:
    """Thread (b, h, i, j): first + (second + third), as many as there are. At most 32 registers."""

    @kernel(threads=THREADS)
    def add(first, second, third, numbers, out):
        at = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if at < numbers:
            score = load(first, at)
            if terms == 2:
                score += load(second, at)
            if terms == 3:
                score += load(second, at) + load(third, at)
            store(out, at, score)

    return add


@cache
def softmax_kernel(padded: bool, mask_queries: bool) -> Any:
    """Warp (b, h, i): the largest score of the row, the weights and their sum, the division. At most 40 registers."""

    @kernel(threads=THREADS)
    def softmax(scores, lengths, rows, heads, frames, out):
        row = cuda.blockIdx.x * ROWS + cuda.threadIdx.x // LANES
        lane = cuda.threadIdx.x % LANES
        if row < rows:
            valid = frames
            if padded:
                valid = min(lengths[row // frames // heads], frames)
                if mask_queries and row % frames >= valid:
                    valid = 0
            start = row * frames
            largest = MASKED
            for j in range(lane, valid, LANES):
                largest = max(largest, load(scores, start + j))
            largest = group_max(largest, LANES)
            total = ZERO
            for j in range(lane, valid, LANES):
                total += exp2((load(scores, start + j) - largest) * LOG2_E)
            total = group_sum(total, LANES)
            for j in range(lane, frames, LANES):
                weight = ZERO
                if j < valid:
                    weight = exp2((load(scores, start + j) - largest) * LOG2_E) / total
                store(out, start + j, weight)

    return softmax


@cache
def context_kernel() -> Any:
    """Thread (b, i, c): the sum over j of probs[i, j] · v_j. At most 48 registers."""

    @kernel(threads=THREADS)
    def context(probs, v, numbers, frames, heads, size, out):
        at = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if at < numbers:
            width = heads * size
            frame = at // width  # b · t + i
            column = at % width
            b = frame // frames
            row = ((b * heads + column // size) * frames + frame % frames) * frames
            value = b * frames * width + column
            total = ZERO
            for j in range(frames):
                total += load(probs, row + j) * load(v, value + j * width)
            store(out, at, total)

    return context


# --------------------------------------------------------------------------- launching


def split_qkv(stream: Any, qkv: Any, q: Any, k: Any, v: Any) -> None:
    """qkv (b, t, 3d) → q, k and v, each (b, t, d)."""
    split_kernel()[blocks(q.size), THREADS, stream](qkv, q.size, q.shape[2], q, k, v)


def content_scores(stream: Any, q: Any, k: Any, heads: int, scale: float, out: Any) -> None:
    """c2c: q and k (b, t, d) → (b, h, i, j)."""
    batch, frames, width = q.shape
    grid = (blocks(frames * frames), batch * heads)
    content_kernel()[grid, THREADS, stream](q, k, frames, heads, width // heads, np.float32(scale), out)


def content_to_position(stream: Any, q: Any, pos_key: Any, rows: Any, scale: float, out: Any) -> None:
    """c2p: q (b, t, d), pos_key (h, p, e), rows (2t − 1,) → (b, h, i, j)."""
    position_scores(stream, True, q, pos_key, rows, scale, out)


def position_to_content(stream: Any, k: Any, pos_query: Any, rows: Any, scale: float, out: Any) -> None:
    """p2c: k (b, t, d), pos_query (h, p, e), rows (2t − 1,) → (b, h, i, j)."""
    position_scores(stream, False, k, pos_query, rows, scale, out)


def position_scores(stream: Any, of_query: bool, x: Any, table: Any, rows: Any, scale: float, out: Any) -> None:
    batch, frames, _ = x.shape
    heads, buckets, size = table.shape
    grid = (blocks(frames * frames), batch * heads)
    run = position_kernel(of_query)
    run[grid, THREADS, stream](x, table, rows, frames, heads, buckets, size, np.float32(scale), out)


def add_scores(stream: Any, terms: tuple[Any, ...], out: Any) -> None:
    """One, two or three terms (b, h, i, j) → their sum."""
    first, second, third = (*terms, *[terms[0]] * (3 - len(terms)))  # the kernel reads only as many as there are
    add_kernel(len(terms))[blocks(out.size), THREADS, stream](first, second, third, out.size, out)


def masked_softmax(stream: Any, scores: Any, lengths: Any | None, mask_queries: bool, out: Any) -> None:
    """Scores (b, h, i, j) → probabilities; ``out`` may be ``scores``. lengths (b,) int32 or None."""
    batch, heads, frames, _ = scores.shape
    padded = lengths is not None
    rows = batch * heads * frames
    run = softmax_kernel(padded, padded and mask_queries)
    run[-(-rows // ROWS), THREADS, stream](scores, lengths if padded else scores, rows, heads, frames, out)


def context(stream: Any, probs: Any, v: Any, out: Any) -> None:
    """Probabilities (b, h, i, j) and v (b, t, d) → (b, t, d)."""
    heads, frames = probs.shape[1:3]
    size = v.shape[2] // heads
    context_kernel()[blocks(out.size), THREADS, stream](probs, v, out.size, frames, heads, size, out)
