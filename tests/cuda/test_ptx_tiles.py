"""The instructions that ``cuda_tiles`` and ``cuda_intrinsics`` write, run on the CPU.

A simulated kernel runs the stand-ins, and a compiled one is not run: neither shows that the instructions compute what
the stand-ins do. They are plain LLVM instructions, though, and the same functions can write them into a CPU function.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit
from numba.core.extending import intrinsic
from numba.cuda.cudadrv.devicearray import DeviceNDArray

from sewd_np import cuda_intrinsics, cuda_tiles
from sewd_np.cuda_memory import shaped

Array = np.ndarray

TOLERANCE = 1e-5  # sums of at most a dozen products in another order


def on_cpu(cuda_intrinsic: Any) -> Any:
    """The same writer of instructions, for a CPU function."""
    return intrinsic(cuda_intrinsic._defn)


add_products, add_band_products = on_cpu(cuda_tiles.add_products), on_cpu(cuda_tiles.add_band_products)
add_weighted = on_cpu(cuda_tiles.add_weighted)
load, store, load4 = (on_cpu(getattr(cuda_intrinsics, name)) for name in ("load", "store", "load4"))
store4, copy4, zero4 = (on_cpu(getattr(cuda_intrinsics, name)) for name in ("store4", "copy4", "zero4"))
fma = on_cpu(cuda_intrinsics.fma)


def numbers(*shape: int) -> Array:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def rows_of(memory: Array, at: int, step: int, count: int) -> Array:
    return np.stack([memory[at + row * step : at + row * step + 4] for row in range(count)])


def test_products() -> None:
    @njit
    def run(tile, memory, a_at, b_at):
        add_products(tile, 3, 2, memory, a_at, 12, b_at, 8)

    memory, tile = numbers(80), numbers(3, 2)
    want = tile + rows_of(memory, 4, 12, 3) @ rows_of(memory, 40, 8, 2).T
    run(tile, memory, 4, 40)
    np.testing.assert_allclose(tile, want, atol=TOLERANCE)


def test_band_products() -> None:
    @njit
    def run(tile, memory, a_at, band_at):
        add_band_products(tile, 3, 2, memory, a_at, 8, band_at, 12, 1)

    @njit
    def run_keys(tile, memory, a_at, band_at):
        add_band_products(tile, 3, 2, memory, a_at, 8, band_at, 12, 0)

    memory = numbers(100)
    band = rows_of(memory, 40, 12, 4)
    for function, of_row in ((run, True), (run_keys, False)):
        tile = numbers(3, 2)
        want, own = tile.copy(), rows_of(memory, 4, 8, 3)
        for i in range(3):
            for j in range(2):
                want[i, j] += own[i if of_row else j] @ band[i - j + 1]
        function(tile, memory, 4, 40)
        np.testing.assert_allclose(tile, want, atol=TOLERANCE)


def test_weighted() -> None:
    @njit
    def run(tile, memory, a_at, v_at):
        add_weighted(tile, 3, 2, memory, a_at, 8, v_at, 20, 12)

    memory, tile = numbers(140), numbers(3, 8)
    values = np.stack([memory[40 + 20 * z :][[0, 1, 2, 3, 12, 13, 14, 15]] for z in range(4)])
    want = tile + rows_of(memory, 4, 8, 3) @ values
    run(tile, memory, 4, 40)
    np.testing.assert_allclose(tile, want, atol=TOLERANCE)


def test_four_numbers_at_a_time() -> None:
    """Flat addresses in an array of two dimensions, as in ``test_sim_tools``."""

    @njit
    def run(x, out):
        a, b, c, d = load4(x, 4)
        store4(out, 0, d, c, b, a)
        copy4(out, 4, x, 8)
        zero4(out, 8)
        store(out, 12, fma(load(x, 1), load(x, 2), load(x, 3)))

    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    out = np.full((4, 4), np.nan, np.float32)
    run(x, out)
    np.testing.assert_array_equal(out.reshape(-1)[:13], [7, 6, 5, 4, 8, 9, 10, 11, 0, 0, 0, 0, 5])


@pytest.mark.parametrize("shape", [(24,), (2, 12), (2, 3, 4), (1, 1, 3)])
def test_a_shape_of_memory_is_what_numba_makes_of_it(shape: tuple[int, ...]) -> None:
    """``shaped`` calls the class of numba's arrays itself: strides, flags and bytes must be those of a reshape."""
    memory = DeviceNDArray((40,), (4,), np.float32, gpu_data=object())
    view, want = shaped(memory, *shape), np.empty(shape, np.float32)
    assert view.gpu_data is memory.gpu_data and view.dtype == np.float32
    assert (view.shape, view.strides, view.alloc_size) == (want.shape, want.strides, want.nbytes)
    assert view.flags["C_CONTIGUOUS"] and view._numba_type_.layout == "C"
