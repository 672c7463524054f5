"""What the CUDA backend must get right, for every run that has numbers: the simulator and kernels as compiled.

Every operation of the table, and whole small models with every option, against NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sewd_np.backend import NUMPY, device_operations
from sewd_np.config import SEWDConfig
from sewd_np.cuda_launch import Device
from sewd_np.cuda_memory import DeviceArray
from sewd_np.model import SEWDForCTC, SEWDForSequenceClassification, SEWDModel
from sewd_np.params import random_params
from sewd_np.trace import Trace, compare, error_between, points
from tests.operation_cases import CASES, Case, Index

Array = np.ndarray

# One operation, equal inputs: float32 rounding of sums over up to 100 terms and of a division after them.
OPERATION = 2e-5
# A whole model: the same through a dozen of layers; of the largest logit.
MODEL = 2e-5
# Recordings of a batch against each alone, which the design promises within 1e-5 of the largest logit.
ALONE = 1e-5

EVERY = 5  # of the operations with many cases, every fifth is simulated, and all cases of the others
MANY = 12


# ----------------------------------------------------------------------- single operations


def chosen() -> list[Case]:
    counts: dict[str, int] = {}
    kept = []
    total = {case.operation: 0 for case in CASES}
    for case in CASES:
        total[case.operation] += 1
    for case in CASES:
        number = counts[case.operation] = counts.get(case.operation, 0) + 1
        if total[case.operation] <= MANY or number % EVERY == 1:
            kept.append(case)
    return kept


def moved(value: Any, move: Callable[[Array], Any], index: Callable[..., Any]) -> Any:
    """An argument with its floating-point arrays moved to a backend, and an ``Index`` in that backend's form."""
    if isinstance(value, Index):
        return index(*value)
    if isinstance(value, tuple):
        parts = [moved(part, move, index) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return move(value) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def check_operation(case: Case, device: Device) -> None:
    """The operation says what its definition says."""
    ops = device_operations(device)
    want = getattr(NUMPY, case.operation)(*moved(case.args, np.asarray, NUMPY.relative_index))
    got = getattr(ops, case.operation)(*moved(case.args, ops.from_numpy, ops.relative_index))
    if case.operation == "relative_index":
        i = np.arange(case.args[0])
        np.testing.assert_array_equal(ops.to_numpy(got)[i[:, None] - i + len(i) - 1], want)
        return
    wants, gots = (value if isinstance(value, tuple) else (value,) for value in (want, got))
    for one, other in zip(gots, wants, strict=True):
        assert isinstance(one, DeviceArray) and one.shape == other.shape
        assert error_between(ops.to_numpy(one), other) <= OPERATION * case.amplification


# ---------------------------------------------------------------------------- whole models

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "conv_dim": [4, 6, 4],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "position_buckets": 4,
    "max_position_embeddings": 8,
    "num_conv_pos_embeddings": 7,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 6,
    "vocab_size": 9,
}
HEADS: dict[str, Any] = {"model": SEWDModel, "ctc": SEWDForCTC, "classification": SEWDForSequenceClassification}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "published": ("ctc", {}),
    "thirteen convolutions": (
        "ctc",
        {"conv_dim": [4] * 13, "conv_kernel": [10, *[3, 1] * 4, *[2, 1] * 2], "conv_stride": [5, *[2, 1] * 6]},
    ),
    "no head": ("model", {}),
    "classification": ("classification", {}),
    "weighted layer sum": ("classification", {"use_weighted_layer_sum": True}),
    "layer norm, conv bias": ("ctc", {"feat_extract_norm": "layer", "conv_bias": True}),
    "conv bias": ("ctc", {"conv_bias": True}),
    "no relative attention": ("ctc", {"relative_attention": False}),
    "c2p": ("ctc", {"pos_att_type": ["c2p"]}),
    "p2c, own keys": ("ctc", {"pos_att_type": ["p2c"], "share_att_key": False}),
    "no position terms": ("ctc", {"pos_att_type": []}),
    "no buckets": ("ctc", {"position_buckets": -1, "max_position_embeddings": 5}),
    "conv beside layer 0": ("ctc", {"conv_kernel_size": 3, "conv_groups": 2}),
    "squeeze 3, even kernel": ("ctc", {"squeeze_factor": 3, "num_conv_pos_embeddings": 4}),
    "squeeze 1": ("ctc", {"squeeze_factor": 1}),
    "odd head size, other activations": (
        "ctc",
        {"hidden_size": 6, "intermediate_size": 7, "hidden_act": "gelu_new", "feat_extract_activation": "mish"},
    ),
    "no feature projection": ("ctc", {"conv_dim": [4, 6, 8]}),
    "table not normed": ("ctc", {"norm_rel_ebd": "none"}),
}
# Those whose operations treat the recordings of a batch in ways of their own.
IN_COMPANY = (
    "published",
    "classification",
    "weighted layer sum",
    "conv beside layer 0",
    "squeeze 3, even kernel",
    "layer norm, conv bias",
)


