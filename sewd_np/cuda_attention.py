"""Fused disentangled attention on the GPU: scores, softmax and context in one kernel, never t × t in memory.

The ladder, ``attention.disentangled_attention`` being the definition:

v1  ``plain_kernel``: one thread per query frame and head, which walks all keys. Kept: it is the readable form, the
    yardstick of the tests, and what runs for head sizes that the last rung cannot take.
v2  ``tiled_kernel``: one block of threads per *tile* of query frames and head. Keys and values pass through shared
    memory in tiles; each thread keeps a small matrix of scores in registers. Softmax is *online*: when a tile brings a
    larger score than any before, what has been summed is scaled down.

What makes positions cheap. r(i − j) depends only on the difference, so that a tile of I × J pairs meets I + J − 1
differences, whose rows of pk and pq form a *band* that fits into shared memory. Thread (y, x) of an R × R block owns
the queries y + R·a and the keys x + R·b. Its differences are y − x + R·(a − b): the diagonals of its own small matrix,
each of which needs one row of the band. Both position terms are added straight onto q · k: three multiply-adds per
number, no lookup per pair. (The same r serves both terms: the log bucket is an odd function of i − j.)

Far tiles. Where all differences of a tile share the first or the last bucket (beyond about 510 frames with the
published tables), c2p is one number per query, found once, and p2c one number per key: a third of the work is left.

Parts. A short clip makes too few blocks for a GPU, and of a long one the last round of blocks may find most of it idle.
Where shorter blocks fill it better, the keys are cut into parts, each with blocks of its own, and ``combine_kernel``
adds what they found: an online softmax over parts instead of tiles. It takes room for one more context a part, which
grows with the length like everything else.

All sums are float32, all addresses 64-bit: qkv of ten minutes has 35 million numbers, and that is no limit. A masked
score is −1e30, not −∞, so that no difference of two infinities can arise; its weight 2^(−1e30 − m) is exactly 0.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from sewd_np.attention import log_bucket
from sewd_np.cuda_intrinsics import cuda, exp2, float32, kernel, load, load4, static_range, store, store4, zero4
from sewd_np.cuda_tiled_attention import MASKED, ZERO, Tile, shared_room, tiled_kernel

SHARED_FLOATS = 48 * 1024 // 4  # of a block, without asking the driver for more
PLAIN_THREADS = 128
COMBINING_THREADS = 256

LARGE = Tile(side=8, rows=8, columns=4, chunk=8, resident=4)  # 64 queries, 32 keys, 64 threads
SMALLER = (  # for larger heads, which leave less shared memory for the rest
    Tile(side=8, rows=4, columns=2, chunk=4, resident=4),
    Tile(side=8, rows=2, columns=2, chunk=4, resident=4),
)
MULTIPROCESSORS = 132  # of an H100 or H200
MOST_PARTS = 8
# What the choice of parts goes by, in the time of one tile of keys of a block that has its schedulers to itself.
# Estimates: a block is two warps, a multiprocessor issues for four, and a second pair fills the first one's waits.
SHARED_TIMES = (0.0, 1.0, 1.0, 1.5, 1.5)  # of that many blocks on one multiprocessor
BLOCK_TIME = 0.8  # reading the queries, writing the context and reading it again to combine
COMBINING_TIME = 0.5  # one more kernel
PART_PRICE = 0.05  # of each further part, as a share of the whole: so much must be gained for the memory it takes


# ------------------------------------------------------------------ relative positions


def relative_rows(frames: int, buckets: int, max_distance: int, span: int) -> np.ndarray:
    """``attention.relative_index`` by difference instead of by pair: rows[i − j + t − 1] = r. (2t − 1,) int32."""
    difference = np.arange(1 - frames, frames)
    bucket = log_bucket(difference, buckets, max_distance) if buckets > 0 else difference
    return np.clip(bucket + span, 0, 2 * span - 1).astype(np.int32)


# -------------------------------------------------------------------------------- v1


@cache
def plain_kernel(head_size: int, c2p: bool, p2c: bool, padded: bool, mask_queries: bool) -> Any:
    """v1: thread (b, h, i) walks the keys once and keeps its context in ``out``. At most 64 registers."""
    E = head_size

    @kernel(threads=PLAIN_THREADS)
    def plain_attention(qkv, pos_key, pos_query, rows, lengths, frames, heads, buckets, scale, out):
        i = cuda.blockIdx.x * PLAIN_THREADS + cuda.threadIdx.x
        if i >= frames:
            return
        b = cuda.blockIdx.y // heads
        h = cuda.blockIdx.y % heads
        d = heads * E
        valid = frames
        if padded:
            valid = min(lengths[b], frames)
        if mask_queries and i >= valid:
            valid = 0
        recording = b * frames * 3 * d + h * E
        q = recording + i * 3 * d
        target = (b * frames + i) * d + h * E
        for c in range(E):
            store(out, target + c, ZERO)
        largest = MASKED
        total = ZERO
        for j in range(valid):
            k = recording + j * 3 * d + d
            v = k + d
            score = ZERO
            if c2p or p2c:
                place = (h * buckets + load(rows, i - j + frames - 1)) * E
            for c in range(E):
                score += load(qkv, q + c) * load(qkv, k + c)
                if c2p:
                    score += load(qkv, q + c) * load(pos_key, place + c)
                if p2c:
                    score += load(qkv, k + c) * load(pos_query, place + c)
            score *= scale
            grown = max(largest, score)
            keep = exp2(largest - grown)
            weight = exp2(score - grown)
            largest = grown
            total = total * keep + weight
            for c in range(E):
                store(out, target + c, load(out, target + c) * keep + weight * load(qkv, v + c))
        if valid > 0:
            for c in range(E):
                store(out, target + c, load(out, target + c) / total)

    return plain_attention


# ------------------------------------------------------------------------------- parts


@cache
def combine_kernel(head_size: int) -> Any:
    """Thread (b, i, four columns): the parts' contexts, weighted by their shares of the softmax. At most 64 registers.

    context = Σ w_p · context_p / Σ w_p with w_p = sum_p · 2^(largest_p − largest), the scores being in base 2.
    """
    E = head_size

    @kernel(threads=COMBINING_THREADS)
    def combine(found, batch, frames, heads, parts, out):
        at = (cuda.blockIdx.x * COMBINING_THREADS + cuda.threadIdx.x) * 4
        d = heads * E
        numbers = batch * frames * d
        if at >= numbers:
            return
        row = at // d  # b · t + i
        b = row // frames
        h = (at - row * d) // E
        first = parts * numbers + ((b * heads + h) * frames + row - b * frames) * 2
        step = batch * heads * frames * 2
        largest = MASKED
        for part in range(parts):
            largest = max(largest, load(found, first + part * step))
        total = ZERO
        sums = cuda.local.array(4, float32)
        for z in static_range(4):
            sums[z] = ZERO
        for part in range(parts):
            weight = exp2(load(found, first + part * step) - largest) * load(found, first + part * step + 1)
            total += weight
            context = load4(found, part * numbers + at)
            for z in static_range(4):
                sums[z] += weight * context[z]
        if total == ZERO:  # no part had a key to attend to; a NaN goes the other way
            zero4(out, at)
        else:
            store4(out, at, sums[0] / total, sums[1] / total, sums[2] / total, sums[3] / total)

    return combine


# --------------------------------------------------------------------------- launching


def choose_tile(head_size: int) -> Tile | None:
    """The largest tile that fits, which reads each number from shared memory for the most multiply-adds; None: v1."""
    for tile in (LARGE, *SMALLER):
        whole = head_size % tile.chunk == 0 and head_size // 4 <= tile.threads
        if whole and shared_room(tile, head_size).size <= SHARED_FLOATS:
            return tile
    return None


def choose_parts(tile: Tile | None, frames: int, pairs: int) -> int:
    """Into how many parts the keys of ``pairs`` recordings times heads are cut: what is expected to take least time."""
    if tile is None:
        return 1
    blocks, steps = -(-frames // tile.queries) * pairs, -(-frames // tile.keys)
    at_once = len(SHARED_TIMES) - 1

    def expected_time(parts: int) -> float:
        full, rest = divmod(-(-blocks * parts // MULTIPROCESSORS), at_once)
        turns = full * SHARED_TIMES[-1] + SHARED_TIMES[rest]
        time = turns * (-(-steps // parts) + BLOCK_TIME) + COMBINING_TIME * (parts > 1)
        return time * (1 + PART_PRICE * (parts - 1))

    return min(range(1, min(MOST_PARTS, max(steps, 1)) + 1), key=expected_time)


def attention_scratch(batch: int, frames: int, heads: int, head_size: int, parts: int | None = None) -> int:
    """float32 numbers of scratch that ``disentangled_attention`` wants: none where the keys stay together."""
    if parts is None:
        parts = choose_parts(choose_tile(head_size), frames, batch * heads)
    return 0 if parts == 1 else parts * batch * heads * frames * (head_size + 2)


def disentangled_attention(
    stream: Any,
    qkv: Any,
    heads: int,
    pos_key: Any | None,
    pos_query: Any | None,
    rows: Any | None,
    scale: float,
    lengths: Any | None,
    mask_queries: bool,
    out: Any,
    scratch: Any | None = None,
    tile: Tile | None = None,
    parts: int | None = None,
) -> None:
    """Context of disentangled self-attention: qkv (b, t, 3d) → out (b, t, d), all of it written.

    ``pos_key`` and ``pos_query`` are the tables (h, p, e), None where there is no such term; ``rows`` is
    ``relative_rows`` on the device, None where there are no tables; ``lengths`` (b,) int32 or None; ``scale`` divides
    the scores. Every recording without a valid frame, and with ``mask_queries`` every padded frame, gives zeros.
    ``scratch``: ``attention_scratch`` numbers; without it the keys stay together. ``tile`` and ``parts`` overrule
    ``choose_tile`` and ``choose_parts``.
    """
    batch, frames, width = out.shape
    size, pairs = width // heads, batch * heads
    tile = tile or choose_tile(size)
    parts = 1 if scratch is None else parts or choose_parts(tile, frames, pairs)
    if tile is None:
        plain_attention(stream, qkv, heads, pos_key, pos_query, rows, scale, lengths, mask_queries, out)
        return
    flags = options(pos_key, pos_query, rows, lengths, mask_queries)
    run = tiled_kernel(tile, size, *flags, parts > 1)
    grid = (-(-frames // tile.queries), pairs, parts)
    part_keys = -(-frames // tile.keys // parts) * tile.keys
    given = arguments(qkv, heads, pos_key, pos_query, rows, scale, lengths)
    run[grid, tile.threads, stream](*given, part_keys, out if parts == 1 else scratch)
    if parts > 1:
        blocks = -(-out.size // (4 * COMBINING_THREADS))
        combine_kernel(size)[blocks, COMBINING_THREADS, stream](scratch, batch, frames, heads, parts, out)


def plain_attention(
    stream: Any,
    qkv: Any,
    heads: int,
    pos_key: Any | None,
    pos_query: Any | None,
    rows: Any | None,
    scale: float,
    lengths: Any | None,
    mask_queries: bool,
    out: Any,
) -> None:
    """v1 with the arguments of ``disentangled_attention``, of which it needs no scratch."""
    batch, frames, width = out.shape
    run = plain_kernel(width // heads, *options(pos_key, pos_query, rows, lengths, mask_queries))
    grid = (-(-frames // PLAIN_THREADS), batch * heads)
    run[grid, PLAIN_THREADS, stream](*arguments(qkv, heads, pos_key, pos_query, rows, scale, lengths), out)


def options(pos_key: Any, pos_query: Any, rows: Any, lengths: Any, mask_queries: bool) -> tuple[bool, bool, bool, bool]:
    """What a kernel is compiled for: c2p, p2c, padded, mask_queries."""
    padded = lengths is not None
    return (
        pos_key is not None and rows is not None,
        pos_query is not None and rows is not None,
        padded,
        padded and mask_queries,
    )


def arguments(
    qkv: Any, heads: int, pos_key: Any, pos_query: Any, rows: Any, scale: float, lengths: Any
) -> tuple[Any, ...]:
    """What both kernels are given first. qkv stands in for each absent array: no code that reads it is compiled."""
    tables = [table for table in (pos_key, pos_query) if table is not None]
    buckets = tables[0].shape[1] if tables else 0
    in_base_2 = np.float32(math.log2(math.e) / scale)
    absent = (array if array is not None else qkv for array in (pos_key, pos_query, rows, lengths))
    return qkv, *absent, qkv.shape[1], heads, buckets, in_base_2
