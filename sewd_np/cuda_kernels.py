"""numba.cuda twins, rung by rung, and the row-wise kernels: norms, activations, pooling, unfolding, padding, means.

The ladder (what each step is for: docs/kernels.md)
---------------------------------------------------
1. *One thread per output* (``cuda_gemm.simple_product``, ``cuda_attention.plain_attention``, ``layer_norm_v1`` here):
   what the definition says, thousands of times at once. Every number is fetched from the device's memory for every use.
2. *Neighbours read neighbours*: the 32 threads of a warp that ask for 32 numbers side by side get them in one access.
   In ``layer_norm_v1`` each thread has a row, so neighbours read a row apart; in ``norm_rows`` each warp has one.
3. *Shared memory* (``cuda_gemm``, ``cuda_conv``, ``cuda_attention``): a tile is fetched once and used by a whole block.
4. *Registers*: each thread keeps a small tile of results, so a number from shared memory serves several multiply-adds.
5. *Vectors and less talk*: 128-bit loads; sums across a warp by shuffles, without shared memory or a barrier.
6. *Less traffic*: bias, activation, residual sum and norm are done where the numbers are anyway; attention never
   writes its t × t scores, and far tiles, where all pairs share one bucket, add the position once.

The kernels here are bound by memory: they do a few operations for each number that they move. So they are short, and
what counts is that a warp's accesses lie side by side and that nothing is moved twice. ``cuda_launch.Device`` puts the
rooms together.

Launch functions take the stream first and what they write last; x (…, c) is seen as rows of c numbers. They start work
and return: no memory, no waiting, no copies. ``lengths_b`` are int32 on the device.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from sewd_np.cuda_intrinsics import (
    add_read,
    cuda,
    float32,
    group_sum,
    kernel,
    load,
    numbers_together,
    read,
    static_range,
    store,
    write,
)
from sewd_np.cuda_math import activation_function

LANES = 32  # threads of a warp: they run together and can exchange registers
WARPS = 8  # rows at work in one block; a warp each
THREADS = LANES * WARPS
SLICES = 8  # of time, in mean_over_time: without them a few hundred threads would read a whole recording
ZERO, ONE, INFINITY = float32(0), float32(1), float32(math.inf)


def blocks(rows: int) -> tuple[int]:
    """Blocks of WARPS rows each."""
    return (-(-rows // WARPS),)


def threads() -> tuple[int, int]:
    """A block: one warp along the channels for each of WARPS rows."""
    return LANES, WARPS


def rows_of(x: Any) -> tuple[int, int]:
    """Number of rows of an array (…, c), and c."""
    *leading, size = x.shape
    return math.prod(leading), size


# ------------------------------------------------------------------------------------ norms


@cache
def layer_norm_v1() -> Any:
    """Rung 1 of ``norm_rows``: a thread for each row; mean, variance, result, one number at a time. ≤ 48 registers."""

    @kernel(threads=THREADS)
    def normalize(x, rows, size, weight, shift, eps, out):
        row = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        if row < rows:
            start = row * size
            count = float32(size)
            mean = ZERO
            for c in range(size):
                mean += load(x, start + c)
            mean /= count
            variance = ZERO
            for c in range(size):
                centred = load(x, start + c) - mean
                variance += centred * centred
            scale = ONE / math.sqrt(variance / count + eps)
            for c in range(size):
                store(out, start + c, (load(x, start + c) - mean) * scale * load(weight, c) + load(shift, c))

    return normalize


@cache
def norm_rows(activation: str, add: bool, with_bias: bool, width: int) -> Any:
    """A warp for each row: (x [+ bias] [+ residual]), normalised, scaled, shifted, activated. ≤ 48 registers.

    Two passes over the row for mean and variance and one for the result. The row is fetched from the device's memory
    once; the passes after that find it in the cache. A sum is written to ``out`` by the lane that reads it there later,
    so no barrier is needed and ``out`` may be ``x`` or ``residual``. ``width``: ``numbers_together``.
    """
    activate = activation_function(activation)

    @kernel(threads=THREADS)
    def normalize(x, rows, size, bias, residual, weight, shift, eps, out):
        part = cuda.local.array(width, float32)
        lane = cuda.threadIdx.x * width
        row = cuda.blockIdx.x * WARPS + cuda.threadIdx.y
        if row < rows:
            start = row * size
            count = float32(size)
            total = ZERO
            for c in range(lane, size, LANES * width):
                read(part, width, x, start + c)
                if with_bias:
                    add_read(part, width, bias, c)
                if add:
                    add_read(part, width, residual, start + c)
                if add or with_bias:
                    write(out, start + c, part, width)
                for z in static_range(width):
                    total += part[z]
            mean = group_sum(total, LANES) / count
            total = ZERO
            for c in range(lane, size, LANES * width):
                if add or with_bias:
                    read(part, width, out, start + c)
                else:
                    read(part, width, x, start + c)
                for z in static_range(width):
                    centred = part[z] - mean
                    total += centred * centred
            scale = ONE / math.sqrt(group_sum(total, LANES) / count + eps)
            for c in range(lane, size, LANES * width):
                if add or with_bias:
                    read(part, width, out, start + c)
                else:
                    read(part, width, x, start + c)
                for z in static_range(width):
                    part[z] = activate((part[z] - mean) * scale * load(weight, c + z) + load(shift, c + z))
                write(out, start + c, part, width)

    return normalize


def layer_norm(stream: Any, x: Any, weight: Any, bias: Any, eps: float, activation: str, out: Any) -> None:
    """activation(layer norm of every row of x); ``out`` may be x."""
    rows, size = rows_of(x)
    run = norm_rows(activation, False, False, numbers_together(size))
    run[blocks(rows), threads(), stream](x, rows, size, bias, x, weight, bias, float32(eps), out)


def add_norm(
    stream: Any, x: Any, added_bias: Any | None, residual: Any, weight: Any, bias: Any, eps: float, out: Any
) -> None:
    """Layer norm of every row of x + added_bias + residual; ``added_bias`` (c,) is a product's own, or None."""
    rows, size = rows_of(x)
    run = norm_rows("linear", True, added_bias is not None, numbers_together(size))
    first = bias if added_bias is None else added_bias
    run[blocks(rows), threads(), stream](x, rows, size, first, residual, weight, bias, float32(eps), out)


