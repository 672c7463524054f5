"""A second opinion in loops: every operation of the table, both losses and the whole model, straight from the formulas.

This file imports nothing of the package and does no arithmetic on whole arrays: NumPy only holds the numbers, Python's
floats and ``math`` do the work, in double precision whatever the inputs are. It is slow and meant for tiny sizes.

Operations have the names, argument order and weight layouts of ``backend.Operations``: matrices (in, out), convolutions
(k, g, c_in/g, c_out/g); a linear layer is (weight, bias), a norm (weight, bias), a convolution (weight, bias, norm or
None). ``forward`` takes a model's parameters by the reference's names in PyTorch's layouts and folds, fuses and
projects them itself, so that it also checks ``prepare``. Dimension key as in the package: b batch, n or s time,
c channels, t squeezed time, d hidden, h heads, e head size, p relative bucket, i query, j key.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

Array = np.ndarray
Conv = tuple[Array, Array | None, tuple[Array, Array] | None]  # weight, bias, norm


def doubles(values: Any) -> Array:
    """The values as float64, so that indexing yields doubles."""
    return np.asarray(values, np.float64)


def indices(array: Array, axes: int | None = None) -> Iterable[tuple[int, ...]]:
    """Every index of the array, or of its first ``axes`` axes (negative: of all but the last ones)."""
    shape = array.shape if axes is None else array.shape[:axes]
    return product(*map(range, shape))


# ------------------------------------------------------------------ activations


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def activated(v: float, name: str) -> float:
    """One number through an activation, by its formula."""
    if name in ("gelu", "gelu_python"):
        return v * math.erfc(-v / math.sqrt(2)) / 2  # v · Φ(v)
    if name in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        return v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    if name == "quick_gelu":
        return v * sigmoid(1.702 * v)
    if name == "relu":
        return v if v > 0 else 0.0
    if name == "relu6":
        return min(max(v, 0.0), 6.0)
    if name == "leaky_relu":
        return v if v >= 0 else v / 100
    if name in ("silu", "swish"):
        return v * sigmoid(v)
    if name == "mish":
        return v * math.tanh(max(v, 0.0) + math.log1p(math.exp(-abs(v))))
    if name == "tanh":
        return math.tanh(v)
    if name == "sigmoid":
        return sigmoid(v)
    assert name == "linear", name
    return v


def activate(x: Array, activation: str) -> Array:
    x = doubles(x)
    out = np.zeros(x.shape)
    for at in indices(x):
        out[at] = activated(float(x[at]), activation)
    return out


# --------------------------------------------------------- products and normalisations


def linear(x: Array, weight: Array, bias: Array, activation: str = "linear") -> Array:
    x, weight, bias = doubles(x), doubles(weight), doubles(bias)
    inputs, outputs = weight.shape
    out = np.zeros((*x.shape[:-1], outputs))
    for at in indices(x, -1):
        for o in range(outputs):
            total = math.fsum(x[at][i] * weight[i, o] for i in range(inputs))
            out[at][o] = activated(total + float(bias[o]), activation)
    return out


def mean_and_variance(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / len(values)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    x, weight, bias = doubles(x), doubles(weight), doubles(bias)
    out = np.zeros(x.shape)
    for at in indices(x, -1):
        mean, variance = mean_and_variance(list(x[at]))
        for c in range(x.shape[-1]):
            out[at][c] = (x[at][c] - mean) / math.sqrt(variance + eps) * weight[c] + bias[c]
    return out


def add_norm(x: Array, residual: Array, weight: Array, bias: Array, eps: float) -> Array:
    x, residual = doubles(x), doubles(residual)
    total = np.zeros(x.shape)
    for at in indices(x):
        total[at] = x[at] + residual[at]
    return layer_norm(total, weight, bias, eps)


def linear_add_norm(
    x: Array, linear_weights: tuple[Array, Array], residual: Array, norm: tuple[Array, Array], eps: float
) -> Array:
    return add_norm(linear(x, *linear_weights), residual, *norm, eps)


def feed_forward(
    x_btd: Array,
    intermediate: tuple[Array, Array],
    output: tuple[Array, Array],
    norm: tuple[Array, Array],
    activation: str,
    eps: float,
) -> Array:
    return linear_add_norm(linear(x_btd, *intermediate, activation), output, x_btd, norm, eps)


def group_norm(x_bnc: Array, weight: Array, bias: Array, eps: float, lengths_b: Array | None = None) -> Array:
    x, weight, bias = doubles(x_bnc), doubles(weight), doubles(bias)
    batch, steps, channels = x.shape
    out = np.zeros(x.shape)
    for b in range(batch):
        valid = steps if lengths_b is None else max(int(lengths_b[b]), 1)
        for c in range(channels):
            mean, variance = mean_and_variance([x[b, n, c] for n in range(min(valid, steps))])
            for n in range(steps):
                out[b, n, c] = (x[b, n, c] - mean) / math.sqrt(variance + eps) * weight[c] + bias[c]
    return out


def normalize(
    x: Array, norm: str, weight: Array | None, bias: Array | None, eps: float, lengths_b: Array | None = None
) -> Array:
    if norm == "none":
        return doubles(x)
    assert weight is not None and bias is not None
    return group_norm(x, weight, bias, eps, lengths_b) if norm == "group" else layer_norm(x, weight, bias, eps)


# ------------------------------------------------------------------- convolutions


def conv1d(x_bnc: Array, weight_kgio: Array, bias_c: Array | None, stride: int, padding: int = 0) -> Array:
    x, weight = doubles(x_bnc), doubles(weight_kgio)
    kernel, groups, inputs, outputs = weight.shape
    batch, steps, _ = x.shape
    m = (steps + 2 * padding - kernel) // stride + 1
    out = np.zeros((batch, m, groups * outputs))
    for b, at, g, o in product(range(batch), range(m), range(groups), range(outputs)):
        total = 0.0 if bias_c is None else float(bias_c[g * outputs + o])
        for k in range(kernel):
            n = at * stride + k - padding
            if 0 <= n < steps:
                for i in range(inputs):
                    total += x[b, n, g * inputs + i] * weight[k, g, i, o]
        out[b, at, g * outputs + o] = total
    return out


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
    x = conv1d(x_bnc, weight, bias, stride)
    return activate(normalize(x, norm, norm_weight, norm_bias, eps, lengths_b), activation)


def feature_encoder(
    wave_bn: Array,
    conv_layers: Sequence[Conv],
    strides: Sequence[int],
    norm: str,
    eps: float,
    activation: str,
    lengths_b: Array | None = None,
) -> Array:
    wave = doubles(wave_bn)
    x = np.zeros((*wave.shape, 1))
    for b, n in indices(wave):
        x[b, n, 0] = wave[b, n]
    for (weight, bias, own_norm), stride in zip(conv_layers, strides, strict=True):
        kind, norm_weight, norm_bias = ("none", None, None) if own_norm is None else (norm, *own_norm)
        x = conv_layer(x, weight, bias, stride, kind, norm_weight, norm_bias, eps, activation, lengths_b)
    return x


# ------------------------------------------------------------- squeeze and upsample


def spec_augment(x_bsd: Array, mask_bs: Array, embed_d: Array) -> Array:
    out = np.array(x_bsd, np.float64)
    for b, s, d in indices(out):
        if mask_bs[b, s]:
            out[b, s, d] = embed_d[d]
    return out


def zero_padding(x_bsd: Array, lengths_b: Array) -> Array:
    out = np.array(x_bsd, np.float64)
    for b, s, d in indices(out):
        if s >= lengths_b[b]:
            out[b, s, d] = 0
    return out


def positional_conv(x_bsd: Array, weight: Array, bias: Array, factor: int) -> Array:
    return conv1d(x_bsd, weight, bias, factor, weight.shape[0] // 2)


def average_pool(x_bsd: Array, factor: int) -> Array:
    x = doubles(x_bsd)
    batch, frames, size = x.shape
    out = np.zeros((batch, frames // factor, size))
    for b, t, d in indices(out):
        out[b, t, d] = math.fsum(x[b, t * factor + k, d] for k in range(factor)) / factor
    return out


def trim_and_activate(position_brd: Array, kernel: int, activation: str) -> Array:
    batch, frames, size = position_brd.shape
    kept = frames - 1 if kernel % 2 == 0 else frames
    out = np.zeros((batch, kept, size))
    for b, t, d in indices(out):
        out[b, t, d] = activated(float(position_brd[b, t, d]), activation)
    return out


def add_pooled(pooled_btd: Array, position_bqd: Array) -> Array:
    pooled, position = doubles(pooled_btd), doubles(position_bqd)
    out = np.zeros(pooled.shape)
    for b, t, d in indices(out):
        out[b, t, d] = pooled[b, t, d] + position[b, t, d]
    return out


def squeeze(x_bsd: Array, conv: Conv, factor: int, activation: str) -> Array:
    weight, bias, _ = conv
    assert bias is not None
    raw = positional_conv(x_bsd, weight, bias, factor)
    return add_pooled(average_pool(x_bsd, factor), trim_and_activate(raw, weight.shape[0], activation))


def unsqueeze(x: Array, factor: int, frames: int, lengths_b: Array | None = None) -> Array:
    x = doubles(x)
    batch, t, width = x.shape
    size = width // factor
    out = np.zeros((batch, frames, size))
    for b, s, d in indices(out):
        if s < t * factor and (lengths_b is None or s < lengths_b[b]):
            out[b, s, d] = x[b, s // factor, s % factor * size + d]
    return out


def upsample(
    x_btd: Array,
    weight: Array,
    bias: Array,
    factor: int,
    activation: str,
    frames: int,
    lengths_b: Array | None = None,
) -> Array:
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
    if lengths_b is not None:
        out_btd = zero_padding(out_btd, lengths_b)
    out = add_norm(activate(out_btd, activation), residual_btd, norm_weight, norm_bias, eps)
    return out if lengths_b is None else zero_padding(out, lengths_b)


# ------------------------------------------------------------------ pooling for a classifier


def softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    total = math.fsum(powers)
    return [power / total for power in powers]


def weighted_layer_sum(hidden_states: Sequence[Array], weights_l: Array) -> Array:
    shares = softmax(list(doubles(weights_l)))
    out = np.zeros(hidden_states[0].shape)
    for at in indices(out):
        out[at] = math.fsum(share * float(states[at]) for share, states in zip(shares, hidden_states, strict=True))
    return out


def mean_over_time(x_bsd: Array, lengths_b: Array | None = None) -> Array:
    x = doubles(x_bsd)
    batch, frames, size = x.shape
    out = np.zeros((batch, size))
    for b, d in indices(out):
        valid = frames if lengths_b is None else min(int(lengths_b[b]), frames)
        out[b, d] = math.fsum(x[b, s, d] for s in range(valid)) / valid if valid else math.nan
    return out


# ---------------------------------------------------------------- relative positions


def single(v: float) -> float:
    """v rounded to single precision."""
    return float(struct.unpack("f", struct.pack("f", v))[0])


def log_bucket(distance: int, buckets: int, max_distance: int) -> int:
    """Bucket of one signed distance, each step rounded to single precision as the reference computes it."""
    mid = buckets // 2
    if abs(distance) <= mid:
        return distance
    reach = single(math.log(single(abs(distance) / mid)))
    whole = single(math.log(single((max_distance - 1) / mid)))
    bucket = math.ceil(single(single(reach / whole) * (mid - 1))) + mid
    return bucket if distance > 0 else -bucket


def relative_index(frames: int, buckets: int, max_distance: int, span: int) -> Array:
    out = np.zeros((frames, frames), np.int64)
    for i, j in indices(out):
        bucket = log_bucket(i - j, buckets, max_distance) if buckets > 0 else i - j
        out[i, j] = min(max(bucket + span, 0), 2 * span - 1)
    return out


# ------------------------------------------------------------------------- attention


def split_qkv(qkv: Array) -> tuple[Array, Array, Array]:
    qkv = doubles(qkv)
    batch, frames, width = qkv.shape
    parts = tuple(np.zeros((batch, frames, width // 3)) for _ in range(3))
    for b, t, at in indices(qkv):
        parts[at // (width // 3)][b, t, at % (width // 3)] = qkv[b, t, at]
    return parts[0], parts[1], parts[2]


def content_scores(q_btd: Array, k_btd: Array, heads: int, scale: float) -> Array:
    q, k = doubles(q_btd), doubles(k_btd)
    batch, frames, width = q.shape
    size = width // heads
    out = np.zeros((batch, heads, frames, frames))
    for b, h, i, j in indices(out):
        out[b, h, i, j] = math.fsum(q[b, i, h * size + e] * k[b, j, h * size + e] for e in range(size)) / scale
    return out


def content_to_position(q_btd: Array, pos_key_hpe: Array, index: Array, scale: float) -> Array:
    q, table = doubles(q_btd), doubles(pos_key_hpe)
    (batch, frames, _), (heads, _, size) = q.shape, table.shape
    out = np.zeros((batch, heads, frames, frames))
    for b, h, i, j in indices(out):
        row = table[h, index[i, j]]
        out[b, h, i, j] = math.fsum(q[b, i, h * size + e] * row[e] for e in range(size)) / scale
    return out


def position_to_content(k_btd: Array, pos_query_hpe: Array, index: Array, scale: float) -> Array:
    k, table = doubles(k_btd), doubles(pos_query_hpe)
    (batch, frames, _), (heads, _, size) = k.shape, table.shape
    out = np.zeros((batch, heads, frames, frames))
    for b, h, i, j in indices(out):
        row = table[h, index[i, j]]
        out[b, h, i, j] = math.fsum(k[b, j, h * size + e] * row[e] for e in range(size)) / scale
    return out


def add_scores(*terms_bhij: Array) -> Array:
    out = np.zeros(terms_bhij[0].shape)
    for at in indices(out):
        out[at] = math.fsum(float(term[at]) for term in terms_bhij)
    return out


def masked_softmax(scores_bhij: Array, lengths_b: Array | None = None, mask_queries: bool = False) -> Array:
    scores = doubles(scores_bhij)
    batch, heads, queries, keys = scores.shape
    out = np.zeros(scores.shape)
    for b, h, i in product(range(batch), range(heads), range(queries)):
        valid = keys if lengths_b is None else min(int(lengths_b[b]), keys)
        if valid <= 0 or (mask_queries and i >= valid):
            continue  # the row stays zero
        for j, share in enumerate(softmax([scores[b, h, i, j] for j in range(valid)])):
            out[b, h, i, j] = share
    return out


def context(probs_bhij: Array, v_btd: Array) -> Array:
    probs, v = doubles(probs_bhij), doubles(v_btd)
    _, heads, _, keys = probs.shape
    size = v.shape[-1] // heads
    out = np.zeros(v.shape)
    for b, i, d in indices(out):
        out[b, i, d] = math.fsum(probs[b, d // size, i, j] * v[b, j, d] for j in range(keys))
    return out


def attention_probabilities(
    qkv: Array,
    heads: int,
    positions: tuple[Array | None, Array | None],
    index: Array | None,
    scale: float,
    lengths_b: Array | None,
    mask_queries: bool,
) -> Array:
    q, k, _ = split_qkv(qkv)
    pos_key_hpe, pos_query_hpe = positions
    terms = [content_scores(q, k, heads, scale)]
    if pos_key_hpe is not None and index is not None:
        terms.append(content_to_position(q, pos_key_hpe, index, scale))
    if pos_query_hpe is not None and index is not None:
        terms.append(position_to_content(k, pos_query_hpe, index, scale))
    return masked_softmax(add_scores(*terms), lengths_b, mask_queries)


def disentangled_attention(
    qkv: Array,
    heads: int,
    positions: tuple[Array | None, Array | None],
    index: Array | None,
    scale: float,
    lengths_b: Array | None = None,
    mask_queries: bool = False,
) -> Array:
    probs = attention_probabilities(qkv, heads, positions, index, scale, lengths_b, mask_queries)
    return context(probs, split_qkv(qkv)[2])


# ---------------------------------------------------------------------------- losses


def collapsed(path: Sequence[int], blank: int) -> list[int]:
    """What a frame path spells: runs become one, blanks go."""
    return [token for s, token in enumerate(path) if token != blank and (s == 0 or path[s - 1] != token)]


def ctc_probability_by_paths(logits_sv: Array, labels: Sequence[int], blank: int) -> float:
    """Sum of the probabilities of all v^s paths that spell ``labels``. Only for a handful of frames."""
    probs_sv = [softmax(list(row)) for row in doubles(logits_sv)]
    total = []
    for path in product(range(np.shape(logits_sv)[1]), repeat=len(probs_sv)):
        if collapsed(path, blank) == list(labels):
            total.append(math.prod(probs[token] for probs, token in zip(probs_sv, path, strict=True)))
    return math.fsum(total)


def ctc_probability(logits_sv: Array, labels: Sequence[int], blank: int) -> float:
    """The same by the forward algorithm, in plain probabilities."""
    probs_sv = [softmax(list(row)) for row in doubles(logits_sv)]
    symbols = [blank]
    for label in labels:
        symbols += [label, blank]
    reached = [0.0] * len(symbols)
    for s, probs in enumerate(probs_sv):
        before = reached
        reached = []
        for u, symbol in enumerate(symbols):
            arriving = before[u] if s else float(u <= 1)
            if s and u >= 1:
                arriving += before[u - 1]
            if s and u >= 2 and symbol not in (blank, symbols[u - 2]):
                arriving += before[u - 2]
            reached.append(arriving * probs[symbol])
    if not probs_sv:
        return float(len(labels) == 0)
    return math.fsum(reached[-2:])


def ctc_loss(
    logits_bsv: Array,
    labels_bl: Array,
    lengths_b: Array,
    blank: int,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> float | Array:
    losses, counts = [], []
    for b in range(len(logits_bsv)):
        labels = [int(label) for label in labels_bl[b] if label not in (-100, blank)]
        probability = ctc_probability(logits_bsv[b][: int(lengths_b[b])], labels, blank)
        losses.append(-math.log(probability) if probability > 0 else 0.0 if zero_infinity else math.inf)
        counts.append(max(len(labels), 1))
    if reduction == "none":
        return np.array(losses)
    if reduction == "sum":
        return math.fsum(losses)
    return math.fsum(loss / count for loss, count in zip(losses, counts, strict=True)) / len(losses)


def cross_entropy(logits_bl: Array, labels_b: Sequence[int]) -> float:
    kept = [(row, label) for row, label in zip(doubles(logits_bl), labels_b, strict=True) if label != -100]
    if not kept:
        return math.nan
    return math.fsum(-math.log(softmax(list(row))[label]) for row, label in kept) / len(kept)


# ----------------------------------------------------------------- the whole model


def transposed(weight_oi: Array) -> Array:
    """PyTorch's (out, in) as (in, out)."""
    weight = doubles(weight_oi)
    out = np.zeros((weight.shape[1], weight.shape[0]))
    for o, i in indices(weight):
        out[i, o] = weight[o, i]
    return out


