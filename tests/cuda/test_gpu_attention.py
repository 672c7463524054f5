"""The attention kernel by itself on a GPU, against its definition in float64, with scores that decide something.

A model with random weights attends to all frames nearly alike, and hides a mistake in a few of them. Here every tile
and every way to cut the keys meets normal numbers, far tiles, tails and padding.
"""

from __future__ import annotations

import numpy as np
import pytest

from sewd_np import attention, cuda_attention
from sewd_np.cuda_launch import open_device, raw
from sewd_np.cuda_tiled_attention import Tile
from sewd_np.trace import error_between

pytestmark = pytest.mark.gpu

HEADS, SPAN, DISTANCE = 2, 256, 512  # of the published tables: far beyond 510 frames
TOLERANCE = 2e-5  # sums over up to 1,100 keys, e to the power of scores of up to about 10
TILES = [  # tile, its head size, and into how many parts it may cut the keys
    (cuda_attention.LARGE, 64, (1, 2, 3, 4, 8)),
    (cuda_attention.SMALLER[0], 96, (1, 2)),
    (cuda_attention.SMALLER[1], 128, (1, 2)),
]


@pytest.mark.parametrize("padded, mask_queries", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("frames", [250, 1100])
@pytest.mark.parametrize("tile, size, cuts", TILES)
def test_attention_of(
    tile: Tile, size: int, cuts: tuple[int, ...], frames: int, padded: bool, mask_queries: bool
) -> None:
    rng = np.random.default_rng((frames, size))
    batch, width = 2, HEADS * size
    qkv = rng.standard_normal((batch, frames, 3 * width), np.float32)
    pos_key, pos_query = rng.standard_normal((2, HEADS, 2 * SPAN, size), np.float32)
    scale = float((3 * size) ** 0.5)
    lengths = np.array([frames, frames * 2 // 3], np.int32) if padded else None
    index = attention.relative_index(frames, SPAN, DISTANCE, SPAN)
    tables = pos_key.astype(np.float64), pos_query.astype(np.float64)
    want = attention.disentangled_attention(qkv.astype(np.float64), HEADS, tables, index, scale, lengths, mask_queries)

    device = open_device()
    rows = device.queue.upload(cuda_attention.relative_rows(frames, SPAN, DISTANCE, SPAN))
    known = None if lengths is None else device.queue.upload(lengths)
    given = [device.from_numpy(array) for array in (qkv, pos_key, pos_query)]
    on_device, *tables_on_device = (array.data for array in given)
    for parts in cuts:
        wanted = cuda_attention.attention_scratch(batch, frames, HEADS, size, parts)
        scratch = device.from_numpy(np.full(wanted, np.nan, np.float32)) if wanted else None
        out = device.from_numpy(np.full((batch, frames, width), np.nan, np.float32))
        inputs = (on_device, HEADS, *tables_on_device, rows, scale, known, mask_queries)
        cuda_attention.disentangled_attention(device.stream, *inputs, out.data, raw(scratch), tile, parts)
        assert error_between(device.to_numpy(out), want) <= TOLERANCE, parts
