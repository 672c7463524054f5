"""Matrix products on the CPU: one register-blocked kernel that every dense step of the model runs through.

    C[i, :] = A[i, :] · B + bias          A (m, k), B (k, n) packed on load, C (m, n), float32

How it is fast, rung by rung (measured gains: docs/kernels.md):

1. ``product_v1``: three loops. One running sum, so every addition waits for the one before; B is read down its
   columns.
2. Keep a tile of C, ``ROWS`` × ``COLUMNS`` numbers, in vector registers while k runs: with AVX-512 12 × 32 of them, so
   that every number loaded is used 32 or 12 times. The compiler does not find this by itself, so ``_tile_builder``
   writes the tile in LLVM's own language, and ``tile`` shows what it computes.
3. Pack B once, on load, into panels of ``COLUMNS`` columns (``pack``): the inner loop then reads it front to back.
4. Rows of A may lie ``stride`` apart, overlapping or not: a convolution over time-major sound is a plain product whose
   row i starts at sample i · stride (no im2col).

A row's result depends on that row alone, not on how many others are computed with it: results do not change with the
batch, the length or the number of threads, to the last bit.

Arrays come flat with an offset, a row stride and a count; that is what a view is underneath.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from sewd_np.sources import fingerprint, kept_on_disk

Array = np.ndarray


def _register_tile() -> tuple[int, int, int]:
    """(rows, vectors a row, floats a vector) of the tile that fills this machine's vector registers.

    Accumulators + one row of B + one broadcast of A must fit: 32 registers of 16 floats with AVX-512, 16 of 8 with
    AVX2, 32 of 4 on 64-bit Arm.
    """
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 12, 2, 16
    if platform.machine() in ("aarch64", "arm64"):
        return 8, 2, 4
    return 6, 2, 8 if features.get("avx2") else 4


ROWS, VECTORS, LANES = _register_tile()
COLUMNS = VECTORS * LANES  # width of a packed panel
FEW_ROWS = 4  # a second, lower tile for the rows that are left over


SOURCES = fingerprint(Path(__file__).parent, "cpu_*.py")


def compiled(**flags: Any) -> Callable[[Callable[..., Any]], Any]:
    """``njit`` for a kernel: without Python's lock, kept on disk until any of the CPU's kernels changes."""
    jit = partial(njit, nogil=True, error_model="numpy", **flags)
    return lambda function: kept_on_disk(jit, function, SOURCES)


kernel = compiled()


def aligned(size: int, dtype: Any) -> Array:
    """``size`` numbers, uninitialised, from an address that is a multiple of 64."""
    raw = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size * np.dtype(dtype).itemsize].view(dtype)


def pack(b_kn: Array) -> Array:
    """B (k, n) as panels (ceil(n / COLUMNS), k, COLUMNS), zeros beyond n: the order in which the kernel reads."""
    k, n = b_kn.shape
    count = -(-n // COLUMNS)
    panels = aligned(count * k * COLUMNS, np.float32).reshape(count, k, COLUMNS)
    panels[:] = 0
    for j, panel in enumerate(panels):
        columns = b_kn[:, j * COLUMNS : (j + 1) * COLUMNS]
        panel[:, : columns.shape[1]] = columns
    return panels


@kernel
def product_v1(a, a_start, a_stride, m, k, b_kn, bias, c, c_start, c_stride):
    """Rung 1: the definition, three loops over an unpacked B (k, n)."""
    for i in range(m):
        for j in range(b_kn.shape[1]):
            total = bias[j]
            for kk in range(k):
                total += a[a_start + i * a_stride + kk] * b_kn[kk, j]
            c[c_start + i * c_stride + j] = total


# ----------------------------------------------------------------------- the register tile


def tile(a, a_start, a_stride, rows, k, b, b_start, bias, bias_start, c, c_start, c_stride):
    """C's tile (rows, COLUMNS) = A's rows · one panel of B + bias: what the compiled tile computes, in NumPy.

    ``rows`` is at most ROWS; all arrays are float32 and flat. The panel is k rows of COLUMNS numbers from ``b_start``.
    """
    for i in range(rows):
        total = bias[bias_start : bias_start + COLUMNS].copy()
        for kk in range(k):
            row = b_start + kk * COLUMNS
            total += a[a_start + i * a_stride + kk] * b[row : row + COLUMNS]
        c[c_start + i * c_stride : c_start + i * c_stride + COLUMNS] = total


def low_tile(a, a_start, a_stride, rows, k, b, b_start, bias, bias_start, c, c_start, c_stride):
    """``tile`` for at most FEW_ROWS rows."""
    tile(a, a_start, a_stride, rows, k, b, b_start, bias, bias_start, c, c_start, c_stride)


READ_TO_LEVEL_2 = [ir.Constant(ir.IntType(32), number) for number in (0, 2, 1)]  # prefetch's: read, level, data


def prefetch(builder: Any) -> Any:
    """LLVM's function that asks for a line of memory."""
    i32 = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), i32, i32, i32])
    return cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")


