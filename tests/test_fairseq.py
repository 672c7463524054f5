"""Original fairseq checkpoints: synthetic files with the original's names, cfg, args and foreign classes."""

from __future__ import annotations

import argparse
import enum
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sewd_np.checkpoint import CheckpointError, read_checkpoint
from sewd_np.config import SEWDConfig
from sewd_np.fairseq import canonical_name, parse_conv_layers, published_vocabulary, read_dictionary
from tests.reference import SMALL, build, canonical

CONV_TEXT = (
    "[(8, 10, 5), (12, 3, 2)] + [(12, 1, 1)] * 1 + [(12, 3, 2)] + [(12, 1, 1)] * 1 + "
    "[(16, 3, 2), (16, 1, 1)]*2 + [(24, 2, 2), (24, 1, 1)] * 2"
)
OPTIONS: dict[str, Any] = {  # fairseq's own names for tests.reference.SMALL
    "_name": "squeeze_wav2vec2_deberta",
    "extractor_mode": "default",
    "encoder_layers": 3,
    "encoder_embed_dim": 48,
    "encoder_ffn_embed_dim": 80,
    "encoder_attention_heads": 4,
    "activation_fn": "gelu",
    "conv_feature_layers": CONV_TEXT,
    "conv_bias": False,
    "conv_pos": 31,
    "conv_pos_groups": 16,
    "squeeze_factor": 2,
    "position_buckets": 8,
    "max_position_embeddings": 16,
    "pos_att_type": "p2c|c2p",
    "mask_prob": 0.65,
    "dropout": 0.2,
    "fbank_dim": 0,
    "mfcc_dim": "${task.mfcc_dim}",
}
FINE_TUNING = {"mask_prob": 0.5, "mask_channel_prob": 0.1, "dropout": 0.0, "final_dropout": 0.3, "w2v_path": "x.pt"}


def original_name(name: str, fine_tuned: bool, layer_mode: bool) -> str:
    """transformers' name → fairseq's, written out independently of the package."""
    if name.startswith("lm_head"):
        return name.replace("lm_head", "w2v_encoder.proj")
    name = name.removeprefix("sew_d.")
    name = re.sub(r"^masked_spec_embed$", "mask_emb", name)
    name = re.sub(r"^feature_projection", "post_extract_proj", name)
    name = re.sub(r"(conv_layers\.\d+)\.conv\.", r"\1.0.", name)
    name = re.sub(r"(conv_layers\.\d+)\.layer_norm\.", r"\1.2.1." if layer_mode else r"\1.2.", name)
    name = name.replace("encoder.pos_conv_embed.conv", "encoder.pos_conv.0")
    name = name.replace("parametrizations.weight.original0", "weight_g")
    name = name.replace("parametrizations.weight.original1", "weight_v")
    name = name.replace("encoder.upsample.projection", "encoder.upsample.0")
    return ("w2v_encoder.w2v_model." if fine_tuned else "") + name


def original_tensors(hf: torch.nn.Module, fine_tuned: bool) -> dict[str, torch.Tensor]:
    layer_mode = hf.config.feat_extract_norm == "layer"
    return {original_name(name, fine_tuned, layer_mode): value for name, value in hf.state_dict().items()}


def saved(tmp_path: Path, tensors: dict[str, torch.Tensor], **entries: Any) -> Path:
    path = tmp_path / "checkpoint_best.pt"
    torch.save({"model": tensors, "optimizer_history": [{"num_updates": 3}], **entries}, path)
    return path


def assert_same(params: dict[str, np.ndarray], hf: torch.nn.Module) -> None:
    expected = canonical(hf.state_dict())
    assert set(params) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


def assert_sizes(config: SEWDConfig, expected: SEWDConfig) -> None:
    for name in (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "squeeze_factor"),
        *("conv_dim", "conv_kernel", "conv_stride", "conv_bias", "feat_extract_norm", "num_conv_pos_embeddings"),
        *("num_conv_pos_embedding_groups", "position_buckets", "max_position_embeddings", "share_att_key"),
        *("pos_att_type", "norm_rel_ebd", "relative_attention", "layer_norm_eps", "feature_layer_norm_eps"),
    ):
        assert getattr(config, name) == getattr(expected, name), name


# --------------------------------------------------------------------------- whole files


