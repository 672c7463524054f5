"""The compiled kernels of whole operations, and their mathematics, at lengths that hit every tail, in both forms.

Against the loops of ``naive``. Products, attention and the matrix unit have files of their own.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import pytest

from sewd_np import cpu_conv, cpu_kernels, cpu_math, layers
from sewd_np.config import ACTIVATIONS
from sewd_np.cpu_gemm import COLUMNS, ROWS, pack
from sewd_np.cpu_kernels import Kernels
from sewd_np.cpu_rows import ROW_BLOCK
from sewd_np.cpu_team import claim
from sewd_np.params import Conv, Linear, Norm
from sewd_np.trace import error_between
from tests import cpu_forms, naive
from tests.cpu_forms import MODULES, TOLERANCE, compiled_functions, normal, same_by_threads

Array = np.ndarray
form, rng = cpu_forms.form, cpu_forms.rng


def test_python_form_has_no_compiled_function_left(form: str) -> None:
    left = {name for module in MODULES for name in compiled_functions(module)}
    assert (left == set()) == (form == "python")


# ------------------------------------------------------------------------- mathematics

EDGES = [0.0, 1e-38, 1e-6, 0.5, 4.0, 20.0, 88.0, 100.0, 1e4, 1e20, math.inf]
EXTREMES = np.array([sign * edge for edge in EDGES for sign in (1, -1)], np.float32)


def test_exp_and_erf_keep_their_error_bounds(form: str) -> None:
    points = 20_001 if form == "compiled" else 2_001
    x = np.linspace(-87.3, 88, points, dtype=np.float32)
    got = np.array([cpu_math.exp(v) for v in x], np.float64)
    assert np.abs(got / np.exp(x.astype(np.float64)) - 1).max() <= 5e-7
    x = np.linspace(-6, 6, points, dtype=np.float32)
    got = np.array([cpu_math.erf(v) for v in x], np.float64)
    assert np.abs(got - [math.erf(v) for v in x]).max() <= 6e-7
    with np.errstate(all="ignore"):
        ends = [float(cpu_math.exp(np.float32(v))) for v in (-math.inf, -1e30, -88.0, 0.0, 89.0, 1e30, math.inf)]
        assert ends == [0, 0, 0, 1, math.inf, math.inf, math.inf]
        assert np.isnan(cpu_math.exp(np.float32(np.nan)))
    # erf reaches 1 and never passes it: 1 + erf(x) is a factor of gelu, and x may be far below 0.
    assert [float(cpu_math.erf(np.float32(v))) for v in (-math.inf, -1e20, -5, 5, 1e20)] == [-1, -1, -1, 1, 1]
    assert np.abs([cpu_math.erf(v) for v in np.linspace(3, 6, 3001, dtype=np.float32)]).max() <= 1


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_at_its_extremes(form: str, name: str) -> None:
    code = cpu_math.ACTIVATION_CODES[name]
    x = EXTREMES.copy()
    with np.errstate(all="ignore"):
        cpu_math.activate(x, code)
        want = layers.activate(EXTREMES.astype(np.float64), name)
    for at, got, expected in zip(EXTREMES, x.astype(np.float64), want, strict=True):
        if np.isnan(expected):  # −∞ · 0 in the definition; its limit is as good
            assert at == -math.inf and (np.isnan(got) or got == 0)
        elif np.isinf(expected):
            assert got == expected
        else:
            assert abs(got - expected) <= 1e-6 * max(1, abs(expected)), at
    missing = np.full(3, np.nan, np.float32)
    cpu_math.activate(missing, code)
    assert np.isnan(missing).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_of_a_number_does_not_depend_on_its_place(form: str, rng: np.random.Generator, name: str) -> None:
    code = cpu_math.ACTIVATION_CODES[name]
    x = 4 * normal(rng, 67)
    alone = x.copy()
    for i in range(len(alone)):
        cpu_math.activate(alone[i : i + 1], code)
    assert error_between(alone, naive.activate(x, name)) <= 2e-6
    for count in (0, 1, 15, 16, 17, 67):
        together = x[:count].copy()
        cpu_math.activate(together, code)
        np.testing.assert_array_equal(together, alone[:count])


def test_activation_codes_are_those_of_the_configuration() -> None:
    assert set(cpu_math.ACTIVATION_CODES) == set(ACTIVATIONS)


# --------------------------------------------------------------------- rows of a layer


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 48])
def test_layer_norm_at_every_tail(form: str, rng: np.random.Generator, size: int) -> None:
    weight, bias = normal(rng, size), normal(rng, size)
    for rows in (1, 2, 3, 7):
        x = 2 + 3 * normal(rng, rows, size)
        got = same_by_threads("layer_norm", x, weight, bias, 1e-5)
        assert error_between(got, naive.layer_norm(x, weight, bias, 1e-5)) <= TOLERANCE
        residual = normal(rng, rows, size)
        got = same_by_threads("add_norm", x, residual, weight, bias, 1e-5)
        assert error_between(got, naive.add_norm(x, residual, weight, bias, 1e-5)) <= TOLERANCE
    for value in (0.0, 3.0, -1e4):  # no variance: the shift alone
        constant = np.full((1, size), value, np.float32)
        got = same_by_threads("layer_norm", constant, weight, bias, 1e-5)
        assert error_between(got, bias[None]) <= TOLERANCE
    missing = np.full((1, size), np.nan, np.float32)
    assert np.isnan(same_by_threads("layer_norm", missing, weight, bias, 1e-5)).all()


def test_a_row_may_be_normalised_in_place(form: str, rng: np.random.Generator) -> None:
    x, weight, bias = normal(rng, 37), normal(rng, 37), normal(rng, 37)
    apart = np.empty_like(x)
    cpu_math.normalize_row(x, weight, bias, 1e-5, apart)
    cpu_math.normalize_row(x, weight, bias, 1e-5, x)
    np.testing.assert_array_equal(x, apart)


@pytest.mark.parametrize("rows", [1, 2, ROWS + 1, ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1, 2 * ROW_BLOCK + 5])
def test_dense_layers_at_every_tail(form: str, rng: np.random.Generator, rows: int) -> None:
    """Fewer rows than threads, one more and one fewer than a block, several blocks a thread."""
    depth, d, inner = (3, 4, 5) if form == "python" or rows > ROW_BLOCK else (17, COLUMNS + 1, 2 * COLUMNS)
    x, residual = normal(rng, 1, rows, depth), normal(rng, 1, rows, d)
    first, norm = Linear(normal(rng, depth, d), normal(rng, d)), Norm(normal(rng, d), normal(rng, d))
    into, out_of = Linear(normal(rng, d, inner), normal(rng, inner)), Linear(normal(rng, inner, d), normal(rng, d))

    def packed(linear: Linear) -> Linear:
        return Linear(pack(linear.weight), linear.bias)

    got = same_by_threads("linear", x, *packed(first), "gelu")
    assert error_between(got, naive.linear(x, *first, "gelu")) <= TOLERANCE
    got = same_by_threads("linear_add_norm", x, packed(first), residual, norm, 1e-5)
    assert error_between(got, naive.linear_add_norm(x, first, residual, norm, 1e-5)) <= TOLERANCE
    got = same_by_threads("feed_forward", residual, packed(into), packed(out_of), norm, "silu", 1e-5)
    assert error_between(got, naive.feed_forward(residual, into, out_of, norm, "silu", 1e-5)) <= TOLERANCE
    wide = Linear(normal(rng, depth, 2 * d), normal(rng, 2 * d))
    got = same_by_threads("upsample", x, *packed(wide), 2, "gelu", 2 * rows + 1)
    assert error_between(got, naive.upsample(x, *wide, 2, "gelu", 2 * rows + 1)) <= TOLERANCE


# ------------------------------------------------------------------------ convolutions

LADDERS: dict[str, tuple[list[int], list[int], list[int]]] = {
    "two": ([2, 3], [3, 2], [2, 1]),
    "odd": ([3, 2, 5], [4, 3, 1], [3, 2, 1]),
    "gaps": ([2, 4], [2, 1], [3, 2]),
    "one": ([COLUMNS + 1], [5], [2]),
}


def encoder_of(
    rng: np.random.Generator, ladder: str, norm: str, with_bias: bool
) -> tuple[tuple[Conv, ...], tuple[int, ...]]:
    channels, kernels, strides = LADDERS[ladder]
    conv_layers, inputs = [], 1
    for i, (outputs, kernel) in enumerate(zip(channels, kernels, strict=True)):
        own = Norm(1 + normal(rng, outputs), normal(rng, outputs)) if norm == "layer" or i == 0 else None
        bias = normal(rng, outputs) if with_bias else None
        conv_layers.append(Conv(normal(rng, kernel, 1, inputs, outputs), bias, own))
        inputs = outputs
    return tuple(conv_layers), tuple(strides)


def samples_for(ladder: str, frames: int) -> int:
    for kernel, stride in zip(*(reversed(column) for column in LADDERS[ladder][1:]), strict=True):
        frames = (frames - 1) * stride + kernel
    return frames


@pytest.mark.parametrize("frames", [1, 2, cpu_conv.TILE_FRAMES, 2 * cpu_conv.TILE_FRAMES + 1])
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("ladder", LADDERS)
def test_feature_encoder_in_tiles(form: str, rng: np.random.Generator, ladder: str, norm: str, frames: int) -> None:
    """One tile for all threads up to several for each; the tiles' seams must not show."""
    with_bias = frames % 2 == 0
    conv_layers, strides = encoder_of(rng, ladder, norm, with_bias)
    packed = cpu_conv.pack_encoder(conv_layers, strides, norm)
    wave = 0.1 * normal(rng, 2, samples_for(ladder, frames) + 1)
    got = same_by_threads("feature_encoder", wave, packed, strides, norm, 1e-5, "gelu")
    want = naive.feature_encoder(wave, conv_layers, strides, norm, 1e-5, "gelu")
    assert got.shape == want.shape
    # A norm over two numbers (two channels, or a short recording) enlarges the rounding before it.
    assert error_between(got, want) <= 10 * TOLERANCE
    if norm == "group":
        steps = (wave.shape[1] - LADDERS[ladder][1][0]) // strides[0] + 1
        valid = np.array([max(steps - 3, 1), steps])
        got = same_by_threads("feature_encoder", wave, packed, strides, norm, 1e-5, "gelu", valid)
        want = naive.feature_encoder(wave, conv_layers, strides, norm, 1e-5, "gelu", valid)
        assert error_between(got, want) <= 10 * TOLERANCE


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3])
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_silence_and_a_constant_wave(form: str, rng: np.random.Generator, norm: str, value: float) -> None:
    conv_layers, strides = encoder_of(rng, "odd", norm, True)
    packed = cpu_conv.pack_encoder(conv_layers, strides, norm)
    wave = np.full((1, samples_for("odd", 5)), value, np.float32)
    got = same_by_threads("feature_encoder", wave, packed, strides, norm, 1e-5, "gelu")
    want = naive.feature_encoder(wave, conv_layers, strides, norm, 1e-5, "gelu")
    # No variance: group norm multiplies the rounding of w · u by 1/sqrt(1e-5) = 316.
    assert error_between(got, want) <= (316 * 1e-6 if norm == "group" and value else 10 * TOLERANCE)


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_group_norm_from_moments_is_as_exact_as_numpy(rng: np.random.Generator, offset: float) -> None:
    """A recording with a large constant in it: the moments cancel, so they must be kept in double precision."""
    conv_layers, strides = encoder_of(rng, "two", "group", False)
    wave = (offset + 0.1 * rng.standard_normal((1, 20_000))).astype(np.float32)
    args = (strides, "group", 1e-5, "linear")
    exact_layers = tuple(
        Conv(layer.weight.astype(np.float64), None, layer.norm and Norm(*(v.astype(np.float64) for v in layer.norm)))
        for layer in conv_layers
    )
    exact = layers.feature_encoder(wave.astype(np.float64), exact_layers, *args)
    numpy = error_between(layers.feature_encoder(wave, conv_layers, *args), exact)
    packed = cpu_conv.pack_encoder(conv_layers, strides, "group")
    assert error_between(Kernels(2).feature_encoder(wave, packed, *args), exact) <= 4 * numpy + 1e-6


