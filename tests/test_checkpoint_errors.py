"""Checkpoints that cannot be used, and hub ids: every message says what was found and what to do."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sewd_np import checkpoint as room
from sewd_np.checkpoint import CheckpointError, find, load_model, read_checkpoint
from sewd_np.config import SEWDConfig
from sewd_np.params import expected_shapes, random_params
from sewd_np.weights import implied_fields
from tests.reference import SMALL, build
from tests.test_checkpoint import change_config, folder_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("saved"), build(SMALL, "ctc", torch.float32))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A sound CTC checkpoint to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(source: Any, *patterns: str, head: str | None = None) -> str:
    """The message with which ``source`` is refused: one line, and all ``patterns`` in it."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(source, head)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    for pattern in patterns:
        assert pattern in message
    return message


# ------------------------------------------------------------------------------- files


def test_hostile_bin(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'mark'}",)

    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "system", "nothing in it was run")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("length", [0, 4, 8, 100, 5000, -1])
def test_truncated_safetensors(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused(folder, "model.safetensors: not a whole safetensors file", "download or copy it again")


def test_safetensors_that_is_something_else(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refused(folder, "Git LFS pointer")
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    refused(folder, "tensors (", "missing")


def test_numbers_of_a_type_that_numpy_lacks(folder: Path) -> None:
    save_file({"x": torch.zeros(4, dtype=torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a type that NumPy lacks.*float8.*save them as float32"):
        read_checkpoint(folder)


@pytest.mark.parametrize("inner", [None, "Wav2Vec2FeatureExtractor", [1]])
def test_a_feature_extractor_that_is_no_object(folder: Path, inner: Any) -> None:
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    (folder / "processor_config.json").write_text(json.dumps({"feature_extractor": inner}))
    with pytest.raises(CheckpointError, match=r"processor_config.json: feature_extractor is .*, not an object"):
        read_checkpoint(folder)


def test_a_fairseq_head_without_rows(tmp_path: Path) -> None:
    args = {"w2v_args": {"model": {}}}
    torch.save({"model": {"w2v_encoder.proj.weight": torch.tensor(1.0)}, "cfg": {"model": args}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        read_checkpoint(tmp_path / "a.pt")


def test_bin_that_is_no_zip(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    path.write_text("<html>Not Found</html>")
    refused(folder, "a text file")
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    refused(folder, "legacy format of before 1.6", "save it again with torch.save")
    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:-200])
    refused(folder, "cut short")
    torch.save(tensors, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    refused(folder, "damaged", "CRC")


def test_sources_that_are_nowhere(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "not a weights file")
    refused(tmp_path / "absent", "no such file or folder")
    refused("./absent", "no such file or folder")
    refused("~nobody-of-that-name/x", "no such file or folder")
    refused("absent/model.safetensors", "no such file or folder")
    for source in ("absent", "a/b/c", "owner/na me", "", "owner/", "owner/a--b", "https://host/owner/name"):
        refused(source, "is no bundled model (an4, keywords)", "owner/name")


def test_folders_that_lack_a_part(folder: Path) -> None:
    weights = folder / "model.safetensors"
    (folder / "config.json").rename(folder / "kept.json")
    refused(folder, "no config.json there")
    refused(weights, "no config.json there")
    (folder / "kept.json").rename(folder / "config.json")
    weights.rename(folder / "other.safetensors")
    refused(folder, "no weights there; expected model.safetensors or pytorch_model.bin.")
    (folder / "checkpoint_best.pt").write_bytes(b"")
    refused(folder, "to read the fairseq file there, give its path", "checkpoint_best.pt")
    assert read_checkpoint(folder / "other.safetensors").head == "ctc"


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_invalid_json(folder: Path, name: str) -> None:
    for text, message in [("{'a': 1}", "not valid JSON"), ("", "not valid JSON"), ("[1]", "found a list")]:
        (folder / name).write_text(text)
        refused(folder, name, message)
    (folder / name).write_bytes(b'{"a": "\xff"}')
    refused(folder, name, "not valid JSON")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_attention_heads": 5}, "hidden_size is 48"),
        ({"model_type": "wav2vec2"}, "model_type"),
        ({"conv_dim": [1, 2]}, "conv_dim"),
        ({"hidden_act": "swiglu"}, "hidden_act"),
    ],
)
def test_config_that_no_model_can_have(folder: Path, changes: dict[str, Any], field: str) -> None:
    change_config(folder, **changes)
    refused(folder, "config.json", field)


# ------------------------------------------------------------------------------- shards


def sharded(tmp_path: Path) -> Path:
    return folder_of(tmp_path, build(SMALL, "ctc", torch.float32), max_shard_size="40KB")


def test_missing_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    refused(folder, f"1 shard ({shards[1].name}) of {len(shards)} missing")


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))

    def changed(**changes: Any) -> None:
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], **changes}}))

    changed(**{"lm_head.extra": shards[0]})
    refused(folder, "lm_head.extra", "in no shard")
    changed(**{"lm_head.bias": shards[0] if index["weight_map"]["lm_head.bias"] != shards[0] else shards[1]})
    refused(folder, "lm_head.bias, which the index does not place there")
    for name in ("../model.safetensors", "/model.safetensors", 3, "", ["a"]):
        changed(**{"lm_head.bias": name})
        refused(folder, "is no file name of a shard")
    path.write_text("{}")
    refused(folder, "no 'weight_map'")