def test_pretrained_with_cfg(tmp_path: Path) -> None:
    hf = build(SMALL, "model", torch.float32)
    tensors = original_tensors(hf, fine_tuned=False)
    heads = ["quantizer.vars", "quantizer.weight_proj.bias", "project_q.weight", "final_proj.net.0.weight"]
    tensors |= {name: torch.randn(3) for name in heads}
    checkpoint = read_checkpoint(saved(tmp_path, tensors, args=None, cfg={"model": OPTIONS, "task": {"fbank_dim": 0}}))
    assert checkpoint.head == "model" and checkpoint.vocab is None
    assert checkpoint.ignored == tuple(heads)
    assert_same(checkpoint.params, hf)
    assert_sizes(checkpoint.config, SEWDConfig.from_dict(hf.config.to_dict()))
    assert checkpoint.config.hidden_act == "gelu" and checkpoint.config.hidden_dropout == 0.2
    assert checkpoint.config.architectures == ("SEWDModel",)
    assert checkpoint.preprocessor["do_normalize"] and not checkpoint.preprocessor["return_attention_mask"]


def test_finetuned_with_nested_namespaces(tmp_path: Path) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    args = argparse.Namespace(**FINE_TUNING, w2v_args=argparse.Namespace(**OPTIONS), arch="wav2vec_ctc")
    checkpoint = read_checkpoint(saved(tmp_path, original_tensors(hf, fine_tuned=True), args=args))
    assert checkpoint.head == "ctc" and checkpoint.ignored == ()
    assert checkpoint.vocab == published_vocabulary()
    assert_same(checkpoint.params, hf)
    assert_sizes(checkpoint.config, SEWDConfig.from_dict(hf.config.to_dict()))
    # Fine-tuning's own options, not those of the model it wraps.
    assert (checkpoint.config.mask_time_prob, checkpoint.config.mask_feature_prob) == (0.5, 0.1)
    assert (checkpoint.config.hidden_dropout, checkpoint.config.final_dropout) == (0.0, 0.3)


def test_finetuned_without_masking_ignores_the_mask(tmp_path: Path) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    cfg = {"model": {**FINE_TUNING, "mask_prob": 0.0, "mask_channel_prob": 0.0, "w2v_args": {"model": OPTIONS}}}
    checkpoint = read_checkpoint(saved(tmp_path, original_tensors(hf, fine_tuned=True), cfg=cfg))
    assert checkpoint.ignored == ("masked_spec_embed",)
    assert not checkpoint.config.apply_spec_augment


def test_layer_mode_with_biases_and_own_position_keys(tmp_path: Path) -> None:
    hf = build({**SMALL, "feat_extract_norm": "layer", "conv_bias": True, "share_att_key": False}, "ctc", torch.float32)
    inner = {**OPTIONS, "extractor_mode": "layer_norm", "conv_bias": True, "share_att_key": False}
    cfg = {"model": {**FINE_TUNING, "w2v_args": {"model": inner}}}
    checkpoint = read_checkpoint(saved(tmp_path, original_tensors(hf, fine_tuned=True), cfg=cfg))
    assert_same(checkpoint.params, hf)
    assert checkpoint.preprocessor["return_attention_mask"]


def test_foreign_classes_are_read_but_never_imported(tmp_path: Path) -> None:
    """OmegaConf's nodes and fairseq's enums, from modules that exist while saving and explode when imported later."""
    module = types.ModuleType("omegaconf_for_a_test")
    namespace: dict[str, Any] = {"__name__": module.__name__, "enum": enum}
    source = """
class DictConfig:
    def __init__(self, content): self._metadata, self._content = object, content
class AnyNode:
    def __init__(self, value): self._metadata, self._val = None, value
class Choice(enum.Enum):
    gelu = "gelu"
"""
    exec(source, namespace)
    vars(module).update(namespace)
    sys.modules[module.__name__] = module
    try:
        leaves = {key: module.AnyNode(value) for key, value in OPTIONS.items()}  # type: ignore[attr-defined]
        leaves["activation_fn"] = module.AnyNode(module.Choice.gelu)  # type: ignore[attr-defined]
        cfg = module.DictConfig({"model": module.DictConfig(leaves)})  # type: ignore[attr-defined]
        hf = build(SMALL, "model", torch.float32)
        path = saved(tmp_path, original_tensors(hf, fine_tuned=False), cfg=cfg)
    finally:
        del sys.modules[module.__name__]
    checkpoint = read_checkpoint(path)
    assert module.__name__ not in sys.modules
    assert_same(checkpoint.params, hf)
    assert checkpoint.config.num_hidden_layers == 3 and checkpoint.config.hidden_act == "gelu"


