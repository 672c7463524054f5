"""The position terms on the CPU: buckets by difference, and the two walks that add them, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from sewd_np import cpu_positions
from sewd_np.cpu_amx import BLOCK
from sewd_np.cpu_attention import QUERIES
from sewd_np.cpu_lines import LINE
from sewd_np.cpu_positions import Distances, distances, index_by_pair
from tests import cpu_forms, naive
from tests.cpu_forms import normal

Array = np.ndarray
form, rng = cpu_forms.form, cpu_forms.rng
# buckets, longest distance, span: as published; logarithmic and far beyond, odd, one each and clipped, hardly any
INDICES = [(256, 512, 256), (4, 8, 4), (9, 30, 9), (-1, 3, 3), (-1, 69, 69), (-1, 1, 1)]


@pytest.mark.parametrize(("buckets", "longest", "span"), INDICES)
def test_distances_are_the_index_by_pair(buckets: int, longest: int, span: int) -> None:
    for frames in (1, 2, 3, 40, 130):
        index = distances(frames, buckets, longest, span)
        want = naive.relative_index(frames, buckets, longest, span)
        np.testing.assert_array_equal(index_by_pair(index, span), want)


@pytest.mark.parametrize(("buckets", "longest", "span"), INDICES)
def test_what_distances_say_of_their_stretches(buckets: int, longest: int, span: int) -> None:
    for frames in (1, 2, 3, 31, 32, 33, 130, 700):
        index = distances(frames, buckets, longest, span)
        rows, count = index.buckets, 2 * frames - 1
        assert len(rows) == count + BLOCK and rows.dtype == np.int32
        assert (np.diff(rows) >= 0).all() and (rows[count:] == rows[-1]).all()
        assert (rows[: index.near] == 0).all() and (rows[index.far :] == rows[-1]).all()
        assert (np.diff(rows[index.step : index.stop]) == 1).all()
        assert index.step <= frames - 1 < index.stop <= count
        assert index.low >= 0 and index.low + rows[-1] < 2 * span


def add_by_bucket(scores: Array, by_bucket: Array, index: Distances, at: int) -> None:
    """As ``attend`` calls it: the row's stretches counted from its own first key."""
    stretches = [end - at for end in (index.near, index.step, index.stop, index.far)]
    cpu_positions.add_by_bucket(scores, by_bucket, index.buckets[at:], *stretches)


@pytest.mark.parametrize(("buckets", "longest", "span"), INDICES)
def test_a_row_of_scores_by_bucket(form: str, rng: np.random.Generator, buckets: int, longest: int, span: int) -> None:
    """Every query of a recording, so every alignment of the four stretches to the lines of 16, before, in and after."""
    for frames in (1, 2, LINE, LINE + 1, 33, 150, 700) if form == "compiled" else (1, 2, 33):
        index = distances(frames, buckets, longest, span)
        by_bucket = normal(rng, int(index.buckets[-1]) + 1)
        whole = -(-frames // BLOCK) * BLOCK
        for query in range(frames):
            at = frames - 1 - query
            for width in {whole, BLOCK, max(whole - BLOCK, BLOCK)}:
                around = normal(rng, width + 2 * LINE)
                want = around.copy()
                want[LINE : LINE + width] += by_bucket[index.buckets[at : at + width]]
                add_by_bucket(around[LINE : LINE + width], by_bucket, index, at)
                np.testing.assert_array_equal(around, want)


@pytest.mark.parametrize(("buckets", "longest", "span"), INDICES)
def test_a_strip_of_keys_by_key(form: str, rng: np.random.Generator, buckets: int, longest: int, span: int) -> None:
    """1 to QUERIES queries, keys from every line: near each other, far apart, and across the ends of the table."""
    counts = range(1, QUERIES + 1) if form == "compiled" else (1, 2, QUERIES)
    for frames in (QUERIES, 2 * QUERIES + 5, 700) if form == "compiled" else (2 * QUERIES,):
        index = distances(frames, buckets, longest, span)
        stride = -(-frames // BLOCK) * BLOCK
        by_key = normal(rng, int(index.buckets[-1]) + 1, stride)
        shear = np.full((QUERIES + LINE) * LINE, np.nan, np.float32)
        keys = np.arange(LINE)
        for count in counts:
            some = range(0, frames, LINE)
            for key in some if count in (1, 7, QUERIES) else rng.choice(some, 2):
                first = int(rng.integers(0, frames - count + 1))
                lowest = frames - 1 - first - (count - 1) + int(key)
                scores = normal(rng, QUERIES, stride)
                want = scores.copy()
                for a in range(count):
                    bucket = index.buckets[lowest + count - 1 - a + keys]
                    want[a, key + keys] += by_key[bucket, key + keys]
                part = int(rng.integers(0, key + 1))  # of P: it may begin anywhere before what is wanted
                for rung in (cpu_positions.add_by_key_v1, cpu_positions.add_by_key):
                    got = scores.copy()
                    rung(
                        got.reshape(-1),
                        stride,
                        count,
                        by_key.reshape(-1)[part:],
                        stride,
                        part,
                        int(key),
                        lowest,
                        index.buckets,
                        shear,
                    )
                    np.testing.assert_array_equal(got, want)