# ---------------------------------------------------------------------------- activations


@cache
def activate_rows(activation: str, with_bias: bool, width: int) -> Any:
    """out[b, s] = activation(x[b, s] [+ bias]) for the frames that ``out`` has of x's. ≤ 40 registers."""
    act = activation_function(activation)

    @kernel(threads=THREADS)
    def run(x, x_frames, frames, rows, size, bias, out):
        part = cuda.local.array(width, float32)
        row = cuda.blockIdx.x * WARPS + cuda.threadIdx.y
        if row < rows:
            batch = row // frames
            start = (batch * x_frames + row - batch * frames) * size
            for c in range(cuda.threadIdx.x * width, size, LANES * width):
                read(part, width, x, start + c)
                if with_bias:
                    add_read(part, width, bias, c)
                for z in static_range(width):
                    part[z] = act(part[z])
                write(out, row * size + c, part, width)

    return run


def activate(stream: Any, x: Any, bias: Any | None, activation: str, out: Any) -> None:
    """activation(x + bias), bias (c,) or None; ``out`` may be x."""
    rows, size = rows_of(x)
    run = activate_rows(activation, bias is not None, numbers_together(size))
    run[blocks(rows), threads(), stream](x, rows, rows, rows, size, x if bias is None else bias, out)


def trim_and_activate(stream: Any, x_buc: Any, activation: str, out_bqc: Any) -> None:
    """activation of the first q of u frames."""
    batch, frames, size = out_bqc.shape
    run = activate_rows(activation, False, numbers_together(size))
    rows = batch * frames
    run[blocks(rows), threads(), stream](x_buc, x_buc.shape[1], frames, rows, size, x_buc, out_bqc)


