"""Group norm over time on the GPU: mean and variance of each channel over a whole recording.

Every frame of the result waits for the last frame of the sound, so there are three steps, each a launch:

1. *chunks*: a block takes ``CHUNK`` frames of 32 channels and writes, for each channel, their mean and the sum of their
   squared distances from it. The numbers are in registers, so the mean comes first and the distances after it: no
   difference of large sums.
2. ``scale_and_shift``: the chunks of a recording become mean and variance, in fixed order,

       mean = Σ_i n_i · mean_i / n          n · variance = Σ_i (squares_i + n_i · (mean_i − mean)²)

   and with weight and bias a scale and a shift for each channel.
3. *apply*: activation(x · scale + shift).

Nothing depends on which block ends first: the result is the same each time. ``group_norm`` does this for an array; the
feature encoder's first layer (``cuda_conv``) has its own steps 1 and 3, which compute the convolution on the way.
The ladder: ``simple_group_norm`` (v1, one thread per channel of a recording, which runs along all of its time) stays.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from sewd_np.cuda_intrinsics import cuda, device, float32, kernel, load, static_range, store
from sewd_np.cuda_math import activation_function

ZERO, ONE = float32(0), float32(1)
CHANNELS = 32  # side by side in a block: a warp reads 128 bytes at once
STRIPS = 8  # rows of threads in a block of step 1 …
OWN_FRAMES = 16  # … each with this many frames: a chunk is their product
CHUNK = STRIPS * OWN_FRAMES
MERGERS = 32  # rows of threads in a block of step 2; they share the chunks of a recording
THREADS = 256


@device
def strip_total(shared, value, channel, strip, strips, channels):
    """Sum of ``value`` over a block's strips, channel by channel, known to all threads after.

    ``shared`` has room for strips × channels. The barrier at the end lets the next call use ``shared`` again.
    """
    store(shared, strip * channels + channel, value)
    cuda.syncthreads()
    total = ZERO
    for other in range(strips):
        total += load(shared, other * channels + channel)
    cuda.syncthreads()
    return total


# --------------------------------------------------------------------------------- v1


@cache
def simple_group_norm(activation: str, ragged: bool, threads: int) -> Any:
    """v1: a thread for each channel of each recording, which runs along its time three times. ≤ 64 registers."""
    activate = activation_function(activation)

    @kernel(threads=threads)
    def normalize(x, items, steps, channels, weight, shift, eps, lengths, out):
        place = cuda.grid(1)
        if place < items * channels:
            item = place // channels
            channel = place - item * channels
            start = item * steps * channels + channel
            valid = steps
            if ragged:
                valid = max(min(lengths[item], steps), 1)
            mean = ZERO
            for step in range(valid):
                mean += load(x, start + step * channels)
            mean /= float32(valid)
            squares = ZERO
            for step in range(valid):
                distance = load(x, start + step * channels) - mean
                squares += distance * distance
            scale = ONE / math.sqrt(squares / float32(valid) + eps)
            for step in range(steps):
                v = (load(x, start + step * channels) - mean) * scale
                store(out, start + step * channels, activate(v * load(weight, channel) + load(shift, channel)))

    return normalize


# -------------------------------------------------------------------------- last rung


@cache
def chunk_moments(channels_wide: int, strips: int, own_frames: int, ragged: bool) -> Any:
    """Step 1 for an array: grid (chunks, tiles of channels, items). ≤ 64 registers.

    Writes moments (items, chunks, 2, channels): mean and sum of squared distances. Chunks after the last valid frame
    are left as they were: nobody reads them.
    """
    chunk_frames = strips * own_frames
    SIZE = strips * channels_wide

    @kernel(threads=channels_wide * strips)
    def run(x, steps, channels, chunks, lengths, moments):
        shared = cuda.shared.array(SIZE, float32)
        values = cuda.local.array(own_frames, float32)
        lane, strip = cuda.threadIdx.x, cuda.threadIdx.y
        chunk, item = cuda.blockIdx.x, cuda.blockIdx.z
        channel = cuda.blockIdx.y * channels_wide + lane
        valid = steps
        if ragged:
            valid = max(min(lengths[item], steps), 1)
        count = min(valid - chunk * chunk_frames, chunk_frames)
        if count <= 0:
            return
        start = (item * steps + chunk * chunk_frames) * channels + channel
        total = ZERO
        for f in static_range(own_frames):
            frame = strip + f * strips
            values[f] = load(x, start + frame * channels) if frame < count and channel < channels else ZERO
            total += values[f]
        mean = strip_total(shared, total, lane, strip, strips, channels_wide) / float32(count)
        total = ZERO
        for f in static_range(own_frames):
            distance = values[f] - mean if strip + f * strips < count else ZERO
            total += distance * distance
        squares = strip_total(shared, total, lane, strip, strips, channels_wide)
        if strip == 0 and channel < channels:
            at = (item * chunks + chunk) * 2 * channels + channel
            store(moments, at, mean)
            store(moments, at + channels, squares)

    return run


@cache
def scale_and_shift(channels_wide: int, mergers: int, chunk_frames: int, ragged: bool) -> Any:
    """Step 2: moments → scales (items, 2, channels); grid (tiles of channels, items). ≤ 64 registers."""
    SIZE = mergers * channels_wide

    @kernel(threads=channels_wide * mergers)
    def run(moments, steps, channels, chunks, weight, shift, eps, lengths, scales):
        shared = cuda.shared.array(SIZE, float32)
        lane, merger = cuda.threadIdx.x, cuda.threadIdx.y
        item = cuda.blockIdx.y
        channel = cuda.blockIdx.x * channels_wide + lane
        valid = steps
        if ragged:
            valid = max(min(lengths[item], steps), 1)
        used = (valid + chunk_frames - 1) // chunk_frames if channel < channels else 0
        start = item * chunks * 2 * channels + channel
        total = ZERO
        for chunk in range(merger, used, mergers):
            count = float32(min(valid - chunk * chunk_frames, chunk_frames))
            total += count * load(moments, start + chunk * 2 * channels)
        mean = strip_total(shared, total, lane, merger, mergers, channels_wide) / float32(valid)
        total = ZERO
        for chunk in range(merger, used, mergers):
            count = float32(min(valid - chunk * chunk_frames, chunk_frames))
            distance = load(moments, start + chunk * 2 * channels) - mean
            total += load(moments, start + (chunk * 2 + 1) * channels) + count * distance * distance
        squares = strip_total(shared, total, lane, merger, mergers, channels_wide)
        if merger == 0 and channel < channels:
            scale = load(weight, channel) / math.sqrt(squares / float32(valid) + eps)
            store(scales, item * 2 * channels + channel, scale)
            store(scales, (item * 2 + 1) * channels + channel, load(shift, channel) - mean * scale)

    return run


@cache
def apply_scales(activation: str, threads: int) -> Any:
    """Step 3: out = activation(x · scale + shift), a thread for each number; grid (blocks, items). ≤ 40 registers."""
    activate = activation_function(activation)

    @kernel(threads=threads)
    def run(x, item_size, channels, scales, out):
        place = cuda.blockIdx.x * threads + cuda.threadIdx.x
        item = cuda.blockIdx.y
        if place < item_size:
            at = item * item_size + place
            channel = item * 2 * channels + place % channels
            store(out, at, activate(load(x, at) * load(scales, channel) + load(scales, channel + channels)))

    return run


# -------------------------------------------------------------------------- launching


def moments_size(batch: int, chunks: int, channels: int) -> int:
    """Numbers of scratch for the moments of ``chunks`` chunks and the scales made of them."""
    return batch * (chunks + 1) * 2 * channels


def launch_scales(
    stream: Any, moments: Any, batch: int, steps: int, channels: int, chunk_frames: int, weight: Any, bias: Any,
    eps: float, lengths_b: Any | None, scales: Any, channels_wide: int = CHANNELS, mergers: int = MERGERS,
) -> None:  # fmt: skip
    """Start step 2."""
    run = scale_and_shift(channels_wide, mergers, chunk_frames, lengths_b is not None)
    chunks = -(-steps // chunk_frames)
    lengths = scales if lengths_b is None else lengths_b
    grid, block = (-(-channels // channels_wide), batch), (channels_wide, mergers)
    run[grid, block, stream](moments, steps, channels, chunks, weight, bias, float32(eps), lengths, scales)


def group_norm_scratch(batch: int, steps: int, channels: int) -> int:
    """float32 numbers of scratch that ``group_norm`` wants."""
    return moments_size(batch, -(-steps // CHUNK), channels)


def group_norm(
    stream: Any, x_bnc: Any, weight_c: Any, bias_c: Any, eps: float, activation: str, lengths_b: Any | None,
    scratch: Any, out_bnc: Any, block: tuple[int, int, int] = (CHANNELS, STRIPS, OWN_FRAMES),
) -> None:  # fmt: skip
    """activation(group norm over time), the statistics from the first ``lengths_b`` steps; ``out`` may be x.

    ``block`` (channels, strips, frames of a strip) is for tests; scratch must suffice for it.
    """
    batch, steps, channels = x_bnc.shape
    wide, strips, own_frames = block
    chunk_frames = strips * own_frames
    chunks = -(-steps // chunk_frames)
    at = batch * chunks * 2 * channels
    moments, scales = scratch[:at], scratch[at : at + batch * 2 * channels]
    lengths = scratch if lengths_b is None else lengths_b
    run = chunk_moments(wide, strips, own_frames, lengths_b is not None)
    run[(chunks, -(-channels // wide), batch), (wide, strips), stream](x_bnc, steps, channels, chunks, lengths, moments)
    launch_scales(
        stream, moments, batch, steps, channels, chunk_frames, weight_c, bias_c, eps, lengths_b, scales, wide, strips
    )
    size = steps * channels
    apply = apply_scales(activation, THREADS)
    apply[(-(-size // THREADS), batch), THREADS, stream](x_bnc, size, channels, scales, out_bnc)
