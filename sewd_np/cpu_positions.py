"""The position terms of attention on the CPU: which bucket two frames have, and adding its numbers to rows of scores.

    S[i, j] += C[i, r(i−j)] + P[r(i−j), j]        C = Q · PKᵀ (queries, band), P = PQ · Kᵀ (band, t)

The bucket r depends on the difference i − j alone, so 2t − 1 numbers say it for all pairs. With the tables stored back
to front r grows with j, one by one while the frames are near each other.

C is read along its rows (``add_by_bucket``): as it lies where r grows by one, by a gather elsewhere. P would be read
down its diagonals, another line of the cache with every number (``add_by_key_v1``). ``add_by_key`` instead takes a
strip of 16 keys (a line, ``cpu_lines``), one line for each difference that the block of queries needs, and shears the
strip upright: column l moves up by l, in one pass for each bit of l. Then what a query needs of the strip is a line.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sewd_np.attention import log_bucket
from sewd_np.cpu_amx import BLOCK, DEPTH, SIDE, pack_split
from sewd_np.cpu_gemm import aligned, pack
from sewd_np.cpu_lines import LINE, add_line, copy_line, mix_line
from sewd_np.cpu_math import vector_kernel
from sewd_np.cpu_split import split_rows

Array = np.ndarray


class Positions(NamedTuple):
    """A layer's projected position table, back to front, for the fused kernel; empty arrays where a term is absent."""

    keys: Array  # flat: a head's PKᵀ (e, p) packed, one head after another
    # (h, p, e) divided by the score scale: flat float32, or a head's pieces as ``split_rows`` lays them out, one head
    # after another.
    queries: Array
    rows: int  # p, 0 without tables


class Distances(NamedTuple):
    """r, back to front, for every difference j − i from −(t−1) to t−1."""

    low: int  # the first bucket that occurs
    buckets: Array  # (2t − 1 + BLOCK,) int32, r − low; the last is repeated, so that a row may be walked in whole lines
    near: int  # entries before this one are all 0
    step: int  # from here
    stop: int  # to here each is one more than the one before
    far: int  # entries from this one on are all the last


def pack_positions(pos_key_hpe: Array | None, pos_query_hpe: Array | None, scale: float, split: bool) -> Positions:
    """Reverse and pack a layer's tables; ``split`` for the matrix unit."""
    keys = np.zeros(0, np.uint16 if split else np.float32)
    if pos_key_hpe is not None:
        heads = [(pack_split if split else pack)(head[::-1].T).reshape(-1) for head in pos_key_hpe]
        keys = aligned(sum(map(len, heads)), heads[0].dtype)
        np.concatenate(heads, out=keys)
    queries = np.zeros(0, keys.dtype)
    if pos_query_hpe is not None:
        queries = (pos_query_hpe[:, ::-1] / scale).astype(np.float32).reshape(-1)
        if split:
            queries = split_heads(queries, *pos_query_hpe.shape)
    rows = max(0 if table is None else table.shape[1] for table in (pos_key_hpe, pos_query_hpe))
    return Positions(keys, queries, rows)


def split_heads(table_hpe: Array, heads: int, rows: int, size: int) -> Array:
    """A flat table (h, p, e) as pieces, head after head, and SIDE lines more: the last tile may read so far.

    e is a multiple of DEPTH, so every head begins at a multiple of 64 bytes, as the table does.
    """
    pieces = aligned(2 * table_hpe.size + SIDE * DEPTH, np.uint16)
    pieces[:] = 0
    for h in range(heads):
        split_rows(table_hpe, h * rows * size, size, rows, size, pieces[2 * h * rows * size :])
    return pieces