@pytest.mark.parametrize("kernel", [1, 2, 5, 8, 31])
@pytest.mark.parametrize(("groups", "width"), [(1, 1), (1, 5), (2, 3), (3, 1), (2, COLUMNS + 1), (5, 2)])
def test_squeeze_by_kernel_and_group(form: str, rng: np.random.Generator, groups: int, width: int, kernel: int) -> None:
    d = groups * width
    conv = Conv(normal(rng, kernel, groups, width, width) / width, normal(rng, d), None)
    packed = cpu_conv.pack_positional(conv)
    cases = [(3, 1), (3, 3), (4, 2), (2 * ROWS + 3, 2)] if width < COLUMNS else [(3, 2)]
    for frames, factor in cases:
        x = normal(rng, 2, frames, d)
        got = same_by_threads("squeeze", x, packed, factor, "gelu")
        want = naive.squeeze(x, conv, factor, "gelu")
        assert got.shape == want.shape
        assert error_between(got, want) <= TOLERANCE


# --------------------------------------------------------------------- team and scratch


def test_a_team_shares_out_a_kernel_and_raises_what_it_raised() -> None:
    for size in (1, 2, 5):
        shares = np.zeros(size, int)

        def takes(shares: Array, worker: int, workers: int) -> None:
            shares[worker] += workers

        cpu_kernels.Team(size).run(takes, shares)
        assert (shares == size).all()

        def fails(at: int, worker: int, workers: int) -> None:
            if worker == at:
                raise ArithmeticError(f"worker {worker} of {workers}")

        for at in range(size):
            with pytest.raises(ArithmeticError, match=f"worker {at} of {size}"):
                cpu_kernels.Team(size).run(fails, at)


