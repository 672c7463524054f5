"""Products on the matrix unit: packing, both forms of the product, and every operation that goes through it.

The compiled form is skipped where there is no unit; Python's form of the same lines runs anywhere. What is compared is
exact numbers (float64) for the product, and the float32 kernels, which have tests of their own, for the operations.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
from types import SimpleNamespace
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import pytest

from sewd_np import cpu_amx, cpu_conv, cpu_gemm, cpu_kernels, cpu_split
from sewd_np.config import SEWDConfig
from sewd_np.cpu_amx import BLOCK, DEPTH, SIDE, pack_split
from sewd_np.cpu_kernels import Kernels
from sewd_np.cpu_positions import distances, pack_positions
from sewd_np.cpu_rows import INNER, ROW_BLOCK
from sewd_np.cpu_split import multiply
from sewd_np.params import Conv, Linear, Norm, random_params
from sewd_np.trace import error_between
from tests import cpu_forms, reference
from tests.cpu_forms import SPLIT_TOLERANCE, by_form, normal, same_by_threads

Array = np.ndarray
form, split_form, rng = cpu_forms.form, cpu_forms.split_form, cpu_forms.rng
HEIGHTS = [1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65]
WIDTHS = [1, 31, 32, 33, 64, 65, 96]
DEPTHS = [32, 64, 96]
needs_unit = pytest.mark.skipif(not cpu_amx.available(), reason="this machine has no matrix unit (AMX) to be used")
# exp far below its range gives 0; ∞ − ∞ and ∞ · 0 are meant
pytestmark = pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")


def in_forms(names: str | tuple[str, ...], compiled: list[Any], python: list[Any]) -> pytest.MarkDecorator:
    """All cases compiled, and those few in Python, whose form is slow, that reach its every line."""
    many = isinstance(names, tuple)
    cases = [
        (form, *case) if many else (form, case)
        for form, chosen in (("compiled", compiled), ("python", python))
        for case in chosen
    ]
    return pytest.mark.parametrize(("split_form", *(names if many else (names,))), cases, indirect=["split_form"])


def as_floats(pieces: Array) -> Array:
    return (pieces.astype(np.uint32) << np.uint32(16)).view(np.float32)


# ---------------------------------------------------------------------------- packing


def test_the_unit_is_not_used_where_code_is_compiled_for_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is made up here, so that each condition counts wherever this runs."""
    look = cpu_amx.available.__wrapped__  # past what it remembers
    assert look() == cpu_amx.available() and isinstance(look(), bool)
    asked: list[tuple[int, ...]] = []
    features = {"amx-tile": True, "amx-bf16": True, "avx512f": True, "sse4a": False}

    def system_that_answers(code: int) -> SimpleNamespace:
        return SimpleNamespace(syscall=lambda *arguments: [asked.append(arguments), code][1])

    for name in ("CPU_NAME", "CPU_FEATURES"):
        monkeypatch.setattr(numba.config, name, None)
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: system_that_answers(0))
    assert look() is True and asked == [(158, 0x1023, 18)]  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    for feature in ("amx-tile", "amx-bf16", "avx512f"):
        with monkeypatch.context() as lacking:
            lacking.setitem(features, feature, False)
            assert look() is False
    for name in ("CPU_NAME", "CPU_FEATURES"):
        with monkeypatch.context() as patched:
            patched.setattr(numba.config, name, "generic")
            assert look() is False
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(platform, "system", lambda: "Darwin")
        assert look() is False
    monkeypatch.setattr(ctypes, "CDLL", lambda name: system_that_answers(-1))
    assert look() is False


