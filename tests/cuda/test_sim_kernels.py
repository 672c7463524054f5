"""The row-wise kernels of ``cuda_kernels`` against their NumPy definitions, in the simulator: tails, options, lengths.

Launch functions take NumPy arrays here; the simulator raises on races and divergence (``fastsim``).
"""

from __future__ import annotations

import numpy as np
import pytest

from sewd_np import cuda_kernels as kernels
from sewd_np import layers
from sewd_np.config import ACTIVATIONS
from sewd_np.trace import error_between

Array = np.ndarray

# float32 sums over at most 100 numbers in another order, and a division by a standard deviation of about 1.
TOLERANCE = 5e-6
# One channel, fewer than a warp's lanes, exactly a warp, and more with a tail; rows around the 8 of a block.
SHAPES = [(1, 1, 1), (2, 4, 5), (1, 9, 32), (3, 3, 70), (2, 3, 140)]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def empty(*shape: int) -> Array:
    """Room for a result, with NaN where a kernel forgets to write."""
    return np.full(shape, np.nan, np.float32)


def close(got: Array, want: Array) -> None:
    assert got.shape == want.shape
    assert error_between(got, want) <= TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, ...]) -> None:
    x, weight, bias = 3 + 2 * normal(*shape), normal(shape[-1]), normal(shape[-1], seed=1)
    for activation in ("linear", "gelu"):
        out = empty(*shape)
        kernels.layer_norm(0, x, weight, bias, 1e-5, activation, out)
        want = layers.activate(layers.layer_norm(x, weight, bias, 1e-5), activation)
        close(out, want)
        own = x.copy()
        kernels.layer_norm(0, own, weight, bias, 1e-5, activation, own)
        np.testing.assert_array_equal(own, out)


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_v1_is_the_same_function(shape: tuple[int, ...]) -> None:
    x, weight, bias, out = 3 + 2 * normal(*shape), normal(shape[-1]), normal(shape[-1], seed=1), empty(*shape)
    rows, _ = kernels.rows_of(x)
    kernels.layer_norm_v1()[-(-rows // 4), 4](x, rows, shape[-1], weight, bias, np.float32(1e-5), out)
    close(out, layers.layer_norm(x, weight, bias, 1e-5))


@pytest.mark.parametrize("shape", SHAPES)
def test_add_norm(shape: tuple[int, ...]) -> None:
    x, residual = normal(*shape), normal(*shape, seed=1)
    added, weight, bias = (normal(shape[-1], seed=seed) for seed in (2, 3, 4))
    out = empty(*shape)
    kernels.add_norm(0, x, None, residual, weight, bias, 1e-7, out)
    # One channel minus its mean is 0 but for rounding, which sqrt(1e-7) enlarges 3,000 times.
    if shape[-1] > 1:
        close(out, layers.add_norm(x, residual, weight, bias, 1e-7))
    else:
        close(out, bias + 0 * x)
    own = x.copy()
    kernels.add_norm(0, own, added, residual, weight, bias, 1e-5, own)
    close(own, layers.add_norm(x + added, residual, weight, bias, 1e-5))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NaN and infinity are among the inputs
@pytest.mark.parametrize("width", [9, 12])  # one by one, and in fours
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activate(name: str, width: int) -> None:
    borders = np.array([-1e4, -30, -6, -1e-3, 0, 1e-3, 5.999, 6.001, 30, 1e4, np.inf, np.nan], np.float32)
    x, bias = np.concatenate([borders, 4 * normal(5 * width - 12)]).reshape(5, width), normal(width)
    out, want = empty(5, width), layers.activate(x + bias, name)
    kernels.activate(0, x, None, name, out)
    close(out, layers.activate(x, name))
    kernels.activate(0, x, bias, name, x)
    close(x, want)
    with pytest.raises(ValueError, match="activation is 'none'"):
        kernels.activate(0, x, None, "none", out)


@pytest.mark.parametrize(("frames", "kernel", "width"), [(1, 1, 5), (2, 4, 5), (9, 4, 5), (9, 4, 140)])
def test_trim_and_activate(frames: int, kernel: int, width: int) -> None:
    x = normal(2, frames, width)
    want = layers.trim_and_activate(x, kernel, "gelu")
    out = empty(*want.shape)
    kernels.trim_and_activate(0, x, "gelu", out)
    close(out, want)


@pytest.mark.parametrize(("frames", "factor"), [(1, 1), (5, 2), (9, 3), (20, 2)])
def test_average_pool_and_add_pooled(frames: int, factor: int) -> None:
    x = normal(2, frames, 33)
    out = empty(2, frames // factor, 33)
    kernels.average_pool(0, x, factor, out)
    close(out, layers.average_pool(x, factor))
    for surplus in (0, 1):
        position, total = normal(2, out.shape[1] + surplus, 33), empty(*out.shape)
        kernels.add_pooled(0, out, position, total)
        np.testing.assert_array_equal(total, layers.add_pooled(out, position))


@pytest.mark.parametrize(("t", "factor", "surplus"), [(1, 1, 0), (1, 2, 1), (4, 3, 2), (7, 2, 1)])
@pytest.mark.parametrize("lengths", [None, (0, 1), (3, 99)])
def test_unsqueeze(t: int, factor: int, surplus: int, lengths: tuple[int, int] | None) -> None:
    x, frames, size = normal(2, t, factor * 5), t * factor + surplus, 5
    bias = normal(factor * 5, seed=1)
    valid = None if lengths is None else np.array(lengths, np.int32)
    out = empty(2, frames, size)
    kernels.unsqueeze(0, x, None, factor, "linear", valid, out)
    np.testing.assert_array_equal(out, layers.unsqueeze(x, factor, frames, valid))
    kernels.unsqueeze(0, x, bias, factor, "silu", valid, out)
    close(out, layers.unsqueeze(layers.activate(x + bias, "silu"), factor, frames, valid))


def test_zero_padding_in_place_and_spec_augment() -> None:
    x, lengths = normal(3, 9, 33), np.array([0, 4, 99], np.int32)
    want = layers.zero_padding(x, lengths)
    kernels.zero_padding(0, x, lengths, x)
    np.testing.assert_array_equal(x, want)
    marks, embed, out = np.random.default_rng(0).random((3, 9)) < 0.5, normal(33), empty(3, 9, 33)
    kernels.spec_augment(0, x, marks.ravel().astype(np.int32), embed, out)
    np.testing.assert_array_equal(out, layers.spec_augment(x, marks, embed))


def test_weighted_layer_sum() -> None:
    states, weights = tuple(normal(2, 5, 33, seed=seed) for seed in range(4)), normal(4)
    shares = np.exp(weights) / np.exp(weights).sum()
    out = empty(2, 5, 33)
    kernels.weighted_layer_sum(0, states, list(shares), out)
    close(out, layers.weighted_layer_sum(states, weights))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # 0 · inf is what makes the NaN
@pytest.mark.parametrize("lengths", [None, (20, 1, 0), (99, 19, 7)])
@pytest.mark.parametrize("size", [1, 32, 45])
def test_mean_over_time(size: int, lengths: tuple[int, ...] | None) -> None:
    x = normal(3, 20, size)
    valid = None if lengths is None else np.array(lengths, np.int32)
    out = empty(3, size)
    kernels.mean_over_time(0, x, valid, out)
    want = layers.mean_over_time(x, valid)
    close(out, want)
    # No valid frame: NaN, as in the reference.
    assert np.isnan(out).any() == (lengths is not None and 0 in lengths)
