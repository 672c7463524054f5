"""Fused disentangled attention on the CPU: scores, softmax and context of a block of query frames, never t × t at once.

For one head and QUERIES query frames the scores are three products and two walks:

    S  = Q · Kᵀ                  (queries, t)       content to content
    C  = Q · PKᵀ                 (queries, band)    content to position, for every bucket that occurs
    P  = PQ · Kᵀ                 (band, t)          position to content; once a head, not once a block
    S[i, j] += C[i, r(i−j)] + P[r(i−j), j]

The walks are in ``cpu_positions``. Only the band of buckets that a recording of this length can have is multiplied at
all: 379 of 512 at 10 s.

Then softmax in place, the product with V, and one division by the row's sum at the end. Frames beyond a recording's
valid length are never computed with, so there is no mask but for the few that fill the last panel: −∞.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from sewd_np.cpu_amx import BLOCK, DEPTH, PANEL_STEP, SIDE, multiply, room_for, split
from sewd_np.cpu_gemm import COLUMNS, kernel
from sewd_np.cpu_lines import LINE, max_line, pair_line
from sewd_np.cpu_math import exp, vector_kernel
from sewd_np.cpu_positions import Distances, add_by_bucket, add_by_key

Array = np.ndarray
QUERIES = 48  # query frames of a block: their scores for a minute of sound fill 300 kB, well inside a core's cache
RUNS = 4 * LINE  # columns in which a row's maximum is looked for side by side


@vector_kernel
def exp_row(scores, runs):
    """scores ← exp(scores − max) in place, whole lines; returns the sum. ``runs`` (RUNS,) is scratch.

    The maximum runs in RUNS columns at once: a single running maximum would have to be taken one number at a time.
    """
    runs[:] = -np.inf
    for j in range(0, len(scores), LINE):
        max_line(runs, j % RUNS, scores, j)
    for line in range(LINE, RUNS, LINE):
        max_line(runs, 0, runs, line)
    largest = np.float32(-np.inf)
    for c in range(LINE):
        largest = runs[c] if runs[c] > largest else largest
    total = np.float32(0)
    for j in range(len(scores)):
        scores[j] = exp(scores[j] - largest)
        total += scores[j]
    return total


class Shape(NamedTuple):
    """Sizes of one attention call, worked out once, and where its parts lie in the scratch memory, in float32."""

    batch: int
    frames: int
    heads: int
    size: int  # e
    row: int  # frames rounded up to whole blocks: a row of S or P
    low: int  # first bucket of the band that occurs
    band: int  # buckets in it
    low_panel: int  # C begins on a whole panel
    columns: int  # width of C
    values: int  # V within a head's shared memory, behind K
    by_key: int  # P behind V
    pair: int  # shared memory of one recording's head
    by_bucket: int  # C within a worker's block, behind queries and scores
    context: int
    shear: int
    block: int  # scratch memory of one worker


def shape_of(batch: int, frames: int, heads: int, size: int, has_p2c: bool, by_difference: Distances | None) -> Shape:
    """Lay out the scratch memory of ``gather_keys`` and ``attend``. Every part begins at a multiple of 64 bytes."""
    low = high = 0
    if by_difference is not None:
        low = by_difference.low
        high = low + int(by_difference.buckets[-1]) + 1
    row = -(-frames // BLOCK) * BLOCK
    low_panel = low // COLUMNS * COLUMNS
    columns = -(-(high - low_panel) // COLUMNS) * COLUMNS
    values = row * size
    by_key = values + -(-size // BLOCK) * BLOCK * row
    pair = by_key + (high - low) * row * has_p2c
    by_bucket = QUERIES * size + QUERIES * row
    context = by_bucket + QUERIES * columns
    shear = context + QUERIES * size
    block = shear + (QUERIES + LINE) * LINE
    return Shape(
        batch, frames, heads, size, row, low, high - low, low_panel, columns, values, by_key, pair, by_bucket, context,
        shear, block,
    )  # fmt: skip


@vector_kernel
def pack_head(qkv, start, stride, valid, size, panels, values):
    """K and V of one head into ``panels`` as ``pack`` packs Kᵀ (e, t) and V (t, e), V's from ``values``.

    Key j of the head begins at start + j · stride in the flat qkv, its value a third of the stride later. K ends with
    columns of zeros to a multiple of BLOCK.
    """
    for first in range(0, (valid + BLOCK - 1) // BLOCK * BLOCK, COLUMNS):
        panel = first * size
        for c in range(size):
            for column in range(COLUMNS):
                j = first + column
                panels[panel + c * COLUMNS + column] = qkv[start + j * stride + c] if j < valid else np.float32(0)
    start += stride // 3
    for first in range(0, size, COLUMNS):
        panel = values + first * valid
        for j in range(valid):
            for column in range(COLUMNS):
                c = first + column
                panels[panel + j * COLUMNS + column] = qkv[start + j * stride + c] if c < size else np.float32(0)


@vector_kernel
def pack_head_split(qkv, start, stride, valid, size, panels, values):
    """``pack_head`` as ``pack_split`` packs: see there for the order. V, too, ends with zeros to a multiple of DEPTH.

    A tile holds pairs of numbers, so it is filled in uint32. For K both of a pair come from one key, for V from two
    neighbouring ones.
    """
    pieces = np.zeros((2, SIDE, size), np.uint16)
    pairs_of_keys = pieces.view(np.uint32)
    tiles, whole = panels.view(np.uint32), (valid + BLOCK - 1) // BLOCK * BLOCK
    tile, step, half = SIDE * SIDE, PANEL_STEP // 2, size // 2
    for j in range(0, whole, SIDE):
        for column in range(SIDE):
            if j + column < valid:
                row = start + (j + column) * stride
                split(qkv[row : row + size], pieces[0, column], pieces[1, column])
            else:
                pieces[:, column] = np.uint16(0)
        corner = j // BLOCK * BLOCK * size + j % BLOCK // SIDE * tile
        for piece in range(2):
            pairs = pairs_of_keys[piece]
            for r in range(half):
                at = corner + r // SIDE * step + piece * (step // 2) + r % SIDE * SIDE
                row_of_tile = tiles[at : at + SIDE]
                for column in range(SIDE):
                    row_of_tile[column] = pairs[column, r]
    start, values = start + stride // 3, values // 2
    for j in range(0, whole, 2):
        for odd in range(2):
            if j + odd < valid:
                row = start + (j + odd) * stride
                split(qkv[row : row + size], pieces[0, odd], pieces[1, odd])
            else:
                pieces[:, odd] = np.uint16(0)
        for piece in range(2):
            for first in range(0, size, SIDE):
                at = values + first // BLOCK * whole * BLOCK + j // DEPTH * step + piece * (step // 2)
                at += first % BLOCK // SIDE * tile + j % DEPTH // 2 * SIDE
                pair_line(tiles, at, pieces[piece, 0], first, pieces[piece, 1], first)


def pack_keys_and_values(qkv, start, stride, valid, size, panels, values):
    """``pack_head`` or ``pack_head_split``, by the kind of ``panels``."""
    chosen: Any = pack_head_split if panels.dtype == np.uint16 else pack_head
    chosen(qkv, start, stride, valid, size, panels, values)


@overload(pack_keys_and_values)
def _pack_keys_and_values(qkv, start, stride, valid, size, panels, values):
    chosen: Any = pack_head_split if panels.dtype == types.uint16 else pack_head
    return lambda qkv, start, stride, valid, size, panels, values: chosen(
        qkv, start, stride, valid, size, panels, values
    )


@kernel
def depth_of(panels, valid):
    """Rows of V as it is packed."""
    return -(-valid // DEPTH) * DEPTH if panels.itemsize == 2 else valid


@vector_kernel
def gather_keys(qkv, shape, keys, queries, zeros, lengths, shared, worker, workers):
    """First half: pack K and V of each head into ``shared`` and multiply P = PQ · Kᵀ; a worker's share of the heads.

    qkv flat (b, t, 3d); queries flat (h, p, e) or empty; zeros stands for "no bias". ``keys`` says by its type how
    panels are packed.
    """
    frames, heads, size = shape.frames, shape.heads, shape.size
    d = heads * size
    pairs = shape.batch * heads
    room = room_for(keys, shape.band * size, size)
    for pair in range(pairs * worker // workers, pairs * (worker + 1) // workers):
        b, h, at = pair // heads, pair % heads, pair * shape.pair
        valid = lengths[b]
        packed = shared[at : at + shape.by_key].view(keys.dtype)
        start = b * frames * 3 * d + d + h * size
        pack_keys_and_values(qkv, start, 3 * d, valid, size, packed, shape.values * (4 // packed.itemsize))
        if len(queries) > 0 and valid > 0:
            table = (h * (len(queries) // d) + shape.low) * size
            by_key, width = at + shape.by_key, (valid + BLOCK - 1) // BLOCK * BLOCK
            multiply(queries, table, size, shape.band, size, packed, 0, width, zeros, shared, by_key, shape.row, room)


@vector_kernel
def attend(
    qkv,
    shape,
    keys,
    queries,
    buckets,
    near,
    step,
    stop,
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
    frames, heads, size, columns, row = shape.frames, shape.heads, shape.size, shape.columns, shape.row
    d = heads * size
    blocks = (frames + QUERIES - 1) // QUERIES
    items = shape.batch * heads * blocks
    block, runs = scratch[worker], np.empty(RUNS, np.float32)
    shear = block[shape.shear :]
    scores = shape.by_bucket - QUERIES * row
    room = room_for(keys, QUERIES * max(row, size), max(row, size))
    for item in range(items * worker // workers, items * (worker + 1) // workers):
        pair, first = item // blocks, item % blocks * QUERIES
        b, h, at = pair // heads, pair % heads, pair * shape.pair
        valid = lengths[b]
        packed, by_key = shared[at : at + shape.by_key].view(keys.dtype), shared[at + shape.by_key : at + shape.pair]
        count = min(QUERIES, frames - first)
        live = count  # queries with something to attend to
        if mask_queries:
            live = min(count, max(valid - first, 0))
        if valid == 0:
            live = 0
        source = (b * frames + first) * 3 * d + h * size
        for i in range(live):
            query, from_qkv = block[i * size : (i + 1) * size], qkv[source + i * 3 * d : source + i * 3 * d + size]
            for c in range(size):
                query[c] = from_qkv[c] / scale
        if live > 0:
            width = (valid + BLOCK - 1) // BLOCK * BLOCK  # what lies beyond valid is not used
            multiply(block, 0, size, live, size, packed, 0, width, zeros, block, scores, row, room)
            difference = frames - 1 - first  # of query 0 and key 0
            if len(keys) > 0:
                table = (h * (len(keys) // heads)) + shape.low_panel * size * (4 // packed.itemsize)
                to = shape.by_bucket
                multiply(block, 0, size, live, size, keys, table, columns, zeros, block, to, columns, room)
                for i in range(live):
                    start, bucket = scores + i * row, to + i * columns + shape.low - shape.low_panel
                    at_0 = difference - i
                    line, by_bucket = block[start : start + width], block[bucket : bucket + shape.band]
                    stretches = near - at_0, step - at_0, stop - at_0, far - at_0
                    add_by_bucket(line, by_bucket, buckets[at_0:], *stretches)
            if len(queries) > 0:
                rows = block[scores : scores + live * row]
                for key in range(0, valid, LINE):
                    add_by_key(rows, row, live, by_key, row, key, difference - live + 1 + key, buckets, shear)
            for i in range(live):
                start = scores + i * row
                block[start + valid : start + width] = -np.inf
                block[i] = np.float32(1) / exp_row(block[start : start + width], runs)  # over the scaled queries
            depth = depth_of(keys, valid)
            values = shape.values * (4 // packed.itemsize)
            to = shape.context
            multiply(block, scores, row, live, depth, packed, values, size, zeros, block, to, size, room)
        for i in range(count):
            target = (b * frames + first + i) * d + h * size
            attended, context = out[target : target + size], block[shape.context + i * size :]
            if i < live:
                for c in range(size):
                    attended[c] = context[c] * block[i]
            else:
                attended[:] = np.float32(0)