def test_pack_split_order(form: str, rng: np.random.Generator) -> None:
    for k, n in itertools.product((32, 64), (1, 31, 32, 33, 65) if form == "compiled" else (33,)):
        b = normal(rng, k, n)
        pieces = np.empty((2, k * n), np.uint16)
        whole = np.pad(b.reshape(-1), (0, -b.size % DEPTH))
        padded = np.empty((2, len(whole)), np.uint16)
        cpu_amx.split(whole, padded[0], padded[1])
        pieces[:] = padded[:, : k * n]
        packed = pack_split(b)
        assert packed.dtype == np.uint16 and packed.ctypes.data % 64 == 0
        at = 0  # read front to back
        for panel, step, piece, tile in np.ndindex(-(-n // BLOCK), k // DEPTH, 2, 2):
            for r, c, odd in np.ndindex(SIDE, SIDE, 2):
                row, column = step * DEPTH + 2 * r + odd, panel * BLOCK + tile * SIDE + c
                assert packed[at] == (pieces[piece, row * n + column] if column < n else 0)
                at += 1
        assert at == len(packed)


# ------------------------------------------------------------------------ the product


def multiplied(a: Array, start: int, stride: int, m: int, k: int, b: Array, bias: Array, shift: int = 0) -> Array:
    """``product_split`` into the middle of NaN, which must stay; ``room`` in the middle of sevens, ``shift`` aside."""
    n, before, gap = b.shape[1], 3, 2
    c = np.full(before + m * (n + gap) + 5, np.nan, np.float32)
    skip = cpu_amx.PANEL_STEP  # B from somewhere behind other panels
    panels = np.concatenate([np.full(skip, 0x7FC0, np.uint16), pack_split(b)])
    size, around = cpu_split.room_size((m - 1) * stride + k, stride), 40 + shift
    memory = np.full(size + 2 * around, 7, np.uint16)
    room = memory[around : around + size]
    room[:] = 0x7FC0  # NaN: what surplus rows are computed from
    cpu_split.product_split(a, start, stride, m, k, panels, skip, n, bias, c, before, n + gap, room)
    assert (memory[:around] == 7).all() and (memory[around + size :] == 7).all()
    rows = c[before : before + m * (n + gap)].reshape(m, n + gap)
    assert np.isnan(c[:before]).all() and np.isnan(c[before + m * (n + gap) :]).all() and np.isnan(rows[:, n:]).all()
    return rows[:, :n].copy()


@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("n", WIDTHS)
def test_product_at_every_tail(split_form: str, rng: np.random.Generator, n: int, k: int) -> None:
    """Rows side by side, with gaps, and overlapping (stride < k); A from anywhere, ``room`` at any address."""
    b, bias = normal(rng, k, n), normal(rng, n)
    heights = HEIGHTS if split_form == "compiled" else (1, 17, 49)
    for m, stride in itertools.product(heights, {DEPTH, k, k + DEPTH}):
        start = int(rng.integers(0, 70))
        size = (m - 1) * stride + k
        a = np.concatenate([np.full(start, np.nan), normal(rng, size), np.full(4, np.nan)]).astype(np.float32)
        got = multiplied(a, start, stride, m, k, b, bias, shift=m % 32)
        rows = np.array([a[start + i * stride :][:k] for i in range(m)], np.float64)
        # Each product's pieces leave out 2^-17 of either factor and a₂ b₂ (2^-16); of random signs the half is seen.
        # The sums are float32's.
        bound = 2.0**-16 * (np.abs(rows) @ np.abs(b.astype(np.float64)) + np.abs(bias)) + 1e-30
        assert (np.abs(got - (rows @ b + bias)) <= bound).all()


def test_all_that_the_pieces_hold_is_multiplied(split_form: str, rng: np.random.Generator) -> None:
    """a₁b₁ + a₁b₂ + a₂b₁ of the packed pieces, and nothing else: only float32's rounding of the sum is left."""
    m, k, n = 33, 64, 33
    a, b = normal(rng, m, k), normal(rng, k, n)
    a_pieces, b_pieces = np.empty((2, a.size), np.uint16), np.empty((2, b.size), np.uint16)
    cpu_amx.split(a.reshape(-1), *a_pieces)
    cpu_amx.split(b.reshape(-1), *b_pieces)
    (a1, a2), (b1, b2) = (as_floats(x).astype(np.float64) for x in (a_pieces, b_pieces))
    a1, a2, b1, b2 = a1.reshape(m, k), a2.reshape(m, k), b1.reshape(k, n), b2.reshape(k, n)
    got = multiplied(a.reshape(-1), 0, k, m, k, b, np.zeros(n, np.float32))
    assert error_between(got, a1 @ b1 + a1 @ b2 + a2 @ b1) <= 1e-6


@needs_unit
@pytest.mark.parametrize("n", [1, 32, 33])
def test_a_row_does_not_depend_on_how_many_are_computed_with_it(rng: np.random.Generator, n: int) -> None:
    m, k = 65, 64
    a, b, bias = normal(rng, m * k), normal(rng, k, n), normal(rng, n)
    whole = multiplied(a, 0, k, m, k, b, bias)
    for first, count in itertools.product(range(m), HEIGHTS):
        count = min(count, m - first)
        part = multiplied(a, first * k, k, count, k, b, bias)
        np.testing.assert_array_equal(part, whole[first : first + count])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, np.array(0x7FFF_FFFF, np.uint32).view(np.float32)])
