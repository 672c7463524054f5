"""Ablations: switch off or disturb one part of the model and see what becomes of the transcript.

Each function returns an *edit*: a dictionary from points of the model (``trace.points``, shell patterns) to functions
that replace the value there, for a model call or ``transcribe``:

    sewd_np.transcribe("a.wav", edit=ablate.drop_c2p()).text
    model(**inputs, edit=ablate.together(ablate.drop_head(3, 0), ablate.drop_head(3, 1)), trace=trace)

Nothing is trained again, so an ablation shows what the trained weights rely on, not what a model trained without the
part would do. An edit of one's own is as short: ``{"encoder.encoder.layer.3": np.zeros_like}``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sewd_np.trace import LAYER, Edit, InOrder, pairs_of

Array = np.ndarray

ATTENTION = f"{LAYER}.{{}}.attention.self"


def drop_head(layer: int, head: int) -> Edit:
    """Without one attention head: its probabilities (t, t) become 0, so that it adds nothing to any frame.

    Layers and heads count from 0. A layer that the model lacks is a ``ValueError`` at the call, as any point is that
    it lacks; so is such a head. Anything but a whole number is one at once.
    """
    layer, head = _whole("layer", layer), _whole("head", head)

    def change(probs_bhij: Array) -> Array:
        heads = probs_bhij.shape[1]
        if not 0 <= head < heads:
            raise ValueError(f"drop_head: head is {head}; this model has heads 0 to {heads - 1}.")
        probs_bhij[:, head] = 0
        return probs_bhij

    return {ATTENTION.format(layer) + ".probs": change}


def drop_c2c(layer: int | None = None) -> Edit:
    """Without content-to-content scores q_i · k_j, in one layer or in all: no frame asks for another's sound.

    The sum of the three terms is not scaled up for the one that is missing; nor is it below. A layer that is no
    whole number is a ``ValueError``, and one that the model lacks is one at the call: so below.
    """
    return _zeros("c2c", layer)


def drop_c2p(layer: int | None = None) -> Edit:
    """Without content-to-position scores q_i · pk[r(i−j)], in one layer or in all: no frame wants a place any more.

    A model without the term (``pos_att_type``) is a ``ValueError`` at the call.
    """
    return _zeros("c2p", layer)


def drop_p2c(layer: int | None = None) -> Edit:
    """Without position-to-content scores k_j · pq[r(i−j)], in one layer or in all: no place wants a content any more.

    A model without the term (``pos_att_type``) is a ``ValueError`` at the call.
    """
    return _zeros("p2c", layer)


def uniform_attention(layer: int | None = None) -> Edit:
    """Every frame attends to all frames alike, in one layer or in all: scores become 0, so each weighs the same."""
    return _zeros("scores", layer)


def shuffle_positions(seed: int = 0) -> Edit:
    """Every distance means another one: the rows of the relative-position table (p, d) in a random order.

    One order for all layers and heads and for both terms, c2p and p2c; the layers project the shuffled table anew. A
    table has one row for each bucket of distances from −S to S − 1, and all of them take part, so on a short recording
    near distances mostly get rows that belong to distances far beyond its ends. Another whole ``seed`` gives another
    order; a negative one is a ``ValueError``.
    """
    seed = _whole("seed", seed)
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be a whole number of at least 0.")

    def change(table_pd: Array) -> Array:
        return np.random.default_rng(seed).permutation(table_pd, axis=0)

    return {"encoder.encoder.rel_embeddings": change}


def mirror_positions() -> Edit:
    """Past and future change places: the table's row for distance δ goes to −δ. Row 0, distance −S, has no twin."""

    def change(table_pd: Array) -> Array:
        table_pd[1:] = table_pd[:0:-1].copy()
        return table_pd

    return {"encoder.encoder.rel_embeddings": change}


def together(*edits: Edit) -> Edit:
    """Several edits as one, a read-only mapping. Where two change the same point, by whichever patterns, the later one
    gets what the earlier one returned. ``TypeError`` for what is no edit.
    """
    return InOrder(pair for edit in edits for pair in pairs_of(edit))


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} is {value!r}; it must be a whole number.")
    return int(value)


def _zeros(term: str, layer: int | None) -> Edit:
    which = "*" if layer is None else _whole("layer", layer)
    return {f"{ATTENTION.format(which)}.{term}": np.zeros_like}
