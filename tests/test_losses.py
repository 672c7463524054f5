"""Losses against PyTorch, against transformers and against counting every path."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers.loss.loss_ctc import ForCTCLoss

from sewd_np.losses import cross_entropy, ctc_lattice, ctc_loss, log_softmax
from sewd_np.trace import error_between
from tests import naive

Array = np.ndarray
SETTINGS = settings(derandomize=True, deadline=None, max_examples=60)


def torch_ctc(
    logits: Array, labels: Array, lengths: Array, blank: int, reduction: str = "mean", zero_infinity: bool = False
) -> Array:
    """torch's CTC on float64 log-probabilities, padding labels taken out."""
    log_probs = functional.log_softmax(torch.from_numpy(logits).double(), -1).transpose(0, 1)
    kept = (labels != -100) & (labels != blank)
    targets, counts = torch.from_numpy(labels[kept]), torch.from_numpy(kept.sum(-1))
    return functional.ctc_loss(
        log_probs, targets, torch.from_numpy(lengths), counts, blank, reduction, zero_infinity
    ).numpy()


def error(a: Any, b: Any) -> float:
    return error_between(np.asarray(a), np.asarray(b))


def batch(frames: int = 12, vocab: int = 7, seed: int = 0) -> tuple[Array, Array, Array]:
    """Logits (4, frames, vocab), labels with repeats, none at all, padding and blanks inside, and lengths."""
    logits = 2 * np.random.default_rng(seed).standard_normal((4, frames, vocab))
    labels = np.array([[1, 2, 2, 3, -100], [5, 5, 5, -100, -100], [-100] * 5, [0, 4, 0, 0, 6]])
    return logits, labels, np.array([frames, frames - 1, frames - 3, frames])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_equals_torch(reduction: str, zero_infinity: bool) -> None:
    logits, labels, lengths = batch()
    args = (logits, labels, lengths, 0, reduction, zero_infinity)
    got = ctc_loss(*args)
    assert isinstance(got, np.ndarray) == (reduction == "none")
    assert error(got, torch_ctc(*args)) <= 1e-10
    assert error(got, naive.ctc_loss(*args)) <= 1e-10


@pytest.mark.parametrize("blank", [0, 3, 6])
def test_ctc_with_any_token_as_blank(blank: int) -> None:
    logits, labels, lengths = batch()
    for reduction in ("mean", "none"):
        got = ctc_loss(logits, labels, lengths, blank, reduction)
        assert error(got, torch_ctc(logits, labels, lengths, blank, reduction)) <= 1e-10


def test_ctc_of_float32_logits_is_computed_in_float64() -> None:
    logits, labels, lengths = batch()
    logits = logits.astype(np.float32)
    got, want = ctc_loss(logits, labels, lengths, 0), ctc_loss(logits.astype(np.float64), labels, lengths, 0)
    assert got == want


def test_ctc_equals_transformers() -> None:
    """transformers takes the log-softmax in float32, so it agrees to single precision only."""
    logits, labels, lengths = batch(frames=40, vocab=32)
    for reduction, zero_infinity in [("mean", False), ("sum", False), ("sum", True), ("none", True)]:
        want = ForCTCLoss(
            torch.from_numpy(logits), torch.from_numpy(labels), torch.from_numpy(lengths), 0, reduction, zero_infinity
        )
        got = ctc_loss(logits, labels, lengths, 0, reduction, zero_infinity)
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


def test_blank_and_ignored_labels_are_dropped_wherever_they_stand() -> None:
    logits = batch()[0][:1]
    lengths = np.array([12])
    plain = ctc_loss(logits, np.array([[1, 2, 2, 3]]), lengths, 0)
    assert ctc_loss(logits, np.array([[0, 1, -100, 2, 0, 2, -100, 3, 0]]), lengths, 0) == plain
    assert ctc_loss(logits, np.array([[1, 2, 2, 3, -100, -100]]), lengths, 0) == plain
    assert ctc_loss(logits, np.array([[1, 2, 3]]), lengths, 0) != plain


