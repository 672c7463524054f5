"""Fused disentangled attention on the CPU: scores, softmax and context of a block of query frames, never t × t at once.

For one head and QUERIES query frames the scores are three products and one walk:

    S  = Q · Kᵀ                  (queries, t)       content to content
    C  = Q · PKᵀ                 (queries, band)    content to position, for every bucket that occurs
    P  = PQ · Kᵀ                 (band, t)          position to content; once a head, not once a block
    S[i, j] += C[i, r(i−j)] + P[r(i−j), j]

The bucket r depends only on i − j. With the table stored back to front, r grows with j: along a row of S the walk
reads C and P front to back, and where frames are so far apart that r no longer changes it adds one number to a run.
Only the band of buckets that a recording of this length can have is multiplied at all: 379 of 512 at 10 s.

Then softmax in place, the product with V, and one division by the row's sum at the end. Frames beyond a recording's
valid length are never computed with, so there is no mask.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sewd_np.attention import log_bucket
from sewd_np.cpu_gemm import COLUMNS, pack, product
from sewd_np.cpu_math import exp, vector_kernel

Array = np.ndarray
QUERIES = 48  # query frames of a block: their scores for a minute of sound fill 300 kB, well inside a core's cache
STRIP = 64  # width of the running maxima of a row


class Positions(NamedTuple):
    """A layer's projected position table, back to front, for the fused kernel; empty arrays where a term is absent."""

    keys: Array  # flat: a head's PKᵀ (e, p) packed, one head after another
    queries: Array  # flat (h, p, e), divided by the score scale


class Distances(NamedTuple):
    """r, back to front, for every difference j − i from −(t−1) to t−1 (2t − 1,), and where its constant ends lie."""

    rows: Array
    near: int  # entries before this one are all rows[0]
    far: int  # entries from this one on are all rows[-1]


def pack_positions(pos_key_hpe: Array | None, pos_query_hpe: Array | None, scale: float) -> Positions:
    """Reverse and pack a layer's tables."""
    nothing = np.zeros(0, np.float32)
    keys = nothing
    if pos_key_hpe is not None:
        keys = np.concatenate([pack(head[::-1].T).reshape(-1) for head in pos_key_hpe])
    queries = nothing if pos_query_hpe is None else (pos_query_hpe[:, ::-1] / scale).astype(np.float32).reshape(-1)
    return Positions(keys, queries)


def distances(frames: int, buckets: int, max_distance: int, span: int) -> Distances:
    """``attention.relative_index`` by difference instead of by pair: 2t − 1 numbers instead of t²."""
    difference = np.arange(frames - 1, -frames, -1)  # i − j as j − i grows
    bucket = log_bucket(difference, buckets, max_distance) if buckets > 0 else difference
    rows = 2 * span - 1 - np.clip(bucket + span, 0, 2 * span - 1)
    changes = np.flatnonzero(np.diff(rows))
    near, far = (changes[0] + 1, changes[-1] + 1) if len(changes) else (len(rows), len(rows))
    return Distances(rows.astype(np.int32), int(near), int(far))


def index_by_pair(by_difference: Distances, span: int) -> Array:
    """``attention.relative_index`` (i, j) from the numbers by difference, for the explicit operations."""
    frames = (len(by_difference.rows) + 1) // 2
    i = np.arange(frames)
    return (2 * span - 1 - by_difference.rows[i[None, :] - i[:, None] + frames - 1]).astype(np.int64)


