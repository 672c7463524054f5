"""What must hold whatever the numbers are: shapes of scores, masks, lengths, and that recordings do not meet."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sewd_np import backend
from sewd_np.attention import masked_softmax, relative_index
from sewd_np.config import SEWDConfig
from sewd_np.model import SEWDOutput
from sewd_np.params import random_params
from sewd_np.trace import Trace, error_between, points
from tests.reference import CLASSES, TINY, arrays_of

Array = np.ndarray
SETTINGS = settings(derandomize=True, deadline=None, max_examples=40)
SEEDS = st.integers(0, 10_000)
NUMPY = backend.NUMPY
NUMBA = backend.get_operations("numba", threads=2)
TOGETHER = dataclasses.replace(NUMPY, one_by_one=False)  # the same operations, but a padded batch runs as one
TABLES = [
    pytest.param(NUMPY, id="one by one"),
    pytest.param(TOGETHER, id="together"),
    pytest.param(NUMBA, id="numba"),
]


def rounding(ops: backend.Operations, exact: float) -> float:
    """The tolerance for another order of summation: ``exact`` in float64; some 30 sums of 2^-24 each in float32."""
    return exact if ops.name == "numpy" else 2e-5


def build(options: dict[str, Any], head: str, ops: backend.Operations = NUMPY, dtype: Any = None) -> Any:
    """A model, in float64 where the backend has it."""
    dtype = dtype or (np.float64 if ops.name == "numpy" else np.float32)
    config = SEWDConfig.from_dict({**TINY, **options})
    params = {name: value.astype(dtype) for name, value in random_params(config, head, seed=9).items()}
    return CLASSES[head](config, params, ops)


# --------------------------------------------------------------------------- attention


@SETTINGS
@given(
    frames=st.integers(1, 40), heads=st.integers(1, 3), size=st.integers(1, 5), buckets=st.integers(4, 9), seed=SEEDS
)
def test_scores_of_a_sound_that_never_changes_are_toeplitz(
    frames: int, heads: int, size: int, buckets: int, seed: int
) -> None:
    """With the same query and key in every frame, a score can depend on i − j alone."""
    rng = np.random.default_rng(seed)
    q, k = (np.repeat(rng.standard_normal((1, 1, heads * size)), frames, axis=1) for _ in range(2))
    pos_key, pos_query = rng.standard_normal((2, heads, 2 * buckets, size))
    index = relative_index(frames, buckets, 30, buckets)
    content = NUMPY.content_scores(q, k, heads, 2.0)
    assert np.ptp(content, axis=(-2, -1)).max() <= 1e-12
    scores = NUMPY.add_scores(
        content,
        NUMPY.content_to_position(q, pos_key, index, 2.0),
        NUMPY.position_to_content(k, pos_query, index, 2.0),
    )
    for h in range(heads):
        for offset in range(1 - frames, frames):
            assert np.ptp(np.diagonal(scores[0, h], offset)) <= 1e-12
    # Distances that share a bucket share a score.
    for row in np.unique(index):
        assert np.ptp(scores[0, 0][index == row]) <= 1e-12


@SETTINGS
@given(
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=3),
    frames=st.integers(1, 12),
    heads=st.integers(1, 2),
    mask_queries=st.booleans(),
    single=st.booleans(),
    seed=SEEDS,
)
def test_probabilities_sum_to_one_and_masked_ones_are_zero(
    lengths: list[int], frames: int, heads: int, mask_queries: bool, single: bool, seed: int
) -> None:
    scores = 10 * np.random.default_rng(seed).standard_normal((len(lengths), heads, frames, frames))
    scores = scores.astype(np.float32 if single else np.float64)
    probs = masked_softmax(scores, np.array(lengths), mask_queries)
    assert (probs >= 0).all() and probs.dtype == scores.dtype
    for b, length in enumerate(lengths):
        assert (probs[b, :, :, length:] == 0).all()
        sums = probs[b].sum(axis=-1)
        queries = min(length, frames) if mask_queries else frames
        assert (sums[:, queries:] == 0).all()
        if length == 0:
            assert (sums == 0).all()
        else:
            np.testing.assert_allclose(sums[:, :queries], 1, rtol=0, atol=1e-6 if single else 1e-14)
    # Masked scores do not matter, however large.
    for b, length in enumerate(lengths):
        scores[b, :, :, length:] = 1e30
    np.testing.assert_array_equal(masked_softmax(scores, np.array(lengths), mask_queries), probs)


@SETTINGS
@given(frames=st.integers(1, 15), lengths=st.lists(st.integers(1, 15), min_size=1, max_size=3), seed=SEEDS)
def test_attention_over_a_padded_row_is_that_of_the_row_alone(frames: int, lengths: list[int], seed: int) -> None:
    heads, size, span = 2, 3, 5
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((len(lengths), frames, 3 * heads * size))
    pos_key, pos_query = rng.standard_normal((2, heads, 2 * span, size))
    tables = (pos_key, pos_query)
    index = relative_index(frames, span, 20, span)
    together = NUMPY.disentangled_attention(qkv, heads, tables, index, 3.0, np.array(lengths))
    for b, length in enumerate(lengths):
        t = min(length, frames)
        alone = NUMPY.disentangled_attention(qkv[b : b + 1, :t], heads, tables, index[:t, :t], 3.0)
        assert error_between(together[b : b + 1, :t], alone) <= 1e-12


# ------------------------------------------------------------------------------ lengths


@SETTINGS
@given(
    ladder=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=5),
    squeeze=st.integers(1, 4),
    kernel=st.integers(1, 9),
    samples=st.integers(1, 300),
)
def test_lengths_are_those_of_real_convolutions(
    ladder: list[tuple[int, int]], squeeze: int, kernel: int, samples: int
) -> None:
    config = SEWDConfig(
        conv_dim=(2,) * len(ladder),
        conv_kernel=tuple(kernel for kernel, _ in ladder),
        conv_stride=tuple(stride for _, stride in ladder),
        squeeze_factor=squeeze,
        num_conv_pos_embeddings=kernel,
    )
    x, real = torch.zeros(1, 1, samples), []
    for taps, stride in ladder:
        steps = x.shape[-1]
        x = torch.nn.functional.conv1d(x, torch.zeros(1, 1, taps), stride=stride) if steps >= taps else x[..., :0]
        real.append(x.shape[-1])
    assert config.conv_lengths(samples) == real
    assert config.frames(samples) == real[-1]
    squeezed = torch.nn.functional.avg_pool1d(x, squeeze, squeeze).shape[-1] if real[-1] >= squeeze else 0
    assert config.squeezed(real[-1]) == squeezed
    if squeezed:  # the positional convolution has a frame for each pooled one
        position = torch.nn.functional.conv1d(x, torch.zeros(1, 1, kernel), stride=squeeze, padding=kernel // 2)
        assert position.shape[-1] - (kernel % 2 == 0) >= squeezed


@SETTINGS
@given(
    ladder=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=5),
    squeeze=st.integers(1, 4),
)
def test_minimum_samples_is_exact(ladder: list[tuple[int, int]], squeeze: int) -> None:
    config = SEWDConfig(
        conv_dim=(2,) * len(ladder),
        conv_kernel=tuple(kernel for kernel, _ in ladder),
        conv_stride=tuple(stride for _, stride in ladder),
        squeeze_factor=squeeze,
    )
    shortest = config.minimum_samples
    assert config.squeezed(config.frames(shortest)) == 1
    assert config.squeezed(config.frames(shortest - 1)) == 0
    assert config.frames(config.receptive_field) == 1 and config.frames(config.receptive_field - 1) == 0
    assert config.frames(shortest + config.inputs_to_logits_ratio) == squeeze + 1


@pytest.mark.parametrize("squeeze", [1, 2, 3])
def test_the_shortest_waveform_runs_and_a_shorter_one_is_refused(squeeze: int) -> None:
    model = build({"squeeze_factor": squeeze}, "ctc")
    shortest = model.config.minimum_samples
    wave = np.random.default_rng(0).standard_normal((2, shortest))
    out = model(wave, output_hidden_states=True)
    assert out.last_hidden_state.shape == (2, squeeze, 12)
    assert out.hidden_states[0].shape == (2, 1, 12)
    with pytest.raises(ValueError, match=f"input_values have {shortest - 1} samples.*at least {shortest}"):
        model(wave[:, :-1])
    mask = np.ones((2, shortest + 20), int)
    mask[1, shortest - 1 :] = 0
    with pytest.raises(ValueError, match=f"attention_mask leaves {shortest - 1} samples.*at least {shortest}"):
        model(np.zeros(mask.shape), mask, padding="alone")


def test_frames_without_a_squeezed_frame_are_zero_and_say_the_bias() -> None:
    """An odd number of frames: the last one has no squeezed frame, so its logits are lm_head's bias exactly."""
    model = build({}, "ctc")
    samples = next(n for n in range(60, 90) if model.config.frames(n) % 2)
    out = model(np.random.default_rng(0).standard_normal((2, samples)), output_hidden_states=True)
    assert (out.last_hidden_state[:, -1] == 0).all() and (out.last_hidden_state[:, -2] != 0).any()
    np.testing.assert_array_equal(out.logits[:, -1], np.broadcast_to(model.params["lm_head.bias"], (2, 7)))