# --------------------------------------------------------------------- squeeze and upsample


@cache
def average_frames() -> Any:
    """Mean of every ``factor`` frames. ≤ 48 registers."""

    @kernel(threads=THREADS)
    def run(x, x_frames, frames, rows, size, factor, out):
        row = cuda.blockIdx.x * WARPS + cuda.threadIdx.y
        if row < rows:
            batch = row // frames
            start = (batch * x_frames + (row - batch * frames) * factor) * size
            for c in range(cuda.threadIdx.x, size, LANES):
                total = ZERO
                for k in range(factor):
                    total += load(x, start + k * size + c)
                store(out, row * size + c, total / float32(factor))

    return run


def average_pool(stream: Any, x_bsd: Any, factor: int, out_btd: Any) -> None:
    """Mean of every ``factor`` frames; a last incomplete group is dropped."""
    batch, frames, size = out_btd.shape
    rows = batch * frames
    average_frames()[blocks(rows), threads(), stream](x_bsd, x_bsd.shape[1], frames, rows, size, factor, out_btd)


@cache
def add_frames() -> Any:
    """x + y for the frames that x has; y may have more. ≤ 32 registers."""

    @kernel(threads=THREADS)
    def run(x, y, y_frames, frames, rows, size, out):
        row = cuda.blockIdx.x * WARPS + cuda.threadIdx.y
        if row < rows:
            batch = row // frames
            start = (batch * y_frames + row - batch * frames) * size
            for c in range(cuda.threadIdx.x, size, LANES):
                store(out, row * size + c, load(x, row * size + c) + load(y, start + c))

    return run


def add_pooled(stream: Any, pooled_btd: Any, position_bqd: Any, out_btd: Any) -> None:
    """pooled + position, whose surplus frame is left out."""
    batch, frames, size = pooled_btd.shape
    rows, position_frames = batch * frames, position_bqd.shape[1]
    add_frames()[blocks(rows), threads(), stream](
        pooled_btd, position_bqd, position_frames, frames, rows, size, out_btd
    )


@cache
def unfold_rows(activation: str, with_bias: bool, with_lengths: bool) -> Any:
    """(b, t, factor·d) → (b, s, d): frame s is part s % factor of row s // factor; what no row has is 0.

    activation(x + bias) on the way; with lengths everything from ``lengths[b]`` on is 0 too. ≤ 48 registers.
    """
    act = activation_function(activation)

    @kernel(threads=THREADS)
    def run(x, x_frames, factor, bias, lengths, frames, rows, size, out):
        row = cuda.blockIdx.x * WARPS + cuda.threadIdx.y
        if row < rows:
            batch = row // frames
            frame = row - batch * frames
            valid = x_frames * factor
            if with_lengths:
                valid = min(valid, load(lengths, batch))
            part = frame % factor * size
            # A row of x is factor · size long: part s % factor of row s // factor is where frame s lies unfolded.
            start = (batch * x_frames * factor + frame) * size
            for c in range(cuda.threadIdx.x, size, LANES):
                v = ZERO
                if frame < valid:
                    v = load(x, start + c)
                    if with_bias:
                        v += load(bias, part + c)
                    v = act(v)
                store(out, row * size + c, v)

    return run


def unsqueeze(
    stream: Any, x: Any, bias: Any | None, factor: int, activation: str, lengths_b: Any | None, out_bsd: Any
) -> None:
    """activation(x + bias), unfolded from (b, t, factor·d) into (b, s, d), with zeros where no frame is or is valid."""
    batch, frames, size = out_bsd.shape
    rows, run = batch * frames, unfold_rows(activation, bias is not None, lengths_b is not None)
    lengths = x if lengths_b is None else lengths_b
    run[blocks(rows), threads(), stream](
        x, x.shape[1], factor, x if bias is None else bias, lengths, frames, rows, size, out_bsd
    )