# ------------------------------------------------------------------- tensors and the config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 96}, "hidden_size is 96, but the weights say 48"),
        ({"vocab_size": 40}, "vocab_size is 40, but the weights say 32"),
        ({"intermediate_size": 81}, "intermediate_size is 81, but the weights say 80"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, but the weights say 3"),
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, but the weights say 3"),
        ({"squeeze_factor": 3}, "squeeze_factor is 3, but the weights say 2"),
        ({"conv_dim": [8, *[12] * 4, *[16] * 4, *[20] * 4]}, "conv_dim is (8, 12"),
        ({"conv_kernel": [11, 3, 1, 3, 1, 3, 1, 3, 1, 2, 1, 2, 1]}, "conv_kernel is (11, 3"),
        ({"conv_bias": True}, "conv_bias is True, but the weights say False"),
        ({"feat_extract_norm": "layer"}, "feat_extract_norm is layer, but the weights say group"),
        ({"num_conv_pos_embeddings": 32}, "num_conv_pos_embeddings is 32, but the weights say 31"),
        ({"num_conv_pos_embedding_groups": 8}, "num_conv_pos_embedding_groups is 8, but the weights say 16"),
        ({"position_buckets": 12}, "position_buckets is 12, but the weights say 8"),
        ({"position_buckets": -1}, "max_position_embeddings is 16, but the weights say 8"),
        ({"relative_attention": False}, "relative_attention is False, but the weights say True"),
        ({"share_att_key": False}, "share_att_key is False, but the weights say True"),
        ({"norm_rel_ebd": "none"}, "norm_rel_ebd is none, but the weights say layer_norm"),
        ({"conv_kernel_size": 3}, "conv_kernel_size is 3, but the weights say 0"),
        # Fields left out take transformers' defaults, and the message says so.
        ({"hidden_size": None, "num_attention_heads": 4}, "hidden_size is 768 (the default, as config.json lacks it)"),
        ({"conv_dim": None}, "conv_dim is (64, 128, 128"),
        ({"position_buckets": None, "max_position_embeddings": 512}, "position_buckets is 256 (the default"),
    ],
)
def test_config_and_weights_that_disagree(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    assert "config and weights disagree" in refused(folder, message)


def test_classifier_fields(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, build({**SMALL, "num_labels": 5}, "classification", torch.float32))
    change_config(folder, classifier_proj_size=21)
    refused(folder, "classifier_proj_size is 21, but the weights say 20")
    change_config(folder, classifier_proj_size=20, id2label=None, label2id=None)
    refused(folder, "num_labels is 2 (the default, as config.json lacks it), but the weights say 5")
    change_config(folder, id2label={str(i): str(i) for i in range(5)}, use_weighted_layer_sum=True)
    refused(folder, "use_weighted_layer_sum is True, but the weights say False", "layer_weights")


OPTIONS: list[dict[str, Any]] = [
    {},
    {"conv_bias": True, "feat_extract_norm": "layer"},
    {"share_att_key": False, "pos_att_type": ["c2p"]},
    {"share_att_key": False, "position_buckets": -1},
    {"relative_attention": False, "norm_rel_ebd": "none", "mask_time_prob": 0.0},
    {"conv_kernel_size": 3, "conv_groups": 2, "conv_dim": [8] * 12 + [48], "squeeze_factor": 3},
    {"num_labels": 7, "use_weighted_layer_sum": True, "max_relative_positions": 20},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("head", ["model", "ctc", "classification"])
def test_sound_tensors_imply_their_own_config(options: dict[str, Any], head: str) -> None:
    config = SEWDConfig.from_dict({**SMALL, **options})
    implied = implied_fields(random_params(config, head), config)
    assert len(implied) >= 10
    for name, value in implied.items():
        assert getattr(config, name) == value, name


def test_names_that_do_not_fit(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "sew_d.encoder.encoder.layer.1.output.dense.bias"
    spoiled = {**tensors, "sew_d.adapter.weight": torch.ones(2), "lm_head.bias": torch.ones(3)}
    del spoiled[name]
    save_file(spoiled, folder / "model.safetensors")
    refused(
        folder,
        "1 tensor (encoder.encoder.layer.1.output.dense.bias) missing",
        "1 tensor (adapter.weight) unexpected",
        "1 tensor (lm_head.bias is (3,), expected (32,)) misshapen",
    )
    save_file({**tensors, name.removeprefix("sew_d."): torch.ones(48)}, folder / "model.safetensors")
    refused(folder, "are the same tensor, encoder.encoder.layer.1.output.dense.bias; expected one")
    new = "sew_d.encoder.pos_conv_embed.conv.parametrizations.weight.original0"
    save_file(
        {**tensors, new.replace("parametrizations.weight.original0", "weight_g"): tensors[new].clone()},
        folder / "model.safetensors",
    )
    refused(folder, "are the same tensor, encoder.pos_conv_embed.conv.weight_g")


def test_long_lists_are_cut_but_counted(folder: Path) -> None:
    save_file({"lm_head.bias": torch.ones(32)}, folder / "model.safetensors")
    count = len(expected_shapes(SEWDConfig.from_dict(SMALL), "ctc")) - 1
    message = refused(folder, f"{count} tensors (", f"and {count - 6} more) missing")
    assert len(message) < 700


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "lm_head.weight holds 1 of 1536 values that are not finite")
    assert read_checkpoint(folder, head="model").head == "model"  # there it is unused


def test_weights_beyond_float32(folder: Path) -> None:
    tensors = {name: value.to(torch.float64) for name, value in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"][3, 5] = 1e300
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight holds numbers too large for float32; .*dtype='float64'"
    ):
        load_model(folder, backend="numpy")
    assert load_model(folder, dtype="float64").params["lm_head.weight"].max() == 1e300


def test_weights_that_are_large_or_whole_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][:] = 3e38  # finite, though their sum is not
    save_file(tensors, folder / "model.safetensors")
    assert read_checkpoint(folder).head == "ctc"
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bool().int()
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "lm_head.weight holds int32 numbers")


