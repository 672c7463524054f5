"""transcribe, classify and load: what a user calls, on the bundled model and on small random ones."""

from __future__ import annotations

import dataclasses
import io
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

import sewd_np
from sewd_np.audio import AudioError
from sewd_np.backend import get_operations
from sewd_np.checkpoint import CheckpointError
from sewd_np.cli import CLIP
from sewd_np.clips import clip
from sewd_np.config import SEWDConfig
from sewd_np.model import SEWDForCTC, SEWDForSequenceClassification, SEWDModel
from sewd_np.params import random_params
from sewd_np.processor import Processor

SPOKEN = CLIP.with_suffix(".txt").read_text(encoding="utf-8").strip()
LABELS = {0: "yes", 1: "no", 2: "maybe"}
CLASSES = {"model": SEWDModel, "ctc": SEWDForCTC, "classification": SEWDForSequenceClassification}


def small_model(head: str, processor: bool = True, backend: str = "numpy") -> Any:
    """A random model with few channels, the published strides and the bundled model's vocabulary."""
    config = SEWDConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=(8,) * 13,
        position_buckets=8,
        max_position_embeddings=16,
        num_conv_pos_embeddings=15,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=12,
        id2label=LABELS,
    )
    own = sewd_np.load("an4").processor
    assert own is not None
    preprocessor, tokenizer, vocab = own.to_files()
    files = Processor.from_files(preprocessor, tokenizer, vocab if head == "ctc" else None)
    return CLASSES[head](config, random_params(config, head), get_operations(backend), files if processor else None)


@pytest.fixture(scope="module")
def an4() -> SEWDModel:
    return sewd_np.load("an4")


@pytest.fixture(scope="module")
def ctc() -> SEWDModel:
    model: SEWDModel = small_model("ctc")
    return model


@pytest.fixture(scope="module")
def classifier() -> SEWDModel:
    model: SEWDModel = small_model("classification")
    return model


@pytest.fixture(scope="module")
def compiled() -> tuple[SEWDModel, SEWDModel]:
    """A recogniser and a classifier on a backend that runs recordings together."""
    return small_model("ctc", backend="numba"), small_model("classification", backend="numba")


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


# ------------------------------------------------------------------------ transcribe


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({}, ("numba", "float32")),
        ({"dtype": np.float32}, ("numba", "float32")),
        ({"dtype": "float64"}, ("numpy", "float64")),  # only "numpy" computes in float64
        ({"backend": "numba"}, ("numba", "float32")),
        ({"backend": "numpy"}, ("numpy", "float32")),
        ({"backend": "numpy", "dtype": np.float64}, ("numpy", "float64")),
    ],
)
def test_bundled_clip(asked: dict[str, Any], given: tuple[str, str]) -> None:
    model = sewd_np.load("an4", **asked)
    assert (model.ops.name, model.dtype) == given
    result = sewd_np.transcribe(CLIP, model=model)
    assert result.text == SPOKEN
    assert [word.text for word in result.words] == SPOKEN.split()
    assert result.duration == soundfile.info(CLIP).duration


def test_defaults_are_the_bundled_model(an4: SEWDModel) -> None:
    assert sewd_np.transcribe(CLIP) == sewd_np.transcribe(CLIP, model=an4) == sewd_np.transcribe(CLIP, model="an4")


