"""Convolutions on the CPU: the feature encoder in tiles of time, and the positional convolution group by group.

With time before channels the window of output step m is k · c_in numbers in a row, beginning stride · c_in after the
window before it. So a convolution is a matrix product whose rows overlap, and ``cpu_gemm.product`` takes it as it is.

The feature encoder as 13 whole layers writes and reads 100 MB for 10 s of sound. Here each worker takes a tile of
about 64 output frames through all 13 layers: what passes between layers stays in the core's own cache, and memory does
not grow with the recording but for the result. A tile begins a little before its first frame (its layers' windows
overlap the neighbour's); the repeated work is well under 1 %.

Group norm stands in the way: it wants the mean and variance of layer 0 over the whole recording before any tile can go
on. Both follow from the sound itself. Layer 0 has one input channel, so its output is w·u for windows u of 10 samples:

    mean = w · E[u]          var = wᵀ (E[u uᵀ] − E[u] E[u]ᵀ) w

One pass collects E[u] and the 10 × 10 matrix E[u uᵀ] in float64; scale and shift then fold into layer 0's weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sewd_np.cpu_amx import BLOCK, DEPTH, PANEL_STEP, pack_split
from sewd_np.cpu_gemm import aligned, kernel, pack, product
from sewd_np.cpu_lines import LINE
from sewd_np.cpu_math import activate, normalize_row, vector_kernel, whole_registers
from sewd_np.cpu_split import aligned_floats, multiply, next_lines, product_of_lines, put_lines, room_for
from sewd_np.cpu_team import claim
from sewd_np.params import Conv

Array = np.ndarray
TILE_FRAMES = 64  # enough rows for the last layers' products, few enough that the first layers' output fits the cache
FIRST_ROWS = 64  # steps of layer 0 at a time, where the next layer wants pieces of them

# Columns of a plan: one row of whole numbers for each layer.
KERNEL, STRIDE, INPUTS, OUTPUTS, PANELS, BIAS, NORM = range(7)


class Encoder(NamedTuple):
    """The feature encoder packed: all layers' panels in one array, biases and norms in another, and where each lies."""

    plan: Array  # (layers, 7) int64
    panels: Array  # flat, of layers 1 and up: float32, or uint16 for the matrix unit
    vectors: Array  # flat float32: biases (zeros where a layer has none), then scales and shifts of the norms
    first_panels: Array  # of layer 0, float32
    first: Conv  # layer 0 unpacked, for the group norm to fold into


def pack_encoder(conv_layers: tuple[Conv, ...], strides: tuple[int, ...], norm: str, split: bool = False) -> Encoder:
    """Pack the layers for ``encode_tiles``. ``norm`` "layer" leaves the norms to the kernel, "group" to
    ``fold_group_norm``.

    ``split``: for the matrix unit, if all layers but the first, which has one input channel, fit it.
    """
    split = split and len(conv_layers) > 1 and all(layer.weight.shape[2] % DEPTH == 0 for layer in conv_layers[1:])
    plan = np.zeros((len(conv_layers), 7), np.int64)
    panels: list[Array] = [np.empty(0, np.uint16 if split else np.float32)]
    vectors = []
    panel_start = vector_start = 0
    for i, (layer, stride) in enumerate(zip(conv_layers, strides, strict=True)):
        kernel, _, inputs, outputs = layer.weight.shape
        packed = (pack_split if split and i > 0 else pack)(layer.weight.reshape(kernel * inputs, outputs)).reshape(-1)
        rows = [np.zeros(outputs, np.float32) if layer.bias is None else layer.bias]
        normed = layer.norm is not None and norm == "layer"
        if layer.norm is not None and norm == "layer":
            rows += [layer.norm.weight, layer.norm.bias]
        plan[i] = (kernel, stride, inputs, outputs, panel_start, vector_start, vector_start + outputs if normed else -1)
        vectors += rows
        vector_start += outputs * len(rows)
        if i == 0:
            first_panels = packed
        else:
            panels.append(packed)
            panel_start += packed.size
    together = aligned(panel_start, panels[0].dtype)
    np.concatenate(panels, out=together)
    return Encoder(plan, together, np.concatenate(vectors), first_panels, conv_layers[0])


# -------------------------------------------------------------------- group norm, folded