@vector_kernel
def add_positions(scores, by_bucket, by_key, stride, first, rows, near, far):
    """scores[j] += by_bucket[r(first + j)] + by_key[r(first + j), j] for one query; ``first`` is j = 0's difference.

    Both tables begin with the first bucket that occurs; an empty one adds nothing. ``by_key`` is flat with rows of
    ``stride``. Three stretches: r constant, r walking, r constant.
    """
    low, count = rows[0], len(scores)
    a = min(max(near - first, 0), count)
    z = min(max(far - first, a), count)
    left, walk, right = scores[:a], scores[a:z], scores[z:]
    buckets = rows[first + a : first + z]
    last_row = np.int64(rows[len(rows) - 1] - low)
    if len(by_bucket) > 0 and len(by_key) > 0:
        walked, last_key = by_key[a:], by_key[last_row * stride + z :]
        for j in range(len(left)):
            left[j] += by_bucket[0] + by_key[j]
        for j in range(len(walk)):
            r = np.uint64(buckets[j] - low)
            walk[j] += by_bucket[r] + walked[r * np.uint64(stride) + np.uint64(j)]
        for j in range(len(right)):
            right[j] += by_bucket[last_row] + last_key[j]
    elif len(by_bucket) > 0:
        for j in range(len(left)):
            left[j] += by_bucket[0]
        for j in range(len(walk)):
            walk[j] += by_bucket[np.uint64(buckets[j] - low)]
        for j in range(len(right)):
            right[j] += by_bucket[last_row]
    elif len(by_key) > 0:
        walked, last_key = by_key[a:], by_key[last_row * stride + z :]
        for j in range(len(left)):
            left[j] += by_key[j]
        for j in range(len(walk)):
            walk[j] += walked[np.uint64(buckets[j] - low) * np.uint64(stride) + np.uint64(j)]
        for j in range(len(right)):
            right[j] += last_key[j]


@vector_kernel
def exp_row(scores, strip):
    """scores ← exp(scores − max) in place; returns the sum. ``strip`` (STRIP,) is scratch.

    The maximum runs in STRIP columns at once: a single running maximum would have to be taken one number at a time.
    """
    strip[:] = -np.inf
    whole = len(scores) // STRIP * STRIP
    for j in range(0, whole, STRIP):
        part = scores[j : j + STRIP]
        for c in range(STRIP):
            strip[c] = part[c] if part[c] > strip[c] else strip[c]
    largest = np.float32(-np.inf)
    for c in range(STRIP):
        largest = strip[c] if strip[c] > largest else largest
    for j in range(whole, len(scores)):
        largest = scores[j] if scores[j] > largest else largest
    total = np.float32(0)
    for j in range(len(scores)):
        scores[j] = exp(scores[j] - largest)
        total += scores[j]
    return total


class Shape(NamedTuple):
    """Sizes of one attention call, worked out once, and where its parts lie in the scratch memory (in numbers)."""

    batch: int
    frames: int
    heads: int
    size: int  # e
    low: int  # first bucket of the band that occurs
    band: int  # buckets in it
    low_panel: int  # C begins on a whole panel
    columns: int  # width of C
    values: int  # V within a head's shared memory, behind K
    by_key: int  # P behind V
    pair: int  # shared memory of one recording's head
    by_bucket: int  # C within a worker's block, behind queries and scores
    context: int
    block: int  # scratch memory of one worker