def test_words_are_in_order_and_inside_the_clip(an4: SEWDModel) -> None:
    for audio in (str(CLIP), noise(16000 * 3), noise(720)):
        result = sewd_np.transcribe(audio, model=an4)
        times = [time for word in result.words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert all(0 <= time <= result.duration for time in times)
        assert all(word.start < word.end and 0 < word.confidence <= 1 for word in result.words)


def test_every_kind_of_recording_gives_the_same(an4: SEWDModel) -> None:
    samples, rate = soundfile.read(CLIP, dtype="float32")
    expected = sewd_np.transcribe(str(CLIP), model=an4)
    with open(CLIP, "rb") as file:
        assert sewd_np.transcribe(file, model=an4) == expected
    assert sewd_np.transcribe(io.BytesIO(CLIP.read_bytes()), model=an4) == expected
    assert sewd_np.transcribe(samples, model=an4) == expected
    assert sewd_np.transcribe(samples, model=an4, sampling_rate=rate) == expected


def test_another_rate_and_stereo(an4: SEWDModel, tmp_path: Path) -> None:
    samples, rate = soundfile.read(CLIP, dtype="float32")
    faster = soxr.resample(samples, rate, 44100)
    assert sewd_np.transcribe(faster, model=an4, sampling_rate=44100).text == SPOKEN
    soundfile.write(tmp_path / "stereo.wav", np.stack([faster, faster], axis=1), 44100, subtype="FLOAT")
    assert sewd_np.transcribe(tmp_path / "stereo.wav", model=an4).text == SPOKEN


def test_a_list_gives_each_what_it_has_alone(an4: SEWDModel) -> None:
    # The first and the third are of about one length, and run together.
    recordings: list[Any] = [noise(5000, 1), str(CLIP), noise(5300, 4), noise(16001, 2), noise(720, 3)]
    alone = [sewd_np.transcribe(recording, model=an4) for recording in recordings]
    assert sewd_np.transcribe(recordings, model=an4) == alone
    assert sewd_np.transcribe(tuple(recordings), model=an4) == alone
    assert sewd_np.transcribe([str(CLIP)], model=an4) == [alone[1]]
    assert sewd_np.transcribe([], model=an4) == []


@settings(max_examples=10, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(4000, 5200), max_size=4), seed=st.integers(0, 99))
def test_company_changes_nothing(compiled: tuple[SEWDModel, SEWDModel], lengths: list[int], seed: int) -> None:
    """Lengths that share a call."""
    ctc, classifier = compiled
    recordings = [noise(length, seed + i) for i, length in enumerate(lengths)]
    assert sewd_np.transcribe(recordings, model=ctc) == [sewd_np.transcribe(x, model=ctc) for x in recordings]
    assert sewd_np.classify(recordings, model=classifier) == [sewd_np.classify(x, model=classifier) for x in recordings]


def test_silence_is_a_recording_like_any_other(an4: SEWDModel) -> None:
    result = sewd_np.transcribe(np.zeros(16000, np.float32), model=an4)
    assert result.duration == 1.0
    assert result.text.split() == [word.text for word in result.words]


