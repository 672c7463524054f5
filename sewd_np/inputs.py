"""Checks of what a model call is given: shapes, dtypes, lengths, NaN, and whether the attention scores can fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sewd_np.config import SAMPLING_RATE, SEWDConfig
from sewd_np.memory import require_memory
from sewd_np.params import expected_shapes
from sewd_np.trace import Trace

if TYPE_CHECKING:
    from sewd_np.model import SEWDModel

Array = np.ndarray
Padding = Literal["transformers", "original", "alone"]
PADDINGS = ("transformers", "original", "alone")


def checked_input(model: SEWDModel, input_values: Any, attention_mask: Any, padding: str) -> tuple[Array, Array | None]:
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
    lengths_b = mask_bn.sum(axis=1).astype(np.int64)
    if padding == "alone" and lengths_b.min() < minimum:
        raise ValueError(f"attention_mask leaves {lengths_b.min()} samples; the model needs at least {minimum}.")
    return wave_bn, lengths_b


def checked_time_mask(model: SEWDModel, indices: Any, batch: int, samples: int) -> Array | None:
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


def require_score_memory(model: SEWDModel, wave_bn: Array, output_attentions: bool, trace: Trace | None) -> None:
    """Stop before the work starts if the (t, t) score matrices cannot fit."""
    config, (batch, samples) = model.config, wave_bn.shape
    t = config.squeezed(config.frames(samples))
    maps = [] if trace is None else [name for name, dims in trace.dims.items() if dims == "b h i j"]
    explicit = output_attentions or bool(maps)
    needed = model.ops.attention_bytes(batch, config.num_attention_heads, t, model.dtype.itemsize, explicit)
    kept = len(maps) + output_attentions * config.num_hidden_layers
    needed += kept * batch * config.num_attention_heads * t * t * model.dtype.itemsize
    require_memory(
        needed,
        f"attention over {samples / SAMPLING_RATE:.1f} s of sound ({t} squeezed frames, batch of {batch}) "
        f"on backend {model.ops.name!r}",
        "cut the recording into shorter pieces" + (" or ask for fewer attention maps" if explicit else ""),
    )


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
