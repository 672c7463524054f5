"""The whole model against transformers: every option, with and without masks, in float64 and in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sewd_np.config import ACTIVATIONS, SEWDConfig
from sewd_np.trace import Trace, compare, error_between, points, shapes
from tests.reference import FOR_THE_UNIT, SMALL, build, mask_of, original_padding, ours, points_of, wave

BACKENDS = ["numpy", "numba"]

# float64: transformers rounds the score scale sqrt(3e) to float32, a relative error of up to 3e-8; where 3e is a
# perfect square nothing is rounded and only the order of summation differs. float32: 13 convolutions, L layers and
# sums over up to 3,000 numbers of 2^-24 relative precision each; PyTorch's own float32 error is of the same size.
# Precision "high" multiplies numbers of 17 bits where the machine has a matrix unit, and holds to the same.
FLOAT64_ROUNDED_SCALE = 1e-7
FLOAT64 = 1e-10
FLOAT32 = 2e-4

CASES: dict[str, dict[str, Any]] = {
    "published": {},
    "head_size_16": {"hidden_size": 64},
    "layer_norm": {"feat_extract_norm": "layer"},
    "conv_bias": {"conv_bias": True},
    "layer_norm_conv_bias": {"feat_extract_norm": "layer", "conv_bias": True},
    "conv_ladder": {"conv_dim": [6, 48, 7], "conv_kernel": [9, 4, 3], "conv_stride": [3, 5, 4]},
    "no_projection": {"conv_dim": [8, 12, 48], "conv_kernel": [10, 3, 2], "conv_stride": [5, 4, 4]},
    "positional_kernel_even": {"num_conv_pos_embeddings": 16},
    "positional_kernel_1": {"num_conv_pos_embeddings": 1},
    "positional_groups_1": {"num_conv_pos_embedding_groups": 1, "num_conv_pos_embeddings": 7},
    "squeeze_1": {"squeeze_factor": 1},
    "squeeze_1_even": {"squeeze_factor": 1, "num_conv_pos_embeddings": 6},
    "squeeze_3": {"squeeze_factor": 3},
    "squeeze_3_even": {"squeeze_factor": 3, "num_conv_pos_embeddings": 4},
    "own_position_keys": {"share_att_key": False},
    "c2p_only": {"pos_att_type": ["c2p"]},
    "p2c_only": {"pos_att_type": ["p2c"]},
    "p2c_only_own_keys": {"pos_att_type": ["p2c"], "share_att_key": False},
    "c2p_only_own_keys": {"pos_att_type": ["c2p"], "share_att_key": False},
    "no_position_terms": {"pos_att_type": []},
    "no_buckets": {"position_buckets": -1, "max_position_embeddings": 9},
    "no_buckets_max_relative": {"position_buckets": -1, "max_relative_positions": 5},
    "max_relative_positions": {"max_relative_positions": 30},
    "table_not_normed": {"norm_rel_ebd": "none"},
    "no_relative_attention": {"relative_attention": False},
    "no_relative_attention_own_keys": {"relative_attention": False, "share_att_key": False, "norm_rel_ebd": "none"},
    "deberta_conv": {"conv_kernel_size": 3, "conv_groups": 2, "hidden_dropout_prob": 0.1},
    "deberta_conv_gelu": {"conv_kernel_size": 5, "conv_act": "gelu", "hidden_dropout_prob": 0.1},
    "no_spec_augment": {"mask_time_prob": 0.0},
    "eps": {"layer_norm_eps": 1e-2, "feature_layer_norm_eps": 1e-2},
    "one_layer": {"num_hidden_layers": 1},
    "one_head": {"num_attention_heads": 1},
    "attention_head_size": {"attention_head_size": 12},
    "matrix_unit": FOR_THE_UNIT,
    **{f"act_{name}": {"hidden_act": name, "feat_extract_activation": name} for name in ACTIVATIONS},
}


def options_of(case: str) -> dict[str, Any]:
    return {**SMALL, **CASES[case]}


def assert_equal_outputs(out: Any, expected: Any, tolerance: float) -> None:
    """Logits, hidden states and attentions within ``tolerance`` of their own largest value (probabilities: of 1)."""
    assert error_between(out.logits, expected.logits.numpy()) <= tolerance
    for name in ("hidden_states", "attentions"):
        mine, theirs = getattr(out, name), getattr(expected, name)
        assert len(mine) == len(theirs)
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert a.shape == tuple(b.shape)
            assert error_between(a, b.numpy()) <= tolerance, f"{name}[{i}]"


def samples_for(options: dict[str, Any], frames: int) -> int:
    """Fewest samples that give ``frames`` frames, and a few more, so that a remainder is left over."""
    config = SEWDConfig.from_dict(options)
    return config.receptive_field + (frames - 1) * config.inputs_to_logits_ratio + 3


def tolerance_of(options: dict[str, Any], dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return FLOAT32
    scale = SEWDConfig.from_dict(options).score_scale
    return FLOAT64 if scale == float(np.float32(scale)) else FLOAT64_ROUNDED_SCALE


# float64 is for the NumPy definition; the fast backends compute in float32.
RUNS = [("numpy", torch.float64, None), ("numpy", torch.float32, None), ("numba", torch.float32, "highest")]
EVERY_OPTION = [(case, *run) for case in CASES for run in RUNS]
# Elsewhere the two precisions are the same: no product has a depth for the unit.
EVERY_OPTION += [(case, "numba", torch.float32, "high") for case in ("head_size_16", "matrix_unit")]


@pytest.mark.parametrize(("case", "backend", "dtype", "precision"), EVERY_OPTION)
def test_every_option(case: str, backend: str, dtype: torch.dtype, precision: str | None) -> None:
    """Odd and even frame counts, one and several recordings, with and without a mask; logits, states, maps, loss."""
    options = options_of(case)
    hf = build(options, dtype=dtype)
    model = ours(hf, backend=backend, precision=precision)
    fused_to_explicit = 1e-12 if dtype == torch.float64 else FLOAT32 if precision == "high" else 2e-5
    for frames, batch, valid in ((12, 1, None), (13, 2, None), (13, 2, 9), (22, 3, 14), (21, 2, 20), (25, 1, 23)):
        samples = samples_for(options, frames)
        lengths = None if valid is None else [samples] * (batch - 1) + [samples_for(options, valid)]
        mask = None if lengths is None else mask_of(lengths, samples)
        inputs, labels = wave(batch, samples, dtype), torch.tensor([[5, 9, 9, -100]] * batch)
        with torch.no_grad():
            expected = hf(inputs, mask, labels=labels, output_hidden_states=True, output_attentions=True)
        numpy_mask = None if mask is None else mask.numpy()
        out = model(inputs.numpy(), numpy_mask, labels.numpy(), output_hidden_states=True, output_attentions=True)
        assert_equal_outputs(out, expected, tolerance_of(options, dtype))
        # transformers takes log_softmax in float32 even in double precision
        assert out.loss == pytest.approx(float(expected.loss), rel=1e-6 if dtype == torch.float64 else 1e-4)
        fused = model(inputs.numpy(), numpy_mask)
        assert error_between(fused.logits, out.logits) <= fused_to_explicit
        assert fused.hidden_states is None and fused.attentions is None and fused.loss is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["published", "squeeze_3", "deberta_conv", "own_position_keys", "layer_norm"])
@pytest.mark.parametrize("weighted", [False, True])
def test_classifier(case: str, weighted: bool, backend: str) -> None:
    options = {**options_of(case), "use_weighted_layer_sum": weighted, "num_labels": 5}
    for dtype in (torch.float64, torch.float32):
        if dtype == torch.float64 and backend != "numpy":
            continue
        hf = build(options, "classification", dtype)
        model = ours(hf, "classification", backend)
        for lengths in (None, [13, 13], [13, 8], [5, 13]):
            samples = samples_for(options, 13)
            mask = None if lengths is None else mask_of([samples_for(options, n) for n in lengths], samples)
            inputs, labels = wave(2, samples, dtype), torch.tensor([3, 0])
            with torch.no_grad():
                expected = hf(inputs, mask, labels=labels, output_hidden_states=True, output_attentions=True)
            out = model(
                inputs.numpy(),
                None if mask is None else mask.numpy(),
                labels.numpy(),
                output_hidden_states=True,
                output_attentions=True,
            )
            assert_equal_outputs(out, expected, tolerance_of(options, dtype))
            assert out.loss == pytest.approx(float(expected.loss), rel=1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["published", "squeeze_1", "squeeze_3", "deberta_conv", "layer_norm"])
def test_original_padding_rule(case: str, backend: str) -> None:
    """``padding="original"``: floor(valid / k) squeezed frames, padded queries cleared."""
    options = options_of(case)
    hf = build(options)
    model = ours(hf) if backend == "numpy" else ours(hf.float(), backend=backend)
    dtype = next(hf.parameters()).dtype
    samples = samples_for(options, 14)
    differs = []
    for valid in (6, 7, 9, 11, 13):
        mask = mask_of([samples, samples_for(options, valid)], samples)
        inputs = wave(2, samples, dtype)
        with original_padding(), torch.no_grad():
            expected = hf(inputs, mask, output_hidden_states=True, output_attentions=True)
        out = model(inputs.numpy(), mask.numpy(), output_hidden_states=True, output_attentions=True, padding="original")
        assert_equal_outputs(out, expected, tolerance_of(options, dtype))
        fused = model(inputs.numpy(), mask.numpy(), padding="original")
        assert error_between(fused.logits, out.logits) <= (1e-12 if dtype == torch.float64 else 2e-5)
        differs.append(error_between(model(inputs.numpy(), mask.numpy()).logits, out.logits) > 1e-6)
    # The rules differ for every odd valid length of a squeeze by 2, and padded rows differ in any case.
    assert any(differs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_spec_augment(backend: str) -> None:
    samples = samples_for(SMALL, 13)
    marked = torch.zeros(2, 13, dtype=torch.bool)
    marked[0, 3:6] = marked[1, 0] = marked[1, 12] = True
    for mask in (None, mask_of([samples, samples_for(SMALL, 8)], samples)):
        hf = build(SMALL, dtype=torch.float32)
        with torch.no_grad():
            expected = hf.sew_d(wave(2, samples, torch.float32), mask, mask_time_indices=marked).last_hidden_state
        model = ours(hf, backend=backend)
        numpy_mask = None if mask is None else mask.numpy()
        inputs = wave(2, samples, torch.float32).numpy()
        out = model(inputs, numpy_mask, mask_time_indices=marked.numpy(), output_hidden_states=True)
        assert error_between(out.last_hidden_state, expected.numpy()) <= FLOAT32
        unmarked = model(inputs, numpy_mask, output_hidden_states=True)
        assert error_between(unmarked.last_hidden_state, expected.numpy()) > 1e-2


def test_spec_augment_switched_off_or_impossible() -> None:
    samples = samples_for(SMALL, 13)
    marked, inputs = np.ones((1, 13), bool), wave(1, samples).numpy()
    off = ours(build({**SMALL, "apply_spec_augment": False}))
    np.testing.assert_array_equal(off(inputs, mask_time_indices=marked).logits, off(inputs).logits)
    without = ours(build({**SMALL, "mask_time_prob": 0.0}))
    with pytest.raises(ValueError, match="no masked_spec_embed"):
        without(inputs, mask_time_indices=marked)
    with pytest.raises(ValueError, match=r"mask_time_indices have shape \(1, 5\)"):
        off_on = ours(build(SMALL))
        off_on(inputs, mask_time_indices=marked[:, :5])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_loss_of_the_model(reduction: str, zero_infinity: bool) -> None:
    """The second recording has more labels than valid frames: inf, or 0 with zero_infinity."""
    options = {**SMALL, "ctc_loss_reduction": reduction, "ctc_zero_infinity": zero_infinity}
    hf = build(options)
    samples = samples_for(SMALL, 13)
    mask = mask_of([samples, samples_for(SMALL, 4)], samples)
    labels = torch.tensor([[5, 6, 6, 7, -100, 0], [7, 8, 9, 10, 11, 12]])
    with torch.no_grad():
        expected = hf(wave(2, samples), mask, labels=labels).loss.numpy()
    out = ours(hf)(wave(2, samples).numpy(), mask.numpy(), labels.numpy())
    np.testing.assert_allclose(out.loss, expected, rtol=1e-6)
    assert np.isinf(expected).any() != zero_infinity


@pytest.mark.parametrize(
    ("case", "head"),
    [
        ("published", "ctc"),
        ("published", "model"),
        ("layer_norm_conv_bias", "ctc"),
        ("squeeze_3_even", "classification"),
        ("own_position_keys", "ctc"),
        ("no_relative_attention", "ctc"),
        ("deberta_conv", "classification"),
        ("no_projection", "ctc"),
        ("c2p_only", "ctc"),
        ("table_not_normed", "ctc"),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_every_trace_point(case: str, head: str, masked: bool) -> None:
    """Every declared point fires once, with its declared shape, and equals transformers'."""
    options = {**options_of(case), "use_weighted_layer_sum": case == "deberta_conv"}
    hf = build(options, head)
    model = ours(hf, head)
    samples = samples_for(options, 14)
    mask = mask_of([samples, samples_for(options, 9)], samples) if masked else None
    trace = Trace()
    model(wave(2, samples).numpy(), None if mask is None else mask.numpy(), trace=trace)
    theirs, _ = points_of(hf, wave(2, samples), mask)
    declared = points(model.config, head)
    assert list(trace) == list(declared)
    assert {name: trace[name].shape for name in trace} == shapes(model.config, head, 2, samples)
    rows = compare(
        trace, {name: value for name, value in theirs.items() if name in declared}, tolerance_of(options, torch.float64)
    )
    assert [row for row in rows if row.status != "OK"] == []


