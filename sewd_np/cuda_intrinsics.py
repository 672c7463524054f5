"""The one door to numba.cuda, and the few machine instructions that plain Python indexing cannot express.

Every CUDA room imports ``cuda`` from here. What is below works in three worlds:

- on a GPU, and compiled to PTX on a machine without one: each function becomes the instruction that it names;
- in Numba's simulator (NUMBA_ENABLE_CUDASIM=1), where a kernel is plain Python: each function has a stand-in that does
  the same and is stricter than the device, which reads past the end of an array without a word.

Addresses are *flat*: ``load4(x, 12)`` reads the numbers 12 to 15 of x in memory order, whatever the shape of x. Numba's
own x[b, t, c] works out the address in 64 bits, asks whether each index is negative, and reads one number at a time;
in the inner loop of a product that costs more than the product.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np

from sewd_np.cuda_unroll import static_range, unrolled
from sewd_np.sources import fingerprint, kept_on_disk

# Any: numba-cuda takes the place of a module of Numba's own, whose types describe neither it nor what a kernel may do.
cuda: Any = importlib.import_module("numba.cuda")
float32: Any = numba.float32
int32: Any = numba.int32
SIMULATED = bool(importlib.import_module("numba.core.config").ENABLE_CUDASIM)
ALL_LANES = 0xFFFFFFFF
SOURCES = fingerprint(Path(__file__).parent, "cuda_*.py")

__all__ = [
    "SIMULATED",
    "add_read",
    "copy4",
    "cuda",
    "device",
    "erf",
    "exp2",
    "float32",
    "fma",
    "group_max",
    "group_sum",
    "int32",
    "kernel",
    "load",
    "load4",
    "numbers_together",
    "read",
    "static_range",
    "store",
    "store4",
    "write",
    "zero4",
]

erf = math.erf  # in a kernel Numba takes the float32 form of the CUDA library, at most 2 units in the last place off


# ------------------------------------------------------------------------- decorators


def kernel(threads: int, blocks: int = 0) -> Callable[[Callable], Any]:
    """Decorator: a kernel launched with ``threads`` threads a block, its ``static_range`` loops written out.

    ``blocks`` asks the compiler to use so few registers that this many blocks fit on a multiprocessor; 0 asks nothing.
    No fast-math flags: they would assume that NaN and infinity do not occur, and a NaN in the sound has to reach the
    result as it does in NumPy; a · b + c in one rounding needs no flag. No link-time optimisation: what the compile
    tests measure is then what runs. Kept on disk until any of the GPU's kernels changes.
    """

    def decorate(function: Callable) -> Any:
        body = unrolled(function)
        if SIMULATED:
            return cuda.jit(body)
        bounds = (threads, blocks) if blocks else threads
        return kept_on_disk(partial(cuda.jit, launch_bounds=bounds, lto=False), body, SOURCES)

    return decorate


def device(function: Callable) -> Any:
    """Decorator: a function that kernels call, always inlined, its ``static_range`` loops written out."""
    body = unrolled(function)
    return cuda.jit(device=True)(body) if SIMULATED else cuda.jit(device=True, forceinline=True)(body)


# ----------------------------------------------------------------- across a warp's lanes


@device
def group_max(x, lanes, apart=1):
    """Largest x of each group of ``lanes`` lanes that lie ``apart`` from each other, known to all of them after.

    Both are powers of two, lanes · apart ≤ 32. Lane l exchanges with l xor apart, l xor 2·apart and so on.
    """
    step = apart
    while step < lanes * apart:
        x = max(x, cuda.shfl_xor_sync(ALL_LANES, x, step))
        step *= 2
    return x


@device
def group_sum(x, lanes, apart=1):
    """Sum of x over the same groups as in ``group_max``."""
    step = apart
    while step < lanes * apart:
        x += cuda.shfl_xor_sync(ALL_LANES, x, step)
        step *= 2
    return x


# ------------------------------------------------------------------------ stand-ins

if SIMULATED:

    def flat(array: Any, at: int, count: int) -> Any:
        """The array as one row, after a look whether ``count`` numbers from ``at`` lie in it, aligned to ``count``."""
        if not 0 <= at <= array.size - count:
            raise IndexError(f"numbers {at} to {at + count - 1} of an array of {array.size}")
        if at % count:
            raise IndexError(f"number {at} is not aligned to {count}")
        return array.reshape(-1)

    def load(array: Any, at: int) -> Any:
        return flat(array, at, 1)[at]

    def store(array: Any, at: int, x: Any) -> None:
        flat(array, at, 1)[at] = x

    def load4(array: Any, at: int) -> tuple:
        row = flat(array, at, 4)
        return row[at], row[at + 1], row[at + 2], row[at + 3]

    def store4(array: Any, at: int, a: Any, b: Any, c: Any, d: Any) -> None:
        row = flat(array, at, 4)
        row[at], row[at + 1], row[at + 2], row[at + 3] = a, b, c, d

    def copy4(target: Any, to: int, source: Any, at: int) -> None:
        store4(target, to, *load4(source, at))

    def zero4(target: Any, to: int) -> None:
        store4(target, to, 0, 0, 0, 0)

    def fma(a: Any, b: Any, c: Any) -> Any:
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))

    def exp2(x: Any) -> Any:
        return np.exp2(np.float32(x))


# --------------------------------------------------------------------- the real thing

else:
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.cuda.extending import intrinsic

    F32, I32 = ir.FloatType(), ir.IntType(32)
    FOUR = ir.VectorType(F32, 4)

    def address(context: Any, builder: Any, array_type: Any, array: Any, at: Any, offset: int = 0) -> Any:
        """Pointer to number ``at + offset`` of an array in memory order; ``offset`` is folded into the instruction."""
        data = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data
        pointer = builder.gep(data, [at])
        return builder.gep(pointer, [ir.Constant(at.type, offset)]) if offset else pointer

    def load_vector(context: Any, builder: Any, array_type: Any, array: Any, at: Any, offset: int = 0) -> Any:
        """Four numbers in one 128-bit instruction."""
        pointer = address(context, builder, array_type, array, at, offset)
        return builder.load(builder.bitcast(pointer, FOUR.as_pointer()), align=16)

    def store_vector(context: Any, builder: Any, array_type: Any, array: Any, at: Any, vector: Any) -> None:
        pointer = address(context, builder, array_type, array, at)
        builder.store(vector, builder.bitcast(pointer, FOUR.as_pointer()), align=16)

    def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(F32, [F32] * 3), "llvm.fma.f32")
        return builder.call(function, [a, b, c])

    def is_flat(*arrays: Any) -> bool:
        return all(isinstance(array, types.Array) and array.layout == "C" for array in arrays)

    @intrinsic
    def load(typing: Any, array: Any, at: Any) -> Any:
        """array.flat[at], any dtype."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.load(address(context, builder, array, *arguments))

        return (array.dtype(array, types.intp), generate) if is_flat(array) else None

    @intrinsic
    def store(typing: Any, array: Any, at: Any, x: Any) -> Any:
        """array.flat[at] = x"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
            builder.store(arguments[2], address(context, builder, array, *arguments[:2]))

        return (types.void(array, types.intp, array.dtype), generate) if is_flat(array) else None

    @intrinsic
    def load4(typing: Any, array: Any, at: Any) -> Any:
        """array.flat[at : at + 4] as a tuple, in one instruction; float32, at a multiple of 4."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vector = load_vector(context, builder, array, *arguments)
            parts = [builder.extract_element(vector, I32(part)) for part in range(4)]
            return context.make_tuple(builder, signature.return_type, parts)

        return (types.UniTuple(types.float32, 4)(array, types.intp), generate) if is_flat(array) else None

    @intrinsic
    def store4(typing: Any, array: Any, at: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        """array.flat[at : at + 4] = a, b, c, d in one instruction."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
            vector = ir.Constant(FOUR, ir.Undefined)
            for part in range(4):
                vector = builder.insert_element(vector, arguments[2 + part], I32(part))
            store_vector(context, builder, array, arguments[0], arguments[1], vector)

        number = types.float32
        return (types.void(array, types.intp, *[number] * 4), generate) if is_flat(array) else None

    @intrinsic
    def copy4(typing: Any, target: Any, to: Any, source: Any, at: Any) -> Any:
        """target.flat[to : to + 4] = source.flat[at : at + 4]"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
            vector = load_vector(context, builder, source, arguments[2], arguments[3])
            store_vector(context, builder, target, arguments[0], arguments[1], vector)

        signature = types.void(target, types.intp, source, types.intp)
        return (signature, generate) if is_flat(target, source) else None

    @intrinsic
    def zero4(typing: Any, target: Any, to: Any) -> Any:
        """target.flat[to : to + 4] = 0"""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
            store_vector(context, builder, target, arguments[0], arguments[1], ir.Constant(FOUR, [0.0] * 4))

        return (types.void(target, types.intp), generate) if is_flat(target) else None

    @intrinsic
    def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
        """a · b + c, rounded once."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return multiply_add(builder, *arguments)

        return types.float32(types.float32, types.float32, types.float32), generate

    @intrinsic
    def exp2(typing: Any, x: Any) -> Any:
        """2ˣ in one instruction, within 2 units in the last place; results below the smallest normal number are 0."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            code = ir.InlineAsm(ir.FunctionType(F32, [F32]), "ex2.approx.ftz.f32 $0, $1;", "=f,f")
            return builder.call(code, arguments)

        return types.float32(types.float32), generate


# ---------------------------------------------------------------------- several numbers at once
# Where a kernel may work in place, no load can be moved before the store of the numbers before it: a lane waits for
# memory once a round. Four numbers a round make a quarter of the rounds.


def numbers_together(size: int) -> int:
    """How many numbers of rows of ``size`` to read and write at once: 4 where each row begins at a multiple of 4."""
    return 4 if size % 4 == 0 else 1


@device
def read(part, width, x, at):
    """part = x[at : at + width]; width is 1 or 4."""
    if width == 1:
        part[0] = load(x, at)
    else:
        v = load4(x, at)
        for z in static_range(4):
            part[z] = v[z]


@device
def add_read(part, width, x, at):
    """part += x[at : at + width]"""
    if width == 1:
        part[0] += load(x, at)
    else:
        v = load4(x, at)
        for z in static_range(4):
            part[z] += v[z]


@device
def write(out, at, part, width):
    """out[at : at + width] = part"""
    if width == 1:
        store(out, at, part[0])
    else:
        store4(out, at, part[0], part[1], part[2], part[3])
