"""The calls that every operation of every backend must get right: sizes that have tails, and every option.

Arrays are float64 (a test casts them), weights are in the layout of ``layers`` and ``attention``; a relative index is
given by its arguments (``Index``), as each backend has its own form of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sewd_np.config import ACTIVATIONS
from sewd_np.params import Conv, Linear, Norm

Array = np.ndarray
Normal = Callable[..., Array]


class Case(NamedTuple):
    """One call: an operation, what is special about it, and its arguments.

    ``amplification`` says how much the operation enlarges rounding errors that arise inside it.
    """

    operation: str
    label: str
    args: tuple[Any, ...]
    amplification: float = 1.0


class Index(NamedTuple):
    """Arguments of ``relative_index``, in the place of its result."""

    frames: int
    buckets: int
    max_distance: int
    span: int


def lengths(*values: int) -> Array:
    return np.array(values, np.int64)


def all_cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape)

    yield from activation_cases(normal)
    yield from product_and_norm_cases(normal)
    yield from convolution_cases(normal)
    yield from encoder_cases(normal)
    yield from squeeze_cases(normal)
    yield from attention_cases(normal)
    yield from residual_and_pooling_cases(normal)


def activation_cases(normal: Normal) -> Iterator[Case]:
    borders = np.array([-1e4, -30.0, -6.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 5.999, 6.0, 6.001, 30.0, 1e4])
    for name in ACTIVATIONS:
        yield Case("activate", name, (np.concatenate([borders, 4 * normal(24)]).reshape(1, 37, 1), name))
        yield Case("linear", name, (normal(2, 3, 5), normal(5, 7), normal(7), name))
    yield Case("activate", "one number", (normal(1, 1, 1), "gelu"))


def product_and_norm_cases(normal: Normal) -> Iterator[Case]:
    for shape, outputs in [((1, 1, 1), 1), ((2, 3, 5), 4), ((3, 8, 16), 33), ((1, 17, 31), 2), ((2, 9), 3)]:
        yield Case("linear", f"{shape} to {outputs}", (normal(*shape), normal(shape[-1], outputs), normal(outputs)))
    for shape, eps in [((1, 1, 1), 1e-7), ((2, 3, 5), 1e-5), ((1, 4, 48), 1e-7), ((3, 1, 17), 0.1), ((6, 8), 1e-7)]:
        c = shape[-1]
        yield Case("layer_norm", f"{shape} eps {eps}", (3 + 2 * normal(*shape), normal(c), normal(c), eps))
        args = (normal(*shape), normal(*shape), normal(c), normal(c), eps)
        yield Case("add_norm", f"{shape} eps {eps}", args)
    sizes: list[tuple[tuple[int, ...], int, int]] = [((1, 1, 1), 1, 1), ((2, 3, 5), 7, 4), ((1, 9, 33), 40, 31)]
    for shape, inner, d in [*sizes, ((3, 8, 16), 65, 48)]:
        x, first, own = normal(*shape), Linear(normal(shape[-1], d), normal(d)), Norm(normal(d), normal(d))
        residual, label = normal(*shape[:-1], d), f"{shape} inner {inner} to {d}"
        # One channel: x − mean is 0 but for rounding, which the norm divides by sqrt(eps).
        yield Case("linear_add_norm", label, (x, first, residual, own, 1e-5))
        raise_, lower = Linear(normal(d, inner), normal(inner)), Linear(normal(inner, d), normal(d))
        for activation in ("gelu", "mish"):
            yield Case("feed_forward", f"{label} {activation}", (residual, raise_, lower, own, activation, 1e-7))
    for shape in [(1, 1, 3), (2, 7, 1), (3, 16, 5), (1, 33, 8)]:
        x, weight, bias = 2 + 3 * normal(*shape), normal(shape[-1]), normal(shape[-1])
        for norm in ("group", "layer"):
            yield Case("normalize", f"{norm} {shape}", (x, norm, weight, bias, 1e-5))
        for kind, counts in {"short": [0, 1, 2], "long": [1, 5, 99], "full": [shape[1]] * 3}.items():
            valid = lengths(*counts[: shape[0]])
            yield Case("normalize", f"group {shape}, {kind}", (x, "group", weight, bias, 1e-5, valid))
        yield Case("normalize", f"none {shape}", (x, "none", None, None, 1e-5))


def convolution_cases(normal: Normal) -> Iterator[Case]:
    # steps, kernel, stride, padding, groups, c_in per group, c_out per group; kernel 10 stride 5, 3/2, 2/2 and 1/1 are
    # the published ones.
    ladder = [
        (10, 10, 5, 0, 1, 1, 4),
        (57, 10, 5, 0, 1, 1, 8),
        (14, 10, 5, 0, 1, 1, 3),
        (3, 3, 2, 0, 1, 4, 5),
        (17, 3, 2, 0, 1, 4, 5),
        (18, 3, 2, 0, 1, 3, 7),
        (2, 2, 2, 0, 1, 2, 3),
        (9, 2, 2, 0, 1, 5, 4),
        (16, 2, 2, 0, 1, 5, 4),
        (1, 1, 1, 0, 1, 6, 3),
        (13, 1, 1, 0, 1, 6, 3),
        (11, 2, 3, 0, 1, 2, 2),
        (8, 4, 3, 2, 2, 3, 2),
        (7, 3, 1, 1, 4, 1, 2),
        (3, 5, 2, 2, 2, 2, 2),
        (1, 7, 1, 3, 1, 2, 2),
        (12, 1, 4, 0, 3, 2, 1),
    ]
    for number, (n, k, stride, padding, g, i, o) in enumerate(ladder):
        batch = 1 + number % 3
        x, weight, bias = normal(batch, n, g * i), normal(k, g, i, o), normal(g * o)
        label = f"n {n} k {k} stride {stride} padding {padding} groups {g}"
        yield Case("conv1d", label, (x, weight, bias, stride, padding))
        yield Case("conv1d", f"{label} no bias", (x, weight, None, stride, padding))


def encoder_cases(normal: Normal) -> Iterator[Case]:
    # channels, kernels, strides and how many frames beyond the first: published steps, gaps between windows, one frame.
    ladders: list[tuple[list[int], list[int], list[int], int]] = [
        ([4], [10], [5], 5),
        ([1], [1], [1], 3),
        ([3, 5], [10, 3], [5, 2], 0),
        ([4, 4, 6], [10, 3, 1], [5, 2, 1], 3),
        ([5, 3, 4, 2], [10, 3, 2, 1], [5, 2, 2, 1], 2),
        ([3, 7, 5], [4, 2, 3], [3, 5, 2], 1),
        ([2, 3], [2, 1], [3, 4], 4),
    ]
    for number, (channels, kernels, strides, more) in enumerate(ladders):
        batch, samples = 1 + number % 3, 1 + more
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
            samples = (samples - 1) * stride + kernel
        samples += number % 2
        steps = (samples - kernels[0]) // strides[0] + 1
        for norm, with_bias in itertools.product(("group", "layer"), (False, True)):
            layers, inputs = [], 1
            for i, (outputs, kernel) in enumerate(zip(channels, kernels, strict=True)):
                own = Norm(normal(outputs), normal(outputs)) if norm == "layer" or i == 0 else None
                bias = normal(outputs) if with_bias else None
                layers.append(Conv(normal(kernel, 1, inputs, outputs), bias, own))
                inputs = outputs
            activation = ("gelu", "relu", "silu")[number % 3]
            args = (normal(batch, samples), tuple(layers), tuple(strides), norm, 1e-5, activation)
            label = f"ladder {number}, {norm} norm, bias {with_bias}"
            # A norm over one or two numbers divides rounding errors before it by almost 0: by sqrt(1e-5) at worst.
            few = 10.0 if min(steps, *channels) <= 2 else 1.0
            yield Case("feature_encoder", label, args, few)
            valid = lengths(max(steps - 1, 1), 1, steps)[:batch]
            if norm == "group":
                yield Case("feature_encoder", f"{label}, lengths", (*args, valid), 10.0 if min(valid) <= 2 else few)


def squeeze_cases(normal: Normal) -> Iterator[Case]:
    for number, (s, k, factor) in enumerate(itertools.product((3, 4, 7, 12), (1, 2, 5, 8), (1, 2, 3))):
        batch, groups, width = 1 + number % 2, 1 + number % 3, 2
        d = groups * width
        x, weight, bias = normal(batch, s, d), normal(k, groups, width, width), normal(d)
        label = f"s {s} kernel {k} factor {factor} groups {groups}"
        yield Case("positional_conv", label, (x, weight, bias, factor))
        yield Case("squeeze", label, (x, Conv(weight, bias, None), factor, "gelu"))
        if k == 1:
            yield Case("average_pool", label, (x, factor))
            pooled = normal(batch, max(s // factor, 1), d)
            for surplus in (0, 1):
                position = normal(batch, max(s // factor, 1) + surplus, d)
                yield Case("add_pooled", f"{label} surplus {surplus}", (pooled, position))
    for kernel in (1, 2, 7, 8):
        yield Case("trim_and_activate", f"kernel {kernel}", (normal(2, 5, 3), kernel, "gelu"))
        yield Case("trim_and_activate", f"kernel {kernel}, tanh", (normal(1, 2, 1), kernel, "tanh"))
    for t, factor, surplus in [(1, 1, 0), (1, 2, 1), (3, 2, 0), (4, 3, 2), (5, 3, 0)]:
        frames, d = t * factor + surplus, 4
        label = f"t {t} factor {factor} frames {frames}"
        for valid in (None, lengths(frames, max(frames - 2, 0)), lengths(0, t)):
            yield Case("unsqueeze", f"{label} lengths {valid}", (normal(2, t, factor * d), factor, frames, valid))
            args = (normal(2, t, d), normal(d, factor * d), normal(factor * d), factor, "gelu", frames, valid)
            yield Case("upsample", f"{label} lengths {valid}", args)
    for s in (1, 2, 5):
        marks = np.random.default_rng(s).random((2, s)) < 0.5
        yield Case("spec_augment", f"s {s}", (normal(2, s, 3), marks, normal(3)))
        yield Case("spec_augment", f"s {s}, all", (normal(2, s, 3), np.ones((2, s), bool), normal(3)))
        yield Case("zero_padding", f"s {s}", (normal(3, s, 3), lengths(0, s // 2, s)))
        yield Case("zero_padding", f"s {s}, beyond", (normal(2, s, 1), lengths(s + 1, 1)))


def attention_cases(normal: Normal) -> Iterator[Case]:
    for frames, buckets, longest, span in [
        (1, 4, 4, 4),
        (2, -1, 1, 1),
        (9, 4, 4, 4),
        (12, -1, 5, 5),
        (40, 8, 16, 8),
        (40, 8, 64, 8),
        (33, 9, 30, 9),
    ]:
        label = f"t {frames} buckets {buckets} max {longest}"
        yield Case("relative_index", label, (frames, buckets, longest, span))
    # batch, frames, heads, head size; buckets and longest distance: frames farther apart than that share a bucket.
    shapes = [
        (1, 1, 1, 1, 4, 8),
        (2, 2, 3, 1, -1, 1),
        (1, 5, 2, 4, -1, 3),
        (3, 8, 3, 5, 4, 5),
        (2, 13, 1, 6, 9, 30),
        (1, 19, 4, 3, 4, 6),
    ]
    for batch, t, heads, e, buckets, longest in shapes:
        span, scale, d = buckets if buckets > 0 else longest, float(np.sqrt(3 * e)), heads * e
        q, k, v, index = normal(batch, t, d), normal(batch, t, d), normal(batch, t, d), Index(t, buckets, longest, span)
        pos_key, pos_query, qkv = normal(heads, 2 * span, e), normal(heads, 2 * span, e), normal(batch, t, 3 * d)
        scores = [3 * normal(batch, heads, t, t) for _ in range(3)]
        label = f"b {batch} t {t} h {heads} e {e}"
        yield Case("split_qkv", label, (qkv,))
        yield Case("content_scores", label, (q, k, heads, scale))
        yield Case("content_to_position", label, (q, pos_key, index, scale))
        yield Case("position_to_content", label, (k, pos_query, index, scale))
        for terms in (1, 2, 3):
            yield Case("add_scores", f"{label} terms {terms}", tuple(scores[:terms]))
        probs = np.abs(scores[0]) / np.abs(scores[0]).sum(-1, keepdims=True)
        yield Case("context", label, (probs, v))
        tables = {"c2p p2c": (pos_key, pos_query), "c2p": (pos_key, None), "p2c": (None, pos_query), "": (None, None)}
        for valid in (None, lengths(t, max(t - 1, 0), 1)[:batch], lengths(t // 2, 0, t + 1)[:batch]):
            for mask_queries in (False, True):
                rule = f"lengths {valid} mask_queries {mask_queries}"
                yield Case("masked_softmax", f"{label} {rule}", (scores[0], valid, mask_queries))
                for kinds, (key, query) in tables.items():
                    args = (qkv, heads, (key, query), index if kinds else None, scale, valid, mask_queries)
                    yield Case("disentangled_attention", f"{label} {kinds} {rule}", args)


def residual_and_pooling_cases(normal: Normal) -> Iterator[Case]:
    for t, d in [(1, 3), (2, 4), (5, 4), (8, 3), (3, 2)]:
        out, residual = normal(2, t, d), normal(2, t, d)
        rest = (normal(d), normal(d), 1e-7, "tanh")
        few = 10.0 if d <= 2 else 1.0  # see encoder_cases
        for valid in (None, lengths(t, max(t - 2, 0)), lengths(t // 2, t + 1)):
            yield Case("activate_add_norm", f"t {t} d {d} lengths {valid}", (out, residual, *rest, valid), few)
    for layers, s in [(1, 1), (3, 2), (4, 7)]:
        states = tuple(normal(2, s, 3) for _ in range(layers))
        yield Case("weighted_layer_sum", f"{layers} layers", (states, 2 * normal(layers)))
        yield Case("mean_over_time", f"s {s}", (normal(2, s, 3),))
        yield Case("mean_over_time", f"s {s}, lengths", (normal(3, s, 5), lengths(s, max(s - 1, 1), s + 2)))
        yield Case("mean_over_time", f"s {s}, one has no frames", (normal(2, s, 3), lengths(0, 1)))


CASES = list(all_cases())