def shape_of(batch: int, frames: int, heads: int, size: int, has_p2c: bool, by_difference: Distances | None) -> Shape:
    """Lay out the scratch memory of ``gather_keys`` and ``attend``."""
    low = high = 0
    if by_difference is not None:
        low, high = int(by_difference.rows[0]), int(by_difference.rows[-1]) + 1
    low_panel = low // COLUMNS * COLUMNS
    columns = high - low_panel
    values = -(-frames // COLUMNS) * COLUMNS * size
    by_key = values + -(-size // COLUMNS) * COLUMNS * frames
    pair = by_key + (high - low) * frames * has_p2c
    by_bucket = QUERIES * (size + frames)
    context = by_bucket + QUERIES * columns
    block = context + QUERIES * size
    return Shape(
        batch, frames, heads, size, low, high - low, low_panel, columns, values, by_key, pair, by_bucket, context, block
    )


@vector_kernel
def gather_keys(qkv, shape, queries, zeros, lengths, shared, worker, workers):
    """First half: pack K and V of each head into ``shared`` and multiply P = PQ · Kᵀ; a worker's share of the heads.

    qkv flat (b, t, 3d); queries flat (h, p, e) or empty; zeros stands for "no bias".
    """
    frames, heads, size = shape.frames, shape.heads, shape.size
    d = heads * size
    pairs = shape.batch * heads
    for pair in range(pairs * worker // workers, pairs * (worker + 1) // workers):
        b, h, at = pair // heads, pair % heads, pair * shape.pair
        valid = lengths[b]
        source = b * frames * 3 * d + h * size
        for first in range(0, valid, COLUMNS):
            panel = at + first * size
            for c in range(size):
                for column in range(COLUMNS):
                    j = first + column
                    number = qkv[source + d + j * 3 * d + c] if j < valid else np.float32(0)
                    shared[panel + c * COLUMNS + column] = number
        for first in range(0, size, COLUMNS):
            panel = at + shape.values + first * valid
            for j in range(valid):
                for column in range(COLUMNS):
                    c = first + column
                    number = qkv[source + 2 * d + j * 3 * d + c] if c < size else np.float32(0)
                    shared[panel + j * COLUMNS + column] = number
        if len(queries) > 0:
            table = (h * (len(queries) // d) + shape.low) * size
            by_key = at + shape.by_key
            product(queries, table, size, shape.band, size, shared, at, valid, zeros, shared, by_key, frames)


@vector_kernel
def attend(
    qkv,
    shape,
    keys,
    queries,
    rows,
    near,
    far,
    scale,
    zeros,
    lengths,
    mask_queries,
    out,
    shared,
    scratch,
    worker,
    workers,
):
    """Second half: blocks of QUERIES query frames of each head → out flat (b, t, d); a worker's share of the blocks.

    ``scratch`` (workers, shape.block) holds a block: scaled queries, scores, C and the context.
    """
    frames, heads, size, columns = shape.frames, shape.heads, shape.size, shape.columns
    d = heads * size
    blocks = (frames + QUERIES - 1) // QUERIES
    items = shape.batch * heads * blocks
    block, strip = scratch[worker], np.empty(STRIP, np.float32)
    scores = QUERIES * size
    for item in range(items * worker // workers, items * (worker + 1) // workers):
        pair, first = item // blocks, item % blocks * QUERIES
        b, h, at = pair // heads, pair % heads, pair * shape.pair
        valid = lengths[b]
        count = min(QUERIES, frames - first)
        live = count  # queries with something to attend to
        if mask_queries:
            live = min(count, max(valid - first, 0))
        if valid == 0:
            live = 0
        source = (b * frames + first) * 3 * d + h * size
        for i in range(live):
            for c in range(size):
                block[i * size + c] = qkv[source + i * 3 * d + c] / scale
        product(block, 0, size, live, size, shared, at, valid, zeros, block, scores, frames)
        if len(keys) > 0:
            table = h * (len(keys) // heads) + shape.low_panel * size
            product(block, 0, size, live, size, keys, table, columns, zeros, block, shape.by_bucket, columns)
        for i in range(live):
            row = block[scores + i * frames : scores + i * frames + valid]
            if len(rows) > 0:
                bucket = shape.by_bucket + i * columns + shape.low - shape.low_panel
                by_bucket = block[bucket : bucket + (shape.band if len(keys) > 0 else 0)]
                by_key = shared[at + shape.by_key : at + shape.pair]
                add_positions(row, by_bucket, by_key, frames, frames - 1 - first - i, rows, near, far)
            block[i] = np.float32(1) / exp_row(row, strip)  # the scaled queries are no longer needed
        product(block, scores, frames, live, valid, shared, at + shape.values, size, zeros, block, shape.context, size)
        for i in range(count):
            target = (b * frames + first + i) * d + h * size
            for c in range(size):
                number = block[shape.context + i * size + c] * block[i] if i < live else np.float32(0)
                out[target + c] = number