def test_vocabulary_of_the_wrong_size(folder: Path) -> None:
    path = folder / "vocab.json"
    vocab = json.loads(path.read_text())
    del vocab["Z"]
    path.write_text(json.dumps(vocab))
    refused(folder, "31 entries with ids 0 to 30, but vocab_size is 32")
    path.write_text(json.dumps({**vocab, "Z": 31, "Ö": 32}))
    refused(folder, "33 entries with ids 0 to 32, but vocab_size is 32")
    path.write_text(json.dumps({**vocab, "Z": 30}))
    refused(folder, "32 entries with ids 0 to 30")
    path.write_text(json.dumps({"en": vocab}))
    refused(folder, "token 'en' has id {")


# --------------------------------------------------------------------------------- hub


def cached(cache: Path, folder: Path, repository: str) -> None:
    """A hub cache that holds a repository, as huggingface_hub lays it out."""
    root = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, root / "snapshots" / ("1" * 40))
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("1" * 40)


def offline(cache: Path, repository: str) -> subprocess.CompletedProcess[str]:
    """Read a hub id in a fresh interpreter: huggingface_hub takes its settings once, on import."""
    code = f"from sewd_np.checkpoint import read_checkpoint; print(len(read_checkpoint({repository!r}).params))"
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    root = Path(room.__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)


def test_hub_id_from_the_cache_while_offline(folder: Path, tmp_path: Path) -> None:
    cached(tmp_path / "cache", folder, "owner/name")
    count = str(len(read_checkpoint(folder).params))
    assert offline(tmp_path / "cache", "owner/name").stdout.strip() == count
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    cached(tmp_path / "cache", folder, "owner/bin-only")
    assert offline(tmp_path / "cache", "owner/bin-only").stdout.strip() == count


def test_unknown_hub_id_while_offline(tmp_path: Path) -> None:
    result = offline(tmp_path, "owner/unknown")
    last = result.stderr.strip().split("\n")[-1]
    assert "owner/unknown: the hub cannot be reached and its cache on this machine does not hold" in last


def test_only_what_is_read_is_asked_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        assert repository == "owner/name"
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find("owner/name") == folder
    assert len(asked) == 1 and "model.safetensors" in asked[0] and "pytorch_model.bin" not in asked[0]
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert find("owner/name") == folder
    assert "pytorch_model.bin" in asked[2] and "model.safetensors" not in asked[2]


def test_what_the_hub_may_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    class Unknown(errors.RepositoryNotFoundError):
        def __init__(self) -> None:
            pass

    answers = [
        (Unknown(), "the hub has no such repository, or it is private or gated"),
        (errors.LocalEntryNotFoundError("x"), "the hub cannot be reached"),
        (RuntimeError("proxy says no\nlong trace"), "the hub refused (RuntimeError: proxy says no)"),
    ]
    for answer, message in answers:

        def fails(*args: Any, answer: Exception = answer, **kwargs: Any) -> None:
            raise answer

        monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
        refused("owner/name", message)


@pytest.mark.parametrize("source", [None, 3, b"an4", ["an4"]])
def test_a_source_that_names_nothing(source: object) -> None:
    with pytest.raises(TypeError, match=r"the model is .*; it must be a bundled name, a folder"):
        read_checkpoint(source)  # type: ignore[arg-type]
