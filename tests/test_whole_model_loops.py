"""The whole model of every backend against the loops of ``naive.forward``: every option, head and padding rule.

The loops fold, fuse and project the parameters themselves, so this also checks every backend's ``prepare``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest

from sewd_np import SEWDForCTC, SEWDForSequenceClassification, SEWDModel, backend
from sewd_np.config import SEWDConfig
from sewd_np.params import random_params
from sewd_np.trace import error_between
from tests import naive

Array = np.ndarray
TABLES = [backend.NUMPY, backend.get_operations("numba", threads=2)]
# float64: the order of summation. float32: the errors of one operation, up to 2e-5 (test_operations), add up over 30.
TOLERANCES = {("numpy", "float64"): 1e-10, ("numpy", "float32"): 1e-4, ("numba", "float32"): 1e-4}


@pytest.fixture(params=TOLERANCES, ids=lambda run: "-".join(run))
def run(request: pytest.FixtureRequest) -> tuple[backend.Operations, str, float]:
    """(table, dtype, tolerance)."""
    name, dtype = request.param
    return next(table for table in TABLES if table.name == name), dtype, TOLERANCES[name, dtype]


Run = tuple[backend.Operations, str, float]

TINY: dict[str, Any] = {
    "vocab_size": 6,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 10,
    "conv_dim": [3, 4, 4],
    "conv_kernel": [4, 3, 1],
    "conv_stride": [2, 2, 1],
    "position_buckets": 4,
    "max_position_embeddings": 8,
    "num_conv_pos_embeddings": 5,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 5,
    "num_labels": 3,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "published options": {},
    "layer norm, conv bias": {"feat_extract_norm": "layer", "conv_bias": True},
    "no projection": {"conv_dim": [3, 4, 8]},
    "even positional kernel": {"num_conv_pos_embeddings": 4},
    "no squeeze": {"squeeze_factor": 1},
    "squeeze 3": {"squeeze_factor": 3},
    "own position projections": {"share_att_key": False},
    "c2p only": {"pos_att_type": ["c2p"]},
    "p2c only": {"pos_att_type": ["p2c"], "share_att_key": False},
    "no position term": {"pos_att_type": []},
    "one bucket a distance": {"position_buckets": -1, "max_relative_positions": 4},
    "table not normed": {"norm_rel_ebd": "none"},
    "no relative attention": {"relative_attention": False},
    "deberta convolution": {"conv_kernel_size": 3, "conv_groups": 2, "conv_act": "gelu"},
    "layer sum": {"use_weighted_layer_sum": True},
    "activations, eps": {"hidden_act": "mish", "feat_extract_activation": "silu", "layer_norm_eps": 1e-2},
}
CLASSES: dict[str, Any] = {"model": SEWDModel, "ctc": SEWDForCTC, "classification": SEWDForSequenceClassification}


def tiny(options: dict[str, Any], head: str, dtype: Any = np.float64) -> tuple[SEWDConfig, dict[str, Array], Array]:
    """Configuration, parameters and a batch of two waveforms for a model that the loops can run."""
    config = SEWDConfig.from_dict({**TINY, **options})
    params = {name: value.astype(dtype) for name, value in random_params(config, head, seed=4).items()}
    wave_bn = np.random.default_rng(6).standard_normal((2, 65)).astype(dtype)
    return config, params, wave_bn


def check_output(output: Any, expected: dict[str, Any], tolerance: float) -> None:
    assert error_between(output.last_hidden_state, expected["last_hidden_state"]) <= tolerance
    assert ("logits" in expected) == (output.logits is not None)
    if output.logits is not None:
        assert output.logits.shape == expected["logits"].shape
        assert error_between(output.logits, expected["logits"]) <= tolerance
    for name in ("hidden_states", "attentions"):
        for got, want in zip(getattr(output, name) or (), expected[name], strict=True):
            assert got.shape == want.shape
            assert error_between(got, want) <= tolerance


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_model_equals_its_loops(run: Run, options: dict[str, Any]) -> None:
    """Explicit and fused forms, without a mask and by both padding rules of a batch."""
    ops, dtype, tolerance = run
    head = "classification" if "use_weighted_layer_sum" in options else "ctc"
    config, params, wave_bn = tiny(options, head, dtype)
    model = CLASSES[head](config, params, ops)
    valid = np.array([65, 48])  # 15 and 11 frames: odd, so that the squeeze leaves frames over
    attention_mask = (np.arange(65) < valid[:, None]).astype(np.int32)
    for padding in (None, "transformers", "original"):
        rule: dict[str, Any] = {} if padding is None else {"attention_mask": attention_mask, "padding": padding}
        expected = by_loops(json.dumps(options), head, dtype, padding)
        output = model(wave_bn, output_hidden_states=True, output_attentions=True, **rule)
        check_output(output, expected, tolerance)
        check_output(model(wave_bn, output_hidden_states=True, **rule), {**expected, "attentions": []}, tolerance)


@functools.cache
def by_loops(options: str, head: str, dtype: str, padding: str | None) -> dict[str, Any]:
    config, params, wave_bn = tiny(json.loads(options), head, dtype)
    if padding is None:
        return naive.forward(config, params, wave_bn)
    return naive.forward(config, params, wave_bn, np.array([65, 48]), padding)


@pytest.mark.parametrize("head", ["model", "ctc", "classification"])
def test_each_head_equals_its_loops(run: Run, head: str) -> None:
    ops, dtype, tolerance = run
    config, params, wave_bn = tiny({}, head, dtype)
    output = CLASSES[head](config, params, ops)(wave_bn, output_hidden_states=True, output_attentions=True)
    check_output(output, by_loops("{}", head, dtype, None), tolerance)
    assert output.last_hidden_state.dtype == dtype


def test_alone_equals_the_loops_of_each_recording(run: Run) -> None:
    ops, dtype, tolerance = run
    for options, head in [({}, "ctc"), ({"squeeze_factor": 3, "conv_kernel_size": 3}, "classification")]:
        config, params, wave_bn = tiny(options, head, dtype)
        valid = np.array([65, 48])
        attention_mask = (np.arange(65) < valid[:, None]).astype(np.int32)
        output = CLASSES[head](config, params, ops)(wave_bn, attention_mask, padding="alone", output_hidden_states=True)
        for b, length in enumerate(valid):
            alone = naive.forward(config, params, wave_bn[b : b + 1, :length])
            frames = naive.frames_of(length, config)
            assert error_between(output.last_hidden_state[b, :frames], alone["last_hidden_state"][0]) <= tolerance
            logits = output.logits[b, :frames] if head == "ctc" else output.logits[b]
            assert error_between(logits, alone["logits"][0]) <= tolerance


def test_marked_frames_are_replaced(run: Run) -> None:
    ops, dtype, tolerance = run
    config, params, wave_bn = tiny({}, "ctc", dtype)
    marks = np.random.default_rng(2).random((2, config.frames(65))) < 0.4
    expected = naive.forward(config, params, wave_bn, mask_bs=marks)
    plain = by_loops("{}", "ctc", dtype, None)
    output = CLASSES["ctc"](config, params, ops)(wave_bn, mask_time_indices=marks)
    assert error_between(output.logits, expected["logits"]) <= tolerance
    assert error_between(output.logits, plain["logits"]) > 1e-3
    config = dataclasses.replace(config, apply_spec_augment=False)
    output = CLASSES["ctc"](config, params, ops)(wave_bn, mask_time_indices=marks)
    assert error_between(output.logits, plain["logits"]) <= tolerance