def test_what_is_no_number_stays_in_its_row(split_form: str, rng: np.random.Generator, value: float) -> None:
    m, k, n = 49, 64, 33
    a, b, bias = normal(rng, m, k), normal(rng, k, n), normal(rng, n)
    clean = multiplied(a.reshape(-1), 0, k, m, k, b, bias)
    for row in (0, 15, 16, 31, 32, 48):
        broken = a.copy()
        broken[row, row % k] = value
        got = multiplied(broken.reshape(-1), 0, k, m, k, b, bias)
        assert not np.isfinite(got[row]).any()
        np.testing.assert_array_equal(np.delete(got, row, 0), np.delete(clean, row, 0))


def test_large_and_small_numbers(split_form: str, rng: np.random.Generator) -> None:
    """Numbers that a bfloat16 would round to infinity stay finite; what the unit takes for 0 is tiny."""
    k, n = 32, 5
    a, b, bias = np.zeros((3, k), np.float32), normal(rng, k, n), np.zeros(n, np.float32)
    a[0, 3], a[1, 3], a[2] = 3.4e38, -3.4e38, 1e-40
    b[3] = [0.5, 1, -1, 0.125, -0.25]
    got = multiplied(a.reshape(-1), 0, k, 3, k, b, bias)
    want = a.astype(np.float64) @ b
    np.testing.assert_allclose(got[:2], want[:2], rtol=2**-16)
    assert np.abs(got[2]).max() <= 1e-30


def test_multiply_goes_by_how_b_is_packed(split_form: str, rng: np.random.Generator) -> None:
    m, k, n = 17, 64, 33
    a, b, bias = normal(rng, m * k), normal(rng, k, n), normal(rng, n)
    call: Any = multiply
    if split_form == "compiled":

        @numba.njit
        def call(a, start, stride, m, k, b, b_start, n, bias, c, c_start, c_stride, room):  # type: ignore[no-untyped-def]
            multiply(a, start, stride, m, k, b, b_start, n, bias, c, c_start, c_stride, room)

    results = []
    for panels in (cpu_gemm.pack(b).reshape(-1), pack_split(b)):
        room = cpu_split.room_for(panels, m * k, k)
        assert room.dtype == np.uint16 and (len(room) == 0) == (panels.dtype == np.float32)
        want, got = np.zeros((2, m * n), np.float32)
        if panels.dtype == np.float32:
            cpu_gemm.product(a, 0, k, m, k, panels, 0, n, bias, want, 0, n)
        else:
            cpu_split.product_split(a, 0, k, m, k, panels, 0, n, bias, want, 0, n, room)
        call(a, 0, k, m, k, panels, 0, n, bias, got, 0, n, room)
        np.testing.assert_array_equal(got, want)
        results.append(got)
    assert 0 < error_between(results[1], results[0]) <= SPLIT_TOLERANCE


# --------------------------------------------------------------------- the operations


@in_forms("rows", [1, 2, 33, ROW_BLOCK - 1, ROW_BLOCK + 1, 2 * ROW_BLOCK + 5], python=[1, 33])
def test_dense_layers(split_form: str, rng: np.random.Generator, rows: int) -> None:
    depth, d, inner = 64, 32, INNER + 96
    x, residual = normal(rng, 1, rows, depth), normal(rng, 1, rows, d)
    norm = Norm(normal(rng, d), normal(rng, d))
    first, into, out_of = (Linear(normal(rng, k, n), normal(rng, n)) for k, n in ((depth, d), (d, inner), (inner, d)))
    wide = Linear(normal(rng, depth, 2 * d + 1), normal(rng, 2 * d + 1))
    results = []
    for pack in (cpu_gemm.pack, pack_split):

        def packed(linear: Linear, pack: Any = pack) -> Linear:
            return Linear(pack(linear.weight), linear.bias)

        run = by_form(split_form)
        results.append(
            (
                run("linear", x, *packed(first), "gelu"),
                run("linear", x, *packed(wide)),
                run("linear_add_norm", x, packed(first), residual, norm, 1e-5),
                run("feed_forward", residual, packed(into), packed(out_of), norm, "silu", 1e-5),
            )
        )
    for exact, got in zip(*results, strict=True):
        assert 0 < error_between(got, exact) <= SPLIT_TOLERANCE


