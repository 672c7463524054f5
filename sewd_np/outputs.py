"""What a model call returns, and how the returns of recordings that ran one by one become those of their batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sewd_np.config import SEWDConfig
from sewd_np.trace import Trace, shapes

Array = np.ndarray


@dataclass(frozen=True)
class SEWDOutput:
    """What a model call returns; NumPy arrays on every backend, None where not asked for or not applicable.

    last_hidden_state (b, s, d) at 50 frames a second, from a model with a head only with ``output_hidden_states`` (it
    is many times the logits, which are all that should have to leave a GPU); logits (b, s, v) for CTC, (b, labels) for
    classification; loss a number, or (b,) with reduction "none"; hidden_states L + 1 arrays (b, t, d) at 25 frames a
    second, the first one what enters layer 0; attentions L arrays (b, h, t, t).
    """

    last_hidden_state: Array | None = None
    logits: Array | None = None
    loss: float | Array | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


def stack_outputs(outputs: Sequence[SEWDOutput], config: SEWDConfig, head: str, samples: int) -> SEWDOutput:
    """The output of a batch of ``samples`` from those of its recordings, each of batch 1 and its own length.

    What lies after a recording's end is 0.
    """
    batch, s, d, h = len(outputs), config.frames(samples), config.hidden_size, config.num_attention_heads
    t = config.squeezed(s)

    def stacked(arrays: Sequence[Array | None], *shape: int) -> Array | None:
        there = [array for array in arrays if array is not None]
        return _stacked(there, shape) if there else None

    def stacked_layers(layers: Sequence[tuple[Array, ...] | None], *shape: int) -> tuple[Array, ...] | None:
        there = [arrays for arrays in layers if arrays is not None]
        return tuple(_stacked(arrays, shape) for arrays in zip(*there, strict=True)) if there else None

    size = config.vocab_size if head == "ctc" else config.num_labels
    return SEWDOutput(
        last_hidden_state=stacked([out.last_hidden_state for out in outputs], batch, s, d),
        logits=stacked([out.logits for out in outputs], *((batch, s, size) if head == "ctc" else (batch, size))),
        hidden_states=stacked_layers([out.hidden_states for out in outputs], batch, t, d),
        attentions=stacked_layers([out.attentions for out in outputs], batch, h, t, t),
    )


def stack_traces(
    into: Trace, traces: Sequence[Mapping[str, Array]], config: SEWDConfig, head: str, samples: int
) -> None:
    """Record what the traces of recordings hold in the trace of their batch, and points without a batch axis once."""
    full = shapes(config, head, len(traces), samples)
    for name, dims in into.dims.items():
        values = [own[name] for own in traces]
        into.record(name, _stacked(values, full[name]) if dims.startswith("b") else values[0])


def _stacked(arrays: Sequence[Array], shape: tuple[int, ...]) -> Array:
    """Arrays (1, ...) below each other in zeros of ``shape`` (b, ...)."""
    out = np.zeros(shape, arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[tuple(slice(size) for size in array.shape[1:])] = array[0]
    return out
