"""The published checkpoints and the numbers that transformers' own tests expect of them: ``pytest -m network``.

Downloads the checkpoints (hundreds of megabytes) and a small set of LibriSpeech clips from the Hugging Face hub.
"""

from __future__ import annotations

import io
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow.parquet
import pytest
import soundfile

import sewd_np

pytestmark = pytest.mark.network

TINY = "asapp/sew-d-tiny-100k"
TINY_CTC = "asapp/sew-d-tiny-100k-ft-ls100h"
KEYWORDS = "anton-l/sew-d-mid-400k-ft-keyword-spotting"
CLIPS = "hf-internal-testing/librispeech_asr_dummy"
TOLERANCE = 1e-3  # what transformers' own integration tests allow


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    """LibriSpeech utterance id → samples, from the dataset's parquet file."""
    files = huggingface_hub.list_repo_files(CLIPS, repo_type="dataset")
    name = next(file for file in files if file.endswith(".parquet") and "clean" in file and "validation" in file)
    table = pyarrow.parquet.read_table(huggingface_hub.hf_hub_download(CLIPS, name, repo_type="dataset")).to_pylist()
    found = {}
    for row in table:
        samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        assert rate == 16_000
        found[row["id"]] = samples
    return found


def test_hidden_states_of_tiny(clips: dict[str, np.ndarray]) -> None:
    model = sewd_np.load(TINY)
    assert model.processor is not None
    inputs = model.processor([clips["1272-141231-0000"], clips["1272-141231-0001"]], sampling_rate=16_000)
    hidden = model(inputs["input_values"]).last_hidden_state
    first_frames = [
        [
            [-0.1619, 0.6995, 0.4062, -0.1014],
            [-0.1364, 0.5960, 0.0952, -0.0873],
            [-0.1572, 0.5718, 0.4228, -0.0864],
            [-0.1325, 0.6823, 0.1387, -0.0871],
        ],
        [
            [-0.1296, 0.4008, 0.4952, -0.1450],
            [-0.1152, 0.3693, 0.3037, -0.1290],
            [-0.1194, 0.6074, 0.3531, -0.1466],
            [-0.1113, 0.3135, 0.2224, -0.1338],
        ],
    ]
    last_frames = [
        [
            [-0.1577, 0.5108, 0.8553, 0.2550],
            [-0.1530, 0.3580, 0.6143, 0.2672],
            [-0.1535, 0.4954, 0.8503, 0.1387],
            [-0.1572, 0.3363, 0.6217, 0.1490],
        ],
        [
            [-0.1338, 0.5459, 0.9607, -0.1133],
            [-0.1502, 0.3738, 0.7313, -0.0986],
            [-0.0953, 0.4708, 1.0821, -0.0944],
            [-0.1474, 0.3598, 0.7248, -0.0748],
        ],
    ]
    np.testing.assert_allclose(hidden[:, :4, :4], first_frames, atol=TOLERANCE)
    np.testing.assert_allclose(hidden[:, -4:, -4:], last_frames, atol=TOLERANCE)
    assert abs(float(hidden.sum(dtype=np.float64)) - 54201.0469) < 1


def test_transcripts_of_tiny(clips: dict[str, np.ndarray]) -> None:
    model = sewd_np.load(TINY_CTC)
    assert model.processor is not None
    inputs = model.processor([clips["1272-141231-0000"], clips["1272-141231-0001"]], sampling_rate=16_000)
    logits = model(inputs["input_values"]).logits
    assert logits is not None
    text = model.processor.batch_decode(logits.argmax(-1))
    assert [line.lower() for line in text] == [
        "a man said to the universe sir i exist",
        "swet covered breon's body trickling into the titlowing closs that was the only garmened he war",
    ]


def test_transcript_and_loss_of_mister_quilter(clips: dict[str, np.ndarray]) -> None:
    model = sewd_np.load(TINY_CTC)
    clip = clips["1272-128104-0000"]
    assert len(clip) == 93_680
    said = "MISTER QUILTER IS THE APOSTIL OF THE MIDDLE CLASSES AND WE ARE GLAD TO WELCOME HIS GOSPEL"
    assert sewd_np.transcribe(clip, model=model).text == said
    assert model.processor is not None and model.processor.tokenizer is not None
    labels = model.processor.tokenizer.encode(said.replace("APOSTIL", "APOSTLE"))
    out = model(model.processor(clip, sampling_rate=16_000)["input_values"], labels=np.array([labels]))
    assert out.logits is not None and out.logits.shape[1] == 292
    assert isinstance(out.loss, float) and round(out.loss, 2) == 0.21


def test_keyword_spotting(clips: dict[str, np.ndarray]) -> None:
    model = sewd_np.load(KEYWORDS)
    clip = clips["1272-128104-0000"]
    assert sewd_np.classify(clip, model=model)[0].label == "_unknown_"
    assert model.processor is not None
    out = model(model.processor(clip, sampling_rate=16_000)["input_values"], labels=np.array([0]))
    assert isinstance(out.loss, float) and round(out.loss, 2) == 3.16


def test_a_published_folder_survives_saving(tmp_path: Path, clips: dict[str, np.ndarray]) -> None:
    model = sewd_np.load(TINY_CTC)
    model.save_pretrained(tmp_path)
    again = sewd_np.load(tmp_path)
    clip = clips["1272-141231-0000"]
    assert sewd_np.transcribe(clip, model=again) == sewd_np.transcribe(clip, model=model)
