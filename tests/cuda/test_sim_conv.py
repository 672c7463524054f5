"""Convolutions, the squeeze, group norm and the feature encoder of the CUDA rooms against NumPy, in the simulator.

The cases are those of ``tests/operation_cases.py``, which every backend runs: tails, groups, padding, gaps between
windows, one frame, lengths. Scratch holds NaN and is exactly as large as was asked for.
"""

from __future__ import annotations

import numpy as np
import pytest

from sewd_np import cuda_conv, cuda_gemm, cuda_kernels, cuda_norm, layers
from sewd_np.cuda_conv import FirstTile, conv_shape, encoder_room, feature_encoder
from sewd_np.cuda_gemm import Tile
from sewd_np.params import Conv, Norm
from sewd_np.trace import error_between
from tests.operation_cases import Case, all_cases

Array = np.ndarray

# float32 sums of at most 50 products and statistics over at most 60 steps, in another order than NumPy's.
TOLERANCE = 5e-6
TILE = Tile(8, 8, 8, 4, 4, slices=2)
FIRST = FirstTile(fours=2, strips=4, own_frames=2)  # chunks of 8 frames
CASES = tuple(all_cases())


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def empty(*shape: int) -> Array:
    """Room for a result, with NaN where a kernel forgets to write."""
    return np.full(shape, np.nan, np.float32)


def cases(operation: str, every: int = 1) -> list[Case]:
    return [case for case in CASES if case.operation == operation][::every]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """TILE for every product that chooses its own: eight threads instead of some hundred."""
    monkeypatch.setattr(cuda_gemm, "choose_tile", lambda shape: TILE)


def single(array: Array | None) -> Array | None:
    return None if array is None else np.ascontiguousarray(array, np.float32)


def conv_of(layer: Conv) -> Conv:
    """The same layer in float32."""
    norm = None if layer.norm is None else Norm(*map(single, layer.norm))
    return Conv(single(layer.weight), single(layer.bias), norm)


# ------------------------------------------------------------------------ convolutions


def test_convolutions() -> None:
    for case in cases("conv1d", every=3):
        x, weight, bias, stride, padding = case.args
        want = layers.conv1d(*case.args)
        shape = conv_shape(x.shape, weight.shape, stride, padding, want.shape[1])
        for start, extra in ((cuda_gemm.launch, (TILE,)), (cuda_gemm.launch_simple, ())):
            out = empty(*want.shape)
            start(0, shape, single(x), single(weight), single(bias), "linear", out, *extra)
            assert error_between(out, want) <= TOLERANCE, case.label


# kernel, stride, padding, groups, c_in per group, c_out per group: all multiples of 4, so that numbers move in fours.
FOURS = [(3, 2, 0, 1, 8, 12), (2, 2, 0, 1, 4, 8), (1, 1, 0, 1, 12, 8), (5, 2, 2, 2, 4, 4), (4, 1, 2, 2, 12, 8)]


@pytest.mark.parametrize(("kernel", "stride", "padding", "groups", "inputs", "outputs"), FOURS)
def test_convolutions_in_fours(kernel: int, stride: int, padding: int, groups: int, inputs: int, outputs: int) -> None:
    for steps in (kernel, 20):
        x, weight = normal(2, steps, groups * inputs), normal(kernel, groups, inputs, outputs)
        bias = normal(groups * outputs)
        want = layers.activate(layers.conv1d(x, weight, bias, stride, padding), "gelu")
        shape = conv_shape(x.shape, weight.shape, stride, padding, want.shape[1])
        assert shape.vector
        out = empty(*want.shape)
        cuda_gemm.launch(0, shape, x, weight, bias, "gelu", out, TILE)
        assert error_between(out, want) <= TOLERANCE
    out = empty(*want.shape)
    cuda_conv.conv1d(0, x, weight, bias, stride, padding, "gelu", out)  # with the tile that runs on a GPU
    assert error_between(out, want) <= TOLERANCE


def test_squeeze(small_tiles: None) -> None:
    for case in cases("squeeze", every=5):
        x, conv, factor, activation = case.args
        want = layers.squeeze(*case.args)
        if want.size:
            out = empty(*want.shape)
            cuda_conv.squeeze(0, single(x), single(conv.weight), single(conv.bias), factor, activation, out)
            assert error_between(out, want) <= TOLERANCE, case.label