@vector_kernel
def window_moments(phases, stride, kernel, steps, mean, moments):
    """E[u] (k,) and E[u uᵀ] (k, k) over ``steps`` windows u of ``kernel`` samples, ``stride`` apart, in float64.

    ``phases`` (stride, steps + ...) is the sound dealt out in turn: sample m · stride + a lies at [a % stride, m + a //
    stride], so that every sum below runs along a row.
    """
    whole_registers()
    for a in range(kernel):
        left = phases[a % stride, a // stride : a // stride + steps]
        total = 0.0
        for m in range(steps):
            total += np.float64(left[m])
        mean[a] = total / steps
        for b in range(a + 1):
            right = phases[b % stride, b // stride : b // stride + steps]
            total = 0.0
            for m in range(steps):
                total += np.float64(left[m]) * np.float64(right[m])
            moments[a, b] = total / steps
            moments[b, a] = moments[a, b]


def fold_group_norm(wave_n: Array, steps: int, first: Conv, stride: int, eps: float) -> tuple[Array, Array]:
    """Layer 0's packed weights and bias with its group norm folded in, for this recording's ``steps`` windows."""
    kernel, _, _, outputs = first.weight.shape
    length = -(-(steps * stride + kernel) // stride) * stride
    padded = np.zeros(length, np.float32)
    padded[: min(length, len(wave_n))] = wave_n[:length]
    phases = np.ascontiguousarray(padded.reshape(-1, stride).T)
    mean, moments = np.empty(kernel), np.empty((kernel, kernel))
    window_moments(phases, stride, kernel, steps, mean, moments)

    assert first.norm is not None
    weight_kc = first.weight.reshape(kernel, outputs).astype(np.float64)
    covariance = moments - np.outer(mean, mean)
    variance_c = np.maximum(np.einsum("kc,kl,lc->c", weight_kc, covariance, weight_kc), 0)
    scale_c = first.norm.weight / np.sqrt(variance_c + eps)
    # A bias of the convolution moves its mean along and so drops out.
    shift_c = first.norm.bias - mean @ weight_kc * scale_c
    return pack((weight_kc * scale_c).astype(np.float32)).reshape(-1), shift_c.astype(np.float32)


# ------------------------------------------------------------------------ the tiles


@kernel
def layer_bounds(plan, frames, tile, tiles, begins, ends):
    """First and last step + 1 of every layer that tile ``tile`` of ``tiles`` needs, into ``begins`` and ``ends``."""
    last = len(plan) - 1
    begins[last], ends[last] = frames * tile // tiles, frames * (tile + 1) // tiles
    for i in range(last, 0, -1):
        begins[i - 1] = begins[i] * plan[i, STRIDE]
        ends[i - 1] = (ends[i] - 1) * plan[i, STRIDE] + plan[i, KERNEL]


@vector_kernel
def encode_tiles(
    waves, plan, panels, vectors, first_panels, first_bias, code, eps, out, tiles, scratch, counter, worker, workers
):
    """Recordings through all layers: waves (b, n) → out (b, s · c), each in ``tiles`` tiles of time.

    Each worker takes one tile after another; ``counter`` is 0, for ``claim``. ``first_panels`` (b, ...) and
    ``first_bias`` (b, c) stand in for layer 0's own. ``scratch`` (workers, 2, size) holds what passes between layers.
    """
    whole_registers()
    layers, last = len(plan), len(plan) - 1
    room = room_for(panels, scratch.shape[2], np.max(plan[:, STRIDE] * plan[:, INPUTS]))
    frames, items = out.shape[1] // plan[last, OUTPUTS], len(waves) * tiles
    begins, ends = np.empty(layers, np.int64), np.empty(layers, np.int64)
    for _ in range(items):
        item = claim(counter)
        if item >= items:
            break
        b = item // tiles
        layer_bounds(plan, frames, item % tiles, tiles, begins, ends)
        source = waves[b, begins[0] * plan[0, STRIDE] :]
        for i in range(layers):
            rows, outputs = ends[i] - begins[i], plan[i, OUTPUTS]
            target = scratch[worker, i % 2, : rows * outputs]
            if i == last:
                target = out[b, begins[i] * outputs : ends[i] * outputs]
            stride, depth = plan[i, STRIDE] * plan[i, INPUTS], plan[i, KERNEL] * plan[i, INPUTS]
            at = plan[i, BIAS]
            if i == 0:
                product(source, 0, stride, rows, depth, first_panels[b], 0, outputs, first_bias[b], target, 0, outputs)
            else:
                bias = vectors[at : at + outputs]
                start = plan[i, PANELS]
                multiply(source, 0, stride, rows, depth, panels, start, outputs, bias, target, 0, outputs, room)
            if plan[i, NORM] >= 0:
                weight = vectors[plan[i, NORM] : plan[i, NORM] + outputs]
                shift = vectors[plan[i, NORM] + outputs : plan[i, NORM] + 2 * outputs]
                for row in range(rows):
                    numbers = target[row * outputs : (row + 1) * outputs]
                    normalize_row(numbers, weight, shift, eps, numbers)
            activate(target, code)
            source = target


@vector_kernel
def first_lines(wave, stride, taps, count, panels, outputs, bias, code, to, fold):
    """Layer 0, of one input channel: ``count`` steps of ``wave``, activated, → ``to`` as ``next_lines`` puts them."""
    whole_registers()
    lines, parts = -(-count // fold), outputs // DEPTH
    some = aligned_floats(FIRST_ROWS * outputs)
    for i in range(0, count, FIRST_ROWS):
        rows = min(FIRST_ROWS, count - i)
        product(wave, i * stride, stride, rows, taps, panels, 0, outputs, bias, some, 0, outputs)
        activate(some[: rows * outputs], code)
        for part in range(parts):
            put_lines(some, outputs, part * DEPTH, rows, to, lines, fold, parts, i, part)


@vector_kernel
def encode_split_tiles(
    waves, plan, panels, vectors, first_panels, first_bias, code, eps, out, tiles, scratch, counter, worker, workers
):
    """``encode_tiles`` on the matrix unit, without norms inside: pieces pass from layer to layer."""
    whole_registers()
    layers, last = len(plan), len(plan) - 1
    frames, items = out.shape[1] // plan[last, OUTPUTS], len(waves) * tiles
    begins, ends = np.empty(layers, np.int64), np.empty(layers, np.int64)
    for _ in range(items):
        item = claim(counter)
        if item >= items:
            break
        b = item // tiles
        layer_bounds(plan, frames, item % tiles, tiles, begins, ends)
        wave = waves[b, begins[0] * plan[0, STRIDE] :]
        source = scratch[worker, 0].view(np.uint16)
        count, outputs, fold = ends[0] - begins[0], plan[0, OUTPUTS], plan[1, STRIDE]
        first_lines(
            wave, plan[0, STRIDE], plan[0, KERNEL], count, first_panels[b], outputs, first_bias[b], code, source, fold
        )
        for i in range(1, layers):
            lines, count, outputs = -(-count // plan[i, STRIDE]), ends[i] - begins[i], plan[i, OUTPUTS]
            steps, turn = plan[i, KERNEL] * plan[i, INPUTS] // DEPTH, plan[i, STRIDE] * plan[i, INPUTS] // DEPTH
            turn, at, start = min(turn, steps), plan[i, BIAS], plan[i, PANELS]
            bias = vectors[at : at + outputs]
            if i < last:
                target, fold = scratch[worker, i % 2].view(np.uint16), plan[i + 1, STRIDE]
                next_lines(source, lines, count, turn, steps, panels, start, outputs, bias, code, target, fold)
                source = target
            else:
                panel, to = steps * PANEL_STEP, out[b, begins[i] * outputs : ends[i] * outputs]
                product_of_lines(
                    source, lines, 0, turn, count, steps, panels, start, panel, outputs, bias, False, to, 0, outputs
                )
                activate(to, code)


def scratch_size(plan: Array, tile_frames: int) -> int:
    """Float32 numbers that pass between two layers for one tile at most, or their pieces, laid out in lines."""
    size, rows = 1, tile_frames
    for i in range(len(plan) - 1, 0, -1):
        stride, inputs = int(plan[i, STRIDE]), int(plan[i, INPUTS])
        rows = (rows - 1) * stride + int(plan[i, KERNEL])
        size = max(size, (rows + stride) * inputs)
    return -(-(size + BLOCK * DEPTH) // LINE) * LINE


# ------------------------------------------------------------- the positional convolution


class Positional(NamedTuple):
    """The positional convolution packed group by group."""

    panels: Array  # flat float32
    bias: Array
    kernel: int
    groups: int


def pack_positional(conv: Conv) -> Positional:
    kernel, groups, inputs, outputs = conv.weight.shape
    panels = [pack(conv.weight[:, g].reshape(kernel * inputs, outputs)).reshape(-1) for g in range(groups)]
    return Positional(np.concatenate(panels), np.array(conv.bias, np.float32), kernel, groups)


@vector_kernel
def squeeze_groups(x_sd, panels, bias, kernel, groups, factor, code, out_td, scratch, worker, workers):
    """out = mean of every ``factor`` frames + activation(positional convolution), one group of channels after another.

    A group's channels are first copied together, with zeros before and after, so that its windows lie in a row.
    scratch (workers, 2, size).
    """
    whole_registers()
    frames, d = x_sd.shape
    t, pad, width = len(out_td), kernel // 2, d // groups
    panel_size = len(panels) // groups
    gathered, convolved = scratch[worker, 0, : (frames + 2 * pad) * width], scratch[worker, 1, : t * width]
    for group in range(groups * worker // workers, groups * (worker + 1) // workers):
        channel = group * width
        gathered[:] = np.float32(0)
        for s in range(frames):
            row, source = gathered[(s + pad) * width : (s + pad + 1) * width], x_sd[s, channel : channel + width]
            for c in range(width):
                row[c] = source[c]
        own_bias = bias[channel : channel + width]
        depth = kernel * width
        product(gathered, 0, factor * width, t, depth, panels, group * panel_size, width, own_bias, convolved, 0, width)
        activate(convolved, code)
        for i in range(t):
            row, target = convolved[i * width : (i + 1) * width], out_td[i, channel : channel + width]
            for c in range(width):
                pooled = np.float32(0)
                for r in range(factor):
                    pooled += x_sd[i * factor + r, channel + c]
                target[c] = pooled / np.float32(factor) + row[c]
