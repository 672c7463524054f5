"""The tools under the kernel tests: the scheduler finds what it should, stand-ins and unrolled loops do as they say.

A check that cannot fail proves nothing: here are a kernel with a race, one with a barrier that half the threads miss,
and one that reads past the end.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sewd_np.cuda_intrinsics import (
    copy4,
    cuda,
    erf,
    exp2,
    float32,
    fma,
    group_max,
    group_sum,
    kernel,
    load,
    load4,
    static_range,
    store,
    store4,
    zero4,
)
from sewd_np.cuda_unroll import unrolled
from tests.cuda.fastsim import SimulationError


def run(body: Any, threads: int, *arguments: Any) -> None:
    kernel(threads=threads)(body)[1, threads, 0](*arguments)


def turn_round(barrier: bool, x: Any, out: Any) -> None:
    """Each thread writes its number to shared memory and reads its mirror image's."""

    def with_barrier(x, out):
        shared = cuda.shared.array(8, float32)
        t = cuda.threadIdx.x
        shared[t] = x[t]
        if barrier:
            cuda.syncthreads()
        out[t] = shared[7 - t]

    run(with_barrier, 8, x, out)


def test_a_race_raises() -> None:
    x, out = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    turn_round(True, x, out)
    np.testing.assert_array_equal(out, x[::-1])
    with pytest.raises(SimulationError, match="race"):
        turn_round(False, x, out)


@pytest.mark.parametrize("threads, raises", [(32, False), (64, True)])
def test_a_warp_barrier_orders_one_warp_only(threads: int, raises: bool) -> None:
    def neighbour(out):
        shared = cuda.shared.array(threads, float32)
        t = cuda.threadIdx.x
        shared[t] = t
        cuda.syncwarp()
        out[t] = shared[(t + 1) % threads]

    out = np.zeros(threads, np.float32)
    if raises:
        with pytest.raises(SimulationError, match="race"):
            run(neighbour, threads, out)
    else:
        run(neighbour, threads, out)
        np.testing.assert_array_equal(out, np.roll(np.arange(threads), -1))


def test_a_barrier_that_some_threads_miss_raises() -> None:
    def half(out):
        if cuda.threadIdx.x < 4:
            cuda.syncthreads()
        out[cuda.threadIdx.x] = 1

    with pytest.raises(SimulationError, match="divergence"):
        run(half, 8, np.zeros(8, np.float32))


def test_shared_memory_begins_as_nan_and_has_an_end() -> None:
    def read(at, out):
        shared = cuda.shared.array((2, 4), float32)
        out[0] = shared[1, at]

    out = np.zeros(1, np.float32)
    run(read, 1, 3, out)
    assert np.isnan(out[0])
    for at in (4, -1):
        with pytest.raises(IndexError):
            run(read, 1, at, out)


def test_groups_of_lanes() -> None:
    def groups(x, out):
        t = cuda.threadIdx.x
        out[0, t] = group_sum(x[t], 4)
        out[1, t] = group_max(x[t], 8, 2)
        out[2, t] = group_sum(x[t], 1)

    x = np.random.default_rng(0).permutation(16).astype(np.float32)
    out = np.zeros((3, 16), np.float32)
    run(groups, 16, x, out)
    np.testing.assert_array_equal(out[0], np.repeat(x.reshape(4, 4).sum(1), 4))
    np.testing.assert_array_equal(out[1], np.tile(x.reshape(8, 2).max(0), 8))
    np.testing.assert_array_equal(out[2], x)


def test_four_numbers_at_a_time() -> None:
    def move(x, out):
        a, b, c, d = load4(x, 4)
        store4(out, 0, d, c, b, a)
        copy4(out, 4, x, 8)
        zero4(out, 8)
        store(out, 12, fma(load(x, 1), load(x, 2), exp2(load(x, 3))) + erf(load(x, 0)))

    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    out = np.full((13,), np.nan, np.float32)
    run(move, 1, x, out)
    np.testing.assert_array_equal(out, [7, 6, 5, 4, 8, 9, 10, 11, 0, 0, 0, 0, 10 + math.erf(0)])


@pytest.mark.parametrize("at", [-4, 2, 12])
def test_an_address_outside_or_between_raises(at: int) -> None:
    def read(x, at):
        load4(x, at)

    with pytest.raises(IndexError):
        run(read, 1, np.zeros((3, 4), np.float32), at)


def test_loops_are_written_out() -> None:
    """Nested loops, bounds from an outer one, branches on a constant: nothing of them is left in the code."""
    size, flag = 3, False

    def triangle(x):
        total = 0
        for i in static_range(size):
            for j in static_range(i, size):
                if i == j and not flag:
                    total += 10 * x[i]
                else:
                    total += x[j]
        return total

    plain = unrolled(triangle)
    assert plain([1, 2, 3]) == 10 * (1 + 2 + 3) + 2 + 3 + 3
    assert "static_range" not in plain.__code__.co_names
    assert plain.__code__.co_firstlineno == triangle.__code__.co_firstlineno
    assert plain.__code__.co_filename == triangle.__code__.co_filename


def test_what_cannot_be_written_out_is_refused() -> None:
    def leaves(x):
        for i in static_range(2):
            if x[i]:
                break

    def assigns(x):
        for i in static_range(2):
            i += x[0]

    for function in (leaves, assigns):
        with pytest.raises(SyntaxError, match="static_range"):
            unrolled(function)
