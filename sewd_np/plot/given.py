"""What callers hand in, made into plain arrays, or into one sentence that says what is missing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sewd_np.trace import LAYER

Array = np.ndarray


def check_trace(trace: Any, pattern: str) -> None:
    """Raise ``TypeError`` for what is no mapping; ``pattern`` is what the error advises to trace."""
    if not all(hasattr(trace, name) for name in ("__getitem__", "__contains__", "__iter__")):
        raise TypeError(f"a {type(trace).__name__} is given; a Trace is needed: model(..., trace=Trace({pattern!r})).")


def check_config(config: Any) -> None:
    """Raise ``TypeError`` for what is no ``SEWDConfig``."""
    if not hasattr(config, "position_span"):
        raise TypeError(f"a {type(config).__name__} is given; a SEWDConfig is needed, such as model.config.")


def point(trace: Any, name: str, pattern: str) -> Array:
    """A trace's value at ``name``."""
    if name not in trace:
        raise ValueError(f"the trace does not hold {name}; call the model with trace=Trace({pattern!r}).")
    return np.asarray(trace[name], np.float64)


def one_of(batch: Array, recording: Any) -> Array:
    """One recording of a batch."""
    recording = whole(recording, "recording")
    if recording >= len(batch):
        raise ValueError(f"recording {recording} does not exist; the batch has {len(batch)}, counted from 0.")
    return batch[recording]


def whole(value: Any, name: str) -> int:
    """A whole number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, counted from 0.")
    return int(value)


def number(value: Any, name: str) -> float:
    """A finite number."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not abs(value) < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a finite number.")
    return float(value)


def positive(value: Any, name: str) -> float:
    """A finite number above 0, such as a frame's length or a sampling rate."""
    if number(value, name) <= 0:
        raise ValueError(f"{name} is {value!r}; it must be a number above 0.")
    return float(value)


def chosen_head(maps_hij: Array, head: Any) -> Array:
    """One head's map (i, j) of (h, i, j)."""
    head = whole(head, "head")
    if head >= len(maps_hij):
        raise ValueError(f"head {head} does not exist; the layer has {len(maps_hij)}, counted from 0.")
    return maps_hij[head]


def attention_maps(out: Any, layer: Any, recording: int) -> dict[int, Array]:
    """Layer → probabilities (h, i, j): of one layer, or of all that are there if ``layer`` is None.

    out: an output with attentions, a trace with ``*.attention.self.probs``, a list of one array a layer, or the array
    of one layer: (i, j), (h, i, j) or (b, h, i, j). A single array is taken for whichever layer is asked for.
    """
    wanted = None if layer is None else whole(layer, "layer")
    if isinstance(out, np.ndarray):
        return {wanted or 0: _four_axes(out, recording)}
    if hasattr(out, "attentions"):
        if out.attentions is None:
            raise ValueError("the output keeps no attentions; call the model with output_attentions=True.")
        found = dict(enumerate(out.attentions))
    elif isinstance(out, Sequence):
        found = dict(enumerate(out))
    else:
        found = _traced_layers(out, ".attention.self.probs")
    if not found:
        raise ValueError("there are no attentions here; call the model with trace=Trace('*.attention.self.probs').")
    return {i: _four_axes(np.asarray(found[i]), recording) for i in _layers(found, wanted)}


def _layers(found: Mapping[int, Any], wanted: int | None) -> list[int]:
    if wanted is None:
        return sorted(found)
    if wanted not in found:
        there = ", ".join(map(str, sorted(found)))
        raise ValueError(f"layer {wanted} is not here; the layers that are, counted from 0: {there}.")
    return [wanted]


def _four_axes(maps: Array, recording: int) -> Array:
    if maps.ndim not in (2, 3, 4) or maps.shape[-1] != maps.shape[-2] or not maps.size:
        raise ValueError(f"the attentions have shape {maps.shape}; expected (t, t), (h, t, t) or (b, h, t, t).")
    maps = maps.reshape((1,) * (4 - maps.ndim) + maps.shape)
    return one_of(maps, recording)


def _traced_layers(trace: Any, ending: str) -> dict[int, Any]:
    """Layer number → value, of a trace's points ``encoder.encoder.layer.N`` + ending."""
    check_trace(trace, "*")
    found = {}
    for name in trace:
        match = re.fullmatch(re.escape(LAYER) + r"\.(\d+)" + re.escape(ending), str(name))
        if match:
            found[int(match[1])] = trace[name]
    return found


def hidden_states(source: Any, recording: int) -> dict[str, Array]:
    """Name → frames (t, d): what enters layer 0, then what leaves each layer.

    source: a trace, an output with hidden states, or a list of arrays (t, d) or (b, t, d).
    """
    if hasattr(source, "hidden_states"):
        if source.hidden_states is None:
            raise ValueError("the output keeps no hidden states; call the model with output_hidden_states=True.")
        source = source.hidden_states
    if isinstance(source, np.ndarray):
        source = [source]
    if isinstance(source, Sequence):
        found = {("into layer 0" if i == 0 else f"layer {i - 1}"): np.asarray(x) for i, x in enumerate(source)}
    else:
        layers = _traced_layers(source, "")
        found = {f"layer {i}": np.asarray(layers[i]) for i in sorted(layers)}
        if "encoder.encoder.input" in source:
            found = {"into layer 0": np.asarray(source["encoder.encoder.input"]), **found}
    if not found:
        raise ValueError(
            "there are no hidden states here; call the model with "
            "trace=Trace('encoder.encoder.input', 'encoder.encoder.layer.?') or output_hidden_states=True."
        )
    for name, x in found.items():
        if x.ndim not in (2, 3) or not x.size:
            raise ValueError(f"the hidden states of {name} have shape {x.shape}; expected (t, d) or (b, t, d).")
    return {name: one_of(x[None] if x.ndim == 2 else x, recording).astype(np.float64) for name, x in found.items()}


def evidence_of(transcript: Any) -> Any:
    """A transcript's evidence."""
    if not hasattr(transcript, "words"):
        raise TypeError(
            f"a {type(transcript).__name__} is given; a Transcript is needed, as sewd_np.transcribe returns."
        )
    if transcript.evidence is None:
        raise ValueError("the transcript keeps no evidence; call sewd_np.transcribe(..., evidence=True).")
    return transcript.evidence
