"""Training losses in plain NumPy: connectionist temporal classification and cross-entropy.

Both work in float64 inside, whatever the logits are: a loss is one number, and its exactness costs nothing beside the
forward pass. (transformers takes the CTC log-softmax in float32 even for a double model, so it agrees to 1e-6.)
"""

from __future__ import annotations

from typing import NamedTuple

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
    try:
        labels_bl = np.asarray(labels_bl)
    except ValueError as error:  # NumPy's own words for rows of different lengths do not say what to do
        raise ValueError(f"labels are rows of different lengths; fill them up with {IGNORED}.") from error
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


def interlaced(labels: Array, blank: int) -> tuple[Array, Array]:
    """Symbols of the CTC lattice: labels (l,) laced with blanks, ``blank l1 blank l2 ... blank``, U = 2·l + 1 of them.

    Also (U,) boolean: whether a path may come to a symbol from the one before the last, leaving out the blank between
    them. It may where both are labels and *different*: between equal ones a blank is needed, or they would merge.
    """
    symbols_u = np.full(2 * len(labels) + 1, blank)
    symbols_u[1::2] = labels
    may_skip_u = np.zeros(len(symbols_u), bool)
    may_skip_u[3::2] = symbols_u[3::2] != symbols_u[1:-2:2]
    return symbols_u, may_skip_u


def _stepped(before_u: Array, may_skip_u: Array) -> Array:
    """Log-probabilities one frame on, nothing emitted yet: a path stays, steps on, or skips a blank."""
    reach_u = before_u.copy()
    reach_u[1:] = np.logaddexp(reach_u[1:], before_u[:-1])
    reach_u[2:] = np.where(may_skip_u[2:], np.logaddexp(reach_u[2:], before_u[:-2]), reach_u[2:])
    return reach_u


def ctc_alphas(log_probs_sv: Array, labels: Array, blank: int) -> Array:
    """Forward lattice of CTC: α[s, u] = log-probability of all ways to stand at symbol u after frame s.

    At each frame a path stays, steps to the next symbol, or skips a blank between two *different* labels:

        α[s, u] = log p[s, sym_u] + logsumexp(α[s−1, u], α[s−1, u−1], α[s−1, u−2] if sym_u may be skipped to)

    log_probs (s, v), labels (l,) → (s, U), −inf where no path leads; U = 2·l + 1 symbols as ``interlaced`` gives them.
    Graves et al. 2006, section 4.1.
    """
    symbols_u, may_skip_u = interlaced(labels, blank)
    emission_su = log_probs_sv[:, symbols_u]
    alphas_su = np.full_like(emission_su, -np.inf)
    alphas_su[0, :2] = emission_su[0, :2]
    for s in range(1, len(alphas_su)):
        alphas_su[s] = _stepped(alphas_su[s - 1], may_skip_u) + emission_su[s]
    return alphas_su


def ctc_betas(log_probs_sv: Array, labels: Array, blank: int) -> Array:
    """Backward lattice of CTC: β[s, u] = log-probability of all ways to go on from symbol u after frame s to the end.

    The same steps the other way round. What frame s itself emits is α's, so that α + β counts everything once:

        β[s, u] = logsumexp over w = u, u+1, u+2 if sym_w may be skipped to, of (log p[s+1, sym_w] + β[s+1, w])

    and β[last, u] is 0 for the last label and the blank after it, where a path may end. Shapes as for ``ctc_alphas``.
    (The paper's β counts frame s too.) Graves et al. 2006, section 4.1.
    """
    symbols_u, _ = interlaced(labels, blank)
    _, may_skip_back_u = interlaced(labels[::-1], blank)  # read from its end the lattice has the same form
    emission_su = log_probs_sv[:, symbols_u]
    betas_su = np.full_like(emission_su, -np.inf)
    betas_su[-1, -2:] = 0
    for s in range(len(betas_su) - 2, -1, -1):
        onward_u = betas_su[s + 1] + emission_su[s + 1]
        betas_su[s] = _stepped(onward_u[::-1], may_skip_back_u)[::-1]
    return betas_su


class CTCLattice(NamedTuple):
    """What ``ctc_lattice`` returns: symbols_u (U,) token ids; alphas_su, betas_su (s, U) log-probabilities.

    posterior_su (s, U): share of the probability of all paths that stands at symbol u at frame s,
    exp(α + β − log_likelihood); each row sums to 1, or is 0 where no path exists. log_likelihood: log of the summed
    probability of all paths that collapse to the labels; −inf where none can.
    """

    symbols_u: Array
    alphas_su: Array
    betas_su: Array
    posterior_su: Array
    log_likelihood: float


def ctc_lattice(log_probs_sv: Array, labels: Array, blank: int) -> CTCLattice:
    """The forward–backward lattice of CTC for one recording, to look at.

    log_probs (s, v), s ≥ 1; labels (l,) token ids without blanks. At *every* frame logsumexp(α[s] + β[s]) is the same
    number, the log-likelihood: each path passes each frame once. The gradient of the loss follows from the posterior:
    ∂(−log_likelihood)/∂logit[s, v] = p[s, v] − Σ_u posterior[s, u] over the symbols u that are v.

    Raises ``ValueError`` where there is no frame, and for a label or blank that is no token id.
    """
    if np.ndim(log_probs_sv) != 2 or len(log_probs_sv) == 0:
        raise ValueError(
            f"log_probs has shape {np.shape(log_probs_sv)}; a lattice needs (frames, tokens), and at least one frame."
        )
    tokens = log_probs_sv.shape[1]
    labels = np.asarray(labels, None if len(labels) else int)  # NumPy makes floats of an empty list
    whole = labels.ndim == 1 and labels.dtype.kind in "iu"
    if not whole or not all(0 <= label < tokens and label != blank for label in labels) or not 0 <= blank < tokens:
        raise ValueError(
            f"labels are {labels.tolist()} and blank is {blank!r}; they must be whole numbers below the number of "
            f"tokens, {tokens}, and no label the blank."
        )
    alphas_su, betas_su = ctc_alphas(log_probs_sv, labels, blank), ctc_betas(log_probs_sv, labels, blank)
    log_likelihood = float(np.logaddexp.reduce(alphas_su[-1, -2:]))
    possible = np.isfinite(log_likelihood)
    posterior_su = np.exp(alphas_su + betas_su - log_likelihood) if possible else np.zeros_like(alphas_su)
    return CTCLattice(interlaced(labels, blank)[0], alphas_su, betas_su, posterior_su, log_likelihood)


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

    Raises ``ValueError`` for labels of the wrong shape, a label that is no token id, or an unknown ``reduction``.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'.")
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


def cross_entropy(logits_bl: Array, labels_b: Array) -> float:
    """Mean of −log softmax(logits)[label] over the recordings whose label is not −100; NaN if all are.

    logits (b, labels), labels (b,) or (b, 1). Raises ``ValueError`` for a label that is no class.
    """
    labels = class_labels(labels_b, *logits_bl.shape)
    kept = labels != IGNORED
    if not kept.any():
        return float("nan")
    return -float(log_softmax(logits_bl)[kept, labels[kept]].mean())