def test_no_labels_cost_the_all_blank_path() -> None:
    logits = batch()[0][:1]
    want = -log_softmax(logits)[0, :, 0].sum()
    for labels in (np.zeros((1, 0), np.int64), np.array([[-100, 0]])):
        for reduction in ("mean", "sum"):
            assert ctc_loss(logits, labels, np.array([12]), 0, reduction) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("labels", [[1, 2, 3, 4], [1, 1, 2], [2, 2]])
def test_labels_that_do_not_fit_cost_infinity_or_nothing(labels: list[int]) -> None:
    """A repeated label needs a blank between: three labels with one repeat need four frames."""
    logits, row = batch()[0][:2], np.array([labels, labels])
    needed = len(labels) + sum(a == b for a, b in pairwise(labels))
    lengths = np.array([needed, needed - 1])
    losses = ctc_loss(logits, row, lengths, 0, "none")
    assert isinstance(losses, np.ndarray)
    assert np.isfinite(losses[0]) and losses[1] == math.inf
    assert ctc_loss(logits, row, lengths, 0) == math.inf
    assert ctc_loss(logits, row, lengths, 0, "sum", True) == pytest.approx(losses[0], rel=1e-12)
    assert error(ctc_loss(logits, row, lengths, 0), torch_ctc(logits, row, lengths, 0)) == 0
    zeroed = ctc_loss(logits, row, lengths, 0, "mean", True)
    assert error(zeroed, torch_ctc(logits, row, lengths, 0, "mean", True)) <= 1e-10


def test_frames_beyond_a_length_do_not_count() -> None:
    logits, labels, lengths = batch()
    want = ctc_loss(logits, labels, lengths, 0, "none")
    for b, length in enumerate(lengths):
        logits[b, length:] = 1e3
    np.testing.assert_array_equal(ctc_loss(logits, labels, lengths, 0, "none"), want)
    longer = np.concatenate([logits, np.full((4, 5, 7), -3.0)], axis=1)
    np.testing.assert_array_equal(ctc_loss(longer, labels, lengths, 0, "none"), want)


def test_certain_and_impossible_tokens() -> None:
    """Logits as extreme as a confident model's, and beyond."""
    for size in (50.0, 800.0, 1e5):
        logits = np.full((1, 4, 3), -size)
        logits[0, [0, 1, 2, 3], [1, 1, 0, 2]] = size
        labels, lengths = np.array([[1, 2]]), np.array([4])
        assert ctc_loss(logits, labels, lengths, 0, "sum") == pytest.approx(0, abs=1e-10)
        wrong = ctc_loss(logits, np.array([[2, 1]]), lengths, 0, "sum")
        want = torch_ctc(logits, np.array([[2, 1]]), lengths, 0, "sum")
        assert error(wrong, want) <= 1e-10 and wrong > size


