"""The kernels of ``cuda_gemm``, ``cuda_conv`` and ``cuda_norm``, compiled and assembled in the sizes that run on a GPU.

``check`` asserts no spills, no stack frame and the register budget that is written beside each kernel. A budget is what
lets the blocks that a kernel counts on share a multiprocessor: 65,536 registers for all threads at work on it.
"""

from __future__ import annotations

from typing import Any

import pytest

from sewd_np import cuda_conv, cuda_gemm, cuda_norm
from sewd_np.cuda_gemm import NARROW_TILES, WIDE_TILES, Tile
from tests.cuda.ptx import check

VECTOR, ARRAY, MATRIX, CONV = "float32[::1]", "float32[:,:,::1]", "float32[:,::1]", "float32[:,:,:,::1]"
WHOLE = ", ".join(["int64"] * 12)  # has_bias and the numbers of a Product
LINEAR = f"void({ARRAY}, {MATRIX}, {VECTOR}, {ARRAY}, {WHOLE})"
CONVOLUTION = f"void({ARRAY}, {CONV}, {CONV}, {ARRAY}, {WHOLE})"


def narrow(number: int, width: int, depth: int) -> Tile:
    return NARROW_TILES[number][0]._replace(outputs=width, depth=depth)


@pytest.mark.parametrize(
    "tile",
    [*(tile for tile, _ in WIDE_TILES), narrow(0, 32, 16)],
    ids=lambda tile: "x".join(map(str, tile[:2])),
)
def test_products(tile: Tile) -> None:
    run = cuda_gemm.tiled_product(tile, "gelu", True, False, False)
    usages = check(run, LINEAR, registers=128)
    for usage in usages.values():
        # Bias, x and weight come four at a time, and results leave so.
        assert "ld.shared.v4.f32" in usage.ptx and "ld.global.v4.f32" in usage.ptx and "st.global.v4.f32" in usage.ptx
        assert usage.registers * tile.threads * max(tile.resident, 1) <= 65536


@pytest.mark.parametrize("tile", [narrow(0, 24, 8), narrow(1, 48, 16)], ids=str)
def test_squeeze(tile: Tile) -> None:
    check(cuda_gemm.tiled_product(tile, "gelu", True, True, True), CONVOLUTION, registers=128)


def test_products_of_any_shape() -> None:
    """One number at a time, with padding and pool: sizes that are no multiples of 4."""
    check(cuda_gemm.tiled_product(WIDE_TILES[-1][0], "gelu", False, True, True), CONVOLUTION, registers=128)
    check(cuda_gemm.simple_product("gelu"), LINEAR, registers=80)


@pytest.mark.parametrize("step", ["moments", "apply", "convolve"])
def test_first_layer(step: str) -> None:
    run = cuda_conv.first_layer(cuda_conv.FIRST_TILE, 10, 5, "gelu", step, step == "moments")
    scales, lengths, out = {
        "moments": (MATRIX, "int32[::1]", VECTOR),
        "apply": (VECTOR, MATRIX, ARRAY),
        "convolve": (VECTOR, MATRIX, ARRAY),
    }[step]
    check(run, f"void({MATRIX}, {CONV}, {', '.join(['int64'] * 5)}, {scales}, {lengths}, {out})", registers=80)


def group_norm_kernels() -> list[Any]:
    wide, strips, frames = cuda_norm.CHANNELS, cuda_norm.STRIPS, cuda_norm.OWN_FRAMES
    lengths = "int32[::1]"
    return [
        (cuda_norm.chunk_moments(wide, strips, frames, True), (ARRAY, *["int64"] * 3, lengths, VECTOR), 64),
        (
            cuda_norm.scale_and_shift(wide, cuda_norm.MERGERS, 256, True),
            (VECTOR, *["int64"] * 3, VECTOR, VECTOR, "float32", lengths, VECTOR),
            64,
        ),
        (cuda_norm.apply_scales("gelu", 256), (ARRAY, "int64", "int64", VECTOR, ARRAY), 40),
        (
            cuda_norm.simple_group_norm("gelu", True, 128),
            (ARRAY, *["int64"] * 3, VECTOR, VECTOR, "float32", lengths, ARRAY),
            64,
        ),
    ]


@pytest.mark.parametrize("number", range(4), ids=["moments", "scales", "apply", "v1"])
def test_group_norm(number: int) -> None:
    run, types, registers = group_norm_kernels()[number]
    check(run, f"void({', '.join(types)})", registers)
