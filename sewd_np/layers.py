"""The layers of SEW-D in plain NumPy, bottom-up: the definition that every faster kernel is measured against.

Time comes before channels everywhere: an activation is ``x_bnc`` (batch, time, channels), contiguous. A kernel-size-1
convolution is then a matrix product and nothing is transposed on the way. Dimension key: b batch, n samples or conv
steps, c channels, s frames (50 per second), t squeezed frames (25 per second), d hidden, k kernel taps, g groups.

Weights arrive prepared (``params.prepare``): matrices as (in, out), convolutions as (k, g, c_in/g, c_out/g).
Results have the dtype of the input; float64 in, float64 out.

No function takes a padding mask. Where recordings of a padded batch must not see their padding, a function takes
``lengths_b``, the number of valid time steps of each recording, or None for "all of them".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import erf, expit

if TYPE_CHECKING:
    from sewd_np.params import Conv, Linear, Norm

Array = np.ndarray

SQRT_HALF = math.sqrt(0.5)
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


# ------------------------------------------------------------------ activations


def gelu(x: Array) -> Array:
    """Exact GELU, x · Φ(x) = x/2 · (1 + erf(x/√2)); ``gelu`` and ``gelu_python`` of the reference. Any shape."""
    return 0.5 * x * (1 + erf(x * SQRT_HALF))


def gelu_tanh(x: Array) -> Array:
    """GELU by tanh: x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))); ``gelu_new``, ``gelu_fast``, ``gelu_pytorch_tanh``.

    The reference has three spellings that differ by rounding only.
    """
    return 0.5 * x * (1 + np.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)))


def softplus(x: Array) -> Array:
    """log(1 + eˣ), without overflow."""
    return np.logaddexp(x, np.zeros((), x.dtype))


def activate(x: Array, activation: str) -> Array:
    """Apply an activation by its name in the configuration. Any shape.

    Raises ``ValueError`` for a name that the configuration would have refused.
    """
    match activation:
        case "gelu" | "gelu_python":
            return gelu(x)
        case "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh":
            return gelu_tanh(x)
        case "quick_gelu":
            return x * expit(1.702 * x)
        case "relu":
            return np.maximum(x, 0)
        case "relu6":
            return np.clip(x, 0, 6)
        case "leaky_relu":
            return np.where(x >= 0, x, x.dtype.type(0.01) * x)
        case "silu" | "swish":
            return x * expit(x)
        case "mish":
            return x * np.tanh(softplus(x))
        case "tanh":
            return np.tanh(x)
        case "sigmoid":
            return expit(x)
        case "linear":
            return x
    raise ValueError(f"activation is {activation!r}; sewd_np.config.ACTIVATIONS lists the known ones.")


# --------------------------------------------------------- products and normalisations


def linear(x: Array, weight: Array, bias: Array, activation: str = "linear") -> Array:
    """activation(x · weight + bias). x (..., in), weight (in, out), bias (out,) → (..., out)."""
    return activate(x @ weight + bias, activation)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Normalise each vector over its channels: (x − mean)/√(var + eps) · weight + bias. x (..., c)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * weight + bias


def add_norm(x: Array, residual: Array, weight: Array, bias: Array, eps: float) -> Array:
    """layer_norm(x + residual): DeBERTa normalises after the sum. x, residual (b, t, d)."""
    return layer_norm(x + residual, weight, bias, eps)


def linear_add_norm(x: Array, linear_weights: Linear, residual: Array, norm: Norm, eps: float) -> Array:
    """layer_norm(x · weight + bias + residual): the end of each half of a transformer layer. (b, t, in) → (b, t, d)."""
    return add_norm(linear(x, *linear_weights), residual, *norm, eps)


def feed_forward(x_btd: Array, intermediate: Linear, output: Linear, norm: Norm, activation: str, eps: float) -> Array:
    """layer_norm(activation(x · W₁ + b₁) · W₂ + b₂ + x): the second half of a transformer layer. (b, t, d)."""
    return linear_add_norm(linear(x_btd, *intermediate, activation), output, x_btd, norm, eps)


def group_norm(x_bnc: Array, weight_c: Array, bias_c: Array, eps: float, lengths_b: Array | None = None) -> Array:
    """Normalise each channel of each recording over *time*: the reference's GroupNorm with one channel a group.

    The statistics run over the whole recording, which is why padding changes the result of every frame. With
    ``lengths_b`` they run over the first ``lengths_b[b]`` steps only, as if the recording came alone.
    Sums run in float64: 10 s are 32,000 steps, added one after the other.
    """
    steps = x_bnc.shape[1]
    out = np.empty_like(x_bnc)
    for b, length in enumerate([steps] * len(x_bnc) if lengths_b is None else lengths_b):
        valid = x_bnc[b, : max(int(length), 1)]
        mean = valid.mean(axis=0, dtype=np.float64)
        variance = np.square(valid - mean).mean(axis=0)
        scale = (weight_c / np.sqrt(variance + eps)).astype(x_bnc.dtype)
        shift = (bias_c - mean * scale).astype(x_bnc.dtype)
        out[b] = x_bnc[b] * scale + shift
    return out


# ------------------------------------------------------------------- convolutions


def conv1d(x_bnc: Array, weight_kgio: Array, bias_c: Array | None, stride: int, padding: int = 0) -> Array:
    """1-D convolution over time: out[m] = Σ_k x[m·stride + k − padding] · weight[k] + bias, group by group.

    x (b, n, c_in), weight (k, g, c_in/g, c_out/g), bias (c_out,) or None → (b, m, c_out) with
    m = (n + 2·padding − k)//stride + 1. Each tap is one matrix product over every ``stride``-th row of x: a view, so
    no window is ever copied out. Equals torch.nn.Conv1d on (b, c, n).
    """
    kernel, groups, inputs, outputs = weight_kgio.shape
    if padding:
        x_bnc = np.pad(x_bnc, ((0, 0), (padding, padding), (0, 0)))
    batch, steps, _ = x_bnc.shape
    m = (steps - kernel) // stride + 1
    x_bngi = x_bnc.reshape(batch, steps, groups, inputs)
    out_bgmo = np.zeros((batch, groups, m, outputs), x_bnc.dtype)
    for tap in range(kernel):
        rows = x_bngi[:, tap : tap + (m - 1) * stride + 1 : stride]  # (b, m, g, c_in/g)
        out_bgmo += rows.transpose(0, 2, 1, 3) @ weight_kgio[tap]
    out_bmc = out_bgmo.transpose(0, 2, 1, 3).reshape(batch, m, groups * outputs)
    return out_bmc if bias_c is None else out_bmc + bias_c


def conv_layer(
    x_bnc: Array,
    weight: Array,
    bias: Array | None,
    stride: int,
    norm: str,
    norm_weight: Array | None,
    norm_bias: Array | None,
    eps: float,
    activation: str,
    lengths_b: Array | None = None,
) -> Array:
    """One layer of the feature encoder: convolution, then ``norm`` ("group", "layer" or "none"), then activation.

    The paper's "wave feature extractor"; classes SEWD{GroupNorm,LayerNorm,NoLayerNorm}ConvLayer of the reference.
    (b, n, c_in) → (b, m, c_out). ``lengths_b`` counts valid output steps and matters to "group" only.
    """
    x_bmc = conv1d(x_bnc, weight, bias, stride)
    return activate(normalize(x_bmc, norm, norm_weight, norm_bias, eps, lengths_b), activation)


def feature_encoder(
    wave_bn: Array,
    conv_layers: tuple[Conv, ...],
    strides: tuple[int, ...],
    norm: str,
    eps: float,
    activation: str,
    lengths_b: Array | None = None,
) -> Array:
    """All convolutions of the feature encoder, one after the other: samples (b, n) → (b, s, c).

    ``norm`` "group" normalises the first layer, whose valid steps are ``lengths_b``; "layer" normalises every layer.
    """
    x_bnc = wave_bn[:, :, None]
    for layer, stride in zip(conv_layers, strides, strict=True):
        kind, weight, bias = ("none", None, None) if layer.norm is None else (norm, *layer.norm)
        x_bnc = conv_layer(x_bnc, layer.weight, layer.bias, stride, kind, weight, bias, eps, activation, lengths_b)
    return x_bnc


def normalize(
    x: Array, norm: str, weight: Array | None, bias: Array | None, eps: float, lengths_b: Array | None = None
) -> Array:
    """``group_norm``, ``layer_norm`` or nothing, by name."""
    if norm == "none":
        return x
    assert weight is not None and bias is not None
    if norm == "group":
        return group_norm(x, weight, bias, eps, lengths_b)
    return layer_norm(x, weight, bias, eps)


# ------------------------------------------------------------- squeeze and upsample


def spec_augment(x_bsd: Array, mask_bs: Array, embed_d: Array) -> Array:
    """SpecAugment in time: put the learnt vector ``embed_d`` in place of every frame that ``mask_bs`` marks."""
    return np.where(mask_bs[:, :, None], embed_d, x_bsd)


def zero_padding(x_bsd: Array, lengths_b: Array) -> Array:
    """Set the frames from ``lengths_b[b]`` on to 0."""
    return np.where(is_valid(x_bsd.shape[1], lengths_b)[:, :, None], x_bsd, x_bsd.dtype.type(0))


def is_valid(steps: int, lengths_b: Array) -> Array:
    """(b, steps) boolean: whether a step comes before its recording's length."""
    return np.arange(steps) < np.asarray(lengths_b)[:, None]


