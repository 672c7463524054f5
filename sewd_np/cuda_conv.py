"""Convolutions on the GPU: any 1-D convolution, the squeeze with its positional convolution, the feature encoder.

A convolution over time-major frames is a matrix product whose rows overlap (``cuda_gemm``), so what stands here is how
each kind says where its rows lie, and one kernel of its own: the first layer. That one has a single input channel and
a window of 10 samples, 10 multiply-adds for each number that it writes, so a product over ten numbers would waste the
tile. It keeps the samples of 256 frames and the weights of 32 channels in shared memory, 4 channels × 8 frames of sums
in the registers of each thread.

Group norm wants the first layer's mean and variance over the whole recording before anything can go on. Writing the
layer out to read it back for that costs more than computing it twice: it is 1 % of the encoder's arithmetic and its
largest array, 123 million numbers for 10 minutes. So the first layer runs twice: for the moments of each chunk
(``cuda_norm``), and then for its output, normalised and activated on the way. A bias of the convolution drops out.

The layers take turns between two buffers; memory grows with the recording by 64 + 64 channels at 3200 and 1600 steps a
second in the published models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from sewd_np.cuda_gemm import Product, launch, linear_shape
from sewd_np.cuda_intrinsics import cuda, float32, kernel, load, load4, static_range, store, store4
from sewd_np.cuda_math import activation_function
from sewd_np.cuda_memory import shaped
from sewd_np.cuda_norm import CHUNK, group_norm, launch_scales, moments_size, strip_total

ZERO = float32(0)
SHARED_NUMBERS = 12288  # 48 KB of float32: what a block may have without asking


# ------------------------------------------------------------------ convolution as a product


def conv_shape(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], stride: int, padding: int, rows: int
) -> Product:
    """The ``Product`` of a convolution: x (b, n, c_in), weight (k, g, c_in/g, c_out/g), its first ``rows`` outputs.

    Without groups the taps of a window lie end to end and count as one. Kernel 1, stride 1 is a linear layer over all
    recordings at once.
    """
    batch, steps, channels = x_shape
    taps, groups, inputs, outputs = weight_shape
    if taps == stride == groups == 1 and padding == 0:
        return linear_shape(batch * steps, inputs, outputs)
    if groups == 1:
        taps, inputs = 1, taps * inputs
    return Product(
        items=batch,
        item_size=steps * channels,
        rows=rows,
        row_step=stride * channels,
        lead=padding * channels,
        taps=taps,
        tap_step=channels,
        inputs=inputs,
        groups=groups,
        outputs=outputs,
    )


def conv1d(
    stream: Any, x_bnc: Any, weight_kgio: Any, bias_c: Any | None, stride: int, padding: int, activation: str,
    out_bmc: Any,
) -> None:  # fmt: skip
    """activation(conv1d(x) + bias), zeros beyond both ends; out (b, m, c_out), m = (n + 2·padding − k)//stride + 1."""
    shape = conv_shape(x_bnc.shape, weight_kgio.shape, stride, padding, out_bmc.shape[1])
    launch(stream, shape, x_bnc, weight_kgio, bias_c, activation, out_bmc)


def squeeze(stream: Any, x_bsd: Any, weight_kgio: Any, bias_d: Any, factor: int, activation: str, out_btd: Any) -> None:
    """average_pool(x) + activation(positional convolution of x + bias): (b, s, d) → (b, s // factor, d), in one launch.

    The convolution's frames beyond the pool's floor(s / factor), an even kernel's surplus among them, are not computed.
    """
    padding = len(weight_kgio) // 2
    shape = conv_shape(x_bsd.shape, weight_kgio.shape, factor, padding, out_btd.shape[1])
    # A kernel of 1 without groups or padding has a linear layer's shape; here its recordings stay apart for the pool.
    shape = shape._replace(
        items=x_bsd.shape[0], item_size=x_bsd.shape[1] * x_bsd.shape[2], rows=out_btd.shape[1],
        tap_step=x_bsd.shape[2], factor=factor,
    )  # fmt: skip
    launch(stream, shape, x_bsd, weight_kgio, bias_d, activation, out_btd)


