"""``cpu_gemm``: packing, and the float32 product at lengths that hit every tail, in both forms (``cpu_forms``)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sewd_np import cpu_gemm, cpu_rows
from sewd_np.cpu_gemm import COLUMNS, FEW_ROWS, ROWS
from sewd_np.cpu_kernels import Kernels
from sewd_np.trace import error_between
from tests import cpu_forms, naive
from tests.cpu_forms import TOLERANCE, normal

Array = np.ndarray
form, rng = cpu_forms.form, cpu_forms.rng


def test_pack_lays_panels_of_columns_one_after_another(rng: np.random.Generator) -> None:
    for k, n in itertools.product((0, 1, 5), (1, COLUMNS - 1, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 3)):
        b = normal(rng, k, n)
        panels = cpu_gemm.pack(b)
        assert panels.shape == (math.ceil(n / COLUMNS), k, COLUMNS) and panels.dtype == np.float32
        for j, row, column in np.ndindex(*panels.shape):
            at = j * COLUMNS + column
            assert panels[j, row, column] == (b[row, at] if at < n else 0)


def multiplied(a: Array, start: int, stride: int, m: int, k: int, b: Array, bias: Array) -> Array:
    """``product`` into the middle of an array full of NaN, which must stay NaN around the result."""
    n, before, gap = b.shape[1], 3, 2
    c = np.full(before + m * (n + gap) + 5, np.nan, np.float32)
    panels = np.concatenate([np.full(7, np.nan, np.float32), cpu_gemm.pack(b).reshape(-1)])
    cpu_gemm.product(a, start, stride, m, k, panels, 7, n, bias, c, before, n + gap)
    rows = c[before : before + m * (n + gap)].reshape(m, n + gap)
    assert np.isnan(c[:before]).all() and np.isnan(c[before + m * (n + gap) :]).all() and np.isnan(rows[:, n:]).all()
    return rows[:, :n].copy()


HEIGHTS = [0, 1, 2, FEW_ROWS, FEW_ROWS + 1, ROWS - 1, ROWS, ROWS + 1, ROWS + FEW_ROWS, 2 * ROWS + 3]
WIDTHS = [1, COLUMNS - 1, COLUMNS, COLUMNS + 1]


@pytest.mark.parametrize("k", [0, 1, 7])
@pytest.mark.parametrize("n", WIDTHS)
def test_product_at_every_tail(form: str, rng: np.random.Generator, n: int, k: int) -> None:
    """Rows side by side, with gaps, and overlapping (stride < k), as a convolution's windows do."""
    start, b, bias = 5, normal(rng, k, n), normal(rng, n)
    for m, stride in itertools.product(HEIGHTS, {1, max(k - 3, 1), k + 2}):
        size = max((m - 1) * stride + k, 0)
        a = np.concatenate([np.full(start, np.nan), normal(rng, size), np.full(4, np.nan)]).astype(np.float32)
        rows = np.array([a[start + i * stride :][:k] for i in range(m)]).reshape(m, k)
        got = multiplied(a, start, stride, m, k, b, bias)
        assert error_between(got, naive.linear(rows, b, bias)) <= TOLERANCE


def test_a_row_does_not_depend_on_how_many_are_computed_with_it(rng: np.random.Generator) -> None:
    for n, k in itertools.product(WIDTHS, (1, 7, 64)):
        m = 2 * ROWS + 3
        a, b, bias = normal(rng, m * k), normal(rng, k, n), normal(rng, n)
        whole = multiplied(a, 0, k, m, k, b, bias)
        for first, count in itertools.product(range(m), HEIGHTS):
            count = min(count, m - first)
            part = multiplied(a, first * k, k, count, k, b, bias)
            np.testing.assert_array_equal(part, whole[first : first + count])


def test_the_first_rungs_equal_the_last(form: str, rng: np.random.Generator) -> None:
    for m, k, n in [(1, 1, 1), (5, 9, 3), (13, 4, 33)]:
        a, b, bias = normal(rng, m * k), normal(rng, k, n), normal(rng, n)
        c = np.zeros(m * n, np.float32)
        cpu_gemm.product_v1(a, 0, k, m, k, b, bias, c, 0, n)
        assert error_between(c.reshape(m, n), multiplied(a, 0, k, m, k, b, bias)) <= TOLERANCE
        x, weight, shift = 2 + normal(rng, m, n), normal(rng, n), normal(rng, n)
        out = np.empty_like(x)
        cpu_rows.layer_norm_v1(x, weight, shift, 1e-5, out)
        assert error_between(Kernels(1).layer_norm(x, weight, shift, 1e-5), out) <= TOLERANCE
