"""Dense layers on the CPU, rows by rows: products with what follows them, while their results are in the cache.

Every kernel here takes arrays flat and does blocks of rows, each worker one after another (``counter`` is 0, for
``cpu_team.claim``): a linear layer and its activation; one with residual and norm; a feed-forward block. Its wide
middle, four times the width of the model, is never written to memory. On the matrix unit it never exists as a whole:
INNER columns of it are computed, activated and split into pieces, block by block, and multiplied with their rows of the
second matrix at once (``feed_forward_split_rows``).
"""

from __future__ import annotations

import numpy as np

from sewd_np.cpu_amx import BLOCK, DEPTH, PANEL_STEP, SIDE
from sewd_np.cpu_gemm import FEW_ROWS, kernel
from sewd_np.cpu_math import activate, normalize_row, vector_kernel, whole_registers
from sewd_np.cpu_split import (
    multiply,
    next_lines,
    product_of_lines,
    room_for,
    split_rows,
)
from sewd_np.cpu_team import claim

# Rows of a block, at most: many, since each block streams all weights once, few enough that what follows a product
# finds its results still in the cache and that each thread gets some blocks.
ROW_BLOCK = 128
INNER = 384  # columns of a feed-forward block's middle that are computed, and used up, at a time


@kernel
def layer_norm_v1(x_rc, weight, bias, eps, out_rc):
    """Rung 1 of ``normalize_rows``: mean, variance, result, one number at a time."""
    rows, size = x_rc.shape
    for r in range(rows):
        mean = 0.0
        for c in range(size):
            mean += x_rc[r, c]
        mean /= size
        variance = 0.0
        for c in range(size):
            variance += (x_rc[r, c] - mean) ** 2
        variance /= size
        for c in range(size):
            out_rc[r, c] = (x_rc[r, c] - mean) / np.sqrt(variance + eps) * weight[c] + bias[c]


@kernel
def low_tile_rows(panels):
    """Rows of the lowest tile in which a product with these panels is computed."""
    return SIDE if panels.itemsize == 2 else FEW_ROWS


@kernel
def blocks_of(rows, workers):
    """Blocks of about ROW_BLOCK rows, the same number for each worker."""
    return ((rows + ROW_BLOCK - 1) // ROW_BLOCK + workers - 1) // workers * workers


@kernel
def block_start(rows, panels, block, blocks):
    """First row of a block: whole low tiles, so that only the last one has rows left over."""
    few = low_tile_rows(panels)
    return rows if block == blocks else rows * block // blocks // few * few


@kernel
def most_rows(rows, panels):
    """Rows of the largest block."""
    return min(rows, ROW_BLOCK + low_tile_rows(panels))


@vector_kernel
def linear_rows(x, rows, depth, panels, outputs, bias, code, out, counter, worker, workers):
    """out (rows, outputs) = activation(x (rows, depth) · B + bias), all flat, B packed; a worker takes blocks."""
    whole_registers()
    blocks, most = blocks_of(rows, workers), most_rows(rows, panels)
    room = room_for(panels, most * depth, depth)
    for _ in range(blocks):
        block = claim(counter)
        if block >= blocks:
            break
        start, stop = block_start(rows, panels, block, blocks), block_start(rows, panels, block + 1, blocks)
        count = stop - start
        multiply(x, start * depth, depth, count, depth, panels, 0, outputs, bias, out, start * outputs, outputs, room)
        activate(out[start * outputs : (start + count) * outputs], code)


@vector_kernel
def add_and_normalize(row, residual, weight, shift, eps):
    """row ← layer norm of row + residual."""
    whole_registers()
    for c in range(len(row)):
        row[c] += residual[c]
    normalize_row(row, weight, shift, eps, row)


@vector_kernel
def linear_norm_rows(x, rows, depth, panels, size, bias, residual, weight, shift, eps, out, counter, worker, workers):
    """out (rows, size) = layer norm of x · B + bias + residual; the rows are normed while they are in the cache."""
    whole_registers()
    blocks, most = blocks_of(rows, workers), most_rows(rows, panels)
    room = room_for(panels, most * depth, depth)
    for _ in range(blocks):
        block = claim(counter)
        if block >= blocks:
            break
        start, stop = block_start(rows, panels, block, blocks), block_start(rows, panels, block + 1, blocks)
        multiply(x, start * depth, depth, stop - start, depth, panels, 0, size, bias, out, start * size, size, room)
        for row in range(start, stop):
            add_and_normalize(
                out[row * size : (row + 1) * size], residual[row * size : (row + 1) * size], weight, shift, eps
            )


@vector_kernel
def feed_forward_rows(
    x,
    rows,
    size,
    panels,
    inner,
    bias,
    code,
    panels_2,
    bias_2,
    weight,
    shift,
    eps,
    out,
    scratch,
    counter,
    worker,
    workers,
):
    """out = layer norm of activation(x · B + b) · B₂ + b₂ + x; the wide middle never leaves the cache."""
    whole_registers()
    blocks, most = blocks_of(rows, workers), most_rows(rows, panels)
    room, room_2 = room_for(panels, most * size, size), room_for(panels_2, most * inner, inner)
    middle = scratch[worker]
    for _ in range(blocks):
        block = claim(counter)
        if block >= blocks:
            break
        start, stop = block_start(rows, panels, block, blocks), block_start(rows, panels, block + 1, blocks)
        count = stop - start
        multiply(x, start * size, size, count, size, panels, 0, inner, bias, middle, 0, inner, room)
        activate(middle[: count * inner], code)
        multiply(middle, 0, inner, count, inner, panels_2, 0, size, bias_2, out, start * size, size, room_2)
        for row in range(start, stop):
            add_and_normalize(out[row * size : (row + 1) * size], x[row * size : (row + 1) * size], weight, shift, eps)


@vector_kernel
def feed_forward_split_rows(
    x, rows, size, panels, inner, bias, code, panels_2, bias_2, weight, shift, eps, out, counter, worker, workers
):
    """``feed_forward_rows`` with both products on the matrix unit, INNER columns of the middle at a time."""
    whole_registers()
    blocks, most = blocks_of(rows, workers), most_rows(rows, panels)
    room, middle = room_for(panels, most * size, size), room_for(panels, most * INNER, INNER)
    panel = inner // DEPTH * PANEL_STEP
    for _ in range(blocks):
        block = claim(counter)
        if block >= blocks:
            break
        start, stop = block_start(rows, panels, block, blocks), block_start(rows, panels, block + 1, blocks)
        count = stop - start
        split_rows(x, start * size, size, count, size, room)
        for column in range(0, inner, INNER):
            width = min(INNER, inner - column)
            depth, start_of = size // DEPTH, column // BLOCK * (size // DEPTH) * PANEL_STEP
            here = bias[column : column + width]
            next_lines(room, count, count, depth, depth, panels, start_of, width, here, code, middle, 1)
            at, steps = column // DEPTH * PANEL_STEP, width // DEPTH
            to, add = start * size, column > 0
            product_of_lines(
                middle, count, 0, steps, count, steps, panels_2, at, panel, size, bias_2, add, out, to, size
            )
        for row in range(start, stop):
            add_and_normalize(out[row * size : (row + 1) * size], x[row * size : (row + 1) * size], weight, shift, eps)


@vector_kernel
def normalize_rows(x, rows, size, weight, bias, eps, out, worker, workers):
    """Layer norm row by row, flat; a worker's share of the rows."""
    whole_registers()
    for row in range(rows * worker // workers, rows * (worker + 1) // workers):
        normalize_row(x[row * size : (row + 1) * size], weight, bias, eps, out[row * size : (row + 1) * size])
