"""SEW-D, written once: what happens to a waveform, in order, over one backend's table of operations.

Nothing here adds or multiplies an activation; every such step is an operation of ``ops`` (``backend.Operations``), so
the same lines run on every backend. Read ``_Pass`` from top to bottom for the whole model:

    wave_bn -> feature_encoder -> features_bsc -> project -> squeeze -> hidden_btd
    hidden_btd -> L x transformer_layer -> upsample -> hidden_bsd -> head

Every intermediate passes ``point(name, x)``, where a trace may look at it and an edit may change it (names:
``trace.points``). Where a point lies inside a fused operation, the explicit form runs instead; each such choice is one
visible ``if self.inside(...)``.

Paper: Wu et al., "Performance-Efficiency Trade-offs in Unsupervised Pre-training for Speech Recognition",
arXiv 2109.06870. Reference: transformers 5.23, ``modeling_sew_d.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from sewd_np import losses
from sewd_np.config import SEWDConfig
from sewd_np.inputs import (
    Padding,
    check_labels,
    checked_input,
    checked_params,
    checked_time_mask,
    checked_trace,
    require_score_memory,
)
from sewd_np.outputs import SEWDOutput, stack_outputs, stack_traces
from sewd_np.params import Attention, Layer, Weights, normalize_positions, project_positions
from sewd_np.trace import Change, Edit, Trace, any_inside, changed, points, resolve_edit

if TYPE_CHECKING:
    from sewd_np.backend import Operations
    from sewd_np.processor import Processor

Array = np.ndarray
CONV_NORM_EPS = 1e-5  # GroupNorm and layer-mode norms of the feature encoder: torch's default, in no config


# ---------------------------------------------------------------------- one forward pass


class _Pass:
    """One forward pass of one batch: the model's parts as methods, in the order in which they run."""

    def __init__(
        self,
        model: SEWDModel,
        lengths_b: Array | None,
        padding: Padding,
        trace: Trace | None,
        edits: Mapping[str, list[Change]],
        keep_attentions: bool,
    ) -> None:
        self.config: SEWDConfig = model.config
        self.params: Mapping[str, Array] = model.params
        self.weights: Weights = model.weights
        self.ops: Operations = model.ops
        self.trace, self.edits = trace, edits
        self.asked = {*edits, *(() if trace is None else trace.dims)}
        self.attentions: list[Array] | None = [] if keep_attentions else None
        self.hidden_states: list[Array] = []
        self.keep_hidden_states = False
        # Lengths reach the operations under "alone" only on a backend that runs such recordings together
        # (``ops.one_by_one`` false); the others come through ``_each_alone``, without padding.
        self.alone = padding == "alone"
        self.mask_queries = padding == "original"
        self.samples_b = lengths_b
        self.frames_b: Array | None = None
        self.squeezed_b: Array | None = None
        if lengths_b is not None:
            factor = self.config.squeeze_factor
            self.frames_b = np.array([self.config.frames(int(n)) for n in lengths_b])
            # transformers 5.23 lets a half-filled last squeezed frame count; the original code does not.
            up = factor - 1 if padding == "transformers" else 0
            self.squeezed_b = (self.frames_b + up) // factor

    def point(self, name: str, x: Any) -> Any:
        """What the model goes on with: ``x``, or what an edit makes of it. The trace sees that."""
        if name in self.edits:
            x = self.ops.from_numpy(changed(name, self.edits[name], self.ops.to_numpy(x)))
        if self.trace is not None and name in self.trace.dims:
            self.trace.record(name, self.ops.to_numpy(x))
        return x

    def inside(self, *names: str) -> bool:
        """Whether a point that only the explicit form of an operation has is asked for, by a trace or an edit."""
        return any_inside(self.asked, *names)

    def whole(self, wave_bn: Any, mask_time_indices: Array | None, head: str, keep_hidden: bool) -> tuple[Any, Any]:
        """Everything: (b, n) samples → (b, s, d) or None, and the logits of the head or None."""
        self.hidden_states.clear()
        hidden = self.encode(wave_bn, mask_time_indices)
        logits = None
        if head != "model":
            logits = self.ctc_head(hidden) if head == "ctc" else self.classification_head(hidden)
        return hidden if keep_hidden else None, logits

    def encode(self, wave_bn: Any, mask_time_indices: Array | None) -> Any:
        """The whole model below the heads: (b, n) samples → (b, s, d)."""
        config, ops, w = self.config, self.ops, self.weights
        x = self.feature_encoder(ops.from_numpy(wave_bn))
        x = self.point("layer_norm", ops.layer_norm(x, *w.layer_norm, config.feature_layer_norm_eps))
        if w.feature_projection is not None:
            x = self.point("feature_projection", ops.linear(x, *w.feature_projection))
        if mask_time_indices is not None:
            x = ops.spec_augment(x, mask_time_indices, w.masked_spec_embed)
        if self.frames_b is not None:
            x = ops.zero_padding(x, self.frames_b)
        x = self.point("encoder.input", x)
        frames = x.shape[1]
        x = self.squeeze(x)
        x = self.transformer(self.point("encoder.encoder.input", x))
        return self.upsample(x, frames)

    def feature_encoder(self, wave_bn: Any) -> Any:
        """Strided convolutions: (b, n) samples → (b, s, c), one frame for every 320 samples."""
        config, ops, w = self.config, self.ops, self.weights
        norm, activation = config.feat_extract_norm, config.feat_extract_activation
        lengths_b = None
        if self.alone and self.samples_b is not None:
            lengths_b = np.array([config.conv_lengths(int(n))[0] for n in self.samples_b])
        if not self.inside("feature_extractor."):
            return ops.feature_encoder(
                wave_bn, w.feature_encoder, config.conv_stride, norm, CONV_NORM_EPS, activation, lengths_b
            )
        x = wave_bn.reshape(*wave_bn.shape, 1)
        for i, (layer, stride) in enumerate(zip(w.conv_layers, config.conv_stride, strict=True)):
            name = f"feature_extractor.conv_layers.{i}"
            x = self.point(f"{name}.conv", ops.conv1d(x, layer.weight, layer.bias, stride))
            if layer.norm is not None:
                x = self.point(f"{name}.layer_norm", ops.normalize(x, norm, *layer.norm, CONV_NORM_EPS, lengths_b))
            x = self.point(name, ops.activate(x, activation))
        return x

    def squeeze(self, x: Any) -> Any:
        """Halve the frame rate and tell frames where they are: (b, s, d) → (b, t, d)."""
        ops, w, factor = self.ops, self.weights, self.config.squeeze_factor
        activation = self.config.feat_extract_activation
        name = "encoder.pos_conv_embed"
        if not self.inside(name, f"{name}.", "encoder.pool"):
            return ops.squeeze(x, w.squeeze, factor, activation)
        raw = self.point(f"{name}.conv", ops.positional_conv(x, w.pos_conv.weight, w.pos_conv.bias, factor))
        position = self.point(name, ops.trim_and_activate(raw, self.config.num_conv_pos_embeddings, activation))
        pooled = self.point("encoder.pool", ops.average_pool(x, factor))
        return ops.add_pooled(pooled, position)

    def transformer(self, x: Any) -> Any:
        """L layers of disentangled attention and feed-forward: (b, t, d) → (b, t, d)."""
        config, ops, w = self.config, self.ops, self.weights
        layers = self.layers_with_positions()
        index = None
        if config.uses_c2p or config.uses_p2c:
            index = ops.relative_index(
                x.shape[1], config.position_buckets, config.max_relative_distance, config.position_span
            )
        self.keep_hidden_state(x)
        for i, layer in enumerate(layers):
            before = x
            x = self.transformer_layer(f"encoder.encoder.layer.{i}", x, layer, index)
            self.keep_hidden_state(x)
            if i == 0 and w.conv is not None:
                x = self.conv_beside_first_layer(before, x)
        return x

    def layers_with_positions(self) -> tuple[Layer, ...]:
        """The layers' weights. Their position tables were projected on load; an edited table is projected anew."""
        w, config, params, table_name = self.weights, self.config, self.params, "encoder.encoder.rel_embeddings"
        if w.rel_embeddings is None:
            return w.layers
        table, normed = self.point(table_name, w.rel_embeddings), w.rel_embeddings_normed
        if table_name in self.edits:
            normed = normalize_positions(params, config, self.ops.to_numpy(table))
        if config.normalizes_positions:
            normed = self.point("encoder.encoder.LayerNorm", normed)
        if not any_inside(self.edits, table_name, "encoder.encoder.LayerNorm"):
            return w.layers
        layers = []
        for i, layer in enumerate(w.layers):
            tables = project_positions(params, config, i, self.ops.to_numpy(normed))
            key, query = (None if table is None else self.ops.from_numpy(table) for table in tables)
            attention = layer.attention._replace(pos_key=key, pos_query=query, positions=None)
            layers.append(layer._replace(attention=attention))
        return tuple(layers)

    def keep_hidden_state(self, x: Any) -> None:
        if self.keep_hidden_states:
            self.hidden_states.append(x)

    def transformer_layer(self, name: str, x: Any, w: Layer, index: Any) -> Any:
        """Attention, add and norm, feed-forward, add and norm (DeBERTa: norms come after the sums)."""
        config, ops, point, eps = self.config, self.ops, self.point, self.config.layer_norm_eps
        attended = self.self_attention(f"{name}.attention.self", x, w.attention, index)
        if self.inside(f"{name}.attention.output.dense"):
            attended = point(f"{name}.attention.output.dense", ops.linear(attended, *w.attention.output))
            x = ops.add_norm(attended, x, *w.attention.norm, eps)
        else:
            x = ops.linear_add_norm(attended, w.attention.output, x, w.attention.norm, eps)
        x = point(f"{name}.attention", x)
        if self.inside(f"{name}.intermediate", f"{name}.intermediate.dense", f"{name}.output.dense"):
            raised = point(f"{name}.intermediate.dense", ops.linear(x, *w.intermediate))
            raised = point(f"{name}.intermediate", ops.activate(raised, config.hidden_act))
            lowered = point(f"{name}.output.dense", ops.linear(raised, *w.output))
            return point(name, ops.add_norm(lowered, x, *w.norm, eps))
        return point(name, ops.feed_forward(x, w.intermediate, w.output, w.norm, config.hidden_act, eps))

    def self_attention(self, name: str, x: Any, w: Attention, index: Any) -> Any:
        """Disentangled self-attention: (b, t, d) → context (b, t, d)."""
        config, ops, point = self.config, self.ops, self.point
        heads, scale, masking = config.num_attention_heads, config.score_scale, (self.squeezed_b, self.mask_queries)
        qkv = ops.linear(x, *w.qkv)
        if self.attentions is None and w.positions is not None and not self.inside(f"{name}."):
            attended = ops.disentangled_attention(qkv, heads, w.positions, index, scale, *masking)
            return point(name, attended)
        q, k, v = ops.split_qkv(qkv)
        q, k, v = point(f"{name}.query_proj", q), point(f"{name}.key_proj", k), point(f"{name}.value_proj", v)
        terms = [point(f"{name}.c2c", ops.content_scores(q, k, heads, scale))]
        if w.pos_key is not None:
            pos_key = point(f"{name}.pos_key_layer", w.pos_key)
            terms.append(point(f"{name}.c2p", ops.content_to_position(q, pos_key, index, scale)))
        if w.pos_query is not None:
            pos_query = point(f"{name}.pos_query_layer", w.pos_query)
            terms.append(point(f"{name}.p2c", ops.position_to_content(k, pos_query, index, scale)))
        scores = point(f"{name}.scores", ops.add_scores(*terms))
        probs = point(f"{name}.probs", ops.masked_softmax(scores, *masking))
        if self.attentions is not None:
            self.attentions.append(ops.to_numpy(probs))
        return point(name, ops.context(probs, v))

    def conv_beside_first_layer(self, before: Any, after: Any) -> Any:
        """DeBERTa's optional convolution of layer 0's input, added to its output."""
        ops, w, name = self.ops, self.weights.conv, "encoder.encoder.conv"
        assert w is not None and w.norm is not None
        if self.alone and self.squeezed_b is not None:
            # The reference lets the last valid frames see padded ones; alone they see zeros, as at a recording's end.
            before = ops.zero_padding(before, self.squeezed_b)
        out = ops.conv1d(before, w.weight, w.bias, 1, self.config.conv_kernel_size // 2)
        out = self.point(f"{name}.conv", out)
        finish = (*w.norm, self.config.layer_norm_eps, self.config.conv_act, self.squeezed_b)
        return self.point(name, ops.activate_add_norm(out, after, *finish))

    def upsample(self, x: Any, frames: int) -> Any:
        """Back to 50 frames a second: (b, t, d) → (b, s, d). This is last_hidden_state: there is no final norm."""
        ops, config, w = self.ops, self.config, self.weights.upsample
        factor, activation, name = config.squeeze_factor, config.feat_extract_activation, "encoder.upsample"
        lengths_b = self.squeezed_b * factor if self.alone and self.squeezed_b is not None else None
        if not self.inside(name, f"{name}."):
            return self.point("encoder", ops.upsample(x, *w, factor, activation, frames, lengths_b))
        x = self.point(f"{name}.projection", ops.linear(x, *w))
        x = self.point(name, ops.unsqueeze(ops.activate(x, activation), factor, x.shape[1] * factor))
        return self.point("encoder", ops.unsqueeze(x, 1, frames, lengths_b))

    def ctc_head(self, hidden: Any) -> Any:
        """Logits of every token for every frame: (b, s, d) → (b, s, v)."""
        lm_head = self.weights.lm_head
        assert lm_head is not None
        return self.point("lm_head", self.ops.linear(hidden, *lm_head))

    def classification_head(self, hidden: Any) -> Any:
        """Project, mean over the valid frames, classify: (b, s, d) → (b, labels)."""
        ops, w, lengths_b = self.ops, self.weights, self.frames_b
        assert w.projector is not None and w.classifier is not None
        if w.layer_weights is not None:
            hidden = ops.weighted_layer_sum(tuple(self.hidden_states), w.layer_weights)
            hidden = self.point("projector.input", hidden)
            # These frames are squeezed, yet the reference counts them with the unsqueezed mask.
            lengths_b = self.squeezed_b if self.alone else self.frames_b
        projected = self.point("projector", ops.linear(hidden, *w.projector))
        pooled = self.point("classifier.input", ops.mean_over_time(projected, lengths_b))
        return self.point("classifier", ops.linear(pooled, *w.classifier))


# ---------------------------------------------------------------------------- a model call


def _forward(
    model: SEWDModel,
    input_values: Array,
    attention_mask: Array | None,
    output_hidden_states: bool,
    output_attentions: bool,
    mask_time_indices: Array | None,
    trace: Trace | None,
    edit: Edit | None,
    padding: Padding,
) -> SEWDOutput:
    """Check the input, run a ``_Pass`` (or one for each recording), return NumPy arrays."""
    wave_bn, lengths_b = checked_input(model, input_values, attention_mask, padding)
    mask_bs = checked_time_mask(model, mask_time_indices, *wave_bn.shape)
    checked_trace(trace)
    declared = points(model.config, model.head)
    edits = resolve_edit(edit, declared)
    if trace is not None:
        trace.start(declared)
    # An edit could bring padding to life, so under "alone" it meets every recording by itself on every backend.
    apart = lengths_b is not None and padding == "alone" and (model.ops.one_by_one or bool(edits))
    batch, samples = wave_bn.shape
    require_score_memory(model, batch, samples, output_attentions, trace, edits, together=1 if apart else batch)
    if apart and lengths_b is not None:
        return _each_alone(model, wave_bn, lengths_b, output_hidden_states, output_attentions, mask_bs, trace, edit)
    run = _Pass(model, lengths_b, padding, trace, edits, output_attentions)
    run.keep_hidden_states = output_hidden_states or model.weights.layer_weights is not None
    repeatable = lengths_b is None and mask_bs is None and not (run.asked or output_hidden_states or output_attentions)
    keep_hidden = output_hidden_states or model.head == "model"
    hidden, logits = model.ops.run(
        lambda x: run.whole(x, mask_bs, model.head, keep_hidden), wave_bn, model.weights, repeatable
    )
    to_numpy = model.ops.to_numpy
    return SEWDOutput(
        last_hidden_state=None if hidden is None else to_numpy(hidden),
        logits=None if logits is None else to_numpy(logits),
        hidden_states=tuple(map(to_numpy, run.hidden_states)) if output_hidden_states else None,
        attentions=tuple(run.attentions) if run.attentions is not None else None,
    )


def _each_alone(
    model: SEWDModel,
    wave_bn: Array,
    lengths_b: Array,
    output_hidden_states: bool,
    output_attentions: bool,
    mask_bs: Array | None,
    trace: Trace | None,
    edit: Edit | None,
) -> SEWDOutput:
    """Run every recording by itself and stack what comes out; what lies after a recording's end is 0 here."""
    config, head, samples = model.config, model.head, wave_bn.shape[1]
    outputs: list[SEWDOutput] = []
    traces: list[Mapping[str, Array]] = []
    for b, length in enumerate(lengths_b):
        own_trace = None if trace is None else Trace(*trace.patterns)
        mask = None if mask_bs is None else mask_bs[b : b + 1, : config.frames(int(length))]
        wave = wave_bn[b : b + 1, :length]
        outputs.append(
            _forward(model, wave, None, output_hidden_states, output_attentions, mask, own_trace, edit, "transformers")
        )
        traces.append(own_trace or {})
    if trace is not None:
        stack_traces(trace, traces, config, head, samples)
    return stack_outputs(outputs, config, head, samples)


# ------------------------------------------------------------------------------ the models


class SEWDModel:
    """SEW-D without a head: waveform to hidden states. Class SEWDModel of the reference.

    ``params`` maps the reference's tensor names to arrays (all float32 or all float64); ``ops`` is a backend's table.
    ``from_pretrained`` and ``sewd_np.load`` are the usual ways to get a model.
    """

    head = "model"

    def __init__(
        self, config: SEWDConfig, params: Mapping[str, Array], ops: Operations, processor: Processor | None = None
    ) -> None:
        if not hasattr(ops, "prepare"):
            raise TypeError(f"ops is {ops!r}; it must be operations, such as sewd_np.backend.get_operations('numpy').")
        self.config, self.ops, self.processor = config, ops, processor
        self.params, self.dtype = checked_params(config, self.head, params)
        self.weights: Weights = ops.prepare(self.params, config)

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        """Copies and pickles prepare their weights anew: how they are laid out depends on the machine."""
        return type(self), (self.config, self.params, self.ops, self.processor)

    def __call__(
        self,
        input_values: Array,
        attention_mask: Array | None = None,
        labels: Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        mask_time_indices: Array | None = None,
        trace: Trace | None = None,
        padding: Padding = "transformers",
        edit: Edit | None = None,
    ) -> SEWDOutput:
        """Run the model. input_values (b, n) at 16 kHz, as ``model.processor`` returns them.

        attention_mask (b, n) of 1 (sound) and 0 (padding on the right) counts only through its sums. ``padding`` says
        what it means: "transformers" as in transformers 5.23; "original" as in the authors' code and transformers
        before mid 2026 (a half-filled squeezed frame is padding, padded queries are cleared); "alone" as if every
        recording came by itself. labels (b, l) of token ids, filled up with -100, ask a CTC model for its loss, labels
        (b,) a classifier. mask_time_indices (b, s) marks frames that SpecAugment's vector replaces.

        ``edit`` changes intermediates: a dictionary from points of ``trace.points`` (shell patterns as in a ``Trace``)
        to functions that take the point's array (a copy) and return one of its shape, with which the model goes on.
        Where several patterns match a point, their functions follow one another in the order of the dictionary. A trace
        and the outputs show the changed values. The relative-position table reaches the layers projected on load; an
        edit of ``rel_embeddings`` or its ``LayerNorm`` projects it anew. With a mask and "alone" a function is called
        for each recording by itself. ``sewd_np.ablate`` makes such dictionaries.

        Raises ``ValueError`` for input of the wrong shape, too short or not finite, a mask with other values than 0
        and 1, unusable labels, an unknown padding rule, a trace or edit that matches no point, or an edit that returns
        another shape; ``TypeError`` for a trace or edit that is none, or an edit that returns no array of numbers;
        ``MemoryError`` before any work if the attention scores cannot fit.
        """
        if labels is not None:
            check_labels(self, labels, input_values)
        out = _forward(
            self,
            input_values,
            attention_mask,
            output_hidden_states,
            output_attentions,
            mask_time_indices,
            trace,
            edit,
            padding,
        )
        return (
            out if labels is None else replace(out, loss=self._loss(out.logits, labels, input_values, attention_mask))
        )

    def _loss(self, logits: Any, labels: Array, input_values: Array, attention_mask: Array | None) -> float | Array:
        config = self.config
        if self.head == "classification":
            return losses.cross_entropy(logits, labels)
        heard_bn = np.ones(np.shape(input_values), bool) if attention_mask is None else attention_mask
        samples_b = np.count_nonzero(heard_bn, axis=1)
        frames_b = np.array([config.frames(int(n)) for n in samples_b])
        return losses.ctc_loss(
            logits, labels, frames_b, config.pad_token_id, config.ctc_loss_reduction, config.ctc_zero_infinity
        )

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        backend: str | None = None,
        dtype: Any = np.float32,
        threads: int | None = None,
        precision: str | None = None,
    ) -> Self:
        """Load from a bundled name, a folder, a weights file or a hub id; see ``checkpoint.load_model``."""
        from sewd_np.checkpoint import load_model

        return load_model(source, cls, backend, dtype, threads, precision)

    def save_pretrained(self, folder: Any) -> None:
        """Write a folder that transformers and this package read back; see ``checkpoint.save_pretrained``."""
        from sewd_np.checkpoint import save_pretrained

        save_pretrained(self, folder)


class SEWDForCTC(SEWDModel):
    """SEW-D with a linear layer over every frame: speech recognition. Class SEWDForCTC of the reference."""

    head = "ctc"


class SEWDForSequenceClassification(SEWDModel):
    """SEW-D with a projection, a mean over time and a linear layer. Class SEWDForSequenceClassification."""

    head = "classification"