def taps(weight_oik: Array, groups: int = 1) -> Array:
    """PyTorch's (out, in/g, k) as (k, g, in/g, out/g)."""
    weight = doubles(weight_oik)
    outputs, inputs, kernel = weight.shape
    out = np.zeros((kernel, groups, inputs, outputs // groups))
    for o, i, k in indices(weight):
        out[k, o // (outputs // groups), i, o % (outputs // groups)] = weight[o, i, k]
    return out


def folded_weight_norm(v_oik: Array, g_11k: Array) -> Array:
    """g · v / ‖v‖ with one norm per kernel tap."""
    v, g = doubles(v_oik), doubles(g_11k)
    outputs, inputs, kernel = v.shape
    out = np.zeros(v.shape)
    for k in range(kernel):
        length = math.sqrt(math.fsum(v[o, i, k] ** 2 for o in range(outputs) for i in range(inputs)))
        for o, i in product(range(outputs), range(inputs)):
            out[o, i, k] = g[0, 0, k] * v[o, i, k] / length
    return out


def projected_table(table_pd: Array, weight: Array, bias: Array, heads: int) -> Array:
    """The relative-position table through one projection, (h, p, e)."""
    rows = linear(table_pd, weight, bias)
    size = rows.shape[1] // heads
    out = np.zeros((heads, len(rows), size))
    for h, p, e in indices(out):
        out[h, p, e] = rows[p, h * size + e]
    return out


def frames_of(samples: int, config: Any) -> int:
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples = max((samples - kernel) // stride + 1, 0)
    return samples


def forward(
    config: Any,
    params: Mapping[str, Array],
    wave_bn: Array,
    lengths_b: Array | None = None,
    padding: str = "transformers",
    mask_bs: Array | None = None,
) -> dict[str, Any]:
    """The whole model. ``config`` has the fields of a config.json as attributes; the head is read off ``params``.

    ``lengths_b`` counts valid samples; ``padding`` is "transformers" or "original" ("alone" is a call per recording).
    Returns last_hidden_state, hidden_states and attentions (lists), and logits where there is a head.
    """

    def dense(name: str) -> tuple[Array, Array]:
        return transposed(params[f"{name}.weight"]), params[f"{name}.bias"]

    def norm(name: str) -> tuple[Array, Array]:
        return params[f"{name}.weight"], params[f"{name}.bias"]

    k, eps, activation = config.squeeze_factor, config.layer_norm_eps, config.feat_extract_activation
    conv_layers: list[Conv] = []
    for layer in range(len(config.conv_stride)):
        name = f"feature_extractor.conv_layers.{layer}"
        normed = config.feat_extract_norm == "layer" or layer == 0
        weight, bias = taps(params[f"{name}.conv.weight"]), params.get(f"{name}.conv.bias")
        conv_layers.append((weight, bias, norm(f"{name}.layer_norm") if normed else None))
    x = feature_encoder(wave_bn, conv_layers, config.conv_stride, config.feat_extract_norm, 1e-5, activation)
    x = layer_norm(x, *norm("layer_norm"), config.feature_layer_norm_eps)
    if x.shape[-1] != config.hidden_size:
        x = linear(x, *dense("feature_projection"))
    if mask_bs is not None and config.apply_spec_augment:
        x = spec_augment(x, mask_bs, params["masked_spec_embed"])
    frames = x.shape[1]
    valid_frames = valid = None
    if lengths_b is not None:
        valid_frames = np.array([frames_of(int(n), config) for n in lengths_b])
        rounded = [math.ceil(s / k) if padding == "transformers" else math.floor(s / k) for s in valid_frames]
        valid = np.array([min(t, frames // k) for t in rounded])
        x = zero_padding(x, valid_frames)

    name = "encoder.pos_conv_embed.conv"
    weight = taps(
        folded_weight_norm(params[f"{name}.weight_v"], params[f"{name}.weight_g"]), config.num_conv_pos_embedding_groups
    )
    x = squeeze(x, (weight, params[f"{name}.bias"], None), k, activation)
    hidden_states, attentions = [x], []
    for layer in range(config.num_hidden_layers):
        x, probs = transformer_layer(config, params, layer, x, valid, padding == "original")
        hidden_states.append(x)
        attentions.append(probs)
        if layer == 0 and config.conv_kernel_size > 0:
            name = "encoder.encoder.conv"
            weight, bias = taps(params[f"{name}.conv.weight"], config.conv_groups), params[f"{name}.conv.bias"]
            out = conv1d(hidden_states[0], weight, bias, 1, config.conv_kernel_size // 2)
            x = activate_add_norm(out, x, *norm(f"{name}.LayerNorm"), eps, config.conv_act, valid)
    last = upsample(x, *dense("encoder.upsample.projection"), k, activation, frames)
    out = {"last_hidden_state": last, "hidden_states": hidden_states, "attentions": attentions}
    if "lm_head.weight" in params:
        out["logits"] = linear(last, *dense("lm_head"))
    elif "projector.weight" in params:
        if config.use_weighted_layer_sum:
            last = weighted_layer_sum(hidden_states, params["layer_weights"])
        pooled = mean_over_time(linear(last, *dense("projector")), valid_frames)
        out["logits"] = linear(pooled, *dense("classifier"))
    return out


def transformer_layer(
    config: Any, params: Mapping[str, Array], layer: int, x: Array, valid: Array | None, mask_queries: bool
) -> tuple[Array, Array]:
    """One layer and its attention probabilities."""
    name, heads, eps = f"encoder.encoder.layer.{layer}", config.num_attention_heads, config.layer_norm_eps

    def dense(part: str) -> tuple[Array, Array]:
        return transposed(params[f"{name}.{part}.weight"]), params[f"{name}.{part}.bias"]

    def norm(part: str) -> tuple[Array, Array]:
        return params[f"{name}.{part}.weight"], params[f"{name}.{part}.bias"]

    batch, frames, size = x.shape
    scale = math.sqrt(size // heads * (1 + len(config.pos_att_type)))
    qkv = np.zeros((batch, frames, 3 * size))
    for part, projection in enumerate(("query_proj", "key_proj", "value_proj")):
        y = linear(x, *dense(f"attention.self.{projection}"))
        for b, t, d in indices(y):
            qkv[b, t, part * size + d] = y[b, t, d]
    pos_key = pos_query = index = None
    if config.relative_attention:
        table = params["encoder.encoder.rel_embeddings.weight"]
        if "layer_norm" in config.norm_rel_ebd:
            prefix = "encoder.encoder.LayerNorm"
            table = layer_norm(table, params[f"{prefix}.weight"], params[f"{prefix}.bias"], eps)
        reach = config.max_relative_positions if config.max_relative_positions >= 1 else config.max_position_embeddings
        span = config.position_buckets if config.position_buckets > 0 else reach
        index = relative_index(frames, config.position_buckets, reach, span)
        shared = config.share_att_key
        if "c2p" in config.pos_att_type:
            projection = "key_proj" if shared else "pos_key_proj"
            pos_key = projected_table(table, *dense(f"attention.self.{projection}"), heads)
        if "p2c" in config.pos_att_type:
            projection = "query_proj" if shared else "pos_query_proj"
            pos_query = projected_table(table, *dense(f"attention.self.{projection}"), heads)
    probs = attention_probabilities(qkv, heads, (pos_key, pos_query), index, scale, valid, mask_queries)
    attended = linear(context(probs, split_qkv(qkv)[2]), *dense("attention.output.dense"))
    x = add_norm(attended, x, *norm("attention.output.LayerNorm"), eps)
    raised = linear(x, *dense("intermediate.dense"), config.hidden_act)
    return add_norm(linear(raised, *dense("output.dense")), x, *norm("output.LayerNorm"), eps), probs
