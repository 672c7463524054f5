"""Sixteen numbers at a time: the few steps that a loop says but the compiler will not make vector instructions of.

LLVM turns a loop over a row into vector instructions once it knows that what is written is not read, and keeps the
plain loop for the numbers left over, which for a row of 64 may be all. Where rows are short, or lie in one array,
kernels use these instead. Each function here does to a *line* of 16 numbers what its NumPy body says; compiled it is a
load or two, the operation, and a store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from sewd_np.cpu_math import E2, E3, E4, E5, E6, LN2_HIGH, LN2_LOW, LOG2_E, SMALLEST_EXP

Array = np.ndarray
LINE = 16
HALF, CUT = 0x8000, 0xFFFF0000  # half of the last bit that a bfloat16 keeps of a float32, and the bits it keeps
SIZE, INFINITE = 0x7FFFFFFF, 0x7F800000  # all bits but the sign, and those of infinity


def copy_line(target, t, source, s):
    """target[t : t + LINE] = source[s : s + LINE]."""
    target[t : t + LINE] = source[s : s + LINE]


def add_line(target, t, source, s):
    """target[t : t + LINE] += source[s : s + LINE]."""
    target[t : t + LINE] += source[s : s + LINE]


def max_line(target, t, source, s):
    """target[t : t + LINE] = the larger of itself and source[s : s + LINE]; a NaN in source does not count."""
    old, new = target[t : t + LINE], source[s : s + LINE]
    target[t : t + LINE] = np.where(new > old, new, old)


def exp_line(x, i, largest, a, sums, t):
    """x[i : i + LINE] = e to what they exceed ``largest[a]`` by (never more than 0), added to sums[t : t + LINE].

    Off by less than 5e-7 of its value; 0 below −87.33, NaN for NaN.
    """
    power = x[i : i + LINE] - largest[a]
    with np.errstate(under="ignore"):
        x[i : i + LINE] = np.where(power < SMALLEST_EXP, np.float32(0), np.exp(power))
    sums[t : t + LINE] += x[i : i + LINE]


def exp_pieces(pieces, u, w, x, i, largest, a, sums, t):
    """``exp_line`` of two lines of x, left as they are, and ``split_line`` of what comes out, from u and from w.

    Of a NaN only the sum is certain to keep that it is one.
    """
    for line in (0, LINE):
        numbers = x[i + line : i + line + LINE].copy()
        exp_line(numbers, 0, largest, a, sums, t)
        split_line(pieces, u + line, pieces, w + line, numbers, 0)


def mix_line(target, t, source, s, bit):
    """Of target[t : t + LINE], the numbers whose place has ``bit`` set become those of source[s : s + LINE]."""
    places = np.flatnonzero(np.arange(LINE) & bit)
    target[t + places] = source[s + places]


def pair_line(target, t, even, e, odd, o):
    """target[t + c] = (even[e + c], odd[o + c]) for a line: two uint16 in one uint32."""
    target[t : t + LINE] = even[e : e + LINE] | odd[o : o + LINE].astype(np.uint32) << np.uint32(16)


def split_line(upper, u, lower, w, x, i):
    """x[i : i + LINE] as two bfloat16 pieces in uint16: each number rounded, and what the rounding left, rounded.

    Rounding adds half of the last bit kept and cuts; numbers so large that this gave infinity are only cut, and so is
    NaN, whose bits might run over. Infinity leaves nothing. Of NaN one piece or both are NaN.
    """
    numbers = x[i : i + LINE]
    bits = numbers.view(np.uint32)
    size = bits & np.uint32(SIZE)
    half = np.where(size < INFINITE - HALF, np.uint32(HALF), np.uint32(0))
    kept = (bits + half) & np.uint32(CUT)
    with np.errstate(invalid="ignore"):
        rest = np.where(size == INFINITE, np.float32(0), numbers - kept.view(np.float32))
    upper[u : u + LINE] = kept >> np.uint32(16)
    lower[w : w + LINE] = (rest.view(np.uint32) + np.uint32(HALF)) >> np.uint32(16)


def split_lines(pieces, u, w, x, i):
    """``split_line`` of two lines of x, from u and from w."""
    for line in (0, LINE):
        split_line(pieces, u + line, pieces, w + line, x, i + line)


# -------------------------------------------------------------------- the same in LLVM's language

_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), LINE), ir.VectorType(ir.IntType(32), LINE)
_HALVES = ir.VectorType(ir.IntType(16), LINE)


def _words(numbers: list[int]) -> Any:
    return ir.Constant(_WORDS, numbers)


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=2 if kind is _HALVES else 4)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=2 if value.type == _HALVES else 4)


def _intrinsic(write: Callable[..., None]) -> Any:
    """An operation on three addresses (the third may be another whole number) whose instructions ``write`` gives."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        write(builder, *arguments)
        return context.get_dummy_value()

    @intrinsic
    def operation(typing_context, first, second, third):
        return types.void(types.int64, types.int64, types.int64), emit

    return operation