# ------------------------------------------------------------------ recordings do not meet

ALONE_OPTIONS: dict[str, dict[str, Any]] = {
    "group norm": {},
    "layer norm": {"feat_extract_norm": "layer", "conv_bias": True},
    "even positional kernel": {"num_conv_pos_embeddings": 4},
    "no squeeze": {"squeeze_factor": 1},
    "squeeze 3": {"squeeze_factor": 3},
    "deberta convolution": {"conv_kernel_size": 5},
    "deberta convolution, layer norm, squeeze 3": {
        "conv_kernel_size": 3,
        "feat_extract_norm": "layer",
        "squeeze_factor": 3,
    },
    "layer sum": {"use_weighted_layer_sum": True},
}


def padded(lengths: list[int], seed: int) -> tuple[Array, Array]:
    """Waveforms that end at different samples, with loud noise instead of silence after each end, and their mask."""
    wave = np.random.default_rng(seed).standard_normal((len(lengths), max(lengths)))
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return np.where(mask, wave, 50 * wave), mask


def pairs_with_alone(
    model: Any, together: SEWDOutput, wave: Array, lengths: list[int], alone_of: Any
) -> list[tuple[Array, Array]]:
    """Every result of the batch beside that of each recording by itself."""
    pairs = []
    for b, length in enumerate(lengths):
        alone = alone_of(wave[b : b + 1, :length], output_hidden_states=True, output_attentions=True)
        frames = model.config.frames(length)
        t = model.config.squeezed(frames)
        pairs.append((together.last_hidden_state[b, :frames], alone.last_hidden_state[0]))
        if together.logits is not None and alone.logits is not None:
            rows = slice(frames) if model.head == "ctc" else slice(None)
            pairs.append((together.logits[b][rows], alone.logits[0]))
        for ours, theirs in zip(together.hidden_states or (), alone.hidden_states or (), strict=True):
            pairs.append((ours[b, :t], theirs[0]))
        if together.attentions is None:  # not asked for: the fused form
            continue
        for ours, theirs in zip(together.attentions, alone.attentions or (), strict=True):
            pairs.append((ours[b, :, :t, :t], theirs[0]))
            assert (ours[b, :, :, t:] == 0).all()
    return pairs