@SETTINGS
@given(frames=st.integers(0, 5), labels=st.lists(st.integers(1, 2), max_size=4), seed=st.integers(0, 99))
def test_ctc_counts_every_path(frames: int, labels: list[int], seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((1, frames, 3))
    probability = naive.ctc_probability_by_paths(logits[0], labels, 0)
    assert math.isclose(naive.ctc_probability(logits[0], labels, 0), probability, rel_tol=1e-12, abs_tol=1e-15)
    loss = ctc_loss(logits, np.array([labels], np.int64), np.array([frames]), 0, "sum")
    if probability == 0:
        assert loss == math.inf
    else:
        assert loss == pytest.approx(-math.log(probability), rel=1e-10, abs=1e-12)


@SETTINGS
@given(seed=st.integers(0, 10_000), frames=st.integers(1, 30), count=st.integers(0, 12), vocab=st.integers(2, 9))
def test_ctc_equals_torch_for_any_sizes(seed: int, frames: int, count: int, vocab: int) -> None:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal((3, frames, vocab))
    labels, lengths = rng.integers(0, vocab, (3, count)), rng.integers(1, frames + 1, 3)
    labels[rng.random((3, count)) < 0.2] = -100
    for reduction in ("none", "mean"):
        got, want = (f(logits, labels, lengths, 0, reduction) for f in (ctc_loss, torch_ctc))
        assert error(got, want) <= 1e-10


def test_probabilities_of_all_label_sequences_sum_to_one() -> None:
    logits = np.random.default_rng(1).standard_normal((1, 3, 3))
    total = 0.0
    for count in range(4):
        for labels in np.ndindex((2,) * count):
            row = np.array([labels], np.int64).reshape(1, count) + 1
            total += math.exp(-float(ctc_loss(logits, row, np.array([3]), 0, "sum")))
    assert total == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[7, 1]], "labels contain 7; they must be below vocab_size = 7, or -100"),
        ([[1, -1]], "labels contain -1"),
        ([[1, -99]], "labels contain -99"),
        ([1, 2], r"labels have shape \(2,\)"),
        ([[1], [2]], r"labels have shape \(2, 1\).*they must be whole numbers of shape \(1, label count\)"),
        ([[1.0, 2.0]], "dtype float64"),
    ],
)
def test_wrong_ctc_labels_are_an_error(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ctc_loss(np.zeros((1, 5, 7)), np.array(labels), np.array([5]), 0)


def test_an_unknown_reduction_is_an_error() -> None:
    with pytest.raises(ValueError, match="reduction is 'avg'; it must be 'mean', 'sum' or 'none'"):
        ctc_loss(np.zeros((1, 5, 7)), np.array([[1]]), np.array([5]), 0, "avg")


# ------------------------------------------------------------------- the lattice


@pytest.mark.parametrize("labels", [[], [1], [1, 2], [1, 1], [2, 1, 1], [1, 2, 1]])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_lattice_counts_every_path(frames: int, labels: list[int]) -> None:
    """α, β and the posterior of every node against the sum over all paths through it, walked one by one."""
    log_probs = log_softmax(np.random.default_rng(frames).standard_normal((frames, 3)))
    lattice = ctc_lattice(log_probs, np.array(labels, np.int64), 0)
    symbols = [0, *(token for label in labels for token in (label, 0))]
    alphas, betas, through = np.zeros((3, frames, len(symbols)))
    for walk in itertools.product(range(len(symbols)), repeat=frames):
        # A walk over symbol numbers: it starts on one of the first two and never goes back or leaves a label out.
        tokens = [symbols[u] for u in walk]
        allowed = [
            step in (0, 1) or (step == 2 and symbols[u] != 0 and symbols[u] != symbols[u - 2])
            for step, u in zip(np.diff(walk), walk[1:], strict=True)
        ]
        emitted = np.exp(log_probs[np.arange(frames), tokens])
        for s in range(frames):
            if walk[0] <= 1 and all(allowed[:s]) and len(set(walk[s:])) == 1:  # each beginning once
                alphas[s, walk[s]] += emitted[: s + 1].prod()
            if len(set(walk[: s + 1])) == 1 and all(allowed[s:]) and walk[-1] >= len(symbols) - 2:  # each ending once
                betas[s, walk[s]] += emitted[s + 1 :].prod()
        if walk[0] <= 1 and all(allowed) and walk[-1] >= len(symbols) - 2:
            through[np.arange(frames), list(walk)] += emitted.prod()
    np.testing.assert_allclose(np.exp(lattice.alphas_su), alphas, rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(np.exp(lattice.betas_su), betas, rtol=1e-10, atol=1e-300)
    total = naive.ctc_probability_by_paths(log_probs, labels, 0)
    assert math.exp(lattice.log_likelihood) == pytest.approx(total, rel=1e-10)
    np.testing.assert_allclose(lattice.posterior_su * total, through, rtol=1e-10, atol=1e-14)
    np.testing.assert_array_equal(lattice.symbols_u, symbols)


def test_lattice_has_the_loss_at_every_frame() -> None:
    logits, labels, _ = batch(frames=30)
    loss = ctc_loss(logits, labels, np.full(4, 30), 0, "none")
    assert isinstance(loss, np.ndarray)
    for b, row in enumerate([[1, 2, 2, 3], [5, 5, 5], [], [4, 6]]):
        lattice = ctc_lattice(log_softmax(logits[b]), np.array(row, np.int64), 0)
        frame_s = np.logaddexp.reduce(lattice.alphas_su + lattice.betas_su, axis=1)
        np.testing.assert_allclose(-frame_s, loss[b], rtol=1e-12)
        np.testing.assert_allclose(lattice.posterior_su.sum(axis=1), 1, rtol=1e-11)


def test_lattice_gives_the_gradient_of_the_loss() -> None:
    logits, labels = torch.from_numpy(batch()[0][:1]).requires_grad_(), [1, 2, 2, 3]
    log_probs = functional.log_softmax(logits, -1).transpose(0, 1)
    loss = functional.ctc_loss(log_probs, torch.tensor([labels]), torch.tensor([12]), torch.tensor([4]), 0, "sum")
    (want,) = torch.autograd.grad(loss, logits)
    log_probs_sv = log_softmax(batch()[0][0])
    lattice = ctc_lattice(log_probs_sv, np.array(labels), 0)
    gradient_sv = np.exp(log_probs_sv)
    for u, token in enumerate(lattice.symbols_u):
        gradient_sv[:, token] -= lattice.posterior_su[:, u]
    assert error(gradient_sv, want[0].numpy()) <= 1e-10


def test_lattice_of_labels_that_do_not_fit_has_no_path() -> None:
    lattice = ctc_lattice(log_softmax(np.zeros((2, 3))), np.array([1, 1]), 0)
    assert lattice.log_likelihood == -math.inf
    assert not lattice.posterior_su.any()
    with pytest.raises(ValueError, match="at least one frame"):
        ctc_lattice(np.zeros((0, 3)), np.array([1]), 0)


@pytest.mark.parametrize("labels, blank", [([3], 0), ([-1], 0), ([0], 0), ([1.5], 0), ([1], 3), ([[1]], 0)])
def test_lattice_refuses_what_is_no_label(labels: list[Any], blank: int) -> None:
    with pytest.raises(ValueError, match=f"and blank is {blank}; they must be whole numbers below .* 3"):
        ctc_lattice(log_softmax(np.zeros((4, 3))), labels, blank)


def test_lattice_of_no_labels_is_silence() -> None:
    lattice = ctc_lattice(log_softmax(np.zeros((4, 3))), [], 0)
    assert lattice.log_likelihood == pytest.approx(4 * math.log(1 / 3))


# ------------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize("labels", [[0, 3, 1], [2, -100, 2], [-100, -100, 3], [-100] * 3])
def test_cross_entropy_equals_torch(labels: list[int]) -> None:
    logits = 3 * np.random.default_rng(0).standard_normal((3, 4))
    want = functional.cross_entropy(torch.from_numpy(logits), torch.tensor(labels)).numpy()
    got = cross_entropy(logits, np.array(labels))
    assert error(got, want) <= 1e-12
    assert error(got, naive.cross_entropy(logits, labels)) <= 1e-12
    assert error(cross_entropy(logits, np.array(labels)[:, None]), want) <= 1e-12
    assert math.isnan(got) == (set(labels) == {-100})


def test_cross_entropy_of_extreme_logits() -> None:
    logits = np.array([[1e4, 0.0, -1e4]], np.float32)
    assert cross_entropy(logits, np.array([0])) == 0
    assert cross_entropy(logits, np.array([2])) == 2e4


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 4], "labels contain 4; they must be from 0 to 3, or -100"),
        ([0, -1], "labels contain -1"),
        ([0], "they must be 2 whole numbers"),
        ([0.0, 1.0], "dtype float64"),
    ],
)
def test_wrong_classes_are_an_error(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy(np.zeros((2, 4)), np.array(labels))


def test_log_softmax_is_normalised_and_double() -> None:
    logits = (100 * np.random.default_rng(2).standard_normal((2, 3, 5))).astype(np.float32)
    got = log_softmax(logits)
    assert got.dtype == np.float64
    np.testing.assert_allclose(np.exp(got).sum(-1), 1, rtol=1e-12)
    want = functional.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    assert error(got, want) <= 1e-12
