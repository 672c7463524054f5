"""Products on the matrix unit that recent Intel server processors have (AMX), a third faster than on the vector unit.

The unit multiplies 16 × 32 by 32 × 16 numbers of bfloat16 in one instruction and adds them up in float32. A bfloat16 is
the upper half of a float32: 8 bits of precision instead of 24, too few for a model that shall equal its reference. So
each float32 is split into two of them, the number rounded and what the rounding left (``split``):

    a = a₁ + a₂ + ε,   |ε| ≤ 2⁻¹⁷ |a|         a · b ≈ a₁ b₁ + a₁ b₂ + a₂ b₁

Three products replace one; the fourth, a₂ b₂, is smaller than what the splitting leaves out. Products are then good to
17 bits: sixty times finer than TensorFloat's, coarser than float32's. A model's logits come out within 2e-5 of the
largest instead of 2e-6 (``python -m benchmarks.cpu error``). PyTorch calls the same trick
``set_float32_matmul_precision("high")``, and so do we: ``load(..., precision="highest")`` leaves the unit alone.

The unit has eight tile registers of 16 rows of 64 bytes. Four hold a tile of C (32, 32), two a tile of A, two of B.
Tiles must start at multiples of 64 bytes, since a row across two cache lines loads five times as slowly; hence only
depths and strides that are multiples of DEPTH go this way, which those of every published checkpoint are. ``cpu_split``
puts whole products together from the blocks here.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from sewd_np.cpu_gemm import READ_TO_LEVEL_2, aligned, kernel, prefetch
from sewd_np.cpu_lines import LINE, split_line

Array = np.ndarray
SIDE = 16  # rows of a tile register
DEPTH = 32  # bfloat16 numbers in a row of one
LINE_BYTES = 2 * DEPTH
BLOCK = 2 * SIDE  # rows and columns of C that are computed together
PANEL_STEP = 2 * 2 * SIDE * DEPTH  # numbers of a packed panel for DEPTH steps of k: two pieces, two tiles
FETCH = 16384  # bytes of B between what is used and what is asked for: weights come from farther away than the cache


@cache
def available() -> bool:
    """Whether this machine has the unit, Numba compiles for it, and the system lets this process use it (Linux)."""
    features = llvmlite.binding.get_host_cpu_features()
    found = features.get("amx-tile") and features.get("amx-bf16") and features.get("avx512f")
    chosen = numba.config.CPU_NAME or numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if not found or chosen or platform.system() != "Linux":
        return False
    # Linux keeps the unit's 8 kB of registers out of a process's state until it asks: arch_prctl(ARCH_REQ_XCOMP_PERM).
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def pack_split(b_kn: Array) -> Array:
    """B (k, n), k a multiple of DEPTH, as the unit reads it: flat uint16, panels of BLOCK columns, zeros beyond n.

    Of a panel, each DEPTH rows lie together: both pieces, in each two tiles of 16 columns, in each 16 rows of 16 pairs
    (B[2r, c], B[2r + 1, c]).
    """
    k, n = b_kn.shape
    panels = -(-n // BLOCK)
    padded = np.zeros((k, panels * BLOCK), np.float32)
    padded[:, :n] = b_kn
    pieces = np.empty((2, padded.size), np.uint16)
    split(padded.reshape(-1), pieces[0], pieces[1])
    out = aligned(pieces.size, np.uint16)
    in_order = pieces.reshape(2, k // DEPTH, SIDE, 2, panels, 2, SIDE).transpose(4, 1, 0, 5, 2, 6, 3)
    out.reshape(in_order.shape)[:] = in_order
    return out


@kernel
def split(x, upper, lower):
    """x (n,) float32 → its two bfloat16 pieces (n,) each, as uint16; n a multiple of LINE."""
    for i in range(0, len(x), LINE):
        split_line(upper, i, lower, i, x, i)


# ----------------------------------------------------------------------- the tile registers


def _at(address: int, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """What lies at an address, as an array; ``strides`` in bytes."""
    size = sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True)) + np.dtype(dtype).itemsize
    memory: Any = (ctypes.c_char * int(size)).from_address(int(address))
    return np.ndarray(shape, dtype, memory, strides=strides)


def _numpy_block(
    rows: int, a: int, plane: int, turn: int, steps: int, b: int, start: int, start_stride: int, c: int, c_stride: int
) -> None:
    k, step, tile = steps * DEPTH, 2 * PANEL_STEP, 2 * SIDE * DEPTH
    places = [a + s % turn * 2 * plane + s // turn * LINE_BYTES for s in range(steps)]
    a_prk = np.concatenate([_at(at, np.uint16, (2, rows, DEPTH), (plane, LINE_BYTES, 2)) for at in places], axis=2)
    in_memory = (step, LINE_BYTES, 2, tile, 4, 2 * tile)
    b_kjp = _at(b, np.uint16, (steps, SIDE, 2, 2, SIDE, 2), in_memory).reshape(k, BLOCK, 2)
    total = _at(start, np.float32, (rows, BLOCK), (start_stride, 4)).astype(np.float64)
    for i, j in ((1, 0), (0, 1), (0, 0)):
        a_rk, b_kj = (piece.astype(np.uint32) << np.uint32(16) for piece in (a_prk[i], b_kjp[:, :, j]))
        total = total + a_rk.view(np.float32).astype(np.float64) @ b_kj.view(np.float32).astype(np.float64)
    _at(c, np.float32, (rows, BLOCK), (c_stride, 4))[:] = total


def block(a, plane, turn, steps, b, start, start_stride, c, c_stride):
    """C's block (BLOCK, BLOCK) = start + A's rows · one panel of B: what the compiled block computes, in NumPy.

    Every argument but ``turn`` and ``steps`` is an address or in bytes. A lies as ``cpu_split.split_rows`` puts it:
    lines of DEPTH numbers, for each step of k those of all rows, ``plane`` bytes of them for each of the two pieces.
    After ``turn`` steps a row's window goes on in the row below. Of ``start`` rows lie ``start_stride`` apart: 0 for a
    bias, which is the same for each.
    """
    _numpy_block(BLOCK, a, plane, turn, steps, b, start, start_stride, c, c_stride)


def first_block(a, plane, turn, steps, b, start, start_stride, c, c_stride):
    """``block`` for the first rows, which meet a panel before it is in the cache: compiled, it asks for it ahead."""
    block(a, plane, turn, steps, b, start, start_stride, c, c_stride)


def low_block(a, plane, turn, steps, b, start, start_stride, c, c_stride):
    """``block`` of SIDE rows."""
    _numpy_block(SIDE, a, plane, turn, steps, b, start, start_stride, c, c_stride)


def configure(settings):
    """Give the eight registers their shape; ``settings`` is the address of 64 bytes. NumPy has no registers."""


def release():
    """Empty the registers, so that the system need not save them when it switches threads."""


def _block_builder(tiles: int, fetch: bool = False) -> Any:
    """The compiled block of ``tiles`` × SIDE rows. ``fetch``: ask for B FETCH bytes ahead, for the first block of rows.

    Tile registers 0 – 3 hold C, 4 – 5 A, 6 – 7 B. Of the three products of pieces the smaller come first; a step from
    one to the next changes A or B but not both, so that four tiles of each are loaded for twelve instructions.
    """
    byte, address = ir.IntType(8), ir.IntType(64)
    pointer = byte.as_pointer()

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, plane, turn, steps, b, start, start_stride, c, c_stride = arguments

        def call(name: str, *operands: Any) -> None:
            values = [ir.Constant(byte, o) if isinstance(o, int) else o for o in operands]
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), values)

        def number(value: int) -> Any:
            return ir.Constant(address, value)

        def at(base: Any, offset: Any) -> Any:
            return builder.inttoptr(builder.add(base, offset), pointer)

        def corner(base: Any, stride: Any, row: int, column: int) -> Any:
            return at(base, builder.add(builder.mul(stride, number(SIDE * row)), number(64 * column)))

        for row in range(tiles):
            for column in range(2):
                call("tileloadd64", 2 * row + column, corner(start, start_stride, row, column), start_stride)
        a_step = builder.mul(plane, number(2))
        # At a turn: back to the first step's lines, one line further.
        a_turn = builder.sub(number(LINE_BYTES), builder.mul(a_step, builder.sub(turn, number(1))))
        entry, loop, done = builder.block, builder.append_basic_block("k"), builder.append_basic_block("done")
        builder.branch(loop)

        builder.position_at_end(loop)
        step, a_here, left = builder.phi(address), builder.phi(address), builder.phi(address)
        b_here = builder.add(b, builder.mul(step, number(2 * PANEL_STEP)))

        def load_a(piece: int, row: int) -> None:
            offset = builder.add(builder.mul(plane, number(piece)), number(SIDE * LINE_BYTES * row))
            call("tileloadd64", 4 + row, at(a_here, offset), number(LINE_BYTES))

        def load_b(piece: int, column: int) -> None:
            call("tileloadd64", 6 + column, at(b_here, number(PANEL_STEP * piece + 1024 * column)), number(64))

        def multiply(row: int, column: int) -> None:
            call("tdpbf16ps", 2 * row + column, 4 + row, 6 + column)

        if fetch:
            for line in range(0, 2 * PANEL_STEP, 64):
                ahead = at(b_here, number(FETCH + line))
                builder.call(prefetch(builder), [ahead, *READ_TO_LEVEL_2])
        load_b(0, 0)
        load_b(0, 1)
        for piece in (1, 0):
            for row in range(tiles):
                load_a(piece, row)
                multiply(row, 0)
                multiply(row, 1)
        for column in range(2):
            load_b(1, column)
            for row in range(tiles):
                multiply(row, column)
        next_step, now_left = builder.add(step, number(1)), builder.sub(left, number(1))
        turns = builder.icmp_signed("==", now_left, number(0))
        next_a = builder.add(a_here, builder.select(turns, a_turn, a_step))
        for phi, first, following in (
            (step, number(0), next_step),
            (a_here, a, next_a),
            (left, turn, builder.select(turns, turn, now_left)),
        ):
            phi.add_incoming(first, entry)
            phi.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", next_step, steps), loop, done)

        builder.position_at_end(done)
        for row in range(tiles):
            for column in range(2):
                call("tilestored64", 2 * row + column, corner(c, c_stride, row, column), c_stride)
        return context.get_dummy_value()

    @intrinsic
    def compiled_block(typing_context, a, plane, turn, steps, b, start, start_stride, c, c_stride):
        return types.void(*[types.int64] * 9), emit

    return compiled_block


_block, _low_block, _first_block = _block_builder(2), _block_builder(1), _block_builder(2, fetch=True)


@overload(block, inline="always")
def _compiled_block(a, plane, turn, steps, b, start, start_stride, c, c_stride):
    return lambda a, plane, turn, steps, b, start, start_stride, c, c_stride: _block(
        a, plane, turn, steps, b, start, start_stride, c, c_stride
    )


@overload(first_block, inline="always")
def _compiled_first_block(a, plane, turn, steps, b, start, start_stride, c, c_stride):
    return lambda a, plane, turn, steps, b, start, start_stride, c, c_stride: _first_block(
        a, plane, turn, steps, b, start, start_stride, c, c_stride
    )


@overload(low_block, inline="always")
def _compiled_low_block(a, plane, turn, steps, b, start, start_stride, c, c_stride):
    return lambda a, plane, turn, steps, b, start, start_stride, c, c_stride: _low_block(
        a, plane, turn, steps, b, start, start_stride, c, c_stride
    )


@intrinsic
def _configure(typing_context, settings):
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer])
        load = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.ldtilecfg")
        builder.call(load, [builder.inttoptr(arguments[0], pointer)])
        return context.get_dummy_value()

    return types.void(types.int64), emit


@intrinsic
def _release(typing_context):
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.tilerelease"), [])
        return context.get_dummy_value()

    return types.void(), emit


@overload(configure, inline="always")
def _compiled_configure(settings):
    return lambda settings: _configure(settings)  # type: ignore[call-arg]


@overload(release, inline="always")
def _compiled_release():
    return lambda: _release()  # type: ignore[call-arg]