LENGTHS = st.lists(st.integers(35, 90), min_size=1, max_size=3)


@pytest.mark.parametrize("head", ["model", "ctc", "classification"])
@pytest.mark.parametrize("options", ALONE_OPTIONS.values(), ids=ALONE_OPTIONS.keys())
@settings(SETTINGS, max_examples=8)
@given(lengths=LENGTHS, seed=SEEDS)
def test_a_batch_gives_each_recording_its_own_result(
    options: dict[str, Any], head: str, lengths: list[int], seed: int
) -> None:
    if "use_weighted_layer_sum" in options and head != "classification":
        return
    wave, mask = padded(lengths, seed)
    asked: dict[str, Any] = {"padding": "alone", "output_hidden_states": True, "output_attentions": True}
    # Run one by one: the same to the last bit.
    model = build(options, head, NUMPY)
    apart = model(wave, mask, **asked)
    assert apart.attentions is not None
    for ours, theirs in pairs_with_alone(model, apart, wave, lengths, model):
        np.testing.assert_array_equal(ours, theirs)
    # Run together, with lengths: the same up to the order of summation.
    for table in (TOGETHER, NUMBA):
        check_together(build(options, head, table), build(options, head, NUMPY), wave, mask, lengths, asked)


def check_together(batched: Any, model: Any, wave: Array, mask: Array, lengths: list[int], asked: Any) -> None:
    fused = {"padding": "alone", "output_hidden_states": True}
    for call in (asked, fused):
        out = batched(wave, mask, **call)
        assert (out.attentions is not None) == ("output_attentions" in call)
        for ours, theirs in pairs_with_alone(batched, out, wave, lengths, model):
            assert error_between(ours, theirs) <= rounding(batched.ops, 1e-10)
    # What is returned is not what is computed: without hidden states the results are the same to the last bit.
    alone, whole = batched(wave, mask, padding="alone"), batched(wave, mask, **fused)
    name = "last_hidden_state" if model.head == "model" else "logits"
    np.testing.assert_array_equal(getattr(alone, name), getattr(whole, name))


