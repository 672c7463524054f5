"""Names, shapes and counts of parameters against transformers, and what ``prepare`` makes of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from sewd_np import backend
from sewd_np.config import SEWDConfig
from sewd_np.params import HEADS, expected_shapes, grouped_taps, prepare, random_params
from sewd_np.trace import error_between
from tests import naive
from tests.reference import HF_CLASSES


def reference_shapes(options: dict[str, Any], head: str) -> dict[str, tuple[int, ...]]:
    """The state dict of transformers under our names; on the meta device a model has shapes and no numbers."""
    with torch.device("meta"):
        model = HF_CLASSES[head](transformers.SEWDConfig(**options))
    shapes = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("sew_d.").replace("parametrizations.weight.original0", "weight_g")
        shapes[name.replace("parametrizations.weight.original1", "weight_v")] = tuple(value.shape)
    return shapes


def published(hidden: int, layers: int, *, width: int = 64, kernel: int = 31, **options: Any) -> dict[str, Any]:
    """The options of a published checkpoint: head size 64, feed-forward 4 · hidden, conv A or B."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "conv_dim": [width, *[2 * width] * 4, *[4 * width] * 4, *[8 * width] * 4],
        "num_conv_pos_embeddings": kernel,
        **options,
    }


PUBLISHED: dict[str, tuple[dict[str, Any], str, int]] = {
    "tiny": (published(384, 12), "model", 24_115_103),
    "tiny ctc": (published(384, 12), "ctc", 24_127_423),
    "small": (published(512, 12), "model", 40_971_039),
    "mid": (published(512, 24), "model", 78_799_647),
    "mid ctc": (published(512, 24), "ctc", 78_816_063),
    "mid-k127": (published(512, 24, kernel=127), "model", 80_372_607),
    "mid-k127 ctc": (published(512, 24, kernel=127), "ctc", 80_389_023),
    "base": (published(768, 24), "model", 175_068_191),
    "base-plus": (published(768, 24, width=96), "model", 176_979_103),
    "base-plus ctc": (published(768, 24, width=96), "ctc", 177_003_711),
    "keyword spotting": (published(512, 24, num_labels=12), "classification", 78_934_059),
}


@pytest.mark.parametrize(("options", "head", "total"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_checkpoints_have_these_tensors(options: dict[str, Any], head: str, total: int) -> None:
    shapes = expected_shapes(SEWDConfig.from_dict(options), head)
    assert sum(math.prod(shape) for shape in shapes.values()) == total
    assert shapes == reference_shapes(options, head)


SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "conv_dim": [4, 6, 8],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "position_buckets": 8,
    "max_position_embeddings": 16,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 5,
    "hidden_dropout_prob": 0.1,
}
COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"conv_bias": True},
    {"feat_extract_norm": "layer"},
    {"feat_extract_norm": "layer", "conv_bias": True},
    {"conv_dim": [4, 6, 24]},
    *[{"share_att_key": False, "pos_att_type": kinds} for kinds in ([], ["c2p"], ["p2c"], ["p2c", "c2p"])],
    {"pos_att_type": ["c2p"]},
    {"position_buckets": -1},
    {"position_buckets": -1, "max_relative_positions": 5},
    {"relative_attention": False},
    {"relative_attention": False, "share_att_key": False},
    {"relative_attention": False, "norm_rel_ebd": "none"},
    {"norm_rel_ebd": "none"},
    {"conv_kernel_size": 3},
    {"conv_kernel_size": 5, "conv_groups": 3},
    {"use_weighted_layer_sum": True},
    {"mask_time_prob": 0.0},
    {"mask_time_prob": 0.0, "mask_feature_prob": 0.1},
    {"squeeze_factor": 3, "vocab_size": 7, "num_labels": 4},
    {"num_hidden_layers": 1, "num_attention_heads": 1, "num_conv_pos_embedding_groups": 24},
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("changes", COMBINATIONS, ids=lambda changes: str(changes) if changes else "as published")
def test_every_option_has_the_tensors_of_transformers(changes: dict[str, Any], head: str) -> None:
    options = {**SMALL, **changes}
    want, got = reference_shapes(options, head), expected_shapes(SEWDConfig.from_dict(options), head)
    assert got == want
    if not (head == "classification" and "use_weighted_layer_sum" in changes):
        assert list(got) == list(want), "in the reference's order"


def test_an_unknown_head_is_an_error() -> None:
    with pytest.raises(ValueError, match="head is 'lm'; it must be one of model, ctc, classification"):
        expected_shapes(SEWDConfig(), "lm")


# ---------------------------------------------------------------------- random parameters


