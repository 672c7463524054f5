"""The row-wise kernels compiled for three generations of GPUs: no spills, no stack frame, registers within budget.

The budgets stand beside the kernels too. ``pytest tests/cuda -k registers -s`` prints what each kernel needs.
"""

from __future__ import annotations

from typing import Any

import pytest
from numba import cuda, float32

from sewd_np import cuda_kernels as kernels
from tests.cuda.ptx import TARGETS, Usage, check, read_usage

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


# ------------------------------------------------------------------- the check itself


@cuda.jit
def scale(x, factor):
    i = cuda.grid(1)
    if i < len(x):
        x[i] *= factor


@cuda.jit
def count(x, out):
    """A local array at places that only the numbers tell, so that it cannot lie in registers."""
    counts = cuda.local.array(16, float32)
    for i in range(16):
        counts[i] = 0
    for i in range(len(x)):
        counts[x[i] & 15] += 1
    for i in range(16):
        out[i] = counts[i]


def test_more_than_the_budget_and_a_stack_frame_are_refused() -> None:
    usages = check(scale, "void(float32[::1], float32)", 32)
    assert list(usages) == list(TARGETS) and all(usage.registers > 4 for usage in usages.values())
    with pytest.raises(AssertionError, match=r"scale for sm_75 needs \d+ registers; the budget is 4"):
        check(scale, "void(float32[::1], float32)", 4)
    with pytest.raises(AssertionError, match=r"count for sm_75 keeps 64 bytes on the stack"):
        check(count, "void(int32[::1], float32[::1])", 64)


def test_the_assemblers_report_is_read_and_one_that_says_nothing_refused() -> None:
    memory = "{} bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
    registers = "Used 9 registers, 8 bytes smem"
    assert read_usage(memory.format(0, 0, 0) + registers, "") == Usage(9, 8, 0, 0, "")
    assert read_usage(memory.format(32, 8, 12) + registers, "") == Usage(9, 8, 32, 20, "")
    for report in ("", memory.format(0, 0, 0), registers):
        with pytest.raises(RuntimeError, match="ptxas does not say"):
            read_usage(report, "")