@intrinsic
def _exponential_pieces(typing_context, upper, lower, x, largest, sums):
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _exp_pieces(builder, *arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit


def _copy(builder: Any, target: Any, source: Any, _: Any) -> None:
    _store(builder, _load(builder, source, _FLOATS), target)


def _add(builder: Any, target: Any, source: Any, _: Any) -> None:
    _store(builder, builder.fadd(_load(builder, target, _FLOATS), _load(builder, source, _FLOATS)), target)


def _max(builder: Any, target: Any, source: Any, _: Any) -> None:
    old, new = _load(builder, target, _FLOATS), _load(builder, source, _FLOATS)
    _store(builder, builder.select(builder.fcmp_ordered(">", new, old), new, old), target)


def _exp_of(builder: Any, x: Any, largest: Any) -> Any:
    """e to what the line at x exceeds the number at ``largest`` by: as ``cpu_math.exp``, but for numbers up to 0.

    n is rounded by adding 1.5 · 2²³, behind which a float32 has no digits; it then lies in the lowest bits.
    """

    def everywhere(value: Any) -> Any:
        return ir.Constant(_FLOATS, [float(value)] * LINE)

    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{LINE}f32"
    )

    def multiply_add(*operands: Any) -> Any:
        return builder.call(fma, operands)

    number = builder.load(builder.inttoptr(largest, ir.FloatType().as_pointer()))
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    power = builder.fsub(_load(builder, x, _FLOATS), builder.shuffle_vector(first, undefined, _words([0] * LINE)))
    shifted = multiply_add(power, everywhere(LOG2_E), everywhere(1.5 * 2**23))
    n = builder.fsub(shifted, everywhere(1.5 * 2**23))
    rest = multiply_add(n, everywhere(-LN2_HIGH), power)
    rest = multiply_add(n, everywhere(-LN2_LOW), rest)
    series = everywhere(E6)
    for coefficient in (E5, E4, E3, E2, 1, 1):
        series = multiply_add(series, rest, everywhere(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, _WORDS), _words([23] * LINE))  # n, and nothing of what was added
    result = builder.bitcast(builder.add(builder.bitcast(series, _WORDS), exponent), _FLOATS)
    result = builder.select(builder.fcmp_ordered("<", power, everywhere(SMALLEST_EXP)), everywhere(0), result)
    return builder.select(builder.fcmp_unordered("uno", power, power), power, result)


def _exp(builder: Any, x: Any, largest: Any, sums: Any) -> None:
    result = _exp_of(builder, x, largest)
    _store(builder, result, x)
    _store(builder, builder.fadd(_load(builder, sums, _FLOATS), result), sums)


def _exp_pieces(builder: Any, upper: Any, lower: Any, x: Any, largest: Any, sums: Any) -> None:
    half, cut = _words([HALF] * LINE), _words([CUT] * LINE)
    results = [_exp_of(builder, address, largest) for address in _two_lines(builder, x)]
    rounded, rests = [], []
    for result in results:
        bits = builder.add(builder.bitcast(result, _WORDS), half)
        rest = builder.fsub(result, builder.bitcast(builder.and_(bits, cut), _FLOATS))
        rounded.append(bits)
        rests.append(builder.add(builder.bitcast(rest, _WORDS), half))
    for words, address in ((rounded, upper), (rests, lower)):
        _store_upper_halves(builder, words, address)
    total = builder.fadd(_load(builder, sums, _FLOATS), results[0])
    _store(builder, builder.fadd(total, results[1]), sums)


def _mix(builder: Any, target: Any, source: Any, bit: Any) -> None:
    old, new = _load(builder, target, _FLOATS), _load(builder, source, _FLOATS)
    word, undefined = ir.IntType(32), ir.Constant(_WORDS, ir.Undefined)
    first = builder.insert_element(undefined, builder.trunc(bit, word), ir.Constant(word, 0))
    everywhere = builder.shuffle_vector(first, undefined, _words([0] * LINE))
    chosen = builder.and_(_words(list(range(LINE))), everywhere)
    _store(builder, builder.select(builder.icmp_signed("!=", chosen, _words([0] * LINE)), new, old), target)


def _pair(builder: Any, target: Any, even: Any, odd: Any) -> None:
    low, high = (builder.zext(_load(builder, address, _HALVES), _WORDS) for address in (even, odd))
    _store(builder, builder.or_(low, builder.shl(high, _words([16] * LINE))), target)