# -------------------------------------------------------------------------- the first layer


class FirstTile(NamedTuple):
    """A block of ``first_layer``: fours × 4 channels by strips × own_frames frames, with fours × strips threads."""

    fours: int = 8
    strips: int = 32
    own_frames: int = 8

    @property
    def channels(self) -> int:
        return self.fours * 4

    @property
    def frames(self) -> int:
        return self.strips * self.own_frames

    def shared_numbers(self, taps: int, stride: int) -> tuple[int, int, int]:
        """Numbers of shared memory for the weights, the samples, and the sums over strips."""
        return taps * self.channels, (self.frames - 1) * stride + taps, self.strips * self.channels


FIRST_TILE = FirstTile()


def has_first_layer(weight_shape: tuple[int, ...], stride: int, tile: FirstTile = FIRST_TILE) -> bool:
    """Whether ``first_layer`` takes a convolution: one input channel, outputs in fours, a window of moderate length."""
    taps, groups, inputs, outputs = weight_shape
    fits = sum(tile.shared_numbers(taps, stride)) <= SHARED_NUMBERS
    return groups == inputs == 1 and outputs % 4 == 0 and fits


@cache
def first_layer(tile: FirstTile, taps: int, stride: int, activation: str, step: str, ragged: bool) -> Any:
    """A convolution of one input channel; grid (chunks of frames, tiles of channels, items), block (fours, strips).

    ``step`` "moments": write each chunk's mean and squared distances, (items, chunks, 2, channels), nothing else.
    "apply": activation(convolution · scale + shift), with scales (items, 2, channels). "convolve": activation(
    convolution + bias), bias in the place of ``scales`` if ``has_bias``. Registers: at most 80.
    """
    FOURS, STRIPS, OWN_FRAMES = tile
    CHANNELS, FRAMES, SUMS = tile.channels, tile.frames, 4 * OWN_FRAMES
    WEIGHTS, SAMPLES, TOTALS = tile.shared_numbers(taps, stride)
    THREADS = FOURS * STRIPS
    MOMENTS, APPLY = step == "moments", step == "apply"
    activate = activation_function(activation)

    @kernel(threads=THREADS)
    def run(wave, weight, samples, steps, channels, chunks, has_bias, scales, lengths, out):
        shared_weight = cuda.shared.array(WEIGHTS, float32, alignment=16)
        shared_wave = cuda.shared.array(SAMPLES, float32)
        sums = cuda.local.array(SUMS, float32)
        four, strip = cuda.threadIdx.x, cuda.threadIdx.y
        thread = strip * FOURS + four
        chunk, item = cuda.blockIdx.x, cuda.blockIdx.z
        first_channel = cuda.blockIdx.y * CHANNELS
        channel = first_channel + four * 4
        m0 = chunk * FRAMES
        if MOMENTS:
            valid = steps
            if ragged:
                valid = max(min(lengths[item], steps), 1)
            count = min(valid - m0, FRAMES)
            if count <= 0:
                return

        for i in range(thread, SAMPLES, THREADS):
            n = m0 * stride + i
            store(shared_wave, i, load(wave, item * samples + n) if n < samples else ZERO)
        for i in range(thread, WEIGHTS, THREADS):
            tap = i // CHANNELS
            c = first_channel + i - tap * CHANNELS
            store(shared_weight, i, load(weight, tap * channels + c) if c < channels else ZERO)
        cuda.syncthreads()

        for i in static_range(SUMS):
            sums[i] = ZERO
        for tap in range(taps):
            w = load4(shared_weight, tap * CHANNELS + four * 4)
            for f in static_range(OWN_FRAMES):
                sample = load(shared_wave, (strip + f * STRIPS) * stride + tap)
                for q in static_range(4):
                    sums[f * 4 + q] += w[q] * sample

        if MOMENTS:
            totals = cuda.shared.array(TOTALS, float32)
            for q in static_range(4):
                total = ZERO
                for f in static_range(OWN_FRAMES):
                    total += sums[f * 4 + q] if strip + f * STRIPS < count else ZERO
                mean = strip_total(totals, total, four * 4 + q, strip, STRIPS, CHANNELS) / float32(count)
                total = ZERO
                for f in static_range(OWN_FRAMES):
                    distance = sums[f * 4 + q] - mean if strip + f * STRIPS < count else ZERO
                    total += distance * distance
                squares = strip_total(totals, total, four * 4 + q, strip, STRIPS, CHANNELS)
                if strip == 0 and channel < channels:
                    at = (item * chunks + chunk) * 2 * channels + channel + q
                    store(out, at, mean)
                    store(out, at + channels, squares)
        else:
            if channel < channels:
                v = (ZERO, ZERO, ZERO, ZERO)
                w = (ZERO, ZERO, ZERO, ZERO)
                if APPLY:
                    w = load4(scales, item * 2 * channels + channel)
                    v = load4(scales, (item * 2 + 1) * channels + channel)
                else:
                    if has_bias:
                        v = load4(scales, channel)
                for f in static_range(OWN_FRAMES):
                    m = m0 + strip + f * STRIPS
                    if m < steps:
                        for q in static_range(4):
                            if APPLY:
                                sums[f * 4 + q] = activate(sums[f * 4 + q] * w[q] + v[q])
                            else:
                                sums[f * 4 + q] = activate(sums[f * 4 + q] + v[q])
                        at = (item * steps + m) * channels + channel
                        store4(out, at, sums[f * 4], sums[f * 4 + 1], sums[f * 4 + 2], sums[f * 4 + 3])

    return run


