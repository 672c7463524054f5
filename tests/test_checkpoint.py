"""Checkpoints read from what torch and transformers write, and written so that transformers reads them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sewd_np
from sewd_np.checkpoint import load_model, read_checkpoint
from sewd_np.fairseq import published_vocabulary
from tests.reference import HF_CLASSES, SMALL, build, canonical, ours, wave

CLASSIFIER = {**SMALL, "num_labels": 5, "use_weighted_layer_sum": True}
OLD_NAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


def folder_of(tmp_path: Path, hf: torch.nn.Module, **options: Any) -> Path:
    """What transformers saves, plus a processor's files for a CTC model."""
    folder = tmp_path / "model"
    hf.save_pretrained(folder, **options)
    if isinstance(hf, transformers.SEWDForCTC) and hf.config.vocab_size == 32:
        (folder / "vocab.json").write_text(json.dumps(published_vocabulary()), encoding="utf-8")
    return folder


def with_names(state: dict[str, torch.Tensor], old: bool, prefix: bool) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in state.items():
        for new_name, old_name in OLD_NAMES.items():
            name = name.replace(new_name, old_name) if old else name
        is_head = name.startswith(("lm_head", "projector", "classifier", "layer_weights"))
        name = name.removeprefix("sew_d.")
        renamed[f"sew_d.{name}" if prefix and not is_head else name] = value.contiguous()
    return renamed


def assert_same(params: dict[str, np.ndarray], hf: torch.nn.Module) -> None:
    expected = canonical({name: value.float() for name, value in hf.state_dict().items()})
    assert set(params) == set(expected)
    for name, array in expected.items():
        assert params[name].dtype == np.float32 and not params[name].flags.writeable
        np.testing.assert_array_equal(params[name], array, err_msg=name)


# ------------------------------------------------------------------------------ formats


@pytest.mark.parametrize("head", ["model", "ctc", "classification"])
@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "sharded bin"])
def test_layouts_and_heads(tmp_path: Path, head: str, layout: str) -> None:
    hf = build(CLASSIFIER, head, torch.float32)
    folder = folder_of(tmp_path, hf, max_shard_size="40KB" if "sharded" in layout else "1GB")
    if "bin" in layout:
        for path in folder.glob("*.safetensors"):
            torch.save(
                load_file(path), path.parent / path.name.replace("model", "pytorch_model").replace("safetensors", "bin")
            )
            path.unlink()
        for path in folder.glob("*.index.json"):
            text = path.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            (folder / "pytorch_model.bin.index.json").write_text(text)
            path.unlink()
    assert len(list(folder.glob("*.index.json"))) == ("sharded" in layout)
    checkpoint = read_checkpoint(folder)
    assert (checkpoint.head, checkpoint.ignored, checkpoint.folder) == (head, (), folder)
    assert_same(checkpoint.params, hf)
    assert checkpoint.vocab == (published_vocabulary() if head == "ctc" else None)
    assert checkpoint.config.num_labels == 5


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_names_old_and_new_with_and_without_prefix(tmp_path: Path, old: bool, prefix: bool, suffix: str) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    folder = folder_of(tmp_path, hf)
    (folder / "model.safetensors").unlink()
    state = with_names(hf.state_dict(), old, prefix)
    path = folder / ("model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin")
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert_same(read_checkpoint(path).params, hf)  # the file by its own path
    assert_same(read_checkpoint(str(folder)).params, hf)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    hf = build(SMALL, "ctc", dtype)
    folder = folder_of(tmp_path, hf)
    if suffix == ".bin":
        (folder / "model.safetensors").unlink()
        torch.save(hf.state_dict(), folder / "pytorch_model.bin")
    assert_same(read_checkpoint(folder).params, hf)


def test_safetensors_is_preferred(tmp_path: Path) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    folder = folder_of(tmp_path, hf)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert_same(read_checkpoint(folder).params, hf)


def test_the_bundled_model_by_name() -> None:
    checkpoint = read_checkpoint("an4")
    assert checkpoint.head == "ctc" and checkpoint.vocab == published_vocabulary()
    assert checkpoint.folder is not None and checkpoint.folder.name == "an4"