def test_config_json_and_dictionary_beside_the_file_win(tmp_path: Path) -> None:
    hf = build({**SMALL, "vocab_size": 7}, "ctc", torch.float32)
    (tmp_path / "dict.ltr.txt").write_text("| 90\nE 51\n' 3\n", encoding="utf-8")
    hf.config.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(saved(tmp_path, original_tensors(hf, fine_tuned=True)))  # neither cfg nor args
    assert checkpoint.vocab == {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "'": 6}
    assert checkpoint.config.hidden_act == "gelu_python"
    assert_same(checkpoint.params, hf)


def test_head_model_of_a_finetuned_file(tmp_path: Path) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    cfg = {"model": {**FINE_TUNING, "w2v_args": {"model": OPTIONS}}}
    checkpoint = read_checkpoint(saved(tmp_path, original_tensors(hf, fine_tuned=True), cfg=cfg), head="model")
    assert set(checkpoint.ignored) == {"lm_head.weight", "lm_head.bias"}
    assert_same(checkpoint.params, hf.sew_d)


# ------------------------------------------------------------------------------- errors


def test_errors_of_whole_files(tmp_path: Path) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    tensors = original_tensors(hf, fine_tuned=True)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("neither 'cfg' nor 'args'", {}),
        ("w2v_args are absent", {"cfg": {"model": FINE_TUNING}}),
        ("squeeze_method is 'multi-layer'", {"cfg": wrapped(squeeze_method="multi-layer")}),
        ("extractor_mode is 'batch_norm'", {"cfg": wrapped(extractor_mode="batch_norm")}),
        (r"\.pt: conv_feature_layers is", {"cfg": wrapped(conv_feature_layers="__import__('os').system('true')")}),
        (
            r"num_hidden_layers is 4, but the weights say 3.*encoder\.encoder\.layer\.3",
            {"cfg": wrapped(encoder_layers=4)},
        ),
        ("hidden_size is 96, but the weights say 48", {"cfg": wrapped(encoder_embed_dim=96)}),
        ("encoder_layers|num_hidden_layers", {"cfg": wrapped(encoder_layers="many")}),
        (
            r"mask_time_prob is 'often'; expected a number",
            {"cfg": {"model": {**FINE_TUNING, "mask_prob": "often", "w2v_args": {"model": OPTIONS}}}},
        ),
    ]
    for message, entries in cases:
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(saved(tmp_path, tensors, **entries))
    tensors["w2v_encoder.upsample.0.weight"] = torch.ones(1)  # an option of the original code that is not SEW-D
    with pytest.raises(CheckpointError, match=r"1 tensor \(w2v_encoder\.upsample\.0\.weight\) unexpected"):
        read_checkpoint(saved(tmp_path, tensors, cfg=wrapped()))


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    tensors = original_tensors(build(SMALL, "ctc", torch.float32), fine_tuned=True)
    tensors["mask_emb"] = torch.zeros(SMALL["hidden_size"])  # beside the one inside w2v_encoder
    with pytest.raises(CheckpointError, match=r"two tensors .* are both masked_spec_embed \(one is mask_emb\)"):
        read_checkpoint(saved(tmp_path, tensors, cfg=wrapped()))


def wrapped(**changes: Any) -> dict[str, Any]:
    return {"model": {**FINE_TUNING, "w2v_args": {"model": {**OPTIONS, **changes}}}}