def _tile_builder(height: int) -> Callable[..., Any]:
    """The compiled tile of ``height`` rows.

    ``height`` × VECTORS accumulators live in registers (LLVM phi values) through the loop over k. Each turn loads one
    row of the panel, broadcasts one number of each row of A, and does ``height`` × VECTORS fused multiply-adds. Where
    fewer rows are asked for, the surplus ones repeat the last: same numbers, same address, no branch in the loop.
    """
    f32, i32, i64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
    vector = ir.VectorType(f32, LANES)
    size = ir.Constant(i64, 4)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, a_stride, rows, k, b, bias, c, c_stride = arguments
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
        )

        pointer = ir.IntType(8).as_pointer()
        panel_bytes = builder.mul(k, ir.Constant(i64, 4 * COLUMNS))

        def vector_at(address: Any, lane: int) -> Any:
            return builder.inttoptr(builder.add(address, ir.Constant(i64, 4 * LANES * lane)), vector.as_pointer())

        def row_address(base: Any, row: int, stride: Any) -> Any:
            wanted, last = ir.Constant(i64, row), builder.sub(rows, ir.Constant(i64, 1))
            index = builder.select(builder.icmp_signed("<", wanted, rows), wanted, last)
            return builder.add(base, builder.mul(builder.mul(index, stride), size))

        a_rows = [builder.inttoptr(row_address(a, r, a_stride), f32.as_pointer()) for r in range(height)]
        c_rows = [row_address(c, r, c_stride) for r in range(height)]
        start = [builder.load(vector_at(bias, v), align=4) for v in range(VECTORS)]
        entry, loop, done = builder.block, builder.append_basic_block("k"), builder.append_basic_block("done")
        enter = builder.icmp_signed(">", k, ir.Constant(i64, 0))
        builder.cbranch(enter, loop, done)

        builder.position_at_end(loop)
        step = builder.phi(i64)
        sums = [[builder.phi(vector) for _ in range(VECTORS)] for _ in range(height)]
        b_row = builder.add(b, builder.mul(step, ir.Constant(i64, 4 * COLUMNS)))
        b_vectors = [builder.load(vector_at(b_row, v), align=4) for v in range(VECTORS)]
        for line in range(0, 4 * COLUMNS, 64):  # ask for the next panel while this one is at work
            ahead = builder.add(builder.add(b_row, panel_bytes), ir.Constant(i64, line))
            builder.call(prefetch(builder), [builder.inttoptr(ahead, pointer), *READ_TO_LEVEL_2])
        undefined, first = ir.Constant(vector, ir.Undefined), ir.Constant(i32, 0)
        everywhere = ir.Constant(ir.VectorType(i32, LANES), [0] * LANES)
        new = []
        for r in range(height):
            number = builder.load(builder.gep(a_rows[r], [step]))
            spread = builder.shuffle_vector(builder.insert_element(undefined, number, first), undefined, everywhere)
            new.append([builder.call(fma, [spread, b_vectors[v], sums[r][v]]) for v in range(VECTORS)])
        next_step = builder.add(step, ir.Constant(i64, 1))
        step.add_incoming(ir.Constant(i64, 0), entry)
        step.add_incoming(next_step, loop)
        for r in range(height):
            for v in range(VECTORS):
                sums[r][v].add_incoming(start[v], entry)
                sums[r][v].add_incoming(new[r][v], loop)
        builder.cbranch(builder.icmp_signed("<", next_step, k), loop, done)

        builder.position_at_end(done)
        for r in range(height):
            for v in range(VECTORS):
                total = builder.phi(vector)
                total.add_incoming(start[v], entry)
                total.add_incoming(new[r][v], loop)
                sums[r][v] = total
        for r in range(height):
            for v in range(VECTORS):
                builder.store(sums[r][v], vector_at(c_rows[r], v), align=4)
        return context.get_dummy_value()

    @intrinsic
    def compiled(typing_context, a, a_stride, rows, k, b, bias, c, c_stride):
        return types.void(*[types.int64] * 8), emit

    return compiled


