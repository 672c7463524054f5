"""Fused disentangled attention on the CPU: scores, softmax and context of a block of query frames, never t × t at once.

For one head and QUERIES query frames the scores are three products and two walks:

    S  = Q · Kᵀ                  (queries, t)       content to content
    C  = Q · PKᵀ                 (queries, band)    content to position, for every bucket that occurs
    P  = PQ · Kᵀ                 (band, t)          position to content
    S[i, j] += C[i, r(i−j)] + P[r(i−j), j]

The walks are in ``cpu_positions``. Only the band of buckets that a recording of this length can have is multiplied at
all: 379 of 512 at 10 s. Of P, which for a minute of sound would fill 3 MB a head, a block of queries needs a stripe
down the diagonal. It comes KEYS keys at a time, only the rows that these queries meet there, and is added to the scores
while it is in the nearest cache: a part is computed twice, and none comes back from memory.

Then softmax, the product with V, and one division by the row's sum at the end. Keys beyond a recording's valid length
are never computed with, so there is no mask but for the few that fill the last panel: −∞.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import overload

from sewd_np.cpu_amx import BLOCK, DEPTH, PANEL_STEP, SIDE, split
from sewd_np.cpu_gemm import COLUMNS, kernel, product
from sewd_np.cpu_lines import LINE, exp_line, exp_pieces, max_line, pair_line
from sewd_np.cpu_math import vector_kernel
from sewd_np.cpu_positions import Distances, add_by_bucket, add_by_key
from sewd_np.cpu_split import lay_out, multiply_laid, product_of_lines, room_for
from sewd_np.cpu_team import claim

Array = np.ndarray
QUERIES = 96  # query frames of a block: their scores for a minute of sound fill 600 kB, inside a core's cache
KEYS = 128  # key frames of a part of P
RUNS = 4 * LINE  # columns in which a row's maximum is looked for side by side


@kernel
def row_max(scores, start, count, runs):
    """The largest of scores[start : start + count], whole lines, into runs[0]; ``runs`` (RUNS,) is scratch.

    It runs in RUNS columns at once: a single running maximum would have to be taken one number at a time.
    """
    runs[:] = -np.inf
    for j in range(0, count, LINE):
        max_line(runs, j % RUNS, scores, start + j)
    for line in range(LINE, RUNS, LINE):
        max_line(runs, 0, runs, line)
    for c in range(1, LINE):
        runs[0] = runs[c] if runs[c] > runs[0] else runs[0]


@kernel
def line_sum(sums, start):
    """Sum of a line."""
    total = np.float32(0)
    for c in range(LINE):
        total += sums[start + c]
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
    rows: int  # of a table: buckets that there are
    values: int  # V within a head's shared memory, behind K
    pair: int  # shared memory of one recording's head
    scores: int  # S within a worker's block, behind the queries
    by_bucket: int  # C
    by_key: int  # a part of P
    context: int
    sums: int  # a line for each query
    shear: int
    block: int  # scratch memory of one worker


def shape_of(batch: int, frames: int, heads: int, size: int, rows: int, by_difference: Distances | None) -> Shape:
    """Lay out the scratch memory of ``gather_keys`` and ``attend``. Every part begins at a multiple of 64 bytes."""
    low = high = 0
    if by_difference is not None:
        low = by_difference.low
        high = low + int(by_difference.buckets[-1]) + 1
    row = -(-frames // BLOCK) * BLOCK
    low_panel = low // COLUMNS * COLUMNS
    columns = -(-(high - low_panel) // COLUMNS) * COLUMNS
    values = row * size
    pair = values + -(-size // BLOCK) * BLOCK * row
    scores = QUERIES * size
    by_bucket = scores + QUERIES * row
    by_key = by_bucket + QUERIES * columns
    context = by_key + (QUERIES + KEYS + SIDE) * KEYS
    sums = context + QUERIES * size
    shear = sums + QUERIES * LINE
    block = shear + (QUERIES + LINE) * LINE
    return Shape(
        batch, frames, heads, size, row, low, high - low, low_panel, columns, rows, values, pair, scores, by_bucket,
        by_key, context, sums, shear, block,
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
def tile_rows(panels, count):
    """Rows of a product of ``count``: on the matrix unit whole tiles, of which the surplus is not used."""
    return (count + SIDE - 1) // SIDE * SIDE if panels.itemsize == 2 else count


# --------------------------------------------------------------------- softmax and context


@vector_kernel
def weigh(block, scores, row, live, valid, size, panels, values, zeros, context, sums, runs, room):
    """Context (live, size) = e^(S − its row's maximum) · V, and the sums of the exponentials: a line for each row.

    S (live, row) from ``scores``; what lies beyond ``valid`` in the last lines is −∞. S is used up.
    """
    for i in range(live):
        start = scores + i * row
        row_max(block, start, (valid + LINE - 1) // LINE * LINE, runs)
        for j in range(start, start + valid, LINE):
            exp_line(block, j, runs, 0, block, sums + i * LINE)
    product(block, scores, row, live, valid, panels, values, size, zeros, block, context, size)


@vector_kernel
def weigh_split(block, scores, row, live, valid, size, panels, values, zeros, context, sums, runs, room):
    """``weigh`` on the matrix unit: BLOCK rows and KEYS keys at a time become exponentials and, in ``room``, pieces."""
    whole = (valid + BLOCK - 1) // BLOCK * BLOCK
    largest = np.empty(live, np.float32)
    for i in range(live):
        row_max(block, scores + i * row, whole, runs)
        largest[i] = runs[0]
    first = (-room.ctypes.data % 64) // 2
    for key in range(0, whole, KEYS):
        steps = min(KEYS, whole - key) // DEPTH
        at, panel = values + key // DEPTH * PANEL_STEP, whole // DEPTH * PANEL_STEP
        for top in range(0, live, BLOCK):
            rows = min(BLOCK, (live - top + SIDE - 1) // SIDE * SIDE)
            for i in range(top, min(top + BLOCK, live)):
                for step in range(steps):
                    upper = first + (2 * step * rows + i - top) * DEPTH
                    lower, j = upper + rows * DEPTH, scores + i * row + key + step * DEPTH
                    exp_pieces(room, upper, lower, block, j, largest, i, block, sums + i * LINE)
            to, add = context + top * size, key > 0
            product_of_lines(room, rows, 0, steps, rows, steps, panels, at, panel, size, zeros, add, block, to, size)


def weigh_values(block, scores, row, live, valid, size, panels, values, zeros, context, sums, runs, room):
    """``weigh`` or ``weigh_split``, by the kind of ``panels``."""
    chosen: Any = weigh_split if panels.dtype == np.uint16 else weigh
    chosen(block, scores, row, live, valid, size, panels, values, zeros, context, sums, runs, room)


@overload(weigh_values)
def _weigh_values(block, scores, row, live, valid, size, panels, values, zeros, context, sums, runs, room):
    chosen: Any = weigh_split if panels.dtype == types.uint16 else weigh
    return lambda block, scores, row, live, valid, size, panels, values, zeros, context, sums, runs, room: chosen(
        block, scores, row, live, valid, size, panels, values, zeros, context, sums, runs, room
    )


# ------------------------------------------------------------------------------ the two halves


@vector_kernel
def gather_keys(qkv, shape, keys, lengths, shared, worker, workers):
    """First half: pack K and V of each head into ``shared``; a worker's share of the heads.

    qkv flat (b, t, 3d). ``keys`` says by its type how panels are packed.
    """
    frames, heads, size = shape.frames, shape.heads, shape.size
    d = heads * size
    pairs = shape.batch * heads
    for pair in range(pairs * worker // workers, pairs * (worker + 1) // workers):
        b, h, at = pair // heads, pair % heads, pair * shape.pair
        packed = shared[at : at + shape.pair].view(keys.dtype)
        start = b * frames * 3 * d + d + h * size
        pack_keys_and_values(qkv, start, 3 * d, lengths[b], size, packed, shape.values * (4 // packed.itemsize))


@vector_kernel
def add_position_to_content(block, shape, live, valid, difference, packed, queries, head, buckets, zeros):
    """S += P[r(i−j), j], KEYS keys at a time; ``difference`` is that of the first query and key, back to front.

    ``head`` is where the head's table begins in ``queries``; K is packed in ``packed``.
    """
    size, row = shape.size, shape.row
    by_key, shear = block[shape.by_key : shape.context], block[shape.shear :]
    rows_of_scores = block[shape.scores : shape.scores + live * row]
    table, kind = queries[head:], 4 // packed.itemsize
    for first in range(0, valid, KEYS):
        width = min(KEYS, (valid + BLOCK - 1) // BLOCK * BLOCK - first)
        lowest = difference - live + 1 + first
        low, high = np.int64(buckets[lowest]), np.int64(buckets[lowest + live - 1 + width - 1])
        count, panels = tile_rows(packed, high - low + 1), first * size * kind
        at = low + shape.low
        multiply_laid(table, 0, size, shape.rows, at, count, table, packed, panels, width, zeros, by_key, 0, KEYS)
        origin = low * KEYS + first
        for key in range(first, min(first + KEYS, valid), LINE):
            add_by_key(rows_of_scores, row, live, by_key, KEYS, origin, key, lowest - first + key, buckets, shear)


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
    counter,
    worker,
    workers,
):
    """Second half: blocks of QUERIES query frames of each head → out flat (b, t, d); a worker takes one by one.

    keys and queries: ``Positions``; ``counter``: 0, for ``claim``. ``scratch`` (workers, shape.block) holds a block:
    scaled queries, scores, C, a part of P, the context and the sums.
    """
    frames, heads, size, columns, row = shape.frames, shape.heads, shape.size, shape.columns, shape.row
    d = heads * size
    blocks = (frames + QUERIES - 1) // QUERIES
    items = shape.batch * heads * blocks
    block, runs = scratch[worker], np.empty(RUNS, np.float32)
    room, weights = room_for(keys, QUERIES * size, size), room_for(keys, BLOCK * KEYS, KEYS)
    for _ in range(items):
        item = claim(counter)
        if item >= items:
            break
        pair, first = item // blocks, item % blocks * QUERIES
        b, h, at = pair // heads, pair % heads, pair * shape.pair
        valid = lengths[b]
        packed = shared[at : at + shape.pair].view(keys.dtype)
        kind = 4 // packed.itemsize  # numbers of a panel for one float32 of memory
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
            rows = tile_rows(packed, live)
            lay_out(block, 0, size, rows, size, keys, room)
            multiply_laid(block, 0, size, rows, 0, rows, room, packed, 0, width, zeros, block, shape.scores, row)
            difference = frames - 1 - first  # of query 0 and key 0
            if len(keys) > 0:
                table = (h * (len(keys) // heads)) + shape.low_panel * size * kind
                to = shape.by_bucket
                multiply_laid(block, 0, size, rows, 0, rows, room, keys, table, columns, zeros, block, to, columns)
                for i in range(live):
                    start, bucket = shape.scores + i * row, to + i * columns + shape.low - shape.low_panel
                    at_0 = difference - i
                    line, by_bucket = block[start : start + width], block[bucket : bucket + shape.band]
                    stretches = near - at_0, step - at_0, stop - at_0, far - at_0
                    add_by_bucket(line, by_bucket, buckets[at_0:], *stretches)
            if len(queries) > 0:
                head = h * shape.rows * size * kind
                add_position_to_content(block, shape, live, valid, difference, packed, queries, head, buckets, zeros)
            block[shape.sums : shape.sums + live * LINE] = np.float32(0)
            for i in range(live):
                block[shape.scores + i * row + valid : shape.scores + i * row + width] = -np.inf
            values = shape.values * kind
            weigh_values(
                block,
                shape.scores,
                row,
                live,
                valid,
                size,
                packed,
                values,
                zeros,
                shape.context,
                shape.sums,
                runs,
                weights,
            )
        for i in range(count):
            target = (b * frames + first + i) * d + h * size
            attended, context = out[target : target + size], block[shape.context + i * size :]
            if i < live:
                share = np.float32(1) / line_sum(block, shape.sums + i * LINE)
                for c in range(size):
                    attended[c] = context[c] * share
            else:
                attended[:] = np.float32(0)
