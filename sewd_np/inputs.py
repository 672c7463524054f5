"""Checks of what a model call is given: shapes, dtypes, lengths, NaN, and whether the attention scores can fit."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sewd_np.config import SAMPLING_RATE, SEWDConfig
from sewd_np.losses import class_labels, ctc_labels
from sewd_np.memory import require_memory
from sewd_np.params import expected_shapes
from sewd_np.trace import LAYER, Trace, any_inside, shapes

if TYPE_CHECKING:
    from sewd_np.model import SEWDModel

Array = np.ndarray
Padding = Literal["transformers", "original", "alone"]
PADDINGS = ("transformers", "original", "alone")


def checked_trace(trace: Any) -> None:
    """Raise ``TypeError`` unless ``trace`` is a ``Trace`` or None."""
    if trace is not None and not isinstance(trace, Trace):
        raise TypeError(f"trace is {trace!r}; it must be a Trace, such as sewd_np.Trace('*.attention.self.probs').")


def checked_input(model: SEWDModel, input_values: Any, attention_mask: Any, padding: str) -> tuple[Array, Array | None]:
    """The waveforms (b, n) in the model's dtype, and their valid lengths (b,) or None without a mask.

    Raises ``ValueError`` for an unknown padding rule; wrong shape, too few samples, NaN or infinity; a mask of another
    shape or with other values than 0 and 1; with "alone", padding that is not on the right and a recording that is too
    short by itself.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding is {padding!r}; it must be one of {', '.join(PADDINGS)}.")
    wave_bn = np.asarray(input_values)
    if wave_bn.ndim != 2 or wave_bn.shape[0] == 0 or wave_bn.dtype.kind not in "fiu":
        raise ValueError(
            f"input_values have shape {wave_bn.shape} and dtype {wave_bn.dtype}; they must be numbers of shape "
            "(batch, samples), as model.processor(audio) returns them."
        )
    wave_bn = wave_bn.astype(model.dtype, copy=False)
    if not np.isfinite(wave_bn).all():
        raise ValueError("input_values contain NaN or infinity; every sample must be a finite number.")
    samples = wave_bn.shape[1]
    minimum = model.config.minimum_samples
    if samples < minimum:
        raise ValueError(f"input_values have {samples} samples; the model needs at least {minimum}.")
    if attention_mask is None:
        return wave_bn, None
    mask_bn = np.asarray(attention_mask)
    if mask_bn.shape != wave_bn.shape:
        raise ValueError(f"attention_mask has shape {mask_bn.shape}; it must match input_values, {wave_bn.shape}.")
    if not np.isin(mask_bn, (0, 1)).all():
        raise ValueError("attention_mask contains other values than 0 (padding) and 1 (sound).")
    lengths_b = np.count_nonzero(mask_bn, axis=1)  # a sum in a half-precision mask's own dtype would be rounded
    if padding == "alone" and (mask_bn[:, 1:] > mask_bn[:, :-1]).any():
        raise ValueError('attention_mask has 0 before a 1; with padding="alone" all padding must be on the right.')
    if padding == "alone" and lengths_b.min() < minimum:
        raise ValueError(f"attention_mask leaves {lengths_b.min()} samples; the model needs at least {minimum}.")
    return wave_bn, lengths_b


def checked_time_mask(model: SEWDModel, indices: Any, batch: int, samples: int) -> Array | None:
    """SpecAugment's marks (b, s), or None where there are none or ``apply_spec_augment`` is false.

    Raises ``ValueError`` for another shape or dtype than bool (b, s), and for a model without ``masked_spec_embed``.
    """
    if indices is None or not model.config.apply_spec_augment:
        return None
    mask_bs, expected = np.asarray(indices), (batch, model.config.frames(samples))
    if mask_bs.dtype != bool or mask_bs.shape != expected:
        raise ValueError(
            f"mask_time_indices have shape {mask_bs.shape} and dtype {mask_bs.dtype}; they must be bool {expected}."
        )
    if model.weights.masked_spec_embed is None:
        raise ValueError(
            "mask_time_indices are given, but this model has no masked_spec_embed "
            "(its mask_time_prob and mask_feature_prob are 0)."
        )
    return mask_bs


