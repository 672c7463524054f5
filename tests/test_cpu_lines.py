"""Lines of 16 numbers: the instructions written out against the NumPy bodies, bit by bit, and what the pieces keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from sewd_np.cpu_lines import (
    LINE,
    add_line,
    copy_line,
    exp_line,
    exp_pieces,
    max_line,
    mix_line,
    pair_line,
    split_line,
    split_lines,
)
from tests import cpu_forms
from tests.cpu_forms import normal

Array = np.ndarray
rng = cpu_forms.rng
OFFSETS = range(LINE + 1)

LARGEST, TINY = np.finfo(np.float32).max, np.finfo(np.float32).tiny
SPECIAL = np.array(
    [0, -0.0, np.inf, -np.inf, np.nan, -np.nan, LARGEST, -LARGEST, TINY, -TINY, TINY / 3, -TINY / 3, 1e-45, 1, -1, 2e9],
    np.float32,
)  # fmt: skip


def both(function: Callable[..., None]) -> tuple[Any, Any]:
    """A call of a line function as kernels make it, compiled and in Python."""
    compiled = numba.njit(error_model="numpy")(function)
    return compiled, compiled.py_func


COPY = both(lambda target, t, source, s: copy_line(target, t, source, s))
ADD = both(lambda target, t, source, s: add_line(target, t, source, s))
MAX = both(lambda target, t, source, s: max_line(target, t, source, s))
MIX = both(lambda target, t, source, s, bit: mix_line(target, t, source, s, bit))
PAIR = both(lambda target, t, even, e, odd, o: pair_line(target, t, even, e, odd, o))
EXP = both(lambda x, i, largest, a, sums, t: exp_line(x, i, largest, a, sums, t))
EXP_PIECES = both(lambda pieces, u, w, x, i, largest, a, sums, t: exp_pieces(pieces, u, w, x, i, largest, a, sums, t))
SPLIT_TWO = both(lambda pieces, u, w, x, i: split_lines(pieces, u, w, x, i))
SPLIT = both(lambda upper, u, lower, w, x, i: split_line(upper, u, lower, w, x, i))


def bits(x: Array) -> Array:
    return x.view(np.uint32)


def some(rng: np.random.Generator, special: bool) -> Array:
    """Three lines of numbers, the special ones among them in another order each time."""
    x = normal(rng, 3 * LINE)
    if special:
        x[rng.permutation(len(x))[: len(SPECIAL)]] = SPECIAL
    return x


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")  # ∞ − ∞, and the largest number twice
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", ["copy", "add", "max", "mix"])
def test_a_line_at_every_offset(rng: np.random.Generator, name: str, special: bool) -> None:
    functions = {"copy": COPY, "add": ADD, "max": MAX, "mix": MIX}[name]
    for t in OFFSETS:
        for s in OFFSETS:
            target, source, rest = some(rng, special), some(rng, special), (1 << t % 4,) if name == "mix" else ()
            old, new = target[t : t + LINE].copy(), source[s : s + LINE]
            want = target.copy()
            for place, (o, n) in enumerate(zip(old, new, strict=True)):
                chosen = {"copy": n, "add": o + n, "max": n if n > o else o, "mix": n if place & (1 << t % 4) else o}
                want[t + place] = chosen[name]
            for function in functions:
                got = target.copy()
                function(got, t, source, s, *rest)
                if name == "add":  # a sum is some NaN
                    np.testing.assert_array_equal(got, want)
                else:
                    np.testing.assert_array_equal(bits(got), bits(want))


def test_a_line_of_pairs_at_every_offset(rng: np.random.Generator) -> None:
    even, odd = (rng.integers(0, 1 << 16, 3 * LINE).astype(np.uint16) for _ in range(2))
    for t in OFFSETS:
        e, o = (5 * t) % (LINE + 1), (3 * t + 1) % (LINE + 1)
        for function in PAIR:
            got = np.full(3 * LINE, 77, np.uint32)
            function(got, t, even, e, odd, o)
            assert (got[:t] == 77).all() and (got[t + LINE :] == 77).all()
            assert list(got[t : t + LINE]) == [
                int(even[e + c]) + 65536 * int(odd[o + c]) for c in range(LINE)
            ]  # so in memory the even one comes first


# ------------------------------------------------------------------------ the two pieces


def pieces_of(x: Array) -> tuple[Array, Array]:
    """``split_line`` over whole lines: its two pieces as float32. Asserts that both forms agree to the last bit."""
    results = []
    for function in SPLIT:
        pieces = np.zeros((2, len(x)), np.uint16)
        for i in range(0, len(x), LINE):
            function(pieces[0], i, pieces[1], i, x, i)
        results.append((pieces.astype(np.uint32) << np.uint32(16)).view(np.float32))
    compiled, python = results
    number = ~np.isnan(python)
    np.testing.assert_array_equal(np.isnan(compiled), ~number)
    np.testing.assert_array_equal(bits(compiled)[number], bits(python)[number])
    return compiled[0], compiled[1]


def from_bits(numbers: Any) -> Array:
    """float32 with these bits, filled up to whole lines with the last."""
    words = np.asarray(numbers, np.uint64).astype(np.uint32).reshape(-1)
    return np.pad(words, (0, -len(words) % LINE), mode="edge").view(np.float32)


def test_split_line_at_every_offset(rng: np.random.Generator) -> None:
    x = some(rng, True)
    for i in OFFSETS:
        u, w = (5 * i) % (LINE + 1), (3 * i + 1) % (LINE + 1)
        whole = pieces_of(x[i : i + LINE].copy())
        for function in SPLIT:
            pieces = np.full((2, 3 * LINE), 77, np.uint16)
            function(pieces[0], u, pieces[1], w, x, i)
            for piece, at, want in zip(pieces, (u, w), whole, strict=True):
                np.testing.assert_array_equal(
                    (piece[at : at + LINE].astype(np.uint32) << np.uint32(16)).view(np.float32), want
                )
                assert (piece[:at] == 77).all() and (piece[at + LINE :] == 77).all()


def test_pieces_keep_seventeen_bits(rng: np.random.Generator) -> None:
    """Of all finite numbers: random bits, the last bits about every tie and overflow, and the ends of the range."""
    ends = np.r_[0:64, 0x7FFF:0x8002, 0x7F_FFC0:0x80_0040, 0x7F7E_7FC0:0x7F7F_0040, 0x7F7F_7FC0:0x7F80_0000]
    kept = rng.integers(0, 0x7F7F, 2000) << 16
    ties = (kept[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x80, 0x7F80, 0x8080])).reshape(-1)
    words = np.concatenate([ends, ties, rng.integers(0, 0x7F80_0000, 16_000)])
    x = from_bits(np.concatenate([words, words | 0x8000_0000]))
    assert np.isfinite(x).all()
    upper, lower = pieces_of(x)
    exact = x.astype(np.float64)
    left = np.abs(exact - (upper.astype(np.float64) + lower))
    # Where the rest is below the smallest normal number it has fewer bits: half of bfloat16's smallest, 2^-133.
    # Where rounding would overflow, the upper piece is cut instead: the rest is up to twice as large.
    rounded = np.abs(exact) < from_bits(0x7F7F_8000)[0]
    bound = np.where(rounded, 2.0**-17 * np.abs(exact), 2.0**-17 * 2.0**128)
    assert (left <= np.maximum(bound, 2.0**-134)).all()
    small = np.abs(exact) < 2.0**-117  # of these the rest is below the smallest normal number
    assert (np.abs(lower) <= np.where(rounded, 2.0**-8, 2.0**-7) * np.abs(exact))[~small].all()
    exactly = from_bits(kept)  # what a bfloat16 can hold
    for piece, want in zip(pieces_of(exactly), (exactly, np.zeros_like(exactly)), strict=True):
        np.testing.assert_array_equal(piece, want)


def test_pieces_of_what_is_no_number() -> None:
    infinite = np.array([np.inf, -np.inf] * (LINE // 2), np.float32)
    upper, lower = pieces_of(infinite)
    np.testing.assert_array_equal(upper, infinite)
    np.testing.assert_array_equal(lower, np.zeros(LINE))
    # Any NaN: quiet, signalling with one bit at either end, all bits set, those whose rounding runs into the sign.
    payloads = np.r_[1, 0x7FFF, 0x8000, 0xFFFF, 0x1_0000, 0x40_0000, 0x7F_7FFF, 0x7F_8000, 0x7F_FFFF, 1:0x80_0000:997]
    words = 0x7F80_0000 + payloads
    upper, lower = pieces_of(from_bits(np.concatenate([words, words | 0x8000_0000])))
    assert (np.isnan(upper) | np.isnan(lower)).all()


def test_two_lines_in_pieces_are_each_line_in_pieces(rng: np.random.Generator) -> None:
    for special in (False, True):
        for u, w, i in ((0, 2 * LINE, 0), (3, 50, 7), (64, 1, LINE)):
            x = some(rng, special)
            want, got, written = np.full((3, 7 * LINE), 77, np.uint16)
            for line in (0, LINE):
                SPLIT[0](want, u + line, want, w + line, x, i + line)
            SPLIT_TWO[0](got, u, w, x, i)
            np.testing.assert_array_equal(got, want)
            with np.errstate(invalid="ignore"):
                SPLIT_TWO[1](written, u, w, x, i)
            finite = np.isfinite(np.concatenate([x[i : i + 2 * LINE]]))
            for at in (u, w):
                np.testing.assert_array_equal(written[at:][: 2 * LINE][finite], want[at:][: 2 * LINE][finite])


# ---------------------------------------------------------------------- exponentials


def scores_up_to(rng: np.random.Generator, largest: float) -> Array:
    """Four lines of scores, of every size below ``largest``, ends and −∞ among them."""
    ends = [0, 0, 87.3, 87.4, 1e30, np.inf]
    below = np.concatenate([rng.uniform(0, 20, 3 * LINE), rng.uniform(80, 90, LINE - len(ends)), ends])
    return (largest - rng.permutation(below)).astype(np.float32)


def exact_exp(scores: Array, largest: float) -> Array:
    """e^(score − largest) of the float32 difference, 0 where the float32 would not be normal."""
    power = (scores - np.float32(largest)).astype(np.float64)
    return np.where(power < -87.33, 0, np.exp(power))


def test_a_line_of_exponentials(rng: np.random.Generator) -> None:
    for largest in (0.0, 3.7, -1e3):
        for i, t in ((0, 0), (5, 3), (LINE, LINE)):
            scores, before = scores_up_to(rng, largest), normal(rng, 3 * LINE)
            want = exact_exp(scores[i : i + LINE], largest)
            for function in EXP:
                x, sums = scores.copy(), before.copy()
                function(x, i, np.array([9, largest], np.float32), 1, sums, t)
                np.testing.assert_allclose(x[i : i + LINE], want, rtol=5e-7, atol=0)
                np.testing.assert_array_equal(sums[t : t + LINE], before[t : t + LINE] + x[i : i + LINE])
                x[i : i + LINE], sums[t : t + LINE] = scores[i : i + LINE], before[t : t + LINE]
                np.testing.assert_array_equal(x, scores)
                np.testing.assert_array_equal(sums, before)


def test_two_lines_of_exponentials_in_pieces(rng: np.random.Generator) -> None:
    """Both pieces together are the exponential to 17 bits, and nothing else is written but the sums."""
    for largest in (0.0, 3.7, -1e3):
        for i, u, w, t in ((0, 0, 2 * LINE, 0), (5, 3, 70, 3), (2 * LINE, 64, 0, LINE)):
            scores, before = scores_up_to(rng, largest), normal(rng, 3 * LINE)
            want = exact_exp(scores[i : i + 2 * LINE], largest)
            for function in EXP_PIECES:
                x, sums, pieces = scores.copy(), before.copy(), np.full(7 * LINE, 77, np.uint16)
                function(pieces, u, w, x, i, np.array([largest], np.float32), 0, sums, t)
                np.testing.assert_array_equal(x, scores)
                upper, lower = (
                    (pieces[at : at + 2 * LINE].astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
                    for at in (u, w)
                )
                np.testing.assert_allclose(upper + lower, want, rtol=1e-5, atol=1e-38)
                added = sums[t : t + LINE].astype(np.float64) - before[t : t + LINE]
                np.testing.assert_allclose(added, want[:LINE] + want[LINE:], rtol=1e-5, atol=1e-6)
                pieces[u : u + 2 * LINE] = pieces[w : w + 2 * LINE] = 77
                assert (pieces == 77).all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("scores", [[np.nan], [np.inf], [np.array(0xFFFFFFFF, np.uint32).view(np.float32)]])
def test_exponentials_of_what_is_no_number(scores: list[float]) -> None:
    """NaN, and ∞ beside a largest of ∞: the sum says so."""
    x = np.zeros(2 * LINE, np.float32)
    x[3] = scores[0]
    largest = np.array([np.inf if scores[0] == np.inf else 0], np.float32)
    for function in EXP:
        sums = np.zeros(LINE, np.float32)
        function(x.copy(), 0, largest, 0, sums, 0)
        assert np.isnan(sums[3]) and not np.isnan(np.delete(sums, 3)).any()
    for function in EXP_PIECES:
        sums = np.zeros(LINE, np.float32)
        function(np.zeros(4 * LINE, np.uint16), 0, 2 * LINE, x, 0, largest, 0, sums, 0)
        assert np.isnan(sums[3]) and not np.isnan(np.delete(sums, 3)).any()
