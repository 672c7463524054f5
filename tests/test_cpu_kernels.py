"""The compiled kernels one by one, at lengths that hit every tail, against the loops of ``naive``.

Each test runs twice: compiled, and with every compiled function of the ``cpu_*`` modules put back to the Python it was
written in, so that the lines themselves are run (and shown by a coverage report), and not only what came of them.
"""

from __future__ import annotations

import itertools
import math
import types
from typing import Any

import numpy as np
import pytest
from numba.core.registry import CPUDispatcher

from sewd_np import attention, cpu_attention, cpu_conv, cpu_gemm, cpu_kernels, cpu_math, layers
from sewd_np.config import ACTIVATIONS
from sewd_np.cpu_attention import QUERIES, STRIP
from sewd_np.cpu_gemm import COLUMNS, FEW_ROWS, ROWS
from sewd_np.cpu_kernels import ROW_BLOCK, Kernels
from sewd_np.params import Conv, Linear, Norm
from sewd_np.trace import error_between
from tests import naive

Array = np.ndarray
MODULES = (cpu_math, cpu_gemm, cpu_conv, cpu_attention, cpu_kernels)
# float32 rounds each of up to some 1,000 sums by 2^-24; exp and erf add 5e-7.
TOLERANCE = 2e-5


def compiled_functions(module: types.ModuleType) -> dict[str, CPUDispatcher]:
    return {name: value for name, value in vars(module).items() if isinstance(value, CPUDispatcher)}


@pytest.fixture(params=["compiled", "python"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the kernels as they are, then with the functions that they were compiled from."""
    if request.param == "python":
        for module in MODULES:
            for name, function in compiled_functions(module).items():
                monkeypatch.setattr(module, name, function.py_func)
    return str(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, dtype=np.float32)


def same_by_threads(operation: str, *args: Any) -> Array:
    """An operation of ``Kernels`` on 1, 2 and 3 threads; asserts that the results are equal to the last bit."""
    results = [getattr(Kernels(threads), operation)(*args) for threads in (1, 2, 3)]
    for result in results:
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, results[0])
    first: Array = results[0]
    return first


def test_python_form_has_no_compiled_function_left(form: str) -> None:
    left = {name for module in MODULES for name in compiled_functions(module)}
    assert (left == set()) == (form == "python")


# ---------------------------------------------------------------------------- products


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
        cpu_kernels.layer_norm_v1(x, weight, shift, 1e-5, out)
        assert error_between(Kernels(1).layer_norm(x, weight, shift, 1e-5), out) <= TOLERANCE


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
        return Linear(cpu_gemm.pack(linear.weight), linear.bias)

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


# --------------------------------------------------------------------------- attention

BUCKETS = {  # buckets, longest distance, span: logarithmic and far beyond, one each and clipped, wider than a panel
    "log": (4, 8, 4),
    "clipped": (-1, 3, 3),
    "wide": (-1, 2 * COLUMNS + 5, 2 * COLUMNS + 5),
    "one": (-1, 1, 1),
}
FRAMES = sorted({1, 2, *(size + more for size in (QUERIES, STRIP, COLUMNS) for more in (-1, 0, 1)), 2 * QUERIES + 1})
TABLES = ["", "c2p", "p2c", "c2p p2c"]


@pytest.mark.parametrize(("buckets", "longest", "span"), [*BUCKETS.values(), (256, 512, 256), (9, 30, 9)])
def test_distances_are_the_index_by_pair(buckets: int, longest: int, span: int) -> None:
    for frames in (1, 2, 3, 40, 130):
        index = cpu_attention.distances(frames, buckets, longest, span)
        want = naive.relative_index(frames, buckets, longest, span)
        np.testing.assert_array_equal(cpu_attention.index_by_pair(index, span), want)
        rows = index.rows
        assert (np.diff(rows) >= 0).all() and len(rows) == 2 * frames - 1
        assert (rows[: index.near] == rows[0]).all() and (rows[index.far :] == rows[-1]).all()


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
    packed = cpu_attention.pack_positions(*positions, scale)
    index = cpu_attention.distances(qkv.shape[1], *BUCKETS[buckets])
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


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # of exp far below its range; it gives 0 there
@pytest.mark.parametrize("factor", [1e15, -1e15])
def test_attention_survives_huge_scores(form: str, rng: np.random.Generator, factor: float) -> None:
    """Scores of ±1e30: one key takes all, and nothing overflows."""
    qkv, positions = attention_case(rng, 1, STRIP + 3, 1, 3, "log", "")
    qkv[..., :3] *= np.float32(factor)
    qkv[..., 3:6] *= np.float32(1e15)
    got = fused(qkv, 1, positions, "log", 3.0)
    assert np.isfinite(got).all()
    assert error_between(got, looped(qkv, 1, positions, "log", 3.0)) <= TOLERANCE
    qkv[..., 3:6] = 1e15  # all keys the same: the mean of the values
    got = fused(qkv, 1, positions, "log", 3.0)
    assert error_between(got, np.broadcast_to(qkv[..., 6:].mean(axis=1, keepdims=True), got.shape)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_softmax_of_one_row(form: str, rng: np.random.Generator) -> None:
    """Rows of given scores: lengths about a strip, −∞ among them, huge ones, NaN.

    With head size 1 and every query 1 the scores are the keys; the values are those of the softmax's own weights.
    """

    def softmax_times(scores: Array, values: Array) -> Array:
        qkv = np.stack([np.ones_like(scores), scores, values], axis=-1).astype(np.float32)
        return fused(qkv[None], 1, (None, None), "log", 1.0)[0, :, 0]

    rows = [9 * normal(rng, n) for n in (1, 2, STRIP - 1, STRIP, STRIP + 1, 2 * STRIP, 2 * STRIP + 1)]
    some = normal(rng, STRIP + 5)
    some[::3] = -np.inf
    rows += [some, np.full(STRIP + 1, 1e30), np.full(3, -1e30), np.array([3e38, -3e38, 0]), 1e9 * rows[-1]]
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