def _rounded_and_rest(builder: Any, numbers: Any) -> tuple[Any, Any]:
    """Words whose upper halves are a line's two pieces."""
    half, infinity = _words([HALF] * LINE), _words([INFINITE] * LINE)
    bits = builder.bitcast(numbers, _WORDS)
    size = builder.and_(bits, _words([SIZE] * LINE))
    roundable = builder.icmp_signed("<", size, _words([INFINITE - HALF] * LINE))
    kept = builder.and_(builder.select(roundable, builder.add(bits, half), bits), _words([CUT] * LINE))
    infinite = builder.icmp_signed("==", size, infinity)
    rest = builder.fsub(numbers, builder.bitcast(kept, _FLOATS))
    rest = builder.select(infinite, ir.Constant(_FLOATS, [0.0] * LINE), rest)
    return kept, builder.add(builder.bitcast(rest, _WORDS), half)


def _split(builder: Any, upper: Any, lower: Any, x: Any) -> None:
    shift = _words([16] * LINE)
    for piece, address in zip(_rounded_and_rest(builder, _load(builder, x, _FLOATS)), (upper, lower), strict=True):
        _store(builder, builder.trunc(builder.lshr(piece, shift), _HALVES), address)


def _store_upper_halves(builder: Any, words: Iterable[Any], address: Any) -> None:
    """Of two lines of words, in one instruction."""
    halves, places = ir.VectorType(ir.IntType(16), 2 * LINE), ir.VectorType(ir.IntType(32), 2 * LINE)
    odd = ir.Constant(places, list(range(1, 4 * LINE, 2)))
    piece = builder.shuffle_vector(*(builder.bitcast(word, halves) for word in words), odd)
    builder.store(piece, builder.inttoptr(address, halves.as_pointer()), align=2)


def _two_lines(builder: Any, x: Any) -> tuple[Any, Any]:
    return x, builder.add(x, ir.Constant(ir.IntType(64), 4 * LINE))


def _split_two(builder: Any, upper: Any, lower: Any, x: Any) -> None:
    lines = [_rounded_and_rest(builder, _load(builder, address, _FLOATS)) for address in _two_lines(builder, x)]
    for words, address in zip(zip(*lines, strict=True), (upper, lower), strict=True):
        _store_upper_halves(builder, words, address)


_copied, _added, _maximum, _exponential = _intrinsic(_copy), _intrinsic(_add), _intrinsic(_max), _intrinsic(_exp)
_mixed, _paired, _parted = _intrinsic(_mix), _intrinsic(_pair), _intrinsic(_split)
_parted_twice = _intrinsic(_split_two)


@overload(copy_line, inline="always")
def _copy_line(target, t, source, s):
    return lambda target, t, source, s: _copied(target.ctypes.data + 4 * t, source.ctypes.data + 4 * s, 0)


@overload(add_line, inline="always")
def _add_line(target, t, source, s):
    return lambda target, t, source, s: _added(target.ctypes.data + 4 * t, source.ctypes.data + 4 * s, 0)


@overload(max_line, inline="always")
def _max_line(target, t, source, s):
    return lambda target, t, source, s: _maximum(target.ctypes.data + 4 * t, source.ctypes.data + 4 * s, 0)


@overload(exp_line, inline="always")
def _exp_line(x, i, largest, a, sums, t):
    return lambda x, i, largest, a, sums, t: _exponential(
        x.ctypes.data + 4 * i, largest.ctypes.data + 4 * a, sums.ctypes.data + 4 * t
    )


@overload(exp_pieces, inline="always")
def _compiled_exp_pieces(pieces, u, w, x, i, largest, a, sums, t):
    return lambda pieces, u, w, x, i, largest, a, sums, t: _exponential_pieces(  # type: ignore[call-arg]
        pieces.ctypes.data + 2 * u,
        pieces.ctypes.data + 2 * w,
        x.ctypes.data + 4 * i,
        largest.ctypes.data + 4 * a,
        sums.ctypes.data + 4 * t,
    )


@overload(mix_line, inline="always")
def _mix_line(target, t, source, s, bit):
    return lambda target, t, source, s, bit: _mixed(target.ctypes.data + 4 * t, source.ctypes.data + 4 * s, bit)


@overload(pair_line, inline="always")
def _pair_line(target, t, even, e, odd, o):
    return lambda target, t, even, e, odd, o: _paired(
        target.ctypes.data + 4 * t, even.ctypes.data + 2 * e, odd.ctypes.data + 2 * o
    )


@overload(split_lines, inline="always")
def _split_lines(pieces, u, w, x, i):
    return lambda pieces, u, w, x, i: _parted_twice(
        pieces.ctypes.data + 2 * u, pieces.ctypes.data + 2 * w, x.ctypes.data + 4 * i
    )


@overload(split_line, inline="always")
def _split_line(upper, u, lower, w, x, i):
    return lambda upper, u, lower, w, x, i: _parted(
        upper.ctypes.data + 2 * u, lower.ctypes.data + 2 * w, x.ctypes.data + 4 * i
    )