@pytest.mark.parametrize("kernel", [4, 7])
def test_squeeze_in_fours(kernel: int) -> None:
    """Groups of 12 and a step of 8 numbers: a tap's second step is half empty. Even and odd kernels, both rungs."""
    x, weight, bias = normal(2, 21, 24), normal(kernel, 2, 12, 12), normal(24)
    want = layers.squeeze(x, Conv(weight, bias, None), 2, "gelu")
    out = empty(*want.shape)
    cuda_conv.squeeze(0, x, weight, bias, 2, "gelu", out)
    assert error_between(out, want) <= TOLERANCE
    shape = conv_shape(x.shape, weight.shape, 2, kernel // 2, want.shape[1])._replace(factor=2)
    for start, extra in ((cuda_gemm.launch, (TILE,)), (cuda_gemm.launch_simple, ())):
        out = empty(*want.shape)
        start(0, shape, x, weight, bias, "gelu", out, *extra)
        assert error_between(out, want) <= TOLERANCE


# -------------------------------------------------------------------------- group norm


@pytest.mark.parametrize(("batch", "steps", "channels"), [(1, 1, 1), (2, 8, 4), (3, 23, 5), (1, 40, 9)])
@pytest.mark.parametrize("ragged", [False, True])
def test_group_norm(batch: int, steps: int, channels: int, ragged: bool) -> None:
    x, weight, bias = 3 + 2 * normal(batch, steps, channels), normal(channels), normal(channels)
    lengths = np.array([steps // 2, steps, 0][:batch], np.int32) if ragged else None
    want = layers.activate(layers.group_norm(x, weight, bias, 1e-5, lengths), "gelu")
    # Where a single step counts, its distance from the mean should be 0; a rounding of it is divided by sqrt(eps).
    tolerance = TOLERANCE if not ragged and steps > 1 else 300 * TOLERANCE
    block = (4, 2, 4)
    scratch = empty(cuda_norm.moments_size(batch, -(-steps // 8), channels))
    out = empty(*x.shape)
    cuda_norm.group_norm(0, x, weight, bias, 1e-5, "gelu", lengths, scratch, out, block)
    assert error_between(out, want) <= tolerance
    own = x.copy()
    cuda_norm.group_norm(0, own, weight, bias, 1e-5, "gelu", lengths, scratch, own, block)
    np.testing.assert_array_equal(own, out)

    out = empty(*x.shape)
    given = scratch if lengths is None else lengths
    run = cuda_norm.simple_group_norm("gelu", ragged, 8)
    run[-(-batch * channels // 8), 8](x, batch, steps, channels, weight, bias, np.float32(1e-5), given, out)
    assert error_between(out, want) <= tolerance


def test_group_norm_with_the_sizes_of_a_gpu() -> None:
    x, weight, bias = normal(1, 300, 3), normal(3), normal(3)
    scratch = empty(cuda_norm.group_norm_scratch(*x.shape))
    out = empty(*x.shape)
    cuda_norm.group_norm(0, x, weight, bias, 1e-5, "linear", None, scratch, out)
    assert error_between(out, layers.group_norm(x, weight, bias, 1e-5)) <= TOLERANCE


def test_silence_and_an_offset() -> None:
    """A constant channel has variance 0 exactly, whatever its level: no difference of large sums."""
    x = np.tile(np.array([0, 3, -1e6], np.float32), (1, 37, 1))
    weight, bias = normal(3), normal(3, seed=1)
    out = empty(*x.shape)
    scratch = empty(cuda_norm.moments_size(1, 5, 3))
    cuda_norm.group_norm(0, x, weight, bias, 1e-5, "linear", None, scratch, out, (4, 2, 4))
    moments = scratch[: 5 * 2 * 3].reshape(5, 2, 3)
    np.testing.assert_array_equal(moments[:, 0], x[0, :5])
    assert (moments[:, 1] == 0).all()
    # The scale is 1/sqrt(eps) = 316, and x · scale + shift rounds at that size.
    np.testing.assert_allclose(out[0, :, :2], np.tile(bias[:2], (37, 1)), atol=3 * 316 * 1e-6)


# --------------------------------------------------------------------- the feature encoder


def run_encoder(case: Case, tile: FirstTile) -> Array:
    wave, conv_layers, strides, norm, eps, activation, *rest = case.args
    conv_layers = tuple(map(conv_of, conv_layers))
    lengths = rest[0].astype(np.int32) if rest else None
    scratch = empty(encoder_room(*wave.shape, conv_layers, strides, tile).size)
    out = empty(*layers.feature_encoder(*case.args).shape)
    feature_encoder(
        0,
        single(wave),
        conv_layers,
        strides,
        norm,
        eps,
        activation,
        lengths,
        cuda_kernels.layer_norm,
        scratch,
        out,
        tile,
    )
    return out


def test_feature_encoder(small_tiles: None) -> None:
    """One to four layers, "group" and "layer", with and without lengths.

    A first layer of 4 channels has a kernel of its own, one of other sizes is a product. Five is
    no divisor of the cases that a ladder has, so each kind occurs.
    """
    for case in cases("feature_encoder", every=5):
        want = layers.feature_encoder(*case.args)
        assert error_between(run_encoder(case, FIRST), want) <= TOLERANCE * case.amplification, case.label


@pytest.mark.parametrize(("norm", "tile"), [("group", FIRST), ("layer", FIRST), ("group", cuda_conv.FIRST_TILE)])
def test_published_steps(norm: str, tile: FirstTile, small_tiles: None) -> None:
    """Kernels and strides of the published encoders' first layers, and at last the block that runs on a GPU.

    Several chunks of frames, two tiles of channels, unequal lengths.
    """
    kernels, strides, channels = (10, 3, 1), (5, 2, 1), (12, 8, 4)
    inputs, conv_layers = 1, []
    for i, (kernel, outputs) in enumerate(zip(kernels, channels, strict=True)):
        own = Norm(normal(outputs), normal(outputs, seed=1)) if norm == "layer" or i == 0 else None
        conv_layers.append(Conv(normal(kernel, 1, inputs, outputs), normal(outputs, seed=2), own))
        inputs = outputs
    lengths = np.array([17, 29], np.int32)
    args = (normal(2, 153), tuple(conv_layers), strides, norm, 1e-5, "gelu", lengths)
    case = Case("feature_encoder", norm, args)
    # Values of about 20 go into the last layer.
    assert error_between(run_encoder(case, tile), layers.feature_encoder(*args)) <= 2 * TOLERANCE


def test_lengths_mean_alone() -> None:
    """The first layer of a padded batch, over a recording's own steps, is what it is for the recording alone."""
    wave, weight = normal(2, 120), normal(10, 1, 1, 8)
    layer = Conv(weight, None, Norm(normal(8), normal(8, seed=1)))
    lengths = np.array([13, 23], np.int32)

    def first(samples: Array, valid: Array | None) -> Array:
        steps = (samples.shape[1] - 10) // 5 + 1
        out = empty(len(samples), steps, 8)
        scratch = empty(cuda_norm.moments_size(len(samples), -(-steps // FIRST.frames), 8))
        cuda_conv.normed_first_layer(0, samples, layer, 5, 1e-5, "gelu", valid, scratch, out, FIRST)
        return out

    together = first(wave, lengths)
    alone = first(np.ascontiguousarray(wave[:1, :70]), None)
    np.testing.assert_array_equal(together[:1, :13], alone)


def test_room() -> None:
    """Ten minutes in one piece: two buffers as long as the first two layers, and little beside."""
    conv_layers = tuple(
        Conv(np.empty((k, 1, i, o)), None, None) for k, i, o in ((10, 1, 64), (3, 64, 128), (1, 128, 128))
    )
    room = encoder_room(1, 9_600_000, conv_layers, (5, 2, 1))
    assert room.steps == (1_919_999, 959_999, 959_999)
    assert (room.even, room.odd) == (1_919_999 * 64, 959_999 * 128)
    assert room.moments < room.even / 50
    assert cuda_conv.feature_encoder_scratch(1, 9_600_000, conv_layers, (5, 2, 1)) == room.size


def test_large_windows_go_another_way() -> None:
    """A first layer whose window does not fit into shared memory is a product like any other."""
    assert cuda_conv.has_first_layer((10, 1, 1, 64), 5)
    assert not cuda_conv.has_first_layer((400, 1, 1, 64), 160)
    assert not cuda_conv.has_first_layer((10, 1, 1, 30), 5)