_compiled_tile = _tile_builder(ROWS)
_compiled_low_tile = _tile_builder(FEW_ROWS)


@overload(tile, inline="always")
def _tile(a, a_start, a_stride, rows, k, b, b_start, bias, bias_start, c, c_start, c_stride):
    def at_addresses(a, a_start, a_stride, rows, k, b, b_start, bias, bias_start, c, c_start, c_stride):
        _compiled_tile(
            a.ctypes.data + 4 * a_start,
            a_stride,
            rows,
            k,
            b.ctypes.data + 4 * b_start,
            bias.ctypes.data + 4 * bias_start,
            c.ctypes.data + 4 * c_start,
            c_stride,
        )

    return at_addresses


@overload(low_tile, inline="always")
def _low_tile(a, a_start, a_stride, rows, k, b, b_start, bias, bias_start, c, c_start, c_stride):
    def at_addresses(a, a_start, a_stride, rows, k, b, b_start, bias, bias_start, c, c_start, c_stride):
        _compiled_low_tile(
            a.ctypes.data + 4 * a_start,
            a_stride,
            rows,
            k,
            b.ctypes.data + 4 * b_start,
            bias.ctypes.data + 4 * bias_start,
            c.ctypes.data + 4 * c_start,
            c_stride,
        )

    return at_addresses


# ---------------------------------------------------------------------------- the product


@kernel
def product(a, a_start, a_stride, m, k, b, b_start, n, bias, c, c_start, c_stride):
    """C (m, n) = A (m, k) · B + bias. a, c flat with a start and a row stride; b packed, flat, from b_start; bias (n,).

    Panels outside, tiles inside: a panel stays in the nearest cache while all rows pass it.
    """
    edge = np.empty(ROWS * COLUMNS, np.float32)
    edge_bias = np.zeros(COLUMNS, np.float32)
    for j in range(0, n, COLUMNS):
        panel = b_start + j * k
        if n - j >= COLUMNS:
            i = 0
            while m - i > ROWS - FEW_ROWS:
                rows = min(ROWS, m - i)
                a_row, c_row = a_start + i * a_stride, c_start + i * c_stride + j
                tile(a, a_row, a_stride, rows, k, b, panel, bias, j, c, c_row, c_stride)
                i += rows
            while i < m:
                rows = min(FEW_ROWS, m - i)
                a_row, c_row = a_start + i * a_stride, c_start + i * c_stride + j
                low_tile(a, a_row, a_stride, rows, k, b, panel, bias, j, c, c_row, c_stride)
                i += rows
        else:  # the last panel is not full: compute it aside, copy the columns that exist
            width = n - j
            edge_bias[:width] = bias[j:n]
            i = 0
            while i < m:
                rows = min(ROWS, m - i)
                tile(a, a_start + i * a_stride, a_stride, rows, k, b, panel, edge_bias, 0, edge, 0, COLUMNS)
                for r in range(rows):
                    for column in range(width):
                        c[c_start + (i + r) * c_stride + j + column] = edge[r * COLUMNS + column]
                i += rows