def pair(case: str, device: Device) -> tuple[SEWDModel, SEWDModel]:
    """The same model on NumPy and on the GPU of this run."""
    head, changes = OPTIONS[case]
    config = SEWDConfig.from_dict({**SMALL, **changes})
    params = random_params(config, head)
    return HEADS[head](config, params, NUMPY), HEADS[head](config, params, device_operations(device))


def waves(model: SEWDModel, batch: int, frames: int, seed: int = 0) -> Array:
    """(b, n) noise of ``frames`` frames and a few samples left over."""
    config = model.config
    samples = config.receptive_field + (frames - 1) * config.inputs_to_logits_ratio + 3
    return np.random.default_rng(seed).standard_normal((batch, samples)).astype(np.float32)


def noise(samples: int, batch: int = 1, seed: int = 0) -> Array:
    """(b, n) normalised noise."""
    return np.random.default_rng(seed).standard_normal((batch, samples)).astype(np.float32)


def error(got: Array, want: Array) -> float:
    """Largest difference by the largest logit, which may be small: ``error_between`` divides by 1 at least."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def mask_for(wave_bn: Array, lengths: list[int]) -> Array:
    return (np.arange(wave_bn.shape[1]) < np.array(lengths)[:, None]).astype(np.int32)


def assert_close(got: Any, want: Any, tolerance: float = MODEL) -> None:
    for name in ("last_hidden_state", "logits"):
        mine, definition = getattr(got, name), getattr(want, name)
        assert (mine is None) == (definition is None)
        if mine is not None:
            assert isinstance(mine, np.ndarray) and mine.dtype == np.float32
            assert error_between(mine, definition) <= tolerance, name


def check_every_point(numpy: SEWDModel, gpu: SEWDModel) -> None:
    """Fused forms with a mask; and without one every trace point, each once."""
    wave_bn = waves(numpy, 2, 9)
    mask = mask_for(wave_bn, [wave_bn.shape[1], wave_bn.shape[1] - 4 * numpy.config.inputs_to_logits_ratio])
    assert_close(*(model(wave_bn, mask, output_hidden_states=True) for model in (gpu, numpy)))
    mine, definition = Trace(), Trace()
    explicit = gpu(wave_bn[:1], output_hidden_states=True, output_attentions=True, trace=mine)
    want = numpy(wave_bn[:1], output_hidden_states=True, output_attentions=True, trace=definition)
    assert list(mine) == list(definition) == list(points(gpu.config, gpu.head))
    rows = compare(mine, definition, MODEL)
    assert not [row for row in rows if row.status != "OK"]
    assert_close(explicit, want)
    for name in ("hidden_states", "attentions"):
        for one, other in zip(getattr(explicit, name), getattr(want, name), strict=True):
            assert error_between(one, other) <= MODEL


def check_batch_is_as_alone(numpy: SEWDModel, gpu: SEWDModel) -> None:
    """What a recording says does not depend on its company, nor on what lies behind its end."""
    wave_bn = waves(numpy, 3, 14)
    ratio = numpy.config.inputs_to_logits_ratio
    lengths = [wave_bn.shape[1] - 3 * ratio - 1, wave_bn.shape[1], numpy.config.minimum_samples + 2]
    # What lies after a recording's end must not matter: not zeros here.
    out = gpu(wave_bn, mask_for(wave_bn, lengths), padding="alone", output_hidden_states=True)
    for b, length in enumerate(lengths):
        alone = numpy(wave_bn[b : b + 1, :length], output_hidden_states=True)
        frames = numpy.config.frames(length)
        assert error_between(out.last_hidden_state[b, :frames], alone.last_hidden_state[0]) <= ALONE
        logits = out.logits[b] if gpu.head == "classification" else out.logits[b, :frames]
        assert error_between(logits, alone.logits[0]) <= ALONE
        for mine, own in zip(out.hidden_states, alone.hidden_states, strict=True):
            assert error_between(mine[b, : own.shape[1]], own[0]) <= ALONE