def test_vocabulary_of_the_wrong_size(tmp_path: Path) -> None:
    path = saved(tmp_path, original_tensors(build({**SMALL, "vocab_size": 7}, "ctc"), True), cfg=wrapped())
    with pytest.raises(CheckpointError, match=r"the CTC head has 7 outputs but the published vocabulary .* has 32"):
        read_checkpoint(path)
    (tmp_path / "dict.ltr.txt").write_text("| 90\nE 51\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"the CTC head has 7 outputs but dict\.ltr\.txt has 6 tokens"):
        read_checkpoint(path)


# --------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layer_norm.weight", "layer_norm.weight"),
        ("w2v_encoder.w2v_model.layer_norm.bias", "layer_norm.bias"),
        ("encoder.encoder.LayerNorm.weight", "encoder.encoder.LayerNorm.weight"),
        ("encoder.pos_conv.0.weight_g", "encoder.pos_conv_embed.conv.weight_g"),
        ("w2v_encoder.proj.bias", "lm_head.bias"),
        # Whole paths: these contain a known name, and are not it.
        ("my_post_extract_proj.weight", "my_post_extract_proj.weight"),
        ("decoder.w2v_encoder.proj.weight", "decoder.w2v_encoder.proj.weight"),
        ("feature_extractor.conv_layers.0.0.weight.extra", "feature_extractor.conv_layers.0.0.weight.extra"),
        ("mask_embedding", "mask_embedding"),
        ("encoder.pos_conv.1.bias", "encoder.pos_conv.1.bias"),
    ],
)
def test_names_match_as_whole_paths(name: str, expected: str) -> None:
    assert canonical_name(name) == expected


# ------------------------------------------------------------------------- conv_feature_layers


@pytest.mark.parametrize(
    "text",
    [
        CONV_TEXT,
        "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
        "[(64, 10, 5), (128, 3, 2)] + [(128, 1, 1)] * 1 + \n[(128, 3, 2)] + 2*[(256, 1, 1)]",
        "([(8, 10, 5)] + [(16, 3, 2)] * 2) * 2",
        "[(8 * 2, 10, 2 + 3),]",
        "((8, 10, 5), (16, 3, 2))",
        "[[8, 10, 5]]",
        "[(1, 2, 3)] * 0 + [(((4)), 5, 6)]",
    ],
)
def test_the_grammar_gives_what_python_gives(text: str) -> None:
    assert parse_conv_layers(text) == [tuple(layer) for layer in eval(text.replace("\n", " "))]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[(8, 10, 5)",
        "[(8, 10, 5)]]",
        "[(8, 10)]",
        "[(8, 10, 5, 1)]",
        "[8, 10, 5]",
        "[(8, 10, 0)]",
        "[(8, 10, -5)]",
        "[(8, 10, 5.0)]",
        "[(8, 10, 5)] + (1, 2, 3)",
        "[(8, 10, 5)] * [(8, 10, 5)]",
        "[(8, 10, 5)] ** 2",
        "[(8, 10, 5)] * 99999999",
        "[(8, 10, 5)] * 999999 * 999999",
        "[(8, 10, 5)] * (1 * 99999 * 99999)",
        "[(8, 10, 5)] 3",
        "[(8 10 5)]",
        "[(8,, 10, 5)]",
        "[,]",
        "(" * 500 + ")" * 500,
        "[(1,1,1)]" + "+[(1,1,1)]" * 200,
        "__import__('os').system('touch x')",
        "[(x, 10, 5)]",
        "[(8, 10, 5) for i in (1,)]",
        "[(٣, 10, 5)]",
        None,
        [(8, 10, 5)],
    ],
)
def test_anything_else_is_refused(text: Any) -> None:
    with pytest.raises(CheckpointError, match="expected lists of"):
        parse_conv_layers(text)


# ------------------------------------------------------------------------------ dictionary


def test_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "dict.ltr.txt"
    letters = [token for token in published_vocabulary() if not token.startswith("<")]
    path.write_text("".join(f"{token} {100 - i}\n" for i, token in enumerate(letters)), encoding="utf-8")
    assert read_dictionary(path) == published_vocabulary()
    path.write_bytes("| 4\r\nÄ 3\r\na b 2\n# 1 #fairseq:overwrite\n".encode())
    assert list(read_dictionary(path))[4:] == ["|", "Ä", "a b", "#"]
    for text, message in [("| 4\nE\n", "line 2 is 'E'"), ("| 4\n| 3\n", "second time"), ("<s> 1\n", "second time")]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            read_dictionary(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_dictionary(path)


def test_published_vocabulary() -> None:
    vocab = published_vocabulary()
    assert len(vocab) == 32 and [vocab[token] for token in ("<pad>", "<s>", "</s>", "<unk>", "|", "Z")] == [
        0,
        1,
        2,
        3,
        4,
        31,
    ]