@numba.njit(nogil=True)
def takes_all(counter, taken, count, worker, workers):  # type: ignore[no-untyped-def]
    """Marks what this worker got, until all is gone."""
    for _ in range(count):
        piece = claim(counter)
        if piece >= count:
            break
        taken[worker, piece] += 1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_piece_of_work_is_taken_once(size: int) -> None:
    """Whoever takes it; compiled, where threads claim at the same time, and in Python."""
    count = 100_000
    taken = np.zeros((size, count), np.int64)
    cpu_kernels.Team(size).run(takes_all, np.zeros(1, np.int64), taken, count)
    np.testing.assert_array_equal(taken.sum(axis=0), np.ones(count))
    counter = np.array([7])
    assert [claim(counter) for _ in range(3)] == [7, 8, 9]


def test_scratch_memory_is_never_in_two_hands() -> None:
    pool = cpu_kernels.Pool()
    with pool.take(10) as a, pool.take(20) as b:
        assert len(a) == 10 and len(b) == 20 and a.dtype == b.dtype == np.float32
        assert not np.shares_memory(a, b)
    with pool.take(5) as again:
        assert np.shares_memory(again, a) or np.shares_memory(again, b)
    with pytest.raises(KeyError), pool.take(7) as lost:
        raise KeyError
    with pool.take(7) as back:
        assert np.shares_memory(back, lost)


def test_kernels_get_what_they_were_compiled_for(rng: np.random.Generator) -> None:
    x = normal(rng, 3, 4)
    assert cpu_kernels.own(x) is x
    fixed = x.copy()
    fixed.flags.writeable = False
    for other in (fixed, x.T, x[:, ::2], x.astype(np.float64), np.asfortranarray(x)):
        made = cpu_kernels.own(other)
        assert made.dtype == np.float32 and made.flags.c_contiguous and made.flags.writeable
        np.testing.assert_array_equal(made, other)