def test_progress_is_drawn_on_standard_error(ctc: SEWDModel, capsys: pytest.CaptureFixture[str]) -> None:
    sewd_np.transcribe([noise(800), noise(900)], model=ctc, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "2/2" in err
    sewd_np.transcribe(noise(800), model=ctc)
    assert capsys.readouterr() == ("", "")


# -------------------------------------------------------------------------- classify


def test_classify_gives_sorted_probabilities(classifier: SEWDModel) -> None:
    labels = sewd_np.classify(noise(4000), model=classifier, top_k=9)
    assert {label.label for label in labels} == set(LABELS.values())
    assert sum(label.score for label in labels) == pytest.approx(1, abs=1e-12)
    assert [label.score for label in labels] == sorted((label.score for label in labels), reverse=True)
    assert sewd_np.classify(noise(4000), model=classifier, top_k=2) == labels[:2]

    assert classifier.processor is not None
    logits = classifier(classifier.processor(noise(4000), sampling_rate=16000)["input_values"]).logits
    assert logits is not None
    scores = np.exp(logits[0].astype(np.float64)) / np.exp(logits[0].astype(np.float64)).sum()
    for label in labels:
        (i,) = [i for i, name in LABELS.items() if name == label.label]
        assert label.score == pytest.approx(scores[i], rel=1e-12)


@pytest.mark.parametrize("top_k", [0, -1, 1.0, True, None, "2"])
def test_top_k_must_be_a_count(classifier: SEWDModel, top_k: Any) -> None:
    with pytest.raises(ValueError, match=r"top_k is .*whole number"):
        sewd_np.classify(noise(4000), model=classifier, top_k=top_k)


def test_the_bundled_classifier_is_the_default() -> None:
    labels = sewd_np.classify(noise(16_000), top_k=100)
    assert labels == sewd_np.classify(noise(16_000), model="keywords", top_k=100)
    assert {label.label for label in labels} >= {"yes", "no", "zero", "nine", "unknown"}
    assert len(labels) == 20


# ---------------------------------------------------------------------------- errors


def test_the_wrong_head_is_one_clear_sentence(an4: SEWDModel, classifier: SEWDModel) -> None:
    with pytest.raises(ValueError, match="model 'an4' has a CTC head, but classify needs a classification head"):
        sewd_np.classify(noise(4000), model="an4")
    with pytest.raises(ValueError, match="the given model has a classification head, but transcribe needs a CTC"):
        sewd_np.transcribe(noise(4000), model=classifier)
    with pytest.raises(ValueError, match="the given model has no head"):
        sewd_np.transcribe(noise(4000), model=small_model("model"))


def test_a_model_without_its_files_cannot_transcribe() -> None:
    with pytest.raises(ValueError, match="has no processor; transcribe needs one"):
        sewd_np.transcribe(noise(4000), model=small_model("ctc", processor=False))
    model = small_model("ctc")
    model.processor = Processor(model.processor.feature_extractor, None)
    with pytest.raises(ValueError, match="has no vocabulary; transcribe needs one"):
        sewd_np.transcribe(noise(4000), model=model)


def test_logits_that_say_nothing_are_refused(ctc: SEWDModel, classifier: SEWDModel) -> None:
    said = "the model's logits are NaN or infinite"
    for value in (np.nan, np.inf, -np.inf):  # -inf everywhere leaves no token
        with pytest.raises(ValueError, match=said):
            sewd_np.transcribe(noise(4000), model=ctc, edit={"lm_head": lambda x, value=value: x + value})
    large = {name: x * 1e25 if "layer.0." in name else x for name, x in classifier.params.items()}
    overflowing = SEWDForSequenceClassification(classifier.config, large, classifier.ops, classifier.processor)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=said):
        sewd_np.classify(noise(4000), model=overflowing)

    def only_e(logits: np.ndarray) -> np.ndarray:
        logits[..., :5], logits[..., 6:] = -np.inf, -np.inf
        return logits

    assert sewd_np.transcribe(noise(4000), model=ctc, edit={"lm_head": only_e}).text == "E"


def test_a_tokenizer_with_another_blank_is_refused() -> None:
    model = small_model("ctc")
    model.config = dataclasses.replace(model.config, pad_token_id=5)
    with pytest.raises(ValueError, match=r"the given model has the blank 5 .* its tokenizer's pad_token has the id 0"):
        sewd_np.transcribe(noise(4000), model=model)


def test_a_bad_recording_in_a_list_is_named(ctc: SEWDModel) -> None:
    with pytest.raises(FileNotFoundError, match=r"audio\[1\]: .*nowhere.wav"):
        sewd_np.transcribe([noise(900), "nowhere.wav"], model=ctc)
    with pytest.raises(AudioError, match=r"audio\[2\]: .*too short: 719 samples.*720"):
        sewd_np.transcribe([noise(900), noise(900), noise(719)], model=ctc)
    with pytest.raises(AudioError, match=r"audio\[0\]: .*NaN"):
        sewd_np.transcribe([np.full(900, np.nan, np.float32)], model=ctc)
    with pytest.raises(AudioError, match=r"^The recording is too short"):
        sewd_np.transcribe(noise(719), model=ctc)


def test_a_rate_is_for_the_arrays_of_a_list(ctc: SEWDModel, tmp_path: Path) -> None:
    wave = noise(2_000)
    soundfile.write(tmp_path / "a.wav", noise(4_000, 1), 16_000, subtype="FLOAT")
    path = tmp_path / "a.wav"
    with path.open("rb") as file:
        found = sewd_np.transcribe([path, str(path), file, wave], model=ctc, sampling_rate=8_000)
    of_file = sewd_np.transcribe(path, model=ctc)
    assert found == [of_file] * 3 + [sewd_np.transcribe(wave, model=ctc, sampling_rate=8_000)]
    with pytest.raises(AudioError, match="leave sampling_rate out for files"):
        sewd_np.transcribe(path, model=ctc, sampling_rate=8_000)
    with pytest.raises(AudioError, match=r"^sampling_rate is 8, expected"):
        sewd_np.transcribe([path], model=ctc, sampling_rate=8)


