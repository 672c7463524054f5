"""A classifier that stores only its own tensors and names the model whose encoder it shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SEWDForSequenceClassification

import sewd_np
from sewd_np.checkpoint import ASSETS, CheckpointError, load_model, read_checkpoint
from tests.reference import SMALL, build, wave

OWN = ("projector", "classifier", "sew_d.encoder.upsample")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def whole_and_head(tmp_path: Path) -> tuple[Path, Path, torch.nn.Module]:
    """A classifier saved whole, and a folder with only its own tensors beside a plain model with the rest."""
    hf = build({**SMALL, "num_labels": 5}, "classification", torch.float32)
    whole, head = tmp_path / "whole", tmp_path / "head"
    hf.save_pretrained(whole)
    hf.save_pretrained(head)
    tensors = load_file(head / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if name.startswith(OWN)}, head / "model.safetensors")
    # The shared model's own upsampling is another: the head's must count.
    other = {name: value + name.startswith("sew_d.encoder.upsample") for name, value in tensors.items()}
    save_file(other, whole / "model.safetensors")
    change_config(head, shared_encoder=str(whole))
    return whole, head, hf


def test_own_tensors_count_before_shared_ones(whole_and_head: tuple[Path, Path, torch.nn.Module]) -> None:
    _, head, hf = whole_and_head
    model = load_model(head)
    x = wave(2, 4000).float()
    expected = hf(x).logits.detach().numpy()
    np.testing.assert_allclose(model(x.numpy()).logits, expected, atol=1e-5)


def test_what_is_saved_is_whole(whole_and_head: tuple[Path, Path, torch.nn.Module], tmp_path: Path) -> None:
    _, head, hf = whole_and_head
    load_model(head).save_pretrained(tmp_path / "saved")
    assert "shared_encoder" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = SEWDForSequenceClassification.from_pretrained(tmp_path / "saved")
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, hf.state_dict()[name], rtol=0, atol=0)


def test_sharing_that_cannot_be(whole_and_head: tuple[Path, Path, torch.nn.Module]) -> None:
    whole, head, _ = whole_and_head
    for source, message in [
        (3, "shared_encoder is 3; it must be the name of a model"),
        (str(head), "which shares an encoder itself"),
        (str(head / "model.safetensors"), "which shares an encoder itself"),
        ("nowhere", "'nowhere' is no bundled model"),
        ("an4", "hidden_size|shape"),
    ]:
        change_config(head, shared_encoder=source)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(head)
    (whole / "model.safetensors").unlink()
    change_config(head, shared_encoder=str(whole))
    with pytest.raises(CheckpointError, match="whole"):
        read_checkpoint(head)


def test_the_bundled_classifier_stands_on_the_bundled_recogniser() -> None:
    keywords, an4 = read_checkpoint("keywords"), read_checkpoint("an4")
    stored = {name.removeprefix("sew_d.") for name in load_file(ASSETS / "keywords" / "model.safetensors")}
    shared = [name for name in keywords.params if name not in stored]
    assert len(shared) > 50
    for name in shared:
        np.testing.assert_array_equal(keywords.params[name], an4.params[name], err_msg=name)
    assert (ASSETS / "keywords" / "model.safetensors").stat().st_size < 4_000_000
    words = "yes no go stop help start enter erase repeat zero one two three four five six seven eight nine unknown"
    assert set(keywords.config.id2label.values()) == set(words.split())


def test_the_bundled_classifier_takes_silence_for_no_keyword() -> None:
    assert sewd_np.classify(np.zeros(16_000, np.float32))[0].label == "unknown"
