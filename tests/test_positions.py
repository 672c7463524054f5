"""Relative positions: whole numbers, compared exactly and exhaustively with transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.sew_d import modeling_sew_d

from sewd_np.attention import content_to_position, log_bucket, position_to_content, relative_index
from sewd_np.config import SEWDConfig
from tests import naive

reference: Any = modeling_sew_d  # its functions are not typed
FARTHEST = 20_000  # squeezed frames: 800 s of sound

# (buckets, max_position): the published pair, small tables, odd ones, tight ones (max_position − 1 just above
# buckets / 2), wide ones, and (32, 129), where float64 gives other buckets than float32.
PAIRS = [
    (256, 512),
    (256, 1024),
    (256, 130),
    (128, 512),
    (64, 100),
    (33, 512),
    (32, 129),
    (32, 64),
    (17, 10),
    (9, 30),
    (8, 16),
    (8, 6),
    (7, 5000),
    (5, 4),
    (4, 4),
    (4, 10_000),
    (512, 512),
    (1000, 502),
]


def reference_buckets(distances: np.ndarray, buckets: int, max_position: int) -> np.ndarray:
    out = reference.make_log_bucket_position(torch.from_numpy(distances), buckets, max_position)
    return out.to(torch.long).numpy()


def on_the_edge(distances: np.ndarray, buckets: int, max_position: int) -> np.ndarray:
    """Distances at which the formula is so near a whole number that rounding decides which way its ceil falls.

    PyTorch's float32 log is off by up to a unit in the last place, and by how much depends on the processor (whether it
    has AVX-512), so there the reference's own bucket does too; ours is that of the correctly rounded logarithm.
    """
    mid = buckets // 2
    far, farthest = (
        np.log(np.float32(x).astype(np.float64))
        for x in (np.maximum(abs(distances) / mid, 1), (max_position - 1) / mid)
    )
    steps = far / farthest * (mid - 1)
    return (steps > 0) & (abs(steps - np.round(steps)) < 5e-7 * steps)


def assert_buckets_equal_the_references(distances: np.ndarray, buckets: int, max_position: int) -> np.ndarray:
    got, want = (f(distances, buckets, max_position) for f in (log_bucket, reference_buckets))
    edge = on_the_edge(distances, buckets, max_position)
    np.testing.assert_array_equal(got[~edge], want[~edge], str((buckets, max_position)))
    assert (abs(got - want) <= 1).all(), (buckets, max_position)
    return got


@pytest.mark.parametrize(("buckets", "max_position"), PAIRS)
def test_log_bucket_equals_transformers_at_every_distance(buckets: int, max_position: int) -> None:
    distances = np.arange(-FARTHEST, FARTHEST + 1)
    assert assert_buckets_equal_the_references(distances, buckets, max_position).dtype == np.int64


def test_published_buckets_equal_transformers_without_exception() -> None:
    distances = np.arange(-FARTHEST, FARTHEST + 1)
    np.testing.assert_array_equal(log_bucket(distances, 256, 512), reference_buckets(distances, 256, 512))


def test_log_bucket_equals_transformers_for_many_tables() -> None:
    distances = np.arange(-700, 701)
    for buckets in range(4, 60):
        for max_position in [*range(buckets // 2 + 2, buckets + 12), 100, 129, 512, 2000]:
            if max_position - 1 > buckets / 2:
                assert_buckets_equal_the_references(distances, buckets, max_position)


@pytest.mark.parametrize(("buckets", "max_position"), PAIRS)
def test_log_bucket_is_odd_and_never_turns_back(buckets: int, max_position: int) -> None:
    got = log_bucket(np.arange(-FARTHEST, FARTHEST + 1), buckets, max_position)
    np.testing.assert_array_equal(got, -got[::-1])
    assert (np.diff(got) >= 0).all()
    mid = buckets // 2
    np.testing.assert_array_equal(got[FARTHEST - mid : FARTHEST + mid + 1], np.arange(-mid, mid + 1))


def test_spot_values_of_the_published_table() -> None:
    spots = {0: 0, 1: 1, 128: 128, 129: 129, 255: 192, 400: 233, 510: 255, 511: 255, 512: 256, 1000: 317}
    distances = np.array(list(spots))
    np.testing.assert_array_equal(log_bucket(distances, 256, 512), list(spots.values()))
    np.testing.assert_array_equal(log_bucket(-distances, 256, 512), [-bucket for bucket in spots.values()])


def test_float64_would_give_other_buckets() -> None:
    """Why the formula is computed in float32: a small table tells the difference."""
    distances, (buckets, max_position) = np.arange(17, 129), (32, 129)
    steps = np.log(distances / 16) / np.log((max_position - 1) / 16) * 15
    in_doubles, in_singles = np.ceil(steps).astype(np.int64) + 16, log_bucket(distances, buckets, max_position)
    assert in_singles.max() < buckets  # none of these is clamped away
    np.testing.assert_array_equal(distances[in_doubles != in_singles], [32, 64])


def test_log_bucket_equals_the_loops() -> None:
    for buckets, max_position in PAIRS:
        distances = np.arange(-1500, 1501)
        want = [naive.log_bucket(int(distance), buckets, max_position) for distance in distances]
        np.testing.assert_array_equal(log_bucket(distances, buckets, max_position), want)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,)])
def test_log_bucket_takes_any_shape(shape: tuple[int, ...]) -> None:
    got = log_bucket(np.full(shape, 400), 256, 512)
    assert got.shape == shape
    assert (got == 233).all()


# ------------------------------------------------------------------------- index


@pytest.mark.parametrize(
    ("frames", "buckets", "max_position"),
    [
        (1, 256, 512),
        (2, 256, 512),
        (700, 256, 512),
        (1100, 256, 512),
        (70, 8, 16),
        (70, 9, 30),
        (300, 32, 129),
        (1, -1, 5),
        (70, -1, 512),
        (70, -1, 33),
        (70, 0, 33),
    ],
)
def test_index_equals_the_clamped_relative_position_of_transformers(
    frames: int, buckets: int, max_position: int
) -> None:
    span = buckets if buckets > 0 else max_position
    relative = reference.build_relative_position(frames, frames, buckets, max_position)[0]
    got = relative_index(frames, buckets, max_position, span)
    np.testing.assert_array_equal(got, torch.clamp(relative + span, 0, 2 * span - 1).numpy())


def test_ends_of_the_published_index() -> None:
    """The clamp is lopsided: forward the last bucket begins at 506 frames, backward the first at 512."""
    index = relative_index(700, 256, 512, 256)
    assert index.min() == 0 and index.max() == 511
    behind, ahead = index[:, 0], index[0]  # i − j = +i, −j
    assert np.argmax(behind == 511) == 506
    assert np.argmax(ahead == 0) == 512
    assert index[3, 3] == 256
    np.testing.assert_array_equal(np.diff(index, axis=0)[:, 0] >= 0, True)


def test_index_depends_on_the_distance_only() -> None:
    index = relative_index(150, 32, 129, 32)
    for offset in range(-149, 150):
        assert len(set(np.diagonal(index, offset))) == 1


def test_both_position_terms_look_up_the_same_row() -> None:
    """p2c gathers at clamp(−rel + S) and transposes afterwards, so [query, key] has row clamp(rel + S), as in c2p."""
    frames, span = 40, 8
    rng = np.random.default_rng(0)
    index = relative_index(frames, span, 16, span)
    table, k = rng.standard_normal((1, 2 * span, 3)), rng.standard_normal((1, frames, 3))
    got = position_to_content(k, table, index, 1.0)[0, 0]
    relative = reference.build_relative_position(frames, frames, span, 16)[0]
    gathered = torch.gather(
        torch.from_numpy(k[0] @ table[0].T), -1, torch.clamp(-relative + span, 0, 2 * span - 1)
    ).T.numpy()
    np.testing.assert_allclose(got, gathered, rtol=0, atol=1e-12)
    i, j = 25, 3  # far apart, so that a sign error would show
    np.testing.assert_allclose(got[i, j], k[0, j] @ table[0, index[i, j]], rtol=0, atol=1e-12)
    c2p = content_to_position(k, table, index, 1.0)[0, 0]
    np.testing.assert_allclose(c2p[i, j], k[0, i] @ table[0, index[i, j]], rtol=0, atol=1e-12)
    assert index[i, j] > span > index[j, i]


# -------------------------------------------------- tables that make no sense are refused


@pytest.mark.parametrize("buckets", [1, 2, 3])
def test_too_few_buckets_are_an_error(buckets: int) -> None:
    with pytest.raises(ValueError, match=rf"config field position_buckets is {buckets}; it must be at least 4, or -1"):
        SEWDConfig(position_buckets=buckets)


@pytest.mark.parametrize(("buckets", "too_short"), [(256, 129), (8, 5), (9, 5), (4, 3)])
def test_too_short_a_reach_is_an_error(buckets: int, too_short: int) -> None:
    with pytest.raises(ValueError, match=f"max_position_embeddings is {too_short}; it must be more than"):
        SEWDConfig(position_buckets=buckets, max_position_embeddings=too_short)
    with pytest.raises(ValueError, match=f"max_relative_positions is {too_short}; it must be more than"):
        SEWDConfig(position_buckets=buckets, max_relative_positions=too_short)
    config = SEWDConfig(position_buckets=buckets, max_position_embeddings=too_short + 1)
    top = log_bucket(np.arange(FARTHEST), config.position_buckets, config.max_relative_distance)
    assert (np.diff(top) >= 0).all()


def test_without_relative_attention_buckets_do_not_matter() -> None:
    assert SEWDConfig(position_buckets=2, relative_attention=False).position_span == 2