def require_score_memory(
    model: SEWDModel,
    batch: int,
    samples: int,
    output_attentions: bool,
    trace: Trace | None,
    edited: Collection[str],
    together: int,
) -> None:
    """Raise ``MemoryError`` before the work starts if the (t, t) score matrices and what a trace keeps cannot fit.

    ``together`` recordings of ``batch`` are computed at a time; what the caller asked for is kept for all.
    ``edited`` are the points that the caller changes.
    """
    config, ops, itemsize = model.config, model.ops, model.dtype.itemsize
    t = config.squeezed(config.frames(samples))
    maps_bytes = config.num_hidden_layers * batch * config.num_attention_heads * t * t * itemsize
    kept_bytes = maps_bytes if output_attentions else 0
    if trace is not None:
        sizes = shapes(config, model.head, batch, samples)
        kept_bytes += sum(math.prod(sizes[name]) for name in trace.dims) * itemsize
    asked = [*edited, *(() if trace is None else trace.dims)]
    tables = ("encoder.encoder.rel_embeddings", "encoder.encoder.LayerNorm")  # traced at no cost, but not edited
    inside = [f"{LAYER}.{i}.attention.self." for i in range(config.num_hidden_layers)]
    explicit = output_attentions or any_inside(asked, *inside) or any_inside(edited, *tables)
    needed = ops.attention_bytes(together, config.num_attention_heads, t, itemsize, explicit)
    advice = "cut the recording into shorter pieces"
    if trace is not None:
        advice += " or trace fewer points"
    elif explicit:
        asks = "ask for fewer attention maps" if output_attentions else "leave out what looks inside the attention"
        advice += f" or {asks}"
    elif ops.name == "numpy":
        advice += " or use backend 'numba', whose memory grows with the length and not with its square"
    what = (
        f"attention{'' if trace is None else ' and trace'} over {samples / SAMPLING_RATE:.1f} s of sound "
        f"({t} squeezed frames, batch of {batch}) on backend {ops.name!r}"
    )
    if ops.own_memory is not None:  # a GPU's, where the work happens; what the caller keeps lies in main memory
        if needed > 0:  # asking a GPU takes as long as some kernels
            require_memory(needed, what, advice, free=ops.own_memory())
        needed = 0
    require_memory(needed + kept_bytes, what, advice)


def check_labels(model: SEWDModel, labels: Any, input_values: Any) -> None:
    """Refuse unusable labels before the forward pass is paid for. Raises ``ValueError``."""
    batch = len(input_values) if np.ndim(input_values) else 0
    if model.head == "model":
        raise ValueError("labels are given, but this model has no head; load it as SEWDForCTC or a classifier.")
    if model.head == "ctc":
        ctc_labels(labels, batch, model.config.vocab_size)
    else:
        class_labels(labels, batch, model.config.num_labels)


def checked_params(config: SEWDConfig, head: str, params: Any) -> tuple[dict[str, Array], np.dtype]:
    """Read-only views of ``params`` in the reference's order, and their one dtype.

    Raises ``ValueError`` if names, shapes or dtypes are not those of the configuration.
    """
    expected = expected_shapes(config, head)
    missing, unexpected = expected.keys() - params.keys(), params.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(f"params lack {sorted(missing)[:5]} and have unknown {sorted(unexpected)[:5]}.")
    dtypes = {np.asarray(params[name]).dtype for name in expected}
    if len(dtypes) != 1 or not dtypes <= {np.dtype(np.float32), np.dtype(np.float64)}:
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"params have dtype {found}; all must be float32 or all float64.")
    checked = {}
    for name, shape in expected.items():
        if np.shape(params[name]) != shape:
            raise ValueError(f"params: {name} has shape {np.shape(params[name])}; the config asks for {shape}.")
        checked[name] = np.asarray(params[name]).view()
        checked[name].flags.writeable = False
    return checked, dtypes.pop()