@pytest.mark.parametrize("ops", TABLES)
def test_alone_clears_what_comes_after_a_recording(ops: backend.Operations) -> None:
    wave, mask = padded([90, 47, 62], seed=1)
    model = build({"squeeze_factor": 3}, "ctc", ops)
    out = model(wave, mask, padding="alone", output_hidden_states=True)
    for b, length in enumerate((90, 47, 62)):
        frames = model.config.frames(length)
        whole = model.config.squeezed(frames) * 3
        assert (out.last_hidden_state[b, whole:] == 0).all()
        assert (out.last_hidden_state[b, :whole] != 0).any(axis=-1).all()


@pytest.mark.parametrize("ops", TABLES)
def test_padding_reaches_results_by_the_other_rules_only(ops: backend.Operations) -> None:
    """Why "alone" exists: group norm runs over padding, unless it is told not to."""
    wave, mask = padded([90, 47], seed=2)
    changed = np.where(mask, wave, 0)
    model = build({}, "ctc", ops)
    for padding, reaches in [("transformers", True), ("original", True), ("alone", False)]:
        a, b = (model(x, mask, padding=padding).logits for x in (wave, changed))
        frames = model.config.frames(47)
        assert (error_between(a[1, :frames], b[1, :frames]) > 1e-3) == reaches
        np.testing.assert_array_equal(a[0], b[0])


@pytest.mark.parametrize("ops", TABLES)
@pytest.mark.parametrize("head", ["ctc", "classification"])
def test_a_mask_of_ones_is_no_mask(ops: backend.Operations, head: str) -> None:
    model = build({}, head, ops)
    wave = np.random.default_rng(4).standard_normal((2, 70))
    plain = model(wave).logits
    for padding in ("transformers", "original", "alone"):
        masked = model(wave, np.ones((2, 70), int), padding=padding).logits
        assert error_between(masked, plain) <= rounding(ops, 1e-12)


@SETTINGS
@given(batch=st.integers(1, 4), samples=st.integers(35, 90), seed=SEEDS)
def test_recordings_of_one_length_do_not_see_each_other(batch: int, samples: int, seed: int) -> None:
    model = build({}, "ctc")
    wave = np.random.default_rng(seed).standard_normal((batch, samples))
    together = model(wave).logits
    for b in range(batch):
        alone = model(wave[b : b + 1]).logits
        assert error_between(together[b], alone[0]) <= 1e-12
    shuffled = np.random.default_rng(seed).permutation(batch)
    again = model(wave[shuffled]).logits
    assert error_between(again, together[shuffled]) <= 1e-12