# -------------------------------------------------------------------------------- heads


def test_a_ctc_checkpoint_without_its_head(tmp_path: Path) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    checkpoint = read_checkpoint(folder_of(tmp_path, hf), head="model")
    assert set(checkpoint.ignored) == {"lm_head.weight", "lm_head.bias"}
    assert_same(checkpoint.params, hf.sew_d)


def test_a_head_that_is_not_there(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, build(SMALL, "model", torch.float32))
    with pytest.raises(
        ValueError, match=r"a pre-trained model without head, not a CTC model; .*lm_head\.weight.*missing"
    ):
        read_checkpoint(folder, head="ctc")
    folder = folder_of(tmp_path / "classifier", build(SMALL, "classification", torch.float32))
    with pytest.raises(ValueError, match=r"this is a classifier, not a CTC model.*lm_head\.weight"):
        read_checkpoint(folder, head="ctc")
    with pytest.raises(ValueError, match="head is 'lm'"):
        read_checkpoint(folder, head="lm")


def test_head_by_tensors_where_config_says_nothing(tmp_path: Path) -> None:
    for head in ("model", "ctc", "classification"):
        folder = folder_of(tmp_path / head, build(SMALL, head, torch.float32))
        change_config(folder, architectures=None)
        assert read_checkpoint(folder).head == head


def test_mask_vector_where_the_config_has_no_masking(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, build(SMALL, "ctc", torch.float32))
    change_config(folder, mask_time_prob=0.0)
    assert read_checkpoint(folder).ignored == ("masked_spec_embed",)
    folder = folder_of(tmp_path / "b", build({**SMALL, "mask_time_prob": 0.0}, "ctc", torch.float32))
    assert read_checkpoint(folder).ignored == ()
    change_config(folder, mask_time_prob=0.05)
    message = r"mask_time_prob is 0\.05, but the weights say 0\.0: 1 tensor \(masked_spec_embed\) missing"
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folder)


# ----------------------------------------------------------------------- small files beside


def change_config(folder: Path, **changes: Any) -> None:
    """Set fields of config.json; None removes one."""
    values = json.loads((folder / "config.json").read_text())
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))


def test_files_that_may_be_absent(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, build(SMALL, "ctc", torch.float32))
    (folder / "vocab.json").unlink()
    checkpoint = read_checkpoint(folder)
    assert checkpoint.vocab is None
    assert checkpoint.preprocessor["do_normalize"] is True and checkpoint.preprocessor["sampling_rate"] == 16000
    assert checkpoint.preprocessor["return_attention_mask"] is False
    assert checkpoint.tokenizer["pad_token"] == "<pad>" and checkpoint.tokenizer["word_delimiter_token"] == "|"


def test_side_files_where_old_and_new_transformers_put_them(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, build(SMALL, "ctc", torch.float32))
    extractor = {"do_normalize": False, "sampling_rate": 16000}
    (folder / "processor_config.json").write_text(json.dumps({"feature_extractor": extractor}))
    tokens = {"unk_token": {"content": "?", "lstrip": False}, "pad_token": "<pad>", "bos_token": "<a>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "word_delimiter_token": " "}))
    checkpoint = read_checkpoint(folder)
    assert checkpoint.preprocessor["do_normalize"] is False and checkpoint.preprocessor["padding_value"] == 0.0
    assert [checkpoint.tokenizer[f"{key}_token"] for key in ("unk", "bos", "word_delimiter")] == ["?", "<s>", " "]
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    assert read_checkpoint(folder).preprocessor["do_normalize"] is True


def test_added_tokens_count_only_where_they_are_outputs(tmp_path: Path) -> None:
    """A fine-tune with letters only: <s> and </s> live in added_tokens.json."""
    vocab, added = {"|": 0, "a": 1, "[UNK]": 2, "[PAD]": 3}, {"<s>": 4, "</s>": 5}
    for size, expected in [(6, {**vocab, **added}), (4, vocab)]:
        folder = folder_of(tmp_path / str(size), build({**SMALL, "vocab_size": size}, "ctc", torch.float32))
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "added_tokens.json").write_text(json.dumps(added))
        assert read_checkpoint(folder).vocab == expected