def distances(frames: int, buckets: int, max_distance: int, span: int) -> Distances:
    """``attention.relative_index`` by difference instead of by pair: 2t − 1 numbers instead of t²."""
    difference = np.arange(frames - 1, -frames, -1)  # i − j as j − i grows
    bucket = log_bucket(difference, buckets, max_distance) if buckets > 0 else difference
    rows = 2 * span - 1 - np.clip(bucket + span, 0, 2 * span - 1)
    uneven = np.flatnonzero(np.diff(rows) != 1)
    middle = frames - 1  # the difference 0
    step = int(uneven[uneven < middle].max(initial=-1)) + 1
    stop = int(uneven[uneven >= middle].min(initial=len(rows) - 1)) + 1
    padded = np.pad(rows - rows[0], (0, BLOCK), mode="edge").astype(np.int32)
    near = int(np.searchsorted(padded, 0, "right"))
    far = max(int(np.searchsorted(padded, padded[-1])), near)  # one frame has one bucket: all near, nothing far
    return Distances(int(rows[0]), padded, near, step, stop, far)


def index_by_pair(by_difference: Distances, span: int) -> Array:
    """``attention.relative_index`` (i, j) from the numbers by difference, for the explicit operations."""
    frames = (len(by_difference.buckets) + 1 - BLOCK) // 2
    i = np.arange(frames)
    rows = by_difference.low + by_difference.buckets[i[None, :] - i[:, None] + frames - 1]
    return (2 * span - 1 - rows).astype(np.int64)


# ---------------------------------------------------------------------------- the two walks


@vector_kernel
def add_by_bucket(scores, by_bucket, buckets, near, step, stop, far):
    """scores[j] += by_bucket[buckets[j]]: one query's row of scores (whole lines) and its row of C.

    ``buckets`` is constant before ``near`` and from ``far`` on, and grows by one from ``step`` to ``stop``.
    """
    count = np.int64(len(scores))
    near, far = max(min(near, count), 0), min(max(far, 0), count)
    step = min((max(step, near) + LINE - 1) // LINE * LINE, far)
    stop = max(step, min(stop, far) // LINE * LINE)
    for first, last in ((0, near), (far, count)):
        part, constant = scores[first:last], by_bucket[np.int64(buckets[min(first, count - 1)])]
        for j in range(len(part)):
            part[j] += constant
    for first, last in ((near, step), (stop, far)):
        part, some = scores[first:last], buckets[first:last]
        for j in range(len(part)):
            part[j] += by_bucket[np.uint64(some[j])]
    for j in range(step, stop, LINE):
        add_line(scores, j, by_bucket, np.int64(buckets[j]))


@vector_kernel
def add_by_key_v1(scores, score_stride, queries, by_key, key_stride, origin, key, lowest, buckets, shear):
    """Rung 1 of ``add_by_key``: what it does, number by number, down the diagonals of P."""
    for a in range(queries):
        for c in range(LINE):
            bucket = np.int64(buckets[lowest + queries - 1 - a + c])
            scores[a * score_stride + key + c] += by_key[bucket * key_stride + key + c - origin]


@vector_kernel
def add_by_key(scores, score_stride, queries, by_key, key_stride, origin, key, lowest, buckets, shear):
    """scores[a, key + l] += P[r(lowest + queries − 1 − a + l), key + l] for ``queries`` rows a and LINE keys l.

    buckets[q] is r of the difference q; ``lowest`` that of the last query and the first key. ``by_key`` is a part of P,
    flat with rows of ``key_stride``, that begins ``origin`` numbers behind P's first row and key. ``shear`` (queries +
    LINE, LINE) is scratch.
    """
    count = queries + LINE - 1
    if buckets[lowest] == buckets[lowest + count - 1]:  # far away: one bucket for all
        for a in range(queries):
            add_line(scores, a * score_stride + key, by_key, np.int64(buckets[lowest]) * key_stride + key - origin)
        return
    for q in range(count):
        copy_line(shear, q * LINE, by_key, np.int64(buckets[lowest + q]) * key_stride + key - origin)
    for bit in (1, 2, 4, 8):
        count -= bit
        for q in range(count):
            mix_line(shear, q * LINE, shear, (q + bit) * LINE, bit)
    for a in range(queries):
        add_line(scores, a * score_stride + key, shear, (queries - 1 - a) * LINE)
