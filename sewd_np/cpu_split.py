"""Whole products on the matrix unit: A is split and laid out for it, and blocks of C follow one another.

    C[i, :] = A[i, :] · B + bias          A (m, k) float32 anywhere, B as ``cpu_amx.pack_split`` gives it

B was split and packed on load. A is split on the way (``split_rows``), into *lines* of 32 numbers, which are rows of a
tile register: for each step of k the lines of all rows lie together. So a tile is one kilobyte in a row, which loads a
fifth faster than 16 rows that lie apart, and the windows of a convolution, which overlap, need no copy each: a window
that is wider than the stride goes on in the line below.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from sewd_np.cpu_amx import (
    BLOCK,
    DEPTH,
    LINE_BYTES,
    PANEL_STEP,
    SIDE,
    block,
    configure,
    first_block,
    low_block,
    release,
)
from sewd_np.cpu_gemm import kernel, product
from sewd_np.cpu_lines import LINE, split_lines
from sewd_np.cpu_math import activate, vector_kernel, whole_registers

NEXT_ROWS = 128  # rows of 32 numbers, half of the nearest cache, from one product to the next


@kernel
def room_size(numbers, stride):
    """uint16 numbers that the pieces of A need: both of all rows, and what the last block reads beyond."""
    return 2 * (numbers + stride) + (BLOCK + 1) * DEPTH


@kernel
def room_for(b, numbers, stride):
    """Uninitialised ``room`` for products of up to ``numbers`` numbers of A with B; none where B is float32."""
    return np.empty(room_size(numbers, stride) if b.itemsize == 2 else 0, np.uint16)


@kernel
def first_of(room):
    """The first number of ``room`` at a multiple of 64 bytes."""
    return (-room.ctypes.data % 64) // 2


@kernel
def aligned_floats(count):
    """``count`` numbers, uninitialised, from a multiple of 64 bytes: tiles load and store faster there."""
    memory = np.empty(count + LINE, np.float32)
    first = (-memory.ctypes.data % 64) // 4
    return memory[first : first + count]


@kernel
def lines_of(a_stride, m, k):
    """Lines of one step: A's rows, and those into which the last row's window, if it is wider than the stride, goes."""
    return m + (k - 1) // a_stride


@kernel
def split_rows(a, a_start, a_stride, m, k, room):
    """A's rows as pieces in ``room``: for each step of a row the upper pieces of all rows, then the lower ones."""
    lines, turn, steps = lines_of(a_stride, m, k), min(k, a_stride) // DEPTH, k // DEPTH
    first = first_of(room)
    for step in range(turn):
        upper = first + 2 * step * lines * DEPTH
        lower = upper + lines * DEPTH
        # Rows beyond the last are there only as far as the last window reaches into them.
        for r in range(m + (steps - 1 - step) // turn):
            x, at = a_start + r * a_stride + step * DEPTH, r * DEPTH
            split_lines(room, upper + at, lower + at, a, x)


@kernel
def tile_shapes():
    """What ``configure`` wants: eight registers of SIDE rows of LINE_BYTES."""
    settings = np.zeros(64, np.uint8)
    settings[0] = 1
    for register in range(8):
        settings[16 + 2 * register] = LINE_BYTES  # as a 16-bit number
        settings[48 + register] = SIDE
    return settings


@kernel
def one_block(rows, first, a, plane, turn, steps, b, start, start_stride, c, c_stride):
    """A block of C, of BLOCK rows or, where no more than SIDE are wanted, of SIDE. ``first``: B is not yet near."""
    if rows <= SIDE:
        low_block(a, plane, turn, steps, b, start, start_stride, c, c_stride)
    elif first:
        first_block(a, plane, turn, steps, b, start, start_stride, c, c_stride)
    else:
        block(a, plane, turn, steps, b, start, start_stride, c, c_stride)


@kernel
def product_of_lines(room, lines, row, turn, m, steps, b, b_start, panel, n, bias, add, c, c_start, c_stride):
    """C (m, n) = A · B + bias, or where ``add`` says so + what C holds. A: pieces in ``room``, from ``row`` on.

    A has ``lines`` lines a step and takes a ``turn`` as ``block`` says. A panel of B lies ``panel`` numbers behind the
    one before; of each, ``steps`` steps are taken from where it begins. A row beyond the last is computed from what
    lies in ``room`` and thrown away.
    """
    pieces = room.ctypes.data + 2 * first_of(room) + row * LINE_BYTES
    edge, edge_bias = aligned_floats(BLOCK * BLOCK), aligned_floats(BLOCK)
    settings = tile_shapes()
    configure(settings.ctypes.data)
    for j in range(0, n, BLOCK):
        of_panel = b.ctypes.data + 2 * (b_start + j // BLOCK * panel)
        columns = min(BLOCK, n - j)
        edge_bias[:columns] = bias[j : j + columns]
        for i in range(0, m, BLOCK):
            rows = min(BLOCK, m - i)
            whole = columns == BLOCK and rows in (BLOCK, SIDE)
            target = c.ctypes.data + 4 * (c_start + i * c_stride + j) if whole else edge.ctypes.data
            stride = 4 * c_stride if whole else 4 * BLOCK
            start, start_stride = edge_bias.ctypes.data, 0
            if add:
                start, start_stride = target, stride
                if not whole:
                    for r in range(rows):
                        for column in range(columns):
                            edge[r * BLOCK + column] = c[c_start + (i + r) * c_stride + j + column]
            first = pieces + i * LINE_BYTES
            one_block(
                rows, i == 0, first, lines * LINE_BYTES, turn, steps, of_panel, start, start_stride, target, stride
            )
            if not whole:
                for r in range(rows):
                    for column in range(columns):
                        c[c_start + (i + r) * c_stride + j + column] = edge[r * BLOCK + column]
    release()
    settings[0] = 0  # a use behind ``configure``: Numba frees an array after its last one, and sees none in an address


@kernel
def product_split(a, a_start, a_stride, m, k, b, b_start, n, bias, c, c_start, c_stride, room):
    """``cpu_gemm.product`` on the matrix unit: b as ``pack_split`` gives it, k and a_stride multiples of DEPTH.

    ``room`` (room_size,) uint16 takes A's pieces. A row with NaN or infinity in it gives NaN or infinity; which of
    them, the pieces of B decide.
    """
    split_rows(a, a_start, a_stride, m, k, room)
    lines, turn, steps = lines_of(a_stride, m, k), min(k, a_stride) // DEPTH, k // DEPTH
    panel = steps * PANEL_STEP
    product_of_lines(room, lines, 0, turn, m, steps, b, b_start, panel, n, bias, False, c, c_start, c_stride)


def multiply(a, a_start, a_stride, m, k, b, b_start, n, bias, c, c_start, c_stride, room):
    """``product`` or ``product_split``, as B is packed: float32 panels, or uint16 for the matrix unit."""
    if b.dtype == np.uint16:
        product_split(a, a_start, a_stride, m, k, b, b_start, n, bias, c, c_start, c_stride, room)
    else:
        product(a, a_start, a_stride, m, k, b, b_start, n, bias, c, c_start, c_stride)


@overload(multiply)
def _multiply(a, a_start, a_stride, m, k, b, b_start, n, bias, c, c_start, c_stride, room):
    """Chosen while compiling, so that a machine without the unit never meets its instructions."""
    if b.dtype == types.uint16:

        def chosen(a, a_start, a_stride, m, k, b, b_start, n, bias, c, c_start, c_stride, room):
            product_split(a, a_start, a_stride, m, k, b, b_start, n, bias, c, c_start, c_stride, room)

    else:

        def chosen(a, a_start, a_stride, m, k, b, b_start, n, bias, c, c_start, c_stride, room):
            product(a, a_start, a_stride, m, k, b, b_start, n, bias, c, c_start, c_stride)

    return chosen


# ------------------------------------------------- from one product to the next without leaving the pieces


@kernel
def put_lines(numbers, width, column, rows, room, lines, fold, parts, row, part):
    """Some of the next A as pieces in ``room``: ``rows`` rows of DEPTH numbers, ``width`` apart, from ``column`` on.

    They belong to rows ``row`` and on of a matrix of ``parts`` · DEPTH columns, and are the ``part``-th in them;
    ``fold`` of those rows side by side are a row of A, which has ``lines`` lines a step.
    """
    first = first_of(room)
    for side in range(fold):
        r = (side - row) % fold  # the first row that comes to lie on this side
        upper = first + (2 * (side * parts + part) * lines + (row + r) // fold) * DEPTH
        for at in range(r * width + column, rows * width, fold * width):
            split_lines(room, upper, upper + lines * DEPTH, numbers, at)
            upper += DEPTH


@vector_kernel
def next_lines(room, lines, count, turn, steps, panels, start, width, bias, code, to, fold):
    """activation(A · B + bias) (count, width) → ``to``, as ``split_rows`` would put it there for rows ``fold`` · width.

    A is in ``room``, ``lines`` lines a step and a ``turn`` as ``block`` says; B begins at ``start``; width is a
    multiple of BLOCK. NEXT_ROWS rows of a panel's columns are activated and split while they are in the nearest cache.
    """
    whole_registers()
    a, lines_out, parts = room.ctypes.data + 2 * first_of(room), -(-count // fold), width // DEPTH
    plane = lines * LINE_BYTES
    some, biases = aligned_floats(NEXT_ROWS * BLOCK), aligned_floats(BLOCK)
    settings = tile_shapes()
    configure(settings.ctypes.data)
    for j in range(0, width, BLOCK):
        panel = panels.ctypes.data + 2 * (start + j // BLOCK * steps * PANEL_STEP)
        biases[:] = bias[j : j + BLOCK]
        for i in range(0, count, NEXT_ROWS):
            rows = min(NEXT_ROWS, count - i)
            for r in range(0, rows, BLOCK):
                at, target = a + (i + r) * LINE_BYTES, some.ctypes.data + 4 * r * BLOCK
                first, start_row = i + r == 0, biases.ctypes.data
                one_block(rows - r, first, at, plane, turn, steps, panel, start_row, 0, target, 4 * BLOCK)
            activate(some[: rows * BLOCK], code)
            put_lines(some, BLOCK, 0, rows, to, lines_out, fold, parts, i, j // DEPTH)
    release()
    settings[0] = 0  # as in ``product_of_lines``


# ------------------------------------------------- the same, with A laid out once for several products


@kernel
def product_laid(a, a_start, k, lines, row, m, room, b, b_start, n, bias, c, c_start, c_stride):
    """``multiply_laid`` on the matrix unit."""
    steps = k // DEPTH
    panel = steps * PANEL_STEP
    product_of_lines(room, lines, row, steps, m, steps, b, b_start, panel, n, bias, False, c, c_start, c_stride)


def lay_out(a, a_start, a_stride, m, k, b, room):
    """Make A ready for ``multiply_laid`` with matrices packed like B: its pieces in ``room``, or nothing."""
    if b.dtype == np.uint16:
        split_rows(a, a_start, a_stride, m, k, room)


def multiply_laid(a, a_start, k, lines, row, m, room, b, b_start, n, bias, c, c_start, c_stride):
    """C (m, n) = A's rows from ``row`` on · B + bias. A (lines, k) lies in ``a``, or in pieces in ``room``, as B is."""
    if b.dtype == np.uint16:
        product_laid(a, a_start, k, lines, row, m, room, b, b_start, n, bias, c, c_start, c_stride)
    else:
        product(a, a_start + row * k, k, m, k, b, b_start, n, bias, c, c_start, c_stride)


@overload(lay_out)
def _lay_out(a, a_start, a_stride, m, k, b, room):
    if b.dtype == types.uint16:
        return lambda a, a_start, a_stride, m, k, b, room: split_rows(a, a_start, a_stride, m, k, room)
    return lambda a, a_start, a_stride, m, k, b, room: None


@overload(multiply_laid)
def _multiply_laid(a, a_start, k, lines, row, m, room, b, b_start, n, bias, c, c_start, c_stride):
    if b.dtype == types.uint16:

        def chosen(a, a_start, k, lines, row, m, room, b, b_start, n, bias, c, c_start, c_stride):
            product_laid(a, a_start, k, lines, row, m, room, b, b_start, n, bias, c, c_start, c_stride)

    else:

        def chosen(a, a_start, k, lines, row, m, room, b, b_start, n, bias, c, c_start, c_stride):
            product(a, a_start + row * k, k, m, k, b, b_start, n, bias, c, c_start, c_stride)

    return chosen
