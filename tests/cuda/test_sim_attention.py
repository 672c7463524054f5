"""The attention kernels against their NumPy definition, in the simulator: tails, padding, tables, far tiles, races.

The kernels run on NumPy arrays here, with tiles of 16 threads; a race, a read of memory that nobody wrote, or a
barrier that some threads miss raises (``fastsim``).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from sewd_np import attention, cuda_attention, cuda_scores
from sewd_np.cuda_tiled_attention import Tile, shared_room
from sewd_np.trace import error_between

Array = np.ndarray

# float32 sums over at most 40 weights in another order, and 2^x for e^x with a score of up to about 10.
TOLERANCE = 5e-6
SMALL = Tile(side=4, rows=2, columns=2, chunk=4, resident=1)  # 8 queries, 8 keys
HEADS, SIZE, BUCKETS = 2, 8, 4  # buckets 4, max distance 8: beyond 8 frames r no longer changes


def case(
    frames: int, batch: int = 1, size: int = SIZE, heads: int = HEADS, span: int = BUCKETS, seed: int = 0
) -> tuple:
    """qkv, both tables, and room for the result with NaN where a kernel forgets to write."""
    rng = np.random.default_rng((frames, batch, size))
    qkv = rng.standard_normal((batch, frames, 3 * heads * size)).astype(np.float32)
    pos_key, pos_query = rng.standard_normal((2, heads, 2 * span, size)).astype(np.float32)
    return qkv, pos_key, pos_query, np.full((batch, frames, heads * size), np.nan, np.float32)


def run(tile: Tile | None, *given: Any) -> None:
    """``disentangled_attention`` with as much scratch as it asks for, or v1; the last of ``given``: result, parts."""
    *inputs, out, parts = given
    if tile is None:
        cuda_attention.plain_attention(0, *inputs, out)
        return
    batch, frames, width = out.shape
    heads = inputs[1]
    wanted = cuda_attention.attention_scratch(batch, frames, heads, width // heads, parts)
    scratch = empty(wanted) if wanted else None
    cuda_attention.disentangled_attention(0, *inputs, out, scratch, tile, parts)


def empty(*shape: int) -> Array:
    return np.full(shape, np.nan, np.float32)


def compare(
    tile: Tile | None,
    frames: int,
    batch: int = 1,
    tables: str = "both",
    lengths: list[int] | None = None,
    mask_queries: bool = False,
    size: int = SIZE,
    heads: int = HEADS,
    buckets: int = BUCKETS,
    max_distance: int = 8,
    parts: int = 1,
) -> None:
    """``tile`` None: v1."""
    span = buckets if buckets > 0 else 6
    qkv, pos_key, pos_query, out = case(frames, batch, size, heads, span)
    pos_key = pos_key if tables in ("both", "c2p") else None
    pos_query = pos_query if tables in ("both", "p2c") else None
    rows = cuda_attention.relative_rows(frames, buckets, max_distance, span) if tables != "none" else None
    known = None if lengths is None else np.array(lengths, np.int32)
    run(tile, qkv, heads, pos_key, pos_query, rows, 3.0, known, mask_queries, out, parts)
    index = attention.relative_index(frames, buckets, max_distance, span)
    want = attention.disentangled_attention(qkv, heads, (pos_key, pos_query), index, 3.0, known, mask_queries)
    assert error_between(out, want) <= TOLERANCE


def test_relative_rows_is_relative_index_by_difference() -> None:
    for frames, buckets, max_distance, span in ((1, 4, 8, 4), (30, 8, 16, 8), (30, -1, -1, 6), (700, 256, 512, 256)):
        rows = cuda_attention.relative_rows(frames, buckets, max_distance, span)
        i, j = np.ogrid[:frames, :frames]
        want = attention.relative_index(frames, buckets, max_distance, span)
        np.testing.assert_array_equal(rows[i - j + frames - 1], want)
        assert rows.dtype == np.int32 and rows.shape == (2 * frames - 1,)


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 15, 16, 17, 40])
def test_every_tail(frames: int) -> None:
    """One frame up to five tiles: at 40 frames the corners are far tiles, and some tiles lie across the border."""
    compare(SMALL, frames, heads=1)


@pytest.mark.parametrize("frames", [1, 9, 40])
def test_v1(frames: int) -> None:
    compare(None, frames)


@pytest.mark.parametrize("tables", ["both", "c2p", "p2c", "none"])
@pytest.mark.parametrize("tile", [None, SMALL])
def test_every_combination_of_tables(tile: Tile | None, tables: str) -> None:
    compare(tile, 25, tables=tables)


@pytest.mark.parametrize("mask_queries", [False, True])
@pytest.mark.parametrize("tile", [None, SMALL])
def test_padded_recordings(tile: Tile | None, mask_queries: bool) -> None:
    """Lengths that end inside a tile, on its edge, before a whole block of queries, and at nothing at all."""
    compare(tile, 18, batch=5, lengths=[18, 11, 8, 1, 0], mask_queries=mask_queries, heads=1)


def test_padding_is_never_read() -> None:
    """NaN in the padded frames does not reach the valid ones."""
    qkv, pos_key, pos_query, out = case(12, heads=1)
    rows = cuda_attention.relative_rows(12, BUCKETS, 8, BUCKETS)
    qkv[:, 9:] = np.nan
    lengths = np.array([9], np.int32)
    for mask_queries, (tile, parts) in itertools.product((False, True), ((None, 1), (SMALL, 1), (SMALL, 2))):
        out.fill(np.nan)
        run(tile, qkv, 1, pos_key, pos_query, rows, 3.0, lengths, mask_queries, out, parts)
        assert np.isfinite(out[:, :9]).all()
        assert (out[:, 9:] == 0).all() if mask_queries else np.isnan(out[:, 9:]).all()


# A square of one number a thread, four columns of the context a thread in one group and in two, a last group of which
# only some threads have a share, rows that no pass of all threads fills.
OTHER_TILES = [
    (Tile(4, 1, 1, 4, 1), 8, 11),
    (Tile(4, 2, 1, 8, 1), 16, 19),
    (Tile(4, 1, 3, 4, 1), 32, 14),
    (Tile(4, 4, 2, 4, 1), 20, 21),
    (Tile(4, 2, 3, 4, 1), 12, 27),
    (Tile(8, 1, 1, 4, 1), 4, 17),
    (Tile(8, 1, 1, 8, 1), 16, 19),  # chunks of two vectors, of four: turned by what row they are
    (Tile(8, 2, 1, 16, 1), 16, 19),
]


@pytest.mark.parametrize("tile, size, frames", OTHER_TILES)
def test_tiles_and_head_sizes(tile: Tile, size: int, frames: int) -> None:
    compare(tile, frames, size=size, heads=1)


# What a GPU runs: too many threads here for more than a tail and some padding of each.
REAL_TILES = [
    (cuda_attention.LARGE, 64, 1),
    (cuda_attention.LARGE, 64, 2),
    (cuda_attention.SMALLER[0], 96, 2),
    (cuda_attention.SMALLER[1], 128, 1),
]


@pytest.mark.parametrize("tile, size, parts", REAL_TILES)
def test_real_tiles(tile: Tile, size: int, parts: int) -> None:
    frames = tile.keys + 5
    compare(tile, frames, size=size, heads=1, lengths=[frames - 3], mask_queries=True, parts=parts)


@pytest.mark.parametrize("buckets, max_distance", [(2, 4), (6, 9), (-1, -1)])
def test_other_tables(buckets: int, max_distance: int) -> None:
    """Two buckets: far at once; six: constant stretches that are not the end; one for each distance."""
    compare(SMALL, 30, heads=1, buckets=buckets, max_distance=max_distance)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("frames", [1, 9, 40])
def test_keys_in_parts(frames: int, parts: int) -> None:
    """Parts of whole tiles, a last one that is shorter, and parts that have nothing."""
    compare(SMALL, frames, parts=parts)


@pytest.mark.parametrize("tables", ["c2p", "p2c", "none"])
def test_parts_of_every_combination_of_tables(tables: str) -> None:
    compare(SMALL, 25, tables=tables, parts=2)


@pytest.mark.parametrize("mask_queries", [False, True])
def test_parts_of_padded_recordings(mask_queries: bool) -> None:
    """Recordings that end in the second part, at its edge, in the first, and before they begin."""
    compare(SMALL, 18, batch=5, lengths=[18, 17, 16, 3, 0], mask_queries=mask_queries, heads=1, parts=2)


def test_a_nan_in_one_part_reaches_the_result() -> None:
    qkv, pos_key, pos_query, out = case(17, heads=1)
    rows = cuda_attention.relative_rows(17, BUCKETS, 8, BUCKETS)
    qkv[:, 16, SIZE] = np.nan  # of a key in the second part
    run(SMALL, qkv, 1, pos_key, pos_query, rows, 3.0, None, False, out, 2)
    assert np.isnan(out).all()


def test_into_how_many_parts_keys_are_cut() -> None:
    """A short clip into as many as there are tiles of keys; where the last round would be nearly empty, into two."""
    large, processors = cuda_attention.LARGE, cuda_attention.MULTIPROCESSORS
    assert cuda_attention.choose_parts(large, 250, 6) == 8  # 4 blocks of queries a head, 8 tiles of keys
    assert cuda_attention.choose_parts(large, 40, 6) == 2
    assert cuda_attention.choose_parts(large, 1, 6) == 1
    assert cuda_attention.choose_parts(large, 250, 12 * 32) == 1  # nearly twelve blocks for each multiprocessor
    assert cuda_attention.choose_parts(large, 64 * 16, 4 * processors // 16) == 1
    assert cuda_attention.choose_parts(large, 64 * 16, 4 * processors // 16 + 1) > 1
    assert cuda_attention.choose_parts(large, 4000, 12) == 2  # nearly six blocks for each, or twelve half as long
    assert cuda_attention.choose_parts(large, 15_000, 12) == 1
    assert cuda_attention.choose_parts(None, 1000, 12) == 1
    assert cuda_attention.attention_scratch(1, 4000, 12, 64) == 2 * 12 * 4000 * 66
    assert cuda_attention.attention_scratch(32, 250, 12, 64) == 0


def test_which_kernel_runs() -> None:
    """The tuned tile at 64; smaller ones for large heads; v1 where a head is no whole number of 128-bit reads."""
    assert cuda_attention.choose_tile(64) == cuda_attention.LARGE
    assert cuda_attention.choose_tile(7) is None
    for size in (4, 8, 20, 32, 48, 64, 80, 96, 128):
        tile = cuda_attention.choose_tile(size)
        assert tile is not None and shared_room(tile, size).size <= cuda_attention.SHARED_FLOATS


def test_a_head_size_of_seven_runs_v1() -> None:
    qkv, pos_key, pos_query, out = case(9, size=7)
    rows = cuda_attention.relative_rows(9, BUCKETS, 8, BUCKETS)
    cuda_attention.disentangled_attention(0, qkv, HEADS, pos_key, pos_query, rows, 2.0, None, False, out)
    index = attention.relative_index(9, BUCKETS, 8, BUCKETS)
    want = attention.disentangled_attention(qkv, HEADS, (pos_key, pos_query), index, 2.0)
    assert error_between(out, want) <= TOLERANCE


def test_large_scores_do_not_overflow() -> None:
    """Scores of several hundred: exp without the largest taken off would be infinite."""
    qkv, pos_key, pos_query, out = case(17, heads=1)
    qkv *= 12
    rows = cuda_attention.relative_rows(17, BUCKETS, 8, BUCKETS)
    run(SMALL, qkv, 1, pos_key, pos_query, rows, 1.0, None, False, out, 1)
    index = attention.relative_index(17, BUCKETS, 8, BUCKETS)
    exact = [array.astype(np.float64) for array in (qkv, pos_key, pos_query)]
    want = attention.disentangled_attention(exact[0], 1, (exact[1], exact[2]), index, 1.0)
    # The distance between neighbouring float32 numbers at 1000 is 6e-5: that much a weight can be off.
    assert error_between(out, want.astype(np.float32)) <= 1e-3


# -------------------------------------------------------------------------- stage by stage


@pytest.mark.parametrize("frames", [1, 5, 18])
def test_stages(frames: int) -> None:
    """Each stage from the same input as its definition; 18² numbers are more than a block, and 18 fewer than a warp."""
    qkv, pos_key, pos_query, _ = case(frames, batch=2)
    rows = cuda_attention.relative_rows(frames, BUCKETS, 8, BUCKETS)
    index = attention.relative_index(frames, BUCKETS, 8, BUCKETS)
    parts = [empty(2, frames, HEADS * SIZE) for _ in range(3)]
    cuda_scores.split_qkv(0, qkv, *parts)
    q, k, v = attention.split_qkv(qkv)
    for got, want in zip(parts, (q, k, v), strict=True):
        np.testing.assert_array_equal(got, want)

    c2c, c2p, p2c, whole = (empty(2, HEADS, frames, frames) for _ in range(4))
    cuda_scores.content_scores(0, q, k, HEADS, 3.0, c2c)
    cuda_scores.content_to_position(0, q, pos_key, rows, 3.0, c2p)
    cuda_scores.position_to_content(0, k, pos_query, rows, 3.0, p2c)
    assert error_between(c2c, attention.content_scores(q, k, HEADS, 3.0)) <= TOLERANCE
    assert error_between(c2p, attention.content_to_position(q, pos_key, index, 3.0)) <= TOLERANCE
    assert error_between(p2c, attention.position_to_content(k, pos_query, index, 3.0)) <= TOLERANCE
    for terms in ((c2c,), (c2c, c2p), (c2c, c2p, p2c)):
        cuda_scores.add_scores(0, terms, whole)
        np.testing.assert_array_equal(whole, attention.add_scores(*terms))

    probs, out = attention.masked_softmax(whole), empty(2, frames, HEADS * SIZE)
    cuda_scores.context(0, probs, v, out)
    assert error_between(out, attention.context(probs, v)) <= TOLERANCE


@pytest.mark.parametrize("lengths", [None, [35, 32, 1, 0]])
@pytest.mark.parametrize("mask_queries", [False, True])
def test_masked_softmax(lengths: list[int] | None, mask_queries: bool) -> None:
    """35 keys: a warp and a tail. In place as well."""
    scores = 5 * np.random.default_rng(3).standard_normal((4, 1, 35, 35)).astype(np.float32)
    known = None if lengths is None else np.array(lengths, np.int32)
    out = empty(*scores.shape)
    cuda_scores.masked_softmax(0, scores, known, mask_queries, out)
    want = attention.masked_softmax(scores, known, mask_queries)
    assert np.abs(out - want).max() <= 1e-6  # probabilities: absolute
    np.testing.assert_array_equal(out == 0, want == 0)
    cuda_scores.masked_softmax(0, scores, known, mask_queries, scores)
    np.testing.assert_array_equal(scores, out)