# ------------------------------------------------------------------------------- saving


def logits_of(hf: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = hf.eval()(x)
    return out.last_hidden_state if isinstance(hf, transformers.SEWDModel) else out.logits


@pytest.mark.parametrize("head", ["model", "ctc", "classification"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_transformers_loads_what_is_saved_to_equal_logits(tmp_path: Path, head: str, dtype: torch.dtype) -> None:
    hf = build(CLASSIFIER, head, dtype)
    ours(hf, head).save_pretrained(tmp_path / "deep" / "saved")
    again, info = HF_CLASSES[head].from_pretrained(tmp_path / "deep" / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert again.dtype == dtype
    for name, value in hf.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    x = wave(2, 4000, dtype)
    assert torch.equal(logits_of(hf, x), logits_of(again, x))
    assert again.config.architectures == [HF_CLASSES[head].__name__]


def test_saved_names_are_those_of_transformers(tmp_path: Path) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    hf.save_pretrained(tmp_path / "theirs")
    ours(hf).save_pretrained(tmp_path / "ours")
    theirs, mine = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert set(theirs) == set(mine)


def test_a_half_precision_source_is_saved_as_float32(tmp_path: Path) -> None:
    """The source's own dtype in config.json would make transformers narrow the weights again."""
    folder = folder_of(tmp_path, build(SMALL, "ctc", torch.bfloat16))
    change_config(folder, torch_dtype="bfloat16")
    model = load_model(folder)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.SEWDForCTC.from_pretrained(tmp_path / "saved")
    assert again.dtype == torch.float32
    assert_same(model.params, again)


def test_processor_survives_and_loads_in_transformers(tmp_path: Path) -> None:
    model = load_model("an4")
    model.save_pretrained(tmp_path)
    processor = transformers.Wav2Vec2Processor.from_pretrained(tmp_path)
    assert processor.tokenizer.get_vocab() == published_vocabulary()
    assert processor.feature_extractor.do_normalize is True
    again = read_checkpoint(tmp_path)
    bundled = read_checkpoint("an4")
    assert again.vocab == bundled.vocab
    assert {key: again.preprocessor[key] for key in bundled.preprocessor} == bundled.preprocessor
    assert {key: again.tokenizer[key] for key in bundled.tokenizer} == bundled.tokenizer
    assert again.config.to_dict() | {"dtype": "float32"} == bundled.config.to_dict() | {"dtype": "float32"}


def test_saving_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("an4")
    model.save_pretrained(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("sewd_np.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(ValueError, match="this is a file; give the path of a folder"):
        load_model("an4").save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "keep me"


def test_strided_parameters_are_saved_right(tmp_path: Path) -> None:
    model = load_model("an4")
    params = {name: np.asfortranarray(array) for name, array in model.params.items()}
    sewd_np.SEWDForCTC(model.config, params, model.ops, model.processor).save_pretrained(tmp_path)
    again = read_checkpoint(tmp_path).params
    for name, array in model.params.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)


# ------------------------------------------------------------------------------- loading


def test_load_model_by_class_and_dtype(tmp_path: Path) -> None:
    hf = build(SMALL, "ctc", torch.float32)
    folder = folder_of(tmp_path, hf)
    x = wave(1, 4000, torch.float32)
    model = load_model(folder)
    assert type(model) is sewd_np.SEWDForCTC and model.dtype == np.float32
    np.testing.assert_allclose(model(x.numpy()).logits, logits_of(hf, x).numpy(), atol=1e-4)
    model = sewd_np.SEWDModel.from_pretrained(folder, dtype=np.float64)
    assert type(model) is sewd_np.SEWDModel and model.dtype == np.float64
    hidden = logits_of(hf.sew_d.double(), x.double()).numpy()
    np.testing.assert_allclose(model(x.double().numpy()).last_hidden_state, hidden, atol=1e-7)
    for wrong in ({"dtype": np.int32}, {"backend": "fpga"}):
        with pytest.raises(ValueError, match=r"dtype is int32|backend is 'fpga'"):
            load_model(folder, **wrong)
