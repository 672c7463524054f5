"""Parameters: which tensors a configuration has, and the layout the NumPy operations want them in.

Two forms, one direction:

* ``params``: a flat mapping from the reference's tensor names (without the ``sew_d.`` prefix of the fine-tuned
  classes) to arrays in PyTorch's layout. Saving, comparing and, one day, the backward pass work on it.
* ``Weights``: what a forward pass reads. ``prepare(params, config)`` makes it: matrices transposed to (in, out),
  weight norm folded, query, key and value fused, the relative-position table normalised and projected by every
  layer. It is a pure function of its arguments, so it can be called again after the parameters have changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from sewd_np.config import SEWDConfig
from sewd_np.layers import layer_norm, linear

Head = Literal["model", "ctc", "classification"]
HEADS: tuple[Head, ...] = ("model", "ctc", "classification")
Shape = tuple[int, ...]
Params = Mapping[str, np.ndarray]


# ----------------------------------------------------------------- names and shapes


def expected_shapes(config: SEWDConfig, head: str) -> dict[str, Shape]:
    """Every tensor of a model, by the reference's name, with its PyTorch shape, in the order of the data.

    ``head`` is "model" (no head), "ctc" or "classification". The positional convolution carries the hub's names for
    its weight norm, ``weight_g`` and ``weight_v``.
    """
    if head not in HEADS:
        raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}.")
    d = config.hidden_size
    shapes: dict[str, Shape] = {}
    if config.has_masked_spec_embed:
        shapes["masked_spec_embed"] = (d,)
    shapes.update(_feature_encoder_shapes(config))
    shapes.update(_encoder_shapes(config))
    if head == "ctc":
        shapes.update(_linear_shapes("lm_head", config.vocab_size, d))
    elif head == "classification":
        if config.use_weighted_layer_sum:
            shapes["layer_weights"] = (config.num_hidden_layers + 1,)
        shapes.update(_linear_shapes("projector", config.classifier_proj_size, d))
        shapes.update(_linear_shapes("classifier", config.num_labels, config.classifier_proj_size))
    return shapes


def _linear_shapes(name: str, outputs: int, inputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm_shapes(name: str, size: int) -> dict[str, Shape]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _feature_encoder_shapes(config: SEWDConfig) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    channels_in = 1
    for i, (channels, kernel) in enumerate(zip(config.conv_dim, config.conv_kernel, strict=True)):
        name = f"feature_extractor.conv_layers.{i}"
        shapes[f"{name}.conv.weight"] = (channels, channels_in, kernel)
        if config.conv_bias:
            shapes[f"{name}.conv.bias"] = (channels,)
        if config.feat_extract_norm == "layer" or i == 0:
            shapes.update(_norm_shapes(f"{name}.layer_norm", channels))
        channels_in = channels
    shapes.update(_norm_shapes("layer_norm", channels_in))
    if config.has_feature_projection:
        shapes.update(_linear_shapes("feature_projection", config.hidden_size, channels_in))
    return shapes


def _encoder_shapes(config: SEWDConfig) -> dict[str, Shape]:
    d, f, kernel = config.hidden_size, config.intermediate_size, config.num_conv_pos_embeddings
    shapes: dict[str, Shape] = {
        "encoder.pos_conv_embed.conv.bias": (d,),
        "encoder.pos_conv_embed.conv.weight_g": (1, 1, kernel),
        "encoder.pos_conv_embed.conv.weight_v": (d, d // config.num_conv_pos_embedding_groups, kernel),
    }
    own_projections = config.relative_attention and not config.share_att_key
    for i in range(config.num_hidden_layers):
        name = f"encoder.encoder.layer.{i}"
        for projection in ("query_proj", "key_proj", "value_proj"):
            shapes.update(_linear_shapes(f"{name}.attention.self.{projection}", d, d))
        if own_projections and config.uses_c2p:
            shapes.update(_linear_shapes(f"{name}.attention.self.pos_key_proj", d, d))
        if own_projections and config.uses_p2c:
            shapes.update(_linear_shapes(f"{name}.attention.self.pos_query_proj", d, d))
        shapes.update(_linear_shapes(f"{name}.attention.output.dense", d, d))
        shapes.update(_norm_shapes(f"{name}.attention.output.LayerNorm", d))
        shapes.update(_linear_shapes(f"{name}.intermediate.dense", f, d))
        shapes.update(_linear_shapes(f"{name}.output.dense", d, f))
        shapes.update(_norm_shapes(f"{name}.output.LayerNorm", d))
    if config.relative_attention:
        shapes["encoder.encoder.rel_embeddings.weight"] = (2 * config.position_span, d)
    if config.normalizes_positions:
        shapes.update(_norm_shapes("encoder.encoder.LayerNorm", d))
    if config.conv_kernel_size > 0:
        shapes["encoder.encoder.conv.conv.weight"] = (d, d // config.conv_groups, config.conv_kernel_size)
        shapes["encoder.encoder.conv.conv.bias"] = (d,)
        shapes.update(_norm_shapes("encoder.encoder.conv.LayerNorm", d))
    shapes.update(_linear_shapes("encoder.upsample.projection", config.squeeze_factor * d, d))
    return shapes


def random_params(config: SEWDConfig, head: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Untrained float32 parameters: small Gaussian weights and biases, norms about 1, seeded.

    Not an initialisation to train from: every parameter, biases and norms too, is off its neutral value, so that a
    forgotten one shows in a test or a benchmark.
    """
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in expected_shapes(config, head).items():
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("layer_norm.weight") or name.endswith("LayerNorm.weight") or name.endswith("weight_g"):
            values = 1 + 0.1 * values
        elif len(shape) > 1:
            values /= np.sqrt(fan_in)
        else:
            values *= 0.1
        params[name] = values.astype(np.float32)
    return params


