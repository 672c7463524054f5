"""Fused attention against the loops of ``naive``, at lengths that hit every tail, in both forms (``cpu_forms``)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from sewd_np import attention
from sewd_np.cpu_amx import BLOCK
from sewd_np.cpu_attention import QUERIES, RUNS
from sewd_np.cpu_gemm import COLUMNS
from sewd_np.cpu_positions import distances, pack_positions
from sewd_np.trace import error_between
from tests import cpu_forms, naive
from tests.cpu_forms import TOLERANCE, normal, same_by_threads

Array = np.ndarray
form, rng = cpu_forms.form, cpu_forms.rng
# of exp far below its range, which gives 0 there: the scores that fill the last block are −∞
pytestmark = pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")

BUCKETS = {  # buckets, longest distance, span: logarithmic and far beyond, one each and clipped, wider than a panel
    "log": (4, 8, 4),
    "clipped": (-1, 3, 3),
    "wide": (-1, 2 * COLUMNS + 5, 2 * COLUMNS + 5),
    "one": (-1, 1, 1),
}
EDGES = [size + more for size in (QUERIES, RUNS, COLUMNS, BLOCK) for more in (-1, 0, 1)]
FRAMES = sorted({1, 2, *EDGES, 2 * QUERIES + 1})
TABLES = ["", "c2p", "p2c", "c2p p2c"]


def attention_case(
    rng: np.random.Generator, batch: int, frames: int, heads: int, size: int, buckets: str, kinds: str
) -> tuple[Array, tuple[Array | None, Array | None]]:
    span = BUCKETS[buckets][2]
    qkv = normal(rng, batch, frames, 3 * heads * size)
    pos_key = normal(rng, heads, 2 * span, size) if "c2p" in kinds else None
    pos_query = normal(rng, heads, 2 * span, size) if "p2c" in kinds else None
    return qkv, (pos_key, pos_query)


def fused(
    qkv: Array, heads: int, positions: tuple[Array | None, Array | None], buckets: str, scale: float, *masking: Any
) -> Array:
    packed = pack_positions(*positions, scale, False)
    index = distances(qkv.shape[1], *BUCKETS[buckets])
    has_positions = any(table is not None for table in positions)
    args = (qkv, heads, packed, index if has_positions else None, scale, *masking)
    return same_by_threads("disentangled_attention", *args)


def looped(
    qkv: Array, heads: int, positions: tuple[Array | None, Array | None], buckets: str, scale: float, *masking: Any
) -> Array:
    index = naive.relative_index(qkv.shape[1], *BUCKETS[buckets])
    return naive.disentangled_attention(qkv, heads, positions, index, scale, *masking)


@pytest.mark.parametrize("kinds", TABLES)
@pytest.mark.parametrize("frames", FRAMES)
def test_attention_at_every_tail(form: str, rng: np.random.Generator, frames: int, kinds: str) -> None:
    size, buckets = (1, 12, 5, 3)[FRAMES.index(frames) % 4], list(BUCKETS)[(FRAMES.index(frames) + len(kinds)) % 4]
    heads = 2 if frames <= COLUMNS else 1
    qkv, positions = attention_case(rng, 1, frames, heads, size, buckets, kinds)
    call = (qkv, heads, positions, buckets, math.sqrt(3 * size))
    assert error_between(fused(*call), looped(*call)) <= TOLERANCE


@pytest.mark.parametrize("kinds", TABLES)
@pytest.mark.parametrize("size", [1, 12, 16, 48, 64])
def test_attention_by_head_size(form: str, rng: np.random.Generator, size: int, kinds: str) -> None:
    qkv, positions = attention_case(rng, 2, 7, 2, size, "log", kinds)
    call = (qkv, 2, positions, "log", math.sqrt(3 * size))
    assert error_between(fused(*call), looped(*call)) <= TOLERANCE


@pytest.mark.parametrize("mask_queries", [False, True])
@pytest.mark.parametrize("buckets", BUCKETS)
def test_attention_sees_nothing_beyond_the_valid_length(
    form: str, rng: np.random.Generator, buckets: str, mask_queries: bool
) -> None:
    frames, size = QUERIES + 2, 3
    valid = np.array([0, 1, QUERIES // 2, QUERIES, QUERIES + 1, frames, frames + 9])
    valid = valid[::2] if form == "python" else valid
    qkv, positions = attention_case(rng, len(valid), frames, 1, size, buckets, "c2p p2c")
    call = (1, positions, buckets, 3.0, valid, mask_queries)
    got = fused(qkv, *call)
    assert error_between(got, looped(qkv, *call)) <= TOLERANCE
    for b, length in enumerate(valid):
        if length == 0 or mask_queries:
            assert (got[b, length:] == 0).all()
        # Not even NaN beyond the valid length reaches a valid frame.
        qkv[b, length:, size:] = np.nan
        if mask_queries:
            qkv[b, length:] = np.nan
    np.testing.assert_array_equal(fused(qkv, *call), got)


@pytest.mark.parametrize("factor", [1e15, -1e15])
def test_attention_survives_huge_scores(form: str, rng: np.random.Generator, factor: float) -> None:
    """Scores of ±1e30: one key takes all, and nothing overflows."""
    qkv, positions = attention_case(rng, 1, RUNS + 3, 1, 3, "log", "")
    qkv[..., :3] *= np.float32(factor)
    qkv[..., 3:6] *= np.float32(1e15)
    got = fused(qkv, 1, positions, "log", 3.0)
    assert np.isfinite(got).all()
    assert error_between(got, looped(qkv, 1, positions, "log", 3.0)) <= TOLERANCE
    qkv[..., 3:6] = 1e15  # all keys the same: the mean of the values
    got = fused(qkv, 1, positions, "log", 3.0)
    assert error_between(got, np.broadcast_to(qkv[..., 6:].mean(axis=1, keepdims=True), got.shape)) <= TOLERANCE


def test_softmax_of_one_row(form: str, rng: np.random.Generator) -> None:
    """Rows of given scores: lengths about the columns that run side by side, −∞ among them, huge ones, NaN.

    With head size 1 and every query 1 the scores are the keys; the values are those of the softmax's own weights.
    """

    def softmax_times(scores: Array, values: Array) -> Array:
        qkv = np.stack([np.ones_like(scores), scores, values], axis=-1).astype(np.float32)
        return fused(qkv[None], 1, (None, None), "log", 1.0)[0, :, 0]

    rows = [9 * normal(rng, n) for n in (1, 2, RUNS - 1, RUNS, RUNS + 1, 2 * RUNS, 2 * RUNS + 1)]
    some = normal(rng, RUNS + 5)
    some[::3] = -np.inf
    rows += [some, np.full(RUNS + 1, 1e30), np.full(3, -1e30), np.array([3e38, -3e38, 0]), 1e9 * rows[-1]]
    for row in rows if form == "compiled" else rows[::3]:
        scores, values = row.astype(np.float32), normal(rng, len(row))
        shares = naive.softmax([float(v) for v in scores])
        want = math.fsum(share * float(v) for share, v in zip(shares, values, strict=True))
        assert error_between(softmax_times(scores, values), np.full(len(row), want)) <= 2e-6
    broken = np.array([1, np.nan, 2], np.float32)
    assert np.isnan(softmax_times(broken, np.ones(3, np.float32))).all()


def test_attention_keeps_the_position_of_each_key(rng: np.random.Generator) -> None:
    """Longer than any constant stretch on both sides: every frame is near, far before and far behind some other."""
    frames = 5 * QUERIES + 7
    for buckets, kinds in itertools.product(BUCKETS, TABLES[1:]):
        qkv, positions = attention_case(rng, 1, frames, 2, 4, buckets, kinds)
        got = fused(qkv, 2, positions, buckets, 3.0)
        exact = [None if table is None else table.astype(np.float64) for table in positions]
        by_pair = attention.relative_index(frames, *BUCKETS[buckets])
        # The definition, which the loops hold at shorter lengths.
        want = attention.disentangled_attention(qkv.astype(np.float64), 2, (exact[0], exact[1]), by_pair, 3.0)
        assert error_between(got, want) <= TOLERANCE
