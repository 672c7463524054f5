"""The products of ``cuda_gemm`` against NumPy, in the simulator: every tail, both rungs, activations, choice of tile.

Tiles here have few threads; what runs on a GPU are the same kernels with larger numbers.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sewd_np import cuda_gemm, layers
from sewd_np.config import ACTIVATIONS
from sewd_np.cuda_gemm import NARROW_TILES, WIDE_TILES, Tile, choose_tile, linear_shape
from sewd_np.trace import error_between

Array = np.ndarray

# float32 sums of at most 40 products, in another order than NumPy's.
TOLERANCE = 5e-6
TILES = [
    Tile(8, 8, 8, 4, 4, slices=1),
    Tile(16, 16, 8, 8, 8, slices=1),  # two pieces of 4 rows and of 4 outputs to a thread
    Tile(16, 8, 4, 8, 4, slices=3),  # the sum in three parts
    Tile(
        16, 12, 4, 4, 4, slices=2
    ),  # a width that is no power of two; more threads than a step of the weight has fours
]
# rows, inputs, outputs: one number, exactly a tile, one more and one less of each, no multiples of 4, a few outputs.
SHAPES = [(1, 1, 1), (16, 16, 16), (17, 9, 15), (15, 8, 17), (5, 40, 4), (9, 4, 32), (33, 12, 8), (3, 7, 2)]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def empty(*shape: int) -> Array:
    """Room for a result, with NaN where a kernel forgets to write."""
    return np.full(shape, np.nan, np.float32)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_tiles_at_every_tail(tile: Tile) -> None:
    for (rows, inputs, outputs), biased in itertools.product(SHAPES, (True, False)):
        x, weight, bias = normal(rows, inputs), normal(inputs, outputs), normal(outputs)
        out = empty(rows, outputs)
        shape = linear_shape(rows, inputs, outputs)
        cuda_gemm.launch(0, shape, x, weight, bias if biased else None, "gelu", out, tile)
        want = layers.linear(x, weight, bias if biased else np.zeros_like(bias), "gelu")
        assert error_between(out, want) <= TOLERANCE, (rows, inputs, outputs, biased)


@pytest.mark.parametrize("tile", [tile for tile, _ in (*WIDE_TILES, *NARROW_TILES)], ids=str)
def test_real_tiles(tile: Tile) -> None:
    """What a GPU runs: too many threads here for more than one block."""
    rows, inputs, outputs = tile.rows - 1, 2 * tile.depth + 3, tile.outputs - 3
    x, weight, bias = normal(rows, inputs), normal(inputs, outputs), normal(outputs)
    out = empty(rows, outputs)
    cuda_gemm.launch(0, linear_shape(rows, inputs, outputs), x, weight, bias, "gelu", out, tile)
    assert error_between(out, layers.linear(x, weight, bias, "gelu")) <= TOLERANCE


def test_the_first_rung() -> None:
    for rows, inputs, outputs in SHAPES:
        x, weight, bias = normal(rows, inputs), normal(inputs, outputs), normal(outputs)
        out = empty(rows, outputs)
        cuda_gemm.launch_simple(0, linear_shape(rows, inputs, outputs), x, weight, bias, "relu", out)
        assert error_between(out, layers.linear(x, weight, bias, "relu")) <= TOLERANCE


@pytest.mark.parametrize("outputs", [32, 50])
def test_linear(outputs: int) -> None:
    """The launch function as the model calls it: axes before the last, a tile of the real size, own width or not."""
    x, weight, bias = normal(2, 5, 20), normal(20, outputs), normal(outputs)
    out = empty(2, 5, outputs)
    cuda_gemm.linear(0, x, weight, bias, "linear", out)
    assert error_between(out, layers.linear(x, weight, bias)) <= TOLERANCE
    cuda_gemm.linear(0, x, weight, None, "tanh", out)
    assert error_between(out, np.tanh(x @ weight)) <= TOLERANCE


def test_nan_stays_in_its_row() -> None:
    """A row computed in the place of one beyond the last, or zeros in the place of missing inputs, must not leak."""
    x, weight, bias = normal(9, 5), normal(5, 6), normal(6)
    x[4, 2] = np.nan
    out = empty(9, 6)
    cuda_gemm.launch(0, linear_shape(9, 5, 6), x, weight, bias, "gelu", out, TILES[0])
    assert np.isnan(out[4]).all()
    assert np.isfinite(np.delete(out, 4, axis=0)).all()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation: str) -> None:
    """Every name of the configuration, over numbers where exp overflows too. x · 1 + 0: the product adds nothing."""
    x = np.concatenate([np.linspace(-9, 9, 37), [-1e4, -200, -90, 90, 200, 1e4, np.nan]]).astype(np.float32)[:, None]
    out = empty(len(x), 1)
    tile = TILES[0]
    cuda_gemm.launch(0, linear_shape(len(x), 1, 1), x, np.ones((1, 1), np.float32), None, activation, out, tile)
    with np.errstate(over="ignore", invalid="ignore"):
        want = layers.activate(x.astype(np.float64), activation)
    assert np.isnan(out[-1, 0])
    np.testing.assert_allclose(out[:-1], want[:-1], rtol=2e-6, atol=5e-7)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="'softmax'"):
        cuda_gemm.linear(0, normal(1, 1), normal(1, 1), None, "softmax", empty(1, 1))


def test_choice_of_tile() -> None:
    large, *_, small = (tile for tile, _ in WIDE_TILES)
    assert choose_tile(linear_shape(100_000, 512, 512)) == large
    assert choose_tile(linear_shape(250, 384, 384)) == small  # ten seconds of sound: 6 large tiles for 132 processors
    head = choose_tile(linear_shape(100_000, 384, 32))
    assert head == NARROW_TILES[0][0]._replace(outputs=32)
    assert choose_tile(linear_shape(500, 384, 29)).outputs == 32
    for tile, _ in (*WIDE_TILES, *NARROW_TILES):
        assert tile.threads <= 1024 and tile.threads % 32 == 0