# ------------------------------------------------------------------ prepared weights


class Linear(NamedTuple):
    """``x @ weight + bias``: weight (in, out), bias (out,)."""

    weight: Any
    bias: Any


class Norm(NamedTuple):
    """Scale and shift of a normalisation, each (c,)."""

    weight: Any
    bias: Any


class Conv(NamedTuple):
    """weight (k, g, c_in / g, c_out / g), tap by tap and group by group; bias (c_out,) or None; norm or None."""

    weight: Any
    bias: Any
    norm: Norm | None


class Attention(NamedTuple):
    """Prepared weights of one disentangled self-attention.

    ``qkv`` projects to query, key and value side by side (d, 3d). ``pos_key`` and ``pos_query`` (h, p, e) are the
    relative-position table already projected, for the c2p and the p2c term; None where the term is absent.
    ``positions`` is what the fused operation reads: here the same two.
    """

    qkv: Linear
    pos_key: Any
    pos_query: Any
    positions: Any
    output: Linear
    norm: Norm


class Layer(NamedTuple):
    """Prepared weights of one transformer layer."""

    attention: Attention
    intermediate: Linear
    output: Linear
    norm: Norm


class Weights(NamedTuple):
    """All that a forward pass reads, in one backend's own layout. Parts that a configuration lacks are None.

    ``feature_encoder`` and ``squeeze`` are what the fused operations of these names read: here the convolutions that
    the explicit forms read too.
    """

    feature_encoder: Any
    conv_layers: tuple[Conv, ...]
    layer_norm: Norm
    feature_projection: Linear | None
    masked_spec_embed: Any
    squeeze: Any
    pos_conv: Conv
    rel_embeddings: Any
    rel_embeddings_normed: Any
    layers: tuple[Layer, ...]
    conv: Conv | None
    upsample: Linear
    lm_head: Linear | None
    projector: Linear | None
    classifier: Linear | None
    layer_weights: Any


def prepare(params: Params, config: SEWDConfig) -> Weights:
    """``Weights`` for the NumPy operations, in the dtype of ``params``."""
    table = params.get("encoder.encoder.rel_embeddings.weight")
    normed = None if table is None else normalize_positions(params, config, table)
    first_norm_only = config.feat_extract_norm == "group"
    conv_layers = tuple(
        _conv(
            params,
            f"feature_extractor.conv_layers.{i}.conv",
            None if first_norm_only and i > 0 else _norm(params, f"feature_extractor.conv_layers.{i}.layer_norm"),
        )
        for i in range(len(config.conv_dim))
    )
    pos_conv = _positional_conv(params, config)
    return Weights(
        feature_encoder=conv_layers,
        conv_layers=conv_layers,
        layer_norm=_norm(params, "layer_norm"),
        feature_projection=_linear(params, "feature_projection") if config.has_feature_projection else None,
        masked_spec_embed=params.get("masked_spec_embed"),
        squeeze=pos_conv,
        pos_conv=pos_conv,
        rel_embeddings=table,
        rel_embeddings_normed=normed,
        layers=tuple(_layer(params, config, i, normed) for i in range(config.num_hidden_layers)),
        conv=(
            _conv(
                params, "encoder.encoder.conv.conv", _norm(params, "encoder.encoder.conv.LayerNorm"), config.conv_groups
            )
            if config.conv_kernel_size > 0
            else None
        ),
        upsample=_linear(params, "encoder.upsample.projection"),
        lm_head=_linear(params, "lm_head") if "lm_head.weight" in params else None,
        projector=_linear(params, "projector") if "projector.weight" in params else None,
        classifier=_linear(params, "classifier") if "classifier.weight" in params else None,
        layer_weights=params.get("layer_weights"),
    )