@in_forms("sizes", [(48, 192), (32, 40)], python=[(48, 192)])
def test_feed_forward_with_one_product_on_the_unit(
    split_form: str, rng: np.random.Generator, sizes: tuple[int, int]
) -> None:
    """Hidden and inner sizes of which only one fits the unit: each product has the room that its own kind needs."""
    size, inner = sizes
    x, norm = normal(rng, 35, size), Norm(normal(rng, size), normal(rng, size))
    into, out_of = (
        Linear(normal(rng, size, inner), normal(rng, inner)),
        Linear(normal(rng, inner, size), normal(rng, size)),
    )

    def packed(linear: Linear, split: bool) -> Linear:
        fits = split and len(linear.weight) % DEPTH == 0
        return Linear((cpu_amx.pack_split if fits else cpu_gemm.pack)(linear.weight), linear.bias)

    exact, got = (
        by_form(split_form)("feed_forward", x, packed(into, split), packed(out_of, split), norm, "silu", 1e-5)
        for split in (False, True)
    )
    assert 0 < error_between(got, exact) <= SPLIT_TOLERANCE


def encoder_of(rng: np.random.Generator, channels: list[int], norm: str) -> tuple[tuple[Conv, ...], tuple[int, ...]]:
    conv_layers, inputs = [], 1
    for i, (outputs, kernel) in enumerate(zip(channels, (4, 3, 2), strict=True)):
        own = Norm(1 + 0.1 * normal(rng, outputs), normal(rng, outputs)) if norm == "layer" or i == 0 else None
        conv_layers.append(Conv(normal(rng, kernel, 1, inputs, outputs), normal(rng, outputs), own))
        inputs = outputs
    return tuple(conv_layers), (3, 2, 1)


@in_forms("frames", [1, 2, 63, 64, 65, 200], python=[2])
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_feature_encoder(split_form: str, rng: np.random.Generator, norm: str, frames: int) -> None:
    conv_layers, strides = encoder_of(rng, [32, 64, 40], norm)
    wave = 0.1 * normal(rng, 2, (frames * 2 + 2) * 3 + 4)
    results = []
    for split in (False, True):
        packed = cpu_conv.pack_encoder(conv_layers, strides, norm, split)
        assert packed.panels.dtype == (np.uint16 if split else np.float32) and packed.first_panels.dtype == np.float32
        results.append(by_form(split_form)("feature_encoder", wave, packed, strides, norm, 1e-5, "gelu"))
    assert results[0].shape[1] == frames
    assert 0 < error_between(results[1], results[0]) <= SPLIT_TOLERANCE