def positional_conv(x_bsd: Array, weight: Array, bias: Array, factor: int) -> Array:
    """The grouped convolution that tells frames where they are, with the stride of the squeeze.

    Padded by k//2 on both sides. An even kernel gives one frame too many: it is still here, as in the reference's
    ``pos_conv_embed.conv``; ``squeeze`` trims it.
    """
    return conv1d(x_bsd, weight, bias, factor, padding=len(weight) // 2)


def average_pool(x_bsd: Array, factor: int) -> Array:
    """Mean of every ``factor`` frames; a last incomplete group is dropped. (b, s, d) → (b, s//factor, d)."""
    batch, frames, size = x_bsd.shape
    t = frames // factor
    return x_bsd[:, : t * factor].reshape(batch, t, factor, size).mean(axis=2)


def trim_and_activate(position_brd: Array, kernel: int, activation: str) -> Array:
    """What follows the positional convolution: drop an even kernel's surplus frame (SEWDSamePadLayer), activate."""
    return activate(position_brd[:, : position_brd.shape[1] - (kernel % 2 == 0)], activation)


def add_pooled(pooled_btd: Array, position_bqd: Array) -> Array:
    """Sum of the pooled frames and the positional ones, cut to the shorter, the pool's floor(s / factor)."""
    return pooled_btd + position_bqd[:, : pooled_btd.shape[1]]


def squeeze(x_bsd: Array, conv: Conv, factor: int, activation: str) -> Array:
    """Squeeze the time axis: average_pool(x) + activation(positional_conv(x)). (b, s, d) → (b, t, d).

    The paper's "squeezed context network": the transformer runs at 25 frames a second instead of 50, which
    quarters the cost of its attention maps and halves all else.
    """
    raw = positional_conv(x_bsd, conv.weight, conv.bias, factor)
    position = trim_and_activate(raw, len(conv.weight), activation)
    return add_pooled(average_pool(x_bsd, factor), position)


def unsqueeze(x: Array, factor: int, frames: int, lengths_b: Array | None = None) -> Array:
    """Unfold (b, t, factor·d) into (b, factor·t, d), then append zero frames up to ``frames``.

    Where ``frames`` is no multiple of ``factor`` the last ones are zero: they have no squeezed frame. With
    ``lengths_b`` (valid frames after unfolding) everything beyond is zero too.
    """
    batch, t, width = x.shape
    out = np.zeros((batch, frames, width // factor), x.dtype)
    out[:, : t * factor] = x.reshape(batch, t * factor, width // factor)
    return out if lengths_b is None else zero_padding(out, lengths_b)


def upsample(
    x_btd: Array,
    weight: Array,
    bias: Array,
    factor: int,
    activation: str,
    frames: int,
    lengths_b: Array | None = None,
) -> Array:
    """Back to 50 frames a second: linear to factor·d, activation, unfold. SEWDUpsampling. (b, t, d) → (b, s, d)."""
    return unsqueeze(linear(x_btd, weight, bias, activation), factor, frames, lengths_b)


def activate_add_norm(
    out_btd: Array,
    residual_btd: Array,
    norm_weight: Array,
    norm_bias: Array,
    eps: float,
    activation: str,
    lengths_b: Array | None = None,
) -> Array:
    """What follows DeBERTa's convolution beside the first layer: layer_norm(residual + activation(out)). (b, t, d).

    out is the convolution of that layer's *input*, residual the layer's output. Padded frames of both out and the
    result are zero. Class ConvLayer of the reference.
    """
    if lengths_b is None:
        return add_norm(activate(out_btd, activation), residual_btd, norm_weight, norm_bias, eps)
    out_btd = activate(zero_padding(out_btd, lengths_b), activation)
    return zero_padding(add_norm(out_btd, residual_btd, norm_weight, norm_bias, eps), lengths_b)


# ------------------------------------------------------------------ pooling for a classifier


def weighted_layer_sum(hidden_states: tuple[Array, ...], weights_l: Array) -> Array:
    """Σ_l softmax(weights)_l · hidden_states[l]: a learnt mix of the embedding and all layers. (b, t, d)."""
    mix = np.exp(weights_l - weights_l.max())
    mix /= mix.sum()
    total = mix[0] * hidden_states[0]
    for share, states in zip(mix[1:], hidden_states[1:], strict=True):
        total = total + share * states
    return total


def mean_over_time(x_bsd: Array, lengths_b: Array | None = None) -> Array:
    """Mean of each recording's valid frames. (b, s, d) → (b, d).

    A recording without a valid frame gives NaN, 0/0, as in the reference.
    """
    if lengths_b is None:
        return x_bsd.mean(axis=1)
    counts = np.minimum(np.asarray(lengths_b), x_bsd.shape[1]).astype(x_bsd.dtype)
    with np.errstate(invalid="ignore"):
        return zero_padding(x_bsd, lengths_b).sum(axis=1) / counts[:, None]
