"""SEWDConfig: refused values, config.json there and back, transformers' defaults, and what follows from the fields."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers

from sewd_np.config import ACTIVATIONS, SEWDConfig

# ------------------------------------------------------------------- refused values

REFUSED: list[tuple[str, Any, str]] = [
    ("vocab_size", 0, "at least 1"),
    ("vocab_size", "32", "a whole number"),
    ("vocab_size", None, "a whole number"),
    ("vocab_size", True, "a whole number"),
    ("hidden_size", 770, "a multiple of num_attention_heads"),
    ("hidden_size", 768.0, "a whole number"),
    ("hidden_size", 10**400, "a whole number below 2,147,483,648"),
    ("num_hidden_layers", 0, "at least 1"),
    ("num_hidden_layers", 10**6, "at most 1,000"),
    ("num_attention_heads", 0, "at least 1"),
    ("intermediate_size", -1, "at least 1"),
    ("squeeze_factor", 0, "at least 1"),
    ("max_position_embeddings", 0, "at least 1"),
    ("max_position_embeddings", 129, "more than position_buckets / 2"),
    ("max_relative_positions", 100, "more than position_buckets / 2"),
    ("position_buckets", 3, "at least 4, or -1"),
    ("position_buckets", 256.0, "a whole number"),
    ("share_att_key", 1, "true or false"),
    ("share_att_key", "true", "true or false"),
    ("relative_attention", None, "true or false"),
    ("pos_att_type", ["c2c"], "'c2p' and 'p2c'"),
    ("pos_att_type", "c2p|p2p", "'c2p' and 'p2c'"),
    ("pos_att_type", ["c2p", "c2p"], "each at most once"),
    ("pos_att_type", 3, "a list of strings"),
    ("pos_att_type", [1], "a list of strings"),
    ("norm_rel_ebd", "batch_norm", "'layer_norm' or 'none'"),
    ("norm_rel_ebd", None, "a string"),
    ("layer_norm_eps", 0, "above 0"),
    ("layer_norm_eps", "1e-7", "a finite number"),
    ("feature_layer_norm_eps", -1e-5, "above 0"),
    ("feature_layer_norm_eps", math.nan, "a finite number"),
    ("hidden_dropout", math.inf, "a finite number"),
    ("hidden_dropout", 10**400, "a finite number"),
    ("hidden_dropout", False, "a finite number"),
    ("feat_extract_norm", "batch", "'group' or 'layer'"),
    ("conv_dim", [], "as long as conv_kernel"),
    ("conv_dim", [64] * 12, "as long as conv_kernel"),
    ("conv_dim", [0] + [64] * 12, "at least 1"),
    ("conv_dim", "64", "a list of whole numbers"),
    ("conv_kernel", [3.0] * 13, "a list of whole numbers"),
    ("conv_kernel", [0] * 13, "at least 1"),
    ("conv_stride", [-1] * 13, "at least 1"),
    ("conv_stride", [10**30] * 13, "a list of whole numbers below 2,147,483,648"),
    ("conv_bias", "false", "true or false"),
    ("num_conv_pos_embeddings", 0, "at least 1"),
    ("num_conv_pos_embedding_groups", 0, "at least 1"),
    ("num_conv_pos_embedding_groups", 5, "a divisor of hidden_size"),
    ("ctc_loss_reduction", "average", "'mean', 'sum' or 'none'"),
    ("classifier_proj_size", 0, "at least 1"),
    ("pad_token_id", 32, "below vocab_size"),
    ("pad_token_id", -1, "below vocab_size"),
    ("pad_token_id", None, "a whole number"),
    ("bos_token_id", 1.5, "a whole number below 2,147,483,648 or null"),
    ("bos_token_id", 2**31, "below 2,147,483,648 or null"),
    ("attention_head_size", 32, "hidden_size / num_attention_heads = 64"),
    ("conv_kernel_size", 4, "odd"),
    ("num_labels", "2", "a whole number"),
    ("num_labels", 2.0, "a whole number"),
    ("num_labels", 10**9, "at most 1,000,000"),
    ("id2label", {}, "a name for each label id"),
    ("id2label", {0: "a", 2: "b"}, "a name for each label id"),
    ("id2label", {"first": "a"}, "a dictionary from label ids to names"),
    ("id2label", ["a", "b"], "a dictionary from label ids to names"),
    ("architectures", [1], "a list of strings"),
    *[(name, "gelu_7", "one of") for name in ("hidden_act", "feat_extract_activation", "conv_act")],
]


@pytest.mark.parametrize(("name", "value", "expected"), REFUSED)
def test_a_refused_value_names_its_field(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        SEWDConfig.from_dict({name: value})
    message = str(caught.value)
    assert expected in message
    if name in ("conv_kernel", "conv_stride", "conv_dim") and "as long as" in message:
        assert "conv_kernel (13) and conv_stride (13)" in message
    else:
        assert message.startswith(f"config field {name} is "), message


@pytest.mark.parametrize("name", ["hidden_act", "feat_extract_activation", "conv_act"])
def test_an_unknown_activation_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"config field {name} is 'selu'") as caught:
        SEWDConfig.from_dict({name: "selu"})
    for activation in ACTIVATIONS:
        assert activation in str(caught.value).rstrip(".").split()
        assert getattr(SEWDConfig.from_dict({name: activation}), name) == activation


def test_a_refused_conv_groups_names_its_field() -> None:
    with pytest.raises(ValueError, match="config field conv_groups is 5"):
        SEWDConfig(conv_kernel_size=3, conv_groups=5)
    assert SEWDConfig(conv_groups=5).conv_groups == 5  # not looked at where there is no such convolution


def test_another_model_type_is_refused() -> None:
    with pytest.raises(ValueError, match="model_type is 'wav2vec2', but this package runs 'sew-d' only"):
        SEWDConfig.from_dict({"model_type": "wav2vec2"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("p2c|c2p", ("p2c", "c2p")),
        (" c2p | ", ("c2p",)),
        ("", ()),
        (None, ()),
        ([], ()),
        (["c2p"], ("c2p",)),
        (("p2c", "c2p"), ("p2c", "c2p")),
    ],
)
def test_pos_att_type_may_be_a_string_a_list_or_null(given: Any, expected: tuple[str, ...]) -> None:
    config = SEWDConfig.from_dict({"pos_att_type": given})
    assert config.pos_att_type == expected
    assert config.uses_c2p == ("c2p" in expected) and config.uses_p2c == ("p2c" in expected)
    assert config.score_scale == math.sqrt(64 * (1 + len(expected)))


def test_score_scale_counts_terms_that_are_switched_off() -> None:
    config = SEWDConfig(relative_attention=False)
    assert not config.uses_c2p and not config.uses_p2c
    assert config.score_scale == math.sqrt(64 * 3)


@pytest.mark.parametrize(
    ("norm_rel_ebd", "normalizes"),
    [("layer_norm", True), ("none", False), ("Layer_Norm", True), (" none | layer_norm", True)],
)
def test_norm_rel_ebd_is_read_as_the_reference_reads_it(norm_rel_ebd: str, normalizes: bool) -> None:
    assert SEWDConfig(norm_rel_ebd=norm_rel_ebd).normalizes_positions is normalizes


# ----------------------------------------------------------------------- config.json


def test_defaults_are_those_of_transformers() -> None:
    reference, ours = transformers.SEWDConfig().to_dict(), SEWDConfig()
    # These the reference reads with getattr, with the defaults written here; its config class does not know them.
    getattr_defaults = {
        "attention_head_size": None,
        "max_relative_positions": -1,
        "conv_kernel_size": 0,
        "conv_groups": 1,
        "conv_act": "tanh",
    }
    for field in dataclasses.fields(SEWDConfig):
        value = getattr(ours, field.name)
        if field.name in getattr_defaults:
            assert value == getattr_defaults[field.name], field.name
            assert field.name not in reference
        elif field.name == "hidden_dropout_prob":
            assert value == reference["hidden_dropout"]
        elif field.name == "architectures":
            assert value == tuple(reference[field.name] or ())
        elif field.name != "extra":
            expected = reference[field.name]
            assert value == (tuple(expected) if isinstance(expected, list | tuple) else expected), field.name
    assert SEWDConfig.from_dict({}) == ours
    assert ours.num_labels == 2


OPTIONS: list[dict[str, Any]] = [
    {},
    {"hidden_size": 384, "num_attention_heads": 6, "num_conv_pos_embeddings": 31, "vocab_size": 40},
    {"pos_att_type": ["c2p"], "share_att_key": False, "position_buckets": -1, "norm_rel_ebd": "none"},
    {"conv_dim": [8, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "conv_bias": True},
    {"num_labels": 12, "classifier_proj_size": 7, "use_weighted_layer_sum": True},
    {"id2label": {0: "yes", 1: "no", 2: "_silence_"}, "label2id": {"yes": 0, "no": 1, "_silence_": 2}},
    {"conv_kernel_size": 3, "conv_groups": 2, "conv_act": "gelu", "hidden_dropout_prob": 0.0},
    {"layer_norm_eps": 1e-5, "mask_time_prob": 0.0, "ctc_loss_reduction": "sum", "ctc_zero_infinity": True},
    {"architectures": ["SEWDForCTC"], "eos_token_id": None, "bos_token_id": None, "max_relative_positions": 300},
    {"attention_head_size": 64, "initializer_range": 0.5, "tie_word_embeddings": False},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_round_trip_through_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    reference = transformers.SEWDConfig(**options)
    config = SEWDConfig.from_dict(reference.to_dict())
    for name, value in options.items():
        if name in {field.name for field in dataclasses.fields(SEWDConfig)} - {"extra"}:
            got = getattr(config, name)
            assert (list(got) if isinstance(got, tuple) else got) == value
    assert config.num_labels == reference.num_labels
    assert config.inputs_to_logits_ratio == reference.inputs_to_logits_ratio
    # Our dictionary, as JSON, gives transformers the configuration it had, and us ours.
    text = json.dumps(config.to_dict())
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    back = transformers.SEWDConfig.from_pretrained(tmp_path)
    assert SEWDConfig.from_dict(json.loads(text)) == config
    assert SEWDConfig.from_dict(back.to_dict()) == config
    written, wanted = back.to_dict(), reference.to_dict()
    for name, value in wanted.items():
        if name not in ("architectures", "transformers_version", "_name_or_path"):
            got = written[name]
            assert (list(got) if isinstance(got, tuple) else got) == (
                list(value) if isinstance(value, tuple) else value
            ), name


def test_unknown_fields_are_kept_and_written_back() -> None:
    values = {"model_type": "sew-d", "num_codevectors_per_group": 320, "gradient_checkpointing": False, "my_note": "x"}
    config = SEWDConfig.from_dict(values)
    assert config.extra == {name: value for name, value in values.items() if name != "model_type"}
    assert values.items() <= config.to_dict().items()
    assert SEWDConfig.from_dict(config.to_dict()) == config


def test_older_files_lack_fields() -> None:
    """An early fine-tune: one epsilon for all, no vocab_size, no feature_layer_norm_eps."""
    config = SEWDConfig.from_dict({"hidden_size": 512, "num_attention_heads": 8, "layer_norm_eps": 1e-5})
    assert (config.layer_norm_eps, config.feature_layer_norm_eps, config.vocab_size) == (1e-5, 1e-5, 32)


def test_a_config_does_not_change() -> None:
    values = {"conv_dim": [4] * 13, "id2label": {"0": "a"}, "my_note": "x"}
    config = SEWDConfig.from_dict(values)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]
    assert values == {"conv_dim": [4] * 13, "id2label": {"0": "a"}, "my_note": "x"}
    assert config.id2label == {0: "a"} and config.conv_dim == (4,) * 13


# ------------------------------------------------------------- what follows from the fields

CONV_A, CONV_B = ((w, *[2 * w] * 4, *[4 * w] * 4, *[8 * w] * 4) for w in (64, 96))


@pytest.mark.parametrize(
    ("hidden", "heads", "conv_dim", "kernel"),
    [(384, 6, CONV_A, 31), (512, 8, CONV_A, 31), (512, 8, CONV_A, 127), (768, 12, CONV_A, 31), (768, 12, CONV_B, 31)],
)
def test_rates_and_lengths_of_the_published_shapes(
    hidden: int, heads: int, conv_dim: tuple[int, ...], kernel: int
) -> None:
    config = SEWDConfig(
        hidden_size=hidden, num_attention_heads=heads, conv_dim=conv_dim, num_conv_pos_embeddings=kernel
    )
    assert (config.inputs_to_logits_ratio, config.receptive_field, config.minimum_samples) == (320, 400, 720)
    assert (config.head_size, config.position_span, config.max_relative_distance) == (64, 256, 512)
    assert config.score_scale == math.sqrt(192)
    assert config.has_feature_projection == (conv_dim[-1] != hidden)
    assert config.has_masked_spec_embed and config.normalizes_positions
    assert config.frames(93_680) == 292 and config.squeezed(292) == 146
    assert [config.frames(n) for n in (0, 399, 400, 719, 720, 1039, 1040)] == [0, 0, 1, 1, 2, 2, 3]
    assert [config.squeezed(s) for s in (0, 1, 2, 3, 4)] == [0, 0, 1, 1, 2]
    assert config.conv_lengths(16_000)[0] == 3199 and config.conv_lengths(16_000)[-1] == 49


def test_position_span_without_buckets_is_the_reach() -> None:
    assert SEWDConfig(position_buckets=-1).position_span == 512
    assert SEWDConfig(position_buckets=0, max_relative_positions=40).position_span == 40
    assert SEWDConfig(position_buckets=8, max_relative_positions=40).position_span == 8
    assert SEWDConfig(max_relative_positions=0).max_relative_distance == 512


@pytest.mark.parametrize(
    ("time", "feature", "exists"), [(0.05, 0.0, True), (0.0, 0.1, True), (0, 0, False), (0.0, 0.0, False)]
)
def test_masked_spec_embed_exists_where_masking_may_happen(time: float, feature: float, exists: bool) -> None:
    assert SEWDConfig(mask_time_prob=time, mask_feature_prob=feature).has_masked_spec_embed is exists
