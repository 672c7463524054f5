"""The row-wise kernels compiled for three generations of GPUs: no spills, no stack frame, registers within budget.

The budgets stand beside the kernels too. ``pytest tests/cuda -k registers -s`` prints what each kernel needs.
"""

from __future__ import annotations

from typing import Any

import pytest

from sewd_np import cuda_kernels as kernels
from tests.cuda.ptx import check

A, N, F, L = "float32[:,:,::1]", "int64", "float32", "int32[::1]"
C = "float32[::1]"
ROWS = (A, N, N)  # x, rows, size

KERNELS: list[tuple[str, Any, tuple[str, ...], int]] = [
    ("layer_norm_v1", kernels.layer_norm_v1(), (*ROWS, C, C, F, A), 48),
    ("norm_rows", kernels.norm_rows("linear", False, False, 4), (*ROWS, C, A, C, C, F, A), 48),
    ("norm_rows, gelu", kernels.norm_rows("gelu", False, False, 4), (*ROWS, C, A, C, C, F, A), 48),
    ("norm_rows, bias and residual", kernels.norm_rows("linear", True, True, 4), (*ROWS, C, A, C, C, F, A), 48),
    ("norm_rows, one by one", kernels.norm_rows("linear", True, True, 1), (*ROWS, C, A, C, C, F, A), 48),
    ("activate_rows, bias, gelu", kernels.activate_rows("gelu", True, 4), (A, N, N, N, N, C, A), 40),
    ("activate_rows, mish", kernels.activate_rows("mish", False, 1), (A, N, N, N, N, C, A), 40),
    ("average_frames", kernels.average_frames(), (A, N, N, N, N, N, A), 48),
    ("add_frames", kernels.add_frames(), (A, A, N, N, N, N, A), 32),
    ("unfold_rows, bias, gelu, lengths", kernels.unfold_rows("gelu", True, True), (A, N, N, C, L, N, N, N, A), 48),
    ("unfold_rows", kernels.unfold_rows("linear", False, False), (A, N, N, A, A, N, N, N, A), 48),
    ("replace_rows", kernels.replace_rows(), (A, L, N, N, C, A), 32),
    ("scale_rows, first", kernels.scale_rows(True), (A, F, N, N, A), 32),
    ("scale_rows", kernels.scale_rows(False), (A, F, N, N, A), 32),
    ("mean_frames", kernels.mean_frames(True), (A, N, N, L, "float32[:,::1]"), 48),
]


@pytest.mark.parametrize(("name", "kernel", "types", "budget"), KERNELS, ids=[name for name, *_ in KERNELS])
def test_registers(name: str, kernel: Any, types: tuple[str, ...], budget: int) -> None:
    usages = check(kernel, f"void({', '.join(types)})", budget)
    print(f"\n{name} (budget {budget}): " + ", ".join(f"sm_{a}{b} {u.registers}" for (a, b), u in usages.items()))