def test_random_params_are_seeded_and_leave_nothing_neutral() -> None:
    config = SEWDConfig.from_dict({**SMALL, "use_weighted_layer_sum": True, "conv_kernel_size": 3, "conv_bias": True})
    for head in HEADS:
        params, again, other = (random_params(config, head, seed) for seed in (0, 0, 1))
        assert {name: value.shape for name, value in params.items()} == expected_shapes(config, head)
        for name, value in params.items():
            assert value.dtype == np.float32 and np.isfinite(value).all()
            np.testing.assert_array_equal(value, again[name])
            assert not np.array_equal(value, other[name])
            assert (value != 0).any() and (value != 1).any(), name


# ------------------------------------------------------------------------------- prepare


def doubles(config: SEWDConfig, head: str = "ctc") -> dict[str, np.ndarray]:
    params = {name: value.astype(np.float64) for name, value in random_params(config, head).items()}
    for value in params.values():
        value.flags.writeable = False  # preparing must not touch them
    return params


def test_prepare_folds_weight_norm_as_torch_does() -> None:
    """One norm for each kernel tap (``dim=2``), over all outputs and inputs."""
    config = SEWDConfig.from_dict(SMALL)
    params = doubles(config)
    name = "encoder.pos_conv_embed.conv"
    g, v = params[f"{name}.weight_g"], params[f"{name}.weight_v"]
    conv = torch.nn.Conv1d(24, 24, 6, groups=4).double()
    torch.nn.utils.parametrizations.weight_norm(conv, name="weight", dim=2)
    weights: Any = conv.parametrizations
    with torch.no_grad():
        weights.weight.original0.copy_(torch.tensor(g))
        weights.weight.original1.copy_(torch.tensor(v))
    got = prepare(params, config).pos_conv
    assert error_between(got.weight, grouped_taps(conv.weight.detach().numpy(), 4)) <= 1e-14
    assert error_between(got.weight, naive.taps(naive.folded_weight_norm(v, g), 4)) <= 1e-14
    assert got.weight.shape == (6, 4, 6, 6) and got.norm is None
    lengths = np.sqrt(np.square(got.weight).sum(axis=(1, 2, 3)))
    np.testing.assert_allclose(lengths, np.abs(g[0, 0]), rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_taps_are_torch_s_grouped_convolution(groups: int) -> None:
    rng = np.random.default_rng(groups)
    weight, x = rng.standard_normal((6, 12 // groups, 5)), rng.standard_normal((1, 12, 9))
    taps = grouped_taps(weight, groups)
    np.testing.assert_array_equal(taps, naive.taps(weight, groups))
    want = torch.nn.functional.conv1d(torch.from_numpy(x), torch.from_numpy(weight), groups=groups)
    assert error_between(naive.conv1d(x.swapaxes(1, 2), taps, None, 1), want.numpy().swapaxes(1, 2)) <= 1e-12


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("norm", ["layer_norm", "none"])
@pytest.mark.parametrize("kinds", [["c2p", "p2c"], ["c2p"], ["p2c"], []])
def test_prepare_projects_the_table_once(shared: bool, norm: str, kinds: list[str]) -> None:
    """c2p asks the table as keys answer, p2c the table asks as queries do."""
    options = {**SMALL, "share_att_key": shared, "norm_rel_ebd": norm, "pos_att_type": kinds}
    config = SEWDConfig.from_dict(options)
    params = doubles(config)
    weights, table = prepare(params, config), params["encoder.encoder.rel_embeddings.weight"]
    np.testing.assert_array_equal(weights.rel_embeddings, table)
    if norm == "layer_norm":
        prefix = "encoder.encoder.LayerNorm"
        table = naive.layer_norm(table, params[f"{prefix}.weight"], params[f"{prefix}.bias"], config.layer_norm_eps)
    assert error_between(weights.rel_embeddings_normed, table) <= 1e-12
    for i, layer in enumerate(weights.layers):
        for kind, got, own, content in [
            ("c2p", layer.attention.pos_key, "pos_key_proj", "key_proj"),
            ("p2c", layer.attention.pos_query, "pos_query_proj", "query_proj"),
        ]:
            if kind not in kinds:
                assert got is None
                continue
            name = f"encoder.encoder.layer.{i}.attention.self.{content if shared else own}"
            rows = naive.linear(table, params[f"{name}.weight"].T, params[f"{name}.bias"])
            assert got.shape == (3, 16, 8)  # (h, p, e)
            for h in range(3):
                assert error_between(got[h], rows[:, 8 * h : 8 * h + 8]) <= 1e-12


def test_fused_operations_read_what_the_explicit_ones_do() -> None:
    """NumPy's table needs no other layout; the same arrays, not copies."""
    config = SEWDConfig.from_dict({**SMALL, "pos_att_type": ["c2p"]})
    weights = prepare(doubles(config), config)
    assert weights.feature_encoder is weights.conv_layers and weights.squeeze is weights.pos_conv
    for layer in weights.layers:
        assert layer.attention.positions == (layer.attention.pos_key, None)


def test_prepare_packs_for_the_numba_kernels() -> None:
    """The tensors of NumPy's ``prepare`` in the kernels' layout; what the explicit forms read is NumPy's own."""
    config = SEWDConfig.from_dict({**SMALL, "conv_kernel_size": 3})
    params = random_params(config, "classification")
    for value in params.values():
        value.flags.writeable = False
    ops = backend.get_operations("numba", threads=1, precision="highest")
    plain, packed, again = prepare(params, config), ops.prepare(params, config), ops.prepare(params, config)
    for name in ("conv_layers", "pos_conv", "conv", "rel_embeddings", "rel_embeddings_normed", "masked_spec_embed"):
        for ours, theirs in zip(leaves(getattr(packed, name)), leaves(getattr(plain, name)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    pairs: list[tuple[Any, Any]] = [(packed.feature_projection, plain.feature_projection)]
    pairs += [(packed.upsample, plain.upsample), (packed.projector, plain.projector)]
    pairs.append((packed.classifier, plain.classifier))
    for layer, old in zip(packed.layers, plain.layers, strict=True):
        pairs += [(layer.attention.qkv, old.attention.qkv), (layer.attention.output, old.attention.output)]
        pairs += [(layer.intermediate, old.intermediate), (layer.output, old.output)]
        np.testing.assert_array_equal(layer.attention.pos_key, old.attention.pos_key)
        np.testing.assert_array_equal(layer.attention.pos_query, old.attention.pos_query)
    for linear, definition in pairs:
        np.testing.assert_array_equal(linear.bias, definition.bias)
        inputs, outputs = definition.weight.shape
        columns = linear.weight.transpose(1, 0, 2).reshape(inputs, -1)  # panels side by side
        np.testing.assert_array_equal(columns[:, :outputs], definition.weight)
        assert (columns[:, outputs:] == 0).all()
    # A pure function: the same again, in memory of its own, and the parameters stay as they are (they are read-only).
    for ours, theirs in zip(leaves(packed), leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert packed.lm_head is None and packed.layer_weights is None


def leaves(tree: Any) -> list[Any]:
    """Arrays and numbers of a tree of tuples."""
    if isinstance(tree, tuple):
        return [leaf for part in tree for leaf in leaves(part)]
    return [] if tree is None else [tree]


def test_prepare_fuses_query_key_and_value() -> None:
    config = SEWDConfig.from_dict(SMALL)
    params = doubles(config)
    x = np.random.default_rng(0).standard_normal((5, 24))
    qkv = prepare(params, config).layers[1].attention.qkv
    for part, projection in enumerate(("query", "key", "value")):
        name = f"encoder.encoder.layer.1.attention.self.{projection}_proj"
        want = naive.linear(x, params[f"{name}.weight"].T, params[f"{name}.bias"])
        assert error_between((x @ qkv.weight + qkv.bias)[:, 24 * part : 24 * part + 24], want) <= 1e-12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_prepare_is_a_pure_function_in_the_dtype_of_its_parameters(dtype: Any) -> None:
    config = SEWDConfig.from_dict({**SMALL, "conv_kernel_size": 3})
    params = {name: value.astype(dtype) for name, value in random_params(config, "ctc").items()}
    before = {name: value.copy() for name, value in params.items()}
    first, second = leaves(prepare(params, config)), leaves(prepare(params, config))
    assert {array.dtype for array in first} == {np.dtype(dtype)}
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    for name, value in before.items():
        np.testing.assert_array_equal(params[name], value)
    # It can be called again after an update.
    params["lm_head.weight"] = params["lm_head.weight"] + 1
    lm_head = prepare(params, config).lm_head
    assert lm_head is not None
    np.testing.assert_array_equal(lm_head.weight, params["lm_head.weight"].T)


def test_parts_that_a_configuration_lacks_are_none() -> None:
    bare = SEWDConfig.from_dict({**SMALL, "conv_dim": [4, 6, 24], "relative_attention": False, "mask_time_prob": 0.0})
    weights = prepare(random_params(bare, "model"), bare)
    assert weights.feature_projection is None and weights.masked_spec_embed is None and weights.conv is None
    assert weights.rel_embeddings is None and weights.rel_embeddings_normed is None
    assert weights.lm_head is None and weights.projector is None and weights.classifier is None
    assert weights.layer_weights is None
    assert [layer.norm is None for layer in weights.conv_layers] == [False, True, True]
    assert all(layer.bias is None for layer in weights.conv_layers)
    full = SEWDConfig.from_dict({**SMALL, "feat_extract_norm": "layer", "conv_bias": True, "conv_kernel_size": 3})
    weights = prepare(random_params(full, "ctc"), full)
    assert all(layer.norm is not None and layer.bias is not None for layer in weights.conv_layers)
    assert weights.conv is not None and weights.lm_head is not None and weights.feature_projection is not None