def test_an_encoder_that_does_not_fit_stays_in_float32(rng: np.random.Generator) -> None:
    conv_layers, strides = encoder_of(rng, [32, 48, 32], "group")
    asked, plain = (cpu_conv.pack_encoder(conv_layers, strides, "group", split) for split in (True, False))
    for got, want in zip(asked[:4], plain[:4], strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


BUCKETS = [(4, 8, 4), (-1, 3, 3), (-1, 69, 69), (256, 512, 256)]
FRAMES = [1, 2, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97]
TABLES = ["", "c2p", "p2c", "c2p p2c"]


def attended(
    split_form: str, rng: np.random.Generator, qkv: Array, heads: int, table: int, kinds: str, *masking: Any
) -> list[Array]:
    """Fused attention with float32 and with split panels."""
    size, index = qkv.shape[2] // 3 // heads, distances(qkv.shape[1], *BUCKETS[table])
    span = BUCKETS[table][2]
    keys = normal(rng, heads, 2 * span, size) if "c2p" in kinds else None
    queries = normal(rng, heads, 2 * span, size) if "p2c" in kinds else None
    scale, results = np.sqrt(3 * size), []
    for fast in (False, True):
        positions = pack_positions(keys, queries, scale, fast)
        call = (qkv, heads, positions, index if kinds else None, scale, *masking)
        results.append(by_form(split_form)("disentangled_attention", *call))
    return results


@pytest.mark.parametrize("kinds", TABLES)
@in_forms(("frames", "size"), list(itertools.product(FRAMES, (32, 64))), python=[(2, 64), (33, 32)])
def test_attention(split_form: str, rng: np.random.Generator, frames: int, size: int, kinds: str) -> None:
    for table in range(len(BUCKETS)) if split_form == "compiled" and kinds else (FRAMES.index(frames) % 4,):
        qkv = normal(rng, 2, frames, 3 * 2 * size) if split_form == "compiled" else normal(rng, 1, frames, 3 * size)
        exact, got = attended(split_form, rng, qkv, qkv.shape[0], table, kinds)
        assert 0 < error_between(got, exact) <= SPLIT_TOLERANCE


@needs_unit
@pytest.mark.parametrize("mask_queries", [False, True])
@pytest.mark.parametrize("frames", [33, 65, 97])
def test_attention_sees_nothing_beyond_the_valid_length(frames: int, mask_queries: bool) -> None:
    valid = np.unique(np.clip([0, 1, 31, 32, 33, 48, 49, 64, 65, frames - 1, frames, frames + 9], 0, frames + 9))
    for table, size in itertools.product(range(len(BUCKETS)), (32, 64)):
        rng = np.random.default_rng(table)
        qkv = normal(rng, len(valid), frames, 3 * size)
        state = rng.bit_generator.state
        exact, got = attended("compiled", rng, qkv, 1, table, "c2p p2c", valid, mask_queries)
        assert 0 < error_between(got, exact) <= SPLIT_TOLERANCE
        for b, length in enumerate(valid):
            if length == 0 or mask_queries:
                assert (got[b, length:] == 0).all()
            qkv[b, length:, size:] = np.nan
            if mask_queries:
                qkv[b, length:] = np.nan
        rng.bit_generator.state = state  # the same tables
        _, again = attended("compiled", rng, qkv, 1, table, "c2p p2c", valid, mask_queries)
        np.testing.assert_array_equal(again, got)


# ----------------------------------------------------------------- what goes which way


def linears(weights: Any) -> list[Linear]:
    """Every dense layer of prepared weights."""
    if isinstance(weights, Linear):
        return [weights]
    return [found for part in weights for found in linears(part)] if isinstance(weights, tuple) else []


FITTING: dict[str, Any] = {
    **reference.TINY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_conv_pos_embedding_groups": 4,
    "conv_dim": [32, 32, 64],
}


def prepared(options: dict[str, Any], precision: str) -> tuple[Kernels, Any]:
    kernels, config = Kernels(1, precision), SEWDConfig.from_dict(options)
    return kernels, kernels.prepare(random_params(config, "ctc", seed=1), config)


def test_precision_chooses_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing works on any machine, so here the unit is said to be there."""
    for there, precision in itertools.product((True, False), ("high", "highest")):
        monkeypatch.setattr(cpu_kernels, "available", lambda there=there: there)
        kernels, weights = prepared(FITTING, precision)
        kind = np.uint16 if there and precision == "high" else np.float32
        assert kernels.split == (kind == np.uint16)
        assert len(linears(weights)) >= 2 * 4 + 1
        assert {linear.weight.dtype for linear in linears(weights)} == {np.dtype(kind)}
        assert weights.feature_encoder.panels.dtype == kind
        assert {layer.attention.positions.keys.dtype for layer in weights.layers} == {np.dtype(kind)}
        assert Kernels(1).split == there  # "high" is the default


def test_a_depth_that_does_not_fit_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: its weights are packed as if float32 had been asked for."""
    monkeypatch.setattr(cpu_kernels, "available", lambda: True)
    _, asked = prepared(reference.TINY, "high")
    _, plain = prepared(reference.TINY, "highest")
    assert asked.feature_encoder.panels.dtype == np.float32
    for got, want in zip(linears(asked), linears(plain), strict=True):
        assert got.weight.dtype == np.float32
        np.testing.assert_array_equal(got.weight, want.weight)
    for got, want in zip(asked.layers, plain.layers, strict=True):
        np.testing.assert_array_equal(got.attention.positions.keys, want.attention.positions.keys)
    # Each on its own: heads of 12 numbers beside a depth of 96 that fits.
    options = {**FITTING, "hidden_size": 48, "num_attention_heads": 4, "conv_dim": [32, 32, 48]}
    _, mixed = prepared(options, "high")
    for layer in mixed.layers:
        assert layer.attention.positions.keys.dtype == layer.intermediate.weight.dtype == np.float32
        assert layer.output.weight.dtype == mixed.feature_encoder.panels.dtype == np.uint16


@needs_unit
def test_rows_are_the_same_whoever_computes_them(rng: np.random.Generator) -> None:
    """Threads take whole tiles of rows of other heights: one row each way, to the last bit."""
    x, weights = normal(rng, 1, 101, 64), Linear(pack_split(normal(rng, 64, 70)), normal(rng, 70))
    whole = same_by_threads("linear", x, *weights)
    for row in (0, 1, 50, 100):
        np.testing.assert_array_equal(same_by_threads("linear", x[:, row : row + 1], *weights), whole[:, row : row + 1])