def _linear(params: Params, name: str) -> Linear:
    return Linear(np.ascontiguousarray(params[f"{name}.weight"].T), params[f"{name}.bias"])


def _norm(params: Params, name: str) -> Norm:
    return Norm(params[f"{name}.weight"], params[f"{name}.bias"])


def grouped_taps(weight_oik: np.ndarray, groups: int) -> np.ndarray:
    """PyTorch's convolution weight (out, in / g, k) as (k, g, in / g, out / g): one small matrix per tap and group."""
    out, inputs, kernel = weight_oik.shape
    return np.ascontiguousarray(weight_oik.reshape(groups, out // groups, inputs, kernel).transpose(3, 0, 2, 1))


def _conv(params: Params, name: str, norm: Norm | None, groups: int = 1) -> Conv:
    return Conv(grouped_taps(params[f"{name}.weight"], groups), params.get(f"{name}.bias"), norm)


def _positional_conv(params: Params, config: SEWDConfig) -> Conv:
    """Fold the weight norm: weight = g · v / ‖v‖, one norm per kernel tap, over (out, in / groups) (``dim=2``)."""
    name = "encoder.pos_conv_embed.conv"
    v, g = params[f"{name}.weight_v"], params[f"{name}.weight_g"]
    # Squares are summed in float64: a tap's whole matrix is up to 36,864 numbers in the published models.
    norm = np.sqrt(np.square(v, dtype=np.float64).sum(axis=(0, 1), keepdims=True)).astype(v.dtype)
    return Conv(grouped_taps(g * (v / norm), config.num_conv_pos_embedding_groups), params[f"{name}.bias"], None)


def _layer(params: Params, config: SEWDConfig, i: int, table_pd: np.ndarray | None) -> Layer:
    name = f"encoder.encoder.layer.{i}"
    return Layer(
        attention=_attention(params, config, i, table_pd),
        intermediate=_linear(params, f"{name}.intermediate.dense"),
        output=_linear(params, f"{name}.output.dense"),
        norm=_norm(params, f"{name}.output.LayerNorm"),
    )


def normalize_positions(params: Params, config: SEWDConfig, table_pd: np.ndarray) -> np.ndarray:
    """The relative-position table (p, d) as the layers read it: through its layer norm, where it has one."""
    if not config.normalizes_positions:
        return table_pd
    return layer_norm(table_pd, *_norm(params, "encoder.encoder.LayerNorm"), config.layer_norm_eps)


def project_positions(
    params: Params, config: SEWDConfig, i: int, table_pd: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Layer i's position keys and queries, each (h, p, e), from the normalised table; None where a term is absent."""
    name = f"encoder.encoder.layer.{i}.attention.self"

    def projected(own: str, shared: str) -> np.ndarray:
        assert table_pd is not None
        # share_att_key: the content projections, bias included, project the table too.
        rows = linear(table_pd, *_linear(params, f"{name}.{shared if config.share_att_key else own}"))  # (p, d)
        return np.ascontiguousarray(rows.reshape(len(rows), config.num_attention_heads, -1).transpose(1, 0, 2))

    # c2p asks with the content's query, so the table answers as a key; p2c the other way round.
    return (
        projected("pos_key_proj", "key_proj") if config.uses_c2p else None,
        projected("pos_query_proj", "query_proj") if config.uses_p2c else None,
    )


def _attention(params: Params, config: SEWDConfig, i: int, table_pd: np.ndarray | None) -> Attention:
    name = f"encoder.encoder.layer.{i}.attention"
    q, k, v = (_linear(params, f"{name}.self.{part}_proj") for part in ("query", "key", "value"))
    pos_key, pos_query = project_positions(params, config, i, table_pd)
    return Attention(
        qkv=Linear(np.concatenate([q.weight, k.weight, v.weight], axis=1), np.concatenate([q.bias, k.bias, v.bias])),
        pos_key=pos_key,
        pos_query=pos_query,
        positions=(pos_key, pos_query),
        output=_linear(params, f"{name}.output.dense"),
        norm=_norm(params, f"{name}.output.LayerNorm"),
    )