def launch_first_layer(
    stream: Any, wave_bn: Any, weight: Any, stride: int, activation: str, step: str, has_bias: bool, scales: Any,
    lengths_b: Any | None, steps: int, out: Any, tile: FirstTile,
) -> None:  # fmt: skip
    """Start ``first_layer`` for one of its steps."""
    (batch, samples), (taps, _, _, channels) = wave_bn.shape, weight.shape
    ragged = step == "moments" and lengths_b is not None
    run = first_layer(tile, taps, stride, activation, step, ragged)
    chunks = -(-steps // tile.frames)
    grid, block = (chunks, -(-channels // tile.channels), batch), (tile.fours, tile.strips)
    lengths = lengths_b if ragged else wave_bn
    run[grid, block, stream](
        wave_bn, weight, samples, steps, channels, chunks, int(has_bias), scales, lengths, out
    )  # fmt: skip


# ---------------------------------------------------------------------- the feature encoder


class EncoderRoom(NamedTuple):
    """Steps of time after each layer, and numbers of scratch: two buffers in turn, and the moments."""

    steps: tuple[int, ...]
    even: int
    odd: int
    moments: int

    @property
    def size(self) -> int:
        return self.even + self.odd + self.moments


def encoder_room(
    batch: int, samples: int, conv_layers: Any, strides: tuple[int, ...], tile: FirstTile = FIRST_TILE
) -> EncoderRoom:
    """What ``feature_encoder`` needs. Only the shapes of the weights are read. Layers 0, 2, … write the even buffer."""
    steps, sizes = [], []
    n = samples
    for layer, stride in zip(conv_layers, strides, strict=True):
        taps, groups, _, outputs = layer.weight.shape
        n = (n - taps) // stride + 1
        steps.append(n)
        sizes.append(-(-batch * n * groups * outputs // 4) * 4)  # buffers begin at a multiple of 4 numbers
    sizes[-1] = 0  # the last layer writes the result
    channels = conv_layers[0].weight.shape[3]
    # cuda_norm.group_norm, which stands in where first_layer does not fit, cuts the time into smaller chunks.
    chunks = -(-steps[0] // min(tile.frames, CHUNK))
    return EncoderRoom(
        tuple(steps), max(sizes[::2]), max(sizes[1::2], default=0), moments_size(batch, chunks, channels)
    )


def feature_encoder_scratch(batch: int, samples: int, conv_layers: Any, strides: tuple[int, ...]) -> int:
    """float32 numbers of scratch that ``feature_encoder`` wants."""
    return encoder_room(batch, samples, conv_layers, strides).size


def feature_encoder(
    stream: Any, wave_bn: Any, conv_layers: Any, strides: tuple[int, ...], norm: str, eps: float, activation: str,
    lengths_b: Any | None, layer_norm: Callable[..., None], scratch: Any, out_bsc: Any, tile: FirstTile = FIRST_TILE,
) -> None:  # fmt: skip
    """All convolutions of the feature encoder: samples (b, n) → (b, s, c), as ``layers.feature_encoder``.

    ``lengths_b``: steps of the first layer that count for "group", or None for all. ``layer_norm(stream, x, weight,
    bias, eps, activation, out)`` is called for "layer", in place. ``tile`` is for tests.
    """
    batch, samples = wave_bn.shape
    room = encoder_room(batch, samples, conv_layers, strides, tile)
    buffers = scratch[: room.even], scratch[room.even : room.even + room.odd]
    moments = scratch[room.even + room.odd :]
    x = shaped(wave_bn, batch, samples, 1)
    for i, (layer, stride, steps) in enumerate(zip(conv_layers, strides, room.steps, strict=True)):
        _, groups, _, outputs = layer.weight.shape
        width = groups * outputs
        out = out_bsc
        if i < len(conv_layers) - 1:
            out = shaped(buffers[i % 2], batch, steps, width)
        kind = "none" if layer.norm is None else norm
        own = activation if kind == "none" else "linear"
        if i == 0 and has_first_layer(layer.weight.shape, stride, tile):
            if kind == "group":
                normed_first_layer(stream, wave_bn, layer, stride, eps, activation, lengths_b, moments, out, tile)
                x = out
                continue
            has_bias = layer.bias is not None
            bias = layer.bias if has_bias else wave_bn
            launch_first_layer(
                stream, wave_bn, layer.weight, stride, own, "convolve", has_bias, bias, None, steps, out, tile
            )
        else:
            conv1d(stream, x, layer.weight, layer.bias, stride, 0, own, out)
        if kind == "group":
            group_norm(stream, out, layer.norm.weight, layer.norm.bias, eps, activation, lengths_b, moments, out)
        elif kind == "layer":
            layer_norm(stream, out, layer.norm.weight, layer.norm.bias, eps, activation, out)
        x = out


def normed_first_layer(
    stream: Any, wave_bn: Any, layer: Any, stride: int, eps: float, activation: str, lengths_b: Any | None,
    scratch: Any, out_bmc: Any, tile: FirstTile = FIRST_TILE,
) -> None:  # fmt: skip
    """activation(group norm of the first layer), in three launches: moments, scales, and the layer itself."""
    batch, steps, channels = out_bmc.shape
    at = batch * -(-steps // tile.frames) * 2 * channels
    moments, scales = scratch[:at], scratch[at : at + batch * 2 * channels]
    weight, bias = layer.norm
    launch_first_layer(
        stream, wave_bn, layer.weight, stride, "linear", "moments", False, wave_bn, lengths_b, steps, moments, tile
    )
    launch_scales(stream, moments, batch, steps, channels, tile.frames, weight, bias, eps, lengths_b, scales)
    launch_first_layer(
        stream, wave_bn, layer.weight, stride, activation, "apply", False, scales, None, steps, out_bmc, tile
    )
