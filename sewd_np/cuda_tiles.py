"""Register tiles: the inner loops of matrix products and fused attention, each a call that becomes straight-line code.

A thread keeps a small matrix of results in registers and adds one outer product after another to it. Operands come from
shared memory four numbers at a time (one 128-bit instruction), and every number read is used several times: for a tile
of 8 × 4 results, 12 reads feed 128 multiply-adds. Written as Python loops the same code takes Numba seconds to minutes
to compile, since it infers a type for each of the unrolled lines; here the lines are made as LLVM instructions at once.

In all four, ``tile`` is a thread's ``cuda.local.array`` of rows · columns results, ``memory`` a flat shared array,
addresses count numbers and are multiples of 4, and sizes and steps are constants of the kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sewd_np.cuda_intrinsics import SIMULATED, load4

if SIMULATED:

    def read(memory: Any, at: int, step: int, count: int) -> np.ndarray:
        """(count, 4): four numbers from each of ``count`` rows."""
        return np.array([load4(memory, at + row * step) for row in range(count)], np.float32)

    def add_outer(
        tile: Any,
        rows: int,
        columns: int,
        memory: Any,
        a_at: int,
        a_gap: int,
        a_step: int,
        b_at: int,
        b_gap: int,
        b_step: int,
        steps: int,
    ) -> None:
        for k in range(steps):
            a = read(memory, a_at + k * a_step, a_gap, rows // 4).reshape(-1)
            b = read(memory, b_at + k * b_step, b_gap, columns // 4).reshape(-1)
            tile += np.outer(a, b).reshape(-1)

    def add_products(
        tile: Any, rows: int, columns: int, memory: Any, a_at: int, a_step: int, b_at: int, b_step: int
    ) -> None:
        tile += read(memory, a_at, a_step, rows) @ read(memory, b_at, b_step, columns).T

    def add_band_products(
        tile: Any,
        rows: int,
        columns: int,
        memory: Any,
        a_at: int,
        a_step: int,
        band_at: int,
        band_step: int,
        of_row: int,
    ) -> None:
        own = read(memory, a_at, a_step, rows if of_row else columns)
        band = read(memory, band_at, band_step, rows + columns - 1)
        for i in range(rows):
            for j in range(columns):
                tile[i, j] += own[i if of_row else j] @ band[i - j + columns - 1]

    def add_weighted(
        tile: Any, rows: int, groups: int, memory: Any, a_at: int, a_step: int, v_at: int, v_step: int, group_step: int
    ) -> None:
        weights = read(memory, a_at, a_step, rows)
        for group in range(groups):
            tile[:, 4 * group : 4 * group + 4] += weights @ read(memory, v_at + group * group_step, v_step, 4)

else:
    from numba.core import types
    from numba.core.errors import RequireLiteralValue
    from numba.cuda.extending import intrinsic

    from sewd_np.cuda_intrinsics import I32, address, is_flat, load_vector, multiply_add

    def constants(*arguments: Any) -> list[int]:
        """The numbers behind sizes and steps, which have to be constants of the kernel."""
        if not all(isinstance(argument, types.IntegerLiteral) for argument in arguments):
            raise RequireLiteralValue("sizes and steps of a register tile must be constants")
        return [argument.literal_value for argument in arguments]

    class Emitter:
        """Writes the instructions of one call: vectors out of shared memory, multiply-adds into the tile."""

        def __init__(
            self, context: Any, builder: Any, tile_type: Any, tile: Any, memory_type: Any, memory: Any
        ) -> None:
            self.context, self.builder = context, builder
            self.tile_type, self.tile = tile_type, tile
            self.memory_type, self.memory = memory_type, memory

        def read(self, at: Any, offset: int) -> list:
            vector = load_vector(self.context, self.builder, self.memory_type, self.memory, at, offset)
            return [self.builder.extract_element(vector, I32(part)) for part in range(4)]

        def add(self, place: int, a: list, b: list) -> None:
            """tile.flat[place] += Σ a · b"""
            zero = self.context.get_constant(types.intp, 0)
            pointer = address(self.context, self.builder, self.tile_type, self.tile, zero, place)
            total = self.builder.load(pointer)
            for x, y in zip(a, b, strict=True):
                total = multiply_add(self.builder, x, y, total)
            self.builder.store(total, pointer)

    @intrinsic
    def add_outer(
        typing: Any,
        tile: Any,
        rows: Any,
        columns: Any,
        memory: Any,
        a_at: Any,
        a_gap: Any,
        a_step: Any,
        b_at: Any,
        b_gap: Any,
        b_step: Any,
        steps: Any,
    ) -> Any:
        """tile[i · columns + j] += Σ_k a[k, i] · b[k, j], k < steps: both lie turned, k after k in steps of their own.

        The rows numbers of a are in fours that lie a_gap apart, the columns numbers of b in fours b_gap apart.
        """
        count, width, a_apart, a_on, b_apart, b_on, depth = constants(
            rows, columns, a_gap, a_step, b_gap, b_step, steps
        )

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
            emit = Emitter(context, builder, tile, arguments[0], memory, arguments[3])
            for k in range(depth):
                a = [x for i in range(count // 4) for x in emit.read(arguments[4], k * a_on + i * a_apart)]
                b = [x for j in range(width // 4) for x in emit.read(arguments[7], k * b_on + j * b_apart)]
                for i in range(count):
                    for j in range(width):
                        emit.add(i * width + j, [a[i]], [b[j]])

        place = types.intp
        signature = types.void(tile, rows, columns, memory, place, a_gap, a_step, place, b_gap, b_step, steps)
        return (signature, generate) if is_flat(tile, memory) else None

    @intrinsic
    def add_products(
        typing: Any, tile: Any, rows: Any, columns: Any, memory: Any, a_at: Any, a_step: Any, b_at: Any, b_step: Any
    ) -> Any:
        """tile[i, j] += Σ_z a[i, z] · b[j, z], z < 4: rows of a lie a_step apart from a_at on, those of b likewise."""
        count, width, a_apart, b_apart = constants(rows, columns, a_step, b_step)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
            emit = Emitter(context, builder, tile, arguments[0], memory, arguments[3])
            a = [emit.read(arguments[4], i * a_apart) for i in range(count)]
            b = [emit.read(arguments[6], j * b_apart) for j in range(width)]
            for i in range(count):
                for j in range(width):
                    emit.add(i * width + j, a[i], b[j])

        place = types.intp
        signature = types.void(tile, rows, columns, memory, place, a_step, place, b_step)
        return (signature, generate) if is_flat(tile, memory) else None

    @intrinsic
    def add_band_products(
        typing: Any,
        tile: Any,
        rows: Any,
        columns: Any,
        memory: Any,
        a_at: Any,
        a_step: Any,
        band_at: Any,
        band_step: Any,
        of_row: Any,
    ) -> Any:
        """tile[i, j] += Σ_z a[i or j, z] · band[i − j + columns − 1, z]: a tile's diagonals share a row of the band.

        ``of_row`` 1: a has a row for each i (queries with position keys); 0: for each j (keys with position queries).
        """
        count, width, a_apart, band_apart, takes_row = constants(rows, columns, a_step, band_step, of_row)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
            emit = Emitter(context, builder, tile, arguments[0], memory, arguments[3])
            a = [emit.read(arguments[4], i * a_apart) for i in range(count if takes_row else width)]
            for diagonal in range(count + width - 1):
                band = emit.read(arguments[6], diagonal * band_apart)
                for i in range(count):
                    j = i - diagonal + width - 1
                    if 0 <= j < width:
                        emit.add(i * width + j, a[i if takes_row else j], band)

        place = types.intp
        signature = types.void(tile, rows, columns, memory, place, a_step, place, band_step, of_row)
        return (signature, generate) if is_flat(tile, memory) else None

    @intrinsic
    def add_weighted(
        typing: Any,
        tile: Any,
        rows: Any,
        groups: Any,
        memory: Any,
        a_at: Any,
        a_step: Any,
        v_at: Any,
        v_step: Any,
        group_step: Any,
    ) -> Any:
        """tile[i, 4g + c] += Σ_z a[i, z] · v[z, g, c], z and c < 4: the groups g of v lie group_step apart in a row."""
        count, width, a_apart, v_apart, group_apart = constants(rows, groups, a_step, v_step, group_step)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> None:
            emit = Emitter(context, builder, tile, arguments[0], memory, arguments[3])
            a = [emit.read(arguments[4], i * a_apart) for i in range(count)]
            for group in range(width):
                v = [emit.read(arguments[6], z * v_apart + group * group_apart) for z in range(4)]
                for i in range(count):
                    for c in range(4):
                        emit.add((i * width + group) * 4 + c, a[i], [v[z][c] for z in range(4)])

        place = types.intp
        signature = types.void(tile, rows, groups, memory, place, a_step, place, v_step, group_step)
        return (signature, generate) if is_flat(tile, memory) else None
