"""The attention kernels compiled for three generations of GPUs: no spills, no stack frame, registers within budget.

The budgets stand beside the kernels too. ``pytest tests/cuda/test_ptx_attention.py -s`` prints what each kernel needs.
A multiprocessor has 65,536 registers: four blocks of a tile with 64 threads may use all 255 that a thread can have.
"""

from __future__ import annotations

from typing import Any

import pytest

from sewd_np import cuda_attention as attention
from sewd_np import cuda_scores as scores
from tests.cuda.ptx import Usage, check

ROWS, TABLE, MATRIX = "float32[:,:,::1]", "float32[:,:,::1]", "float32[:,:,:,::1]"  # (b, t, d), (h, p, e), (b, h, i, j)
ROW = "float32[::1]"
WHOLE, INDEX, NUMBER = "int64", "int32[::1]", "float32"
SIZES = (WHOLE, WHOLE, WHOLE, NUMBER)  # frames, heads, buckets, scale
FUSED = (ROWS, TABLE, TABLE, INDEX, INDEX, *SIZES, WHOLE, ROWS)
UNPADDED = (ROWS, TABLE, TABLE, INDEX, ROWS, *SIZES, WHOLE, ROWS)
ALONE = (ROWS, ROWS, ROWS, ROWS, ROWS, *SIZES, WHOLE, ROWS)  # qkv stands in for what is absent

plain, tiled = attention.plain_kernel, attention.tiled_kernel
LARGE, SMALLER = attention.LARGE, attention.SMALLER

KERNELS: list[tuple[str, Any, tuple[str, ...], int]] = [
    ("v1", plain(64, True, True, True, True), (*FUSED[:-2], ROWS), 64),  # all its keys are one part
    ("v1, no tables", plain(64, False, False, False, False), (*ALONE[:-2], ROWS), 64),
    ("large", tiled(LARGE, 64, True, True, False, False), UNPADDED, 255),
    ("large, padded", tiled(LARGE, 64, True, True, True, True), FUSED, 255),
    ("large, c2p", tiled(LARGE, 64, True, False, True, False), (ROWS, TABLE, ROWS, *FUSED[3:]), 255),
    ("large, p2c", tiled(LARGE, 64, False, True, True, False), (ROWS, ROWS, *FUSED[2:]), 255),
    ("large, no tables", tiled(LARGE, 64, False, False, False, False), ALONE, 255),
    ("large, parts", tiled(LARGE, 64, True, True, False, False, True), (*UNPADDED[:-1], ROW), 255),
    ("large, parts, padded", tiled(LARGE, 64, True, True, True, True, True), (*FUSED[:-1], ROW), 255),
    ("smaller, parts", tiled(SMALLER[0], 96, True, True, True, True, True), (*FUSED[:-1], ROW), 255),
    ("smallest, parts", tiled(SMALLER[1], 128, True, True, True, True, True), (*FUSED[:-1], ROW), 255),
    ("combine", attention.combine_kernel(64), (ROW, *[WHOLE] * 4, ROWS), 64),
    ("large, heads of 32", tiled(LARGE, 32, True, True, True, False), FUSED, 255),
    ("smaller, heads of 96", tiled(SMALLER[0], 96, True, True, True, False), FUSED, 255),
    ("smallest, heads of 128", tiled(SMALLER[1], 128, True, True, True, False), FUSED, 255),
    ("split", scores.split_kernel(), (ROWS, WHOLE, WHOLE, ROWS, ROWS, ROWS), 32),
    ("content", scores.content_kernel(), (ROWS, ROWS, WHOLE, WHOLE, WHOLE, NUMBER, MATRIX), 48),
    ("c2p", scores.position_kernel(True), (ROWS, TABLE, INDEX, *[WHOLE] * 4, NUMBER, MATRIX), 48),
    ("p2c", scores.position_kernel(False), (ROWS, TABLE, INDEX, *[WHOLE] * 4, NUMBER, MATRIX), 48),
    ("add", scores.add_kernel(3), (MATRIX, MATRIX, MATRIX, WHOLE, MATRIX), 32),
    ("softmax", scores.softmax_kernel(True, True), (MATRIX, INDEX, WHOLE, WHOLE, WHOLE, MATRIX), 40),
    ("context", scores.context_kernel(), (MATRIX, ROWS, *[WHOLE] * 4, ROWS), 48),
]


@pytest.mark.parametrize(("name", "kernel", "types", "budget"), KERNELS, ids=[name for name, *_ in KERNELS])
def test_registers(name: str, kernel: Any, types: tuple[str, ...], budget: int) -> None:
    usages = check(kernel, f"void({', '.join(types)})", budget)
    print(f"\n{name} (budget {budget}): " + ", ".join(f"sm_{a}{b} {u.registers}" for (a, b), u in usages.items()))
    if name == "large":
        reads_vectors(usages[9, 0])


def reads_vectors(usage: Usage) -> None:
    """The inner loops read shared memory four numbers at a time; one at a time, the sums of the far tiles only."""
    assert usage.ptx.count("ld.shared.v4.f32") > 4 * usage.ptx.count("ld.shared.f32")