# ----------------------------------------------------------------------------- memory


@pytest.mark.parametrize("padding", ["transformers", "alone"])
@pytest.mark.parametrize("head", ["ctc", "classification"])
def test_a_head_returns_hidden_states_only_where_they_are_asked_for(head: str, padding: str) -> None:
    model = build({}, head)
    wave, mask = padded([90, 47], seed=3)
    plain, asked = model(wave, mask, padding=padding), model(wave, mask, padding=padding, output_hidden_states=True)
    assert plain.last_hidden_state is None and plain.hidden_states is None
    assert asked.last_hidden_state.shape == (2, model.config.frames(90), model.config.hidden_size)
    np.testing.assert_array_equal(plain.logits, asked.logits)
    assert build({}, "model")(wave, mask, padding=padding).last_hidden_state is not None


@pytest.mark.parametrize("ops", TABLES)
@pytest.mark.parametrize("head", ["model", "ctc", "classification"])
@pytest.mark.parametrize("padding", ["none", "transformers", "original", "alone"])
@pytest.mark.parametrize("options", [{}, {"squeeze_factor": 1, "feat_extract_activation": "linear"}], ids=str)
def test_nothing_returned_shares_memory(
    ops: backend.Operations, head: str, padding: str, options: dict[str, Any]
) -> None:
    model = build(options, head, ops)
    wave, mask = padded([70, 53], seed=0)
    before = wave.copy()
    asked: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    if padding != "none":
        asked.update(attention_mask=mask, padding=padding)
    trace = Trace()
    first, traced = arrays_of(model(wave, **asked)), arrays_of(model(wave, **asked, trace=trace))
    kept = [array.copy() for array in first]
    groups = {"first": first, "traced": traced, "trace": list(trace.values())}
    foreign = [wave, mask, *model.params.values()]
    everything = [(name, array) for name, arrays in groups.items() for array in arrays]
    for number, (name, array) in enumerate(everything):
        assert array.flags.writeable
        assert not any(np.may_share_memory(array, other) for other in foreign), name
        assert not any(np.may_share_memory(array, other) for _, other in everything[number + 1 :]), name
    # Whatever a caller does to the results, the next call is not affected.
    for _, array in everything:
        array[...] = np.nan
    for want, got in zip(kept, arrays_of(model(wave, **asked)), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(wave, before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ops", TABLES)
def test_read_only_and_strided_waveforms_give_the_same(ops: backend.Operations, dtype: Any) -> None:
    if ops.name == "numba" and dtype == np.float64:
        return  # computes in float32 only
    model = build({}, "ctc", ops, dtype)
    wave, mask = padded([70, 53], seed=0)
    want = model(wave, mask, padding="alone").logits
    wide = np.zeros((2, 140))
    wide[:, ::2] = wave
    read_only = wave.copy()
    read_only.flags.writeable = False
    for variant in (wide[:, ::2], read_only, np.asfortranarray(wave)):
        for kind in (bool, np.int32, np.float64):
            got = model(variant, mask.astype(kind), padding="alone").logits
            assert got.dtype == dtype
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("ops", TABLES)
@pytest.mark.parametrize("head", ["ctc", "classification"])
def test_a_trace_does_not_change_the_result(ops: backend.Operations, head: str) -> None:
    """Fused and explicit forms agree, whichever point is asked for."""
    model = build({"conv_kernel_size": 3}, head, ops)
    wave, mask = padded([70, 53], seed=3)
    for padding in ("transformers", "original", "alone"):
        want = arrays_of(model(wave, mask, padding=padding))
        for name in points(model.config, head):
            trace = Trace(name)
            got = arrays_of(model(wave, mask, padding=padding, trace=trace))
            assert list(trace) == [name]
            for ours, theirs in zip(got, want, strict=True):
                assert error_between(ours, theirs) <= rounding(ops, 1e-12), name