def zero_padding(stream: Any, x_bsd: Any, lengths_b: Any, out_bsd: Any) -> None:
    """Set the frames from ``lengths_b[b]`` on to 0; ``out`` may be x."""
    unsqueeze(stream, x_bsd, None, 1, "linear", lengths_b, out_bsd)


@cache
def replace_rows() -> Any:
    """``embed`` in place of every row that is marked. ≤ 32 registers."""

    @kernel(threads=THREADS)
    def run(x, marks, rows, size, embed, out):
        row = cuda.blockIdx.x * WARPS + cuda.threadIdx.y
        if row < rows:
            for c in range(cuda.threadIdx.x, size, LANES):
                if load(marks, row) != 0:
                    store(out, row * size + c, load(embed, c))
                else:
                    store(out, row * size + c, load(x, row * size + c))

    return run


def spec_augment(stream: Any, x_bsd: Any, marks_r: Any, embed_d: Any, out_bsd: Any) -> None:
    """``embed`` in place of every frame that ``marks_r`` (b·s,), int32, marks with other than 0."""
    rows, size = rows_of(x_bsd)
    replace_rows()[blocks(rows), threads(), stream](x_bsd, marks_r, rows, size, embed_d, out_bsd)


# ------------------------------------------------------------------- pooling for a classifier


@cache
def scale_rows(first: bool) -> Any:
    """out = share · x for the first, out + share · x after it. ≤ 32 registers."""

    @kernel(threads=THREADS)
    def run(x, share, rows, size, out):
        row = cuda.blockIdx.x * WARPS + cuda.threadIdx.y
        if row < rows:
            for c in range(cuda.threadIdx.x, size, LANES):
                v = share * load(x, row * size + c)
                if not first:
                    v += load(out, row * size + c)
                store(out, row * size + c, v)

    return run


def weighted_layer_sum(stream: Any, states: tuple[Any, ...], shares: list[float], out: Any) -> None:
    """Σ_l shares[l] · states[l], one layer after the other."""
    rows, size = rows_of(out)
    for number, (x, share) in enumerate(zip(states, shares, strict=True)):
        scale_rows(number == 0)[blocks(rows), threads(), stream](x, float32(share), rows, size, out)


@cache
def mean_frames(with_lengths: bool) -> Any:
    """Mean over a recording's valid frames, for LANES channels a block; SLICES rows of threads share the frames.

    ≤ 48 registers.
    """

    @kernel(threads=LANES * SLICES)
    def run(x, frames, size, lengths, out):
        sums = cuda.shared.array((SLICES, LANES), float32)
        lane, slice_, batch = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockIdx.y
        channel = cuda.blockIdx.x * LANES + lane
        valid = frames
        if with_lengths:
            valid = min(frames, load(lengths, batch))
        total = ZERO
        if channel < size:
            for frame in range(slice_, valid, SLICES):
                total += load(x, (batch * frames + frame) * size + channel)
        sums[slice_, lane] = total
        cuda.syncthreads()
        if slice_ == 0 and channel < size:
            total = ZERO
            for other in range(SLICES):
                total += sums[other, lane]
            # No valid frame: 0 · inf, which is NaN as in the reference; a division by 0 would be an error to Numba.
            share = ONE / float32(valid) if valid > 0 else INFINITY
            store(out, batch * size + channel, total * share)

    return run


def mean_over_time(stream: Any, x_bsd: Any, lengths_b: Any | None, out_bd: Any) -> None:
    """Mean of each recording's valid frames; NaN for a recording that has none."""
    batch, frames, size = x_bsd.shape
    run = mean_frames(lengths_b is not None)
    lengths = x_bsd if lengths_b is None else lengths_b
    run[(-(-size // LANES), batch), (LANES, SLICES), stream](x_bsd, frames, size, lengths, out_bd)