def test_a_foreign_error_in_a_list_keeps_its_sentence(ctc: SEWDModel) -> None:
    class Upload:
        def read(self) -> bytes:
            raise urllib.error.HTTPError("http://nowhere/a.wav", 404, "Not Found", None, None)  # type: ignore[arg-type]

    with pytest.raises(OSError, match=r"^audio\[1\]: HTTP Error 404: Not Found") as caught:
        sewd_np.transcribe([noise(900), Upload()], model=ctc)
    assert type(caught.value) is OSError


def test_too_little_memory_in_a_list_is_named(ctc: SEWDModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sewd_np.memory.available_memory", lambda: 1000)
    with pytest.raises(MemoryError, match=r"audio\[0\]: attention over"):
        sewd_np.transcribe([noise(16000)], model=ctc)


def test_threads_may_be_a_number_of_numpys() -> None:
    assert get_operations(threads=np.int64(1)).describe() == get_operations(threads=1).describe()
    for threads in (0, True, 1.0, "2"):
        with pytest.raises(ValueError, match=r"threads is .*; it must be a whole number of at least 1"):
            get_operations(threads=threads)  # type: ignore[arg-type]


def test_load_says_what_it_could_not_find() -> None:
    with pytest.raises(CheckpointError, match="an5"):
        sewd_np.load("an5")
    with pytest.raises(ValueError, match="backend is 'abacus'"):
        sewd_np.transcribe(noise(900), backend="abacus")
    with pytest.raises(ValueError, match="dtype is int32; backend 'numpy' computes in float32 or float64"):
        sewd_np.load("an4", dtype=np.int32)
    with pytest.raises(ValueError, match="dtype is float64; backend 'numba' computes in float32"):
        sewd_np.load("an4", backend="numba", dtype=np.float64)
    for call in (sewd_np.load, sewd_np.SEWDForCTC.from_pretrained):
        with pytest.raises(ValueError, match="precision is 'low'; it must be one of 'high', 'highest'"):
            call("an4", precision="low")
    for recognize in (sewd_np.transcribe, sewd_np.classify):
        with pytest.raises(ValueError, match="precision is 'low'; it must be one of 'high', 'highest'"):
            recognize(noise(900), precision="low")


def test_arguments_that_a_loaded_model_cannot_follow_are_refused() -> None:
    wave = np.zeros(16_000, np.float32)
    for loaded, other in (("numpy", "numba"), ("numba", "numpy")):
        model = sewd_np.load("an4", backend=loaded)
        for options in ({"backend": other}, {"backend": "nonsense"}, {"threads": 2}, {"precision": "high"}):
            with pytest.raises(ValueError, match=rf"already loaded on '{loaded}'; give it to load\(\) instead"):
                sewd_np.transcribe(wave, model=model, **options)
        assert sewd_np.transcribe(wave, model=model, backend=loaded) == sewd_np.transcribe(wave, model=model)


def test_no_model_means_the_bundled_one() -> None:
    assert sewd_np.transcribe(CLIP, model=None) == sewd_np.transcribe(CLIP, model="an4")
    assert sewd_np.transcribe(CLIP, model=None).text == SPOKEN
    assert sewd_np.classify(clip("yes"), model=None) == sewd_np.classify(clip("yes"), model="keywords")
    assert sewd_np.classify(clip("yes"), model=None)[0].label == "yes"


@pytest.mark.parametrize("level", [0.0, 0.001, 0.1])
def test_the_bundled_model_hears_nothing_in_silence_and_noise(level: float) -> None:
    for seconds in (0.5, 3):
        wave = level * noise(int(seconds * 16_000))
        assert sewd_np.transcribe(wave).text == ""