CONV_A = [64] + [128] * 4 + [256] * 4 + [512] * 4
CONV_B = [96] + [192] * 4 + [384] * 4 + [768] * 4
PUBLISHED = {
    "tiny": (384, 12, 6, CONV_A, 31),
    "small": (512, 12, 8, CONV_A, 31),
    "mid": (512, 24, 8, CONV_A, 31),
    "mid-k127": (512, 24, 8, CONV_A, 127),
    "base": (768, 24, 12, CONV_A, 31),
    "base-plus": (768, 24, 12, CONV_B, 31),
}


def published_options(shape: str) -> dict[str, Any]:
    hidden, depth, heads, conv_dim, kernel = PUBLISHED[shape]
    return {
        "hidden_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "conv_dim": conv_dim,
        "num_conv_pos_embeddings": kernel,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", PUBLISHED)
def test_published_shapes(shape: str, backend: str) -> None:
    """Random weights of every published shape; two recordings, with a mask, odd frame count."""
    options = published_options(shape)
    samples = samples_for(options, 49)
    mask = mask_of([samples, samples_for(options, 31)], samples)
    hf = build(options)
    for dtype in (torch.float64, torch.float32):
        hf = hf.to(dtype)
        if dtype == torch.float64 and backend != "numpy":
            continue
        inputs = wave(2, samples, dtype)
        with torch.no_grad():
            expected = hf(inputs, mask, output_hidden_states=True, output_attentions=True)
        out = ours(hf, backend=backend)(inputs.numpy(), mask.numpy(), output_hidden_states=True, output_attentions=True)
        assert_equal_outputs(out, expected, tolerance_of(options, dtype))


def test_published_classifier_shape() -> None:
    """The keyword-spotting checkpoint: mid with 12 labels."""
    options = {**published_options("mid"), "num_labels": 12}
    hf = build(options, "classification", torch.float32)
    samples = samples_for(options, 50)
    with torch.no_grad():
        expected = hf(wave(1, samples, torch.float32)).logits
    out = ours(hf, "classification")(wave(1, samples, torch.float32).numpy())
    assert error_between(out.logits, expected.numpy()) <= FLOAT32
