"""Training losses in plain NumPy: connectionist temporal classification and cross-entropy.

Both work in float64 inside, whatever the logits are: a loss is one number, and its exactness costs nothing beside the
forward pass. (transformers takes the CTC log-softmax in float32 even for a double model, so it agrees to 1e-6.)
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

IGNORED = -100  # label that means "no label here"


def log_softmax(logits: Array) -> Array:
    """log(softmax(logits)) over the last axis, in float64."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def ctc_labels(labels_bl: Array, batch: int, vocab_size: int) -> Array:
    """Labels (b, l) as an array, or ``ValueError``: token ids below ``vocab_size``, filled up with −100."""
    labels_bl = np.asarray(labels_bl)
    if labels_bl.ndim != 2 or len(labels_bl) != batch or labels_bl.dtype.kind not in "iu":
        raise ValueError(
            f"labels have shape {labels_bl.shape} and dtype {labels_bl.dtype}; "
            f"they must be whole numbers of shape ({batch}, label count), filled up with {IGNORED}."
        )
    wrong = labels_bl[(labels_bl >= vocab_size) | ((labels_bl < 0) & (labels_bl != IGNORED))]
    if wrong.size:
        raise ValueError(f"labels contain {wrong[0]}; they must be below vocab_size = {vocab_size}, or {IGNORED}.")
    return labels_bl


def class_labels(labels_b: Array, batch: int, classes: int) -> Array:
    """Labels (b,) as an array, or ``ValueError``: class ids, or −100 for "none"."""
    labels = np.asarray(labels_b).reshape(-1)
    if len(labels) != batch or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels have shape {np.shape(labels_b)} and dtype {labels.dtype}; they must be {batch} whole numbers."
        )
    wrong = labels[((labels < 0) & (labels != IGNORED)) | (labels >= classes)]
    if wrong.size:
        raise ValueError(f"labels contain {wrong[0]}; they must be from 0 to {classes - 1}, or {IGNORED}.")
    return labels


def ctc_alphas(log_probs_sv: Array, labels: Array, blank: int) -> Array:
    """Forward lattice of CTC: α[s, u] = log-probability of all ways to stand at symbol u after frame s.

    The labels are laced with blanks, ``blank l1 blank l2 ... blank`` (U = 2·len + 1 symbols). At each frame a path
    stays, steps to the next symbol, or skips a blank between two *different* labels:

        α[s, u] = log p[s, sym_u] + logsumexp(α[s−1, u], α[s−1, u−1], α[s−1, u−2] if sym_u may be skipped to)

    log_probs (s, v), labels (l,) → (s, U), −inf where no path leads. Graves et al. 2006, section 4.1.
    """
    symbols = np.full(2 * len(labels) + 1, blank)
    symbols[1::2] = labels
    may_skip = np.zeros(len(symbols), bool)
    may_skip[3::2] = symbols[3::2] != symbols[1:-2:2]
    emission_su = log_probs_sv[:, symbols]
    alphas = np.full_like(emission_su, -np.inf)
    alphas[0, :2] = emission_su[0, :2]
    for s in range(1, len(alphas)):
        before = alphas[s - 1]
        reach = before.copy()
        reach[1:] = np.logaddexp(reach[1:], before[:-1])
        reach[2:] = np.where(may_skip[2:], np.logaddexp(reach[2:], before[:-2]), reach[2:])
        alphas[s] = reach + emission_su[s]
    return alphas


def ctc_negative_log_likelihood(log_probs_sv: Array, labels: Array, blank: int) -> float:
    """−log of the summed probability of every frame path that collapses to ``labels``; inf where none can."""
    if len(log_probs_sv) == 0:
        return 0.0 if len(labels) == 0 else np.inf
    last = ctc_alphas(log_probs_sv, labels, blank)[-1, -2:]  # a path may end on the last label or on the blank after it
    return -float(np.logaddexp.reduce(last))


def ctc_loss(
    logits_bsv: Array,
    labels_bl: Array,
    lengths_b: Array,
    blank: int,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> float | Array:
    """CTC loss of a batch, as transformers computes it for SEWDForCTC.

    logits (b, s, v); labels (b, l), where −100 and the blank itself are dropped; lengths (b,) valid frames of each
    recording; ``reduction`` "mean" (each recording's loss over its own label count, at least 1, then the mean), "sum"
    or "none" (an array (b,)). A recording whose labels do not fit into its frames costs inf, or 0 with
    ``zero_infinity``.

    Raises ``ValueError`` for labels of the wrong shape or a label that is no token id.
    """
    batch, _, vocab_size = logits_bsv.shape
    labels_bl = ctc_labels(labels_bl, batch, vocab_size)
    losses, counts = np.zeros(batch), np.ones(batch)
    for b in range(batch):
        labels = labels_bl[b][(labels_bl[b] != IGNORED) & (labels_bl[b] != blank)]
        log_probs_sv = log_softmax(logits_bsv[b, : max(int(lengths_b[b]), 0)])
        losses[b] = ctc_negative_log_likelihood(log_probs_sv, labels, blank)
        counts[b] = max(len(labels), 1)
    if zero_infinity:
        losses[np.isinf(losses)] = 0
    if reduction == "none":
        return losses
    return float((losses / counts).mean() if reduction == "mean" else losses.sum())


def cross_entropy(logits_bn: Array, labels_b: Array) -> float:
    """Mean of −log softmax(logits)[label] over the recordings whose label is not −100; NaN if all are.

    logits (b, labels), labels (b,) or (b, 1). Raises ``ValueError`` for a label that is no class.
    """
    labels = class_labels(labels_b, *logits_bn.shape)
    kept = labels != IGNORED
    if not kept.any():
        return float("nan")
    return -float(log_softmax(logits_bn)[kept, labels[kept]].mean())
