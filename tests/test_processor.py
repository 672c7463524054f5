"""The processor equals transformers' Wav2Vec2FeatureExtractor to the bit, and says what is wrong with bad input."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from transformers.utils import logging

from sewd_np.audio import AudioError
from sewd_np.processor import FeatureExtractor, Processor, ProcessorOutput

logging.set_verbosity_error()  # the reference warns at every call without a rate

PUBLISHED = {
    "do_normalize": True,
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
    "sampling_rate": 16000,
}
VOCAB = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"])}
PROCESSOR = Processor.from_files(PUBLISHED, {}, VOCAB)

dtypes = st.sampled_from([np.float32, np.float64, np.int16, np.int32, np.uint8])
# The values come of a generator: sums over thousands of samples in another order would show, over ten they may not.
waves = st.tuples(st.integers(1, 3000), dtypes, st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 0.1, 1.0, 300.0]))
extractors = st.fixed_dictionaries(
    {
        "do_normalize": st.booleans(),
        "return_attention_mask": st.booleans(),
        "padding_value": st.sampled_from([0.0, -2.5]),
    }
)


def wave_of(length: int, dtype: Any, seed: int, scale: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, length, dtype=dtype, endpoint=True)
    return (rng.standard_normal(length) * scale + rng.normal()).astype(dtype)


def assert_equal(found: ProcessorOutput, expected: Any) -> None:
    """The same keys and the same bits; integer input is float64 in the reference and rounded here."""
    assert set(found) == set(expected)
    assert found.input_values.dtype == np.float32
    np.testing.assert_array_equal(found.input_values, expected["input_values"].astype(np.float32))
    if "attention_mask" in found:
        assert found["attention_mask"].dtype == np.int32
        np.testing.assert_array_equal(found["attention_mask"], expected["attention_mask"])


@given(batch=st.lists(waves, min_size=1, max_size=4), fields=extractors, mask=st.none() | st.booleans())
@settings(deadline=None, derandomize=True, max_examples=300)
def test_batch_equals_transformers(batch: list[Any], fields: dict[str, Any], mask: bool | None) -> None:
    audio = [wave_of(*wave) for wave in batch]
    if len({wave.dtype for wave in audio}) > 1:
        fields = fields | {"padding_value": 0.0}  # the reference pads integers with the integer part
    reference = Wav2Vec2FeatureExtractor(**fields)
    options: dict[str, Any] = {"sampling_rate": 16000, "padding": True, "return_attention_mask": mask}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = FeatureExtractor(**fields)(audio, **options)
    assert_equal(found, reference(audio, **options, return_tensors="np"))


@given(wave=waves, fields=extractors, padding=st.sampled_from([True, False, "longest", "do_not_pad"]))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_single_recording_equals_transformers(wave: Any, fields: dict[str, Any], padding: bool | str) -> None:
    audio = wave_of(*wave)
    expected = Wav2Vec2FeatureExtractor(**fields)(audio, sampling_rate=16000, padding=padding, return_tensors="np")
    assert_equal(FeatureExtractor(**fields)(audio, 16000, padding), expected)


@given(values=st.lists(st.floats(-2, 2, width=32) | st.integers(-3, 3), min_size=1, max_size=30), fields=extractors)
@settings(deadline=None, derandomize=True)
def test_numbers_in_lists_equal_transformers(values: list[float], fields: dict[str, Any]) -> None:
    ours, theirs = FeatureExtractor(**fields), Wav2Vec2FeatureExtractor(**fields)
    # A list of whole numbers alone becomes an array of integers there, whose padding value is cut to an integer too.
    values = [0.5, *values]
    for audio in (values, tuple(values), [values, values[:1]]):
        assert_equal(ours(audio), theirs(audio, padding=True, return_tensors="np"))


@pytest.mark.parametrize("mask", [False, True])
def test_two_dimensional_array_is_a_batch(mask: bool) -> None:
    audio_bn = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)
    found = PROCESSOR(audio_bn, return_attention_mask=mask)
    assert_equal(
        found, Wav2Vec2FeatureExtractor()(audio_bn, padding=True, return_attention_mask=mask, return_tensors="np")
    )
    assert_equal(PROCESSOR(torch.from_numpy(audio_bn), return_attention_mask=mask), found)
    assert_equal(PROCESSOR(list(torch.from_numpy(audio_bn)), return_attention_mask=mask), found)


def test_what_is_normalised_over() -> None:
    rng = np.random.default_rng(0)
    audio = [rng.standard_normal(2000).astype(np.float32) + 3, rng.standard_normal(500).astype(np.float32) + 3]
    alone = PROCESSOR(audio[1]).input_values[0]
    masked = PROCESSOR(audio, return_attention_mask=True).input_values[1]
    np.testing.assert_array_equal(masked[:500], alone)
    assert not masked[500:].any()
    whole_row = PROCESSOR(audio).input_values[1]
    # Float32 sums over 2,000 samples: a few ulps of 1.
    assert abs(whole_row.mean()) < 1e-6 and abs(whole_row.var() - 1) < 1e-5
    assert np.abs(whole_row[:500] - alone).max() > 1
    assert np.unique(whole_row[500:]).size == 1 and whole_row[500] != 0


@pytest.mark.parametrize("scale", [1e-3, 1e15])
def test_loudness_does_not_matter_between_the_limits(scale: float) -> None:
    """At a thousandth of full scale the ε of 1e-7 counts for a few per cent, at the upper limit nothing overflows."""
    wave_n = np.random.default_rng(0).uniform(-1, 1, 16_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, scaled = PROCESSOR(wave_n).input_values, PROCESSOR(scale * wave_n).input_values
    assert np.abs(scaled - (plain if scale > 1 else plain / np.sqrt(1 + 1e-7 / (scale * wave_n).var()))).max() < 1e-4


def test_silence_and_half_precision_are_finite() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not PROCESSOR(np.zeros(1000, np.float32)).input_values.any()
        loud = np.random.default_rng(0).uniform(-60_000, 60_000, 5000).astype(np.float16)
        np.testing.assert_array_equal(PROCESSOR(loud).input_values, PROCESSOR(loud.astype(np.float32)).input_values)


def test_result_shares_no_memory_with_the_recording() -> None:
    wave = np.ones(1000, np.float32)
    for fields in ({"do_normalize": True}, {"do_normalize": False}):
        assert not np.shares_memory(FeatureExtractor(**fields)(wave).input_values, wave)


def test_output_is_a_mapping_with_attributes() -> None:
    def model(input_values: np.ndarray, attention_mask: np.ndarray | None = None) -> Any:
        return attention_mask

    plain, masked = PROCESSOR(np.ones(1000)), PROCESSOR(np.ones(1000), return_attention_mask=True)
    assert list(plain) == ["input_values"] and plain.attention_mask is None and model(**plain) is None
    assert masked.attention_mask is masked["attention_mask"] is model(**masked)
    assert masked.input_values is masked["input_values"]


# ---- bad input ----


def test_wrong_rate() -> None:
    with pytest.raises(
        ValueError, match=r"has 8000 samples .* trained on 16000; resample .*load_audio\(recording, 8000, 16000\)"
    ):
        PROCESSOR(np.zeros(1000), sampling_rate=8000)
    with pytest.raises(ValueError, match=r"sampling_rate is '16000' \(str\), expected a number"):
        PROCESSOR(np.zeros(1000), sampling_rate="16000")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (
            np.zeros((1, 2, 1000)),
            r"The array has shape \(1, 2, 1000\), expected \(samples,\) or \(recordings, samples\)",
        ),
        ([np.zeros((2, 1000))], r"The recording has shape \(2, 1000\), expected \(samples,\); mix channels down"),
        ([np.zeros(900), np.zeros((2, 900))], r"Recording 1 of 2 has shape \(2, 900\)"),
        ([], r"no recording in the list"),
        (["a.flac", "b.flac"], r"Recording 0 of 2 is a str, expected a waveform .*load_audio reads files"),
        ([np.zeros(900), None], r"Recording 1 of 2 is a NoneType, expected a waveform"),
        (np.full(900, 1e25), r"The recording holds samples as large as 1e\+25, expected about ±1"),
        (np.zeros((0, 900)), r"no recording in the list"),
        ([np.zeros(900), np.zeros(0)], r"Recording 1 of 2 holds no samples \(zero length\)"),
        ([np.zeros(900), np.full(900, np.nan)], r"Recording 1 of 2 holds samples that are NaN or infinite"),
        (np.full(900, np.inf), r"The recording holds samples that are NaN or infinite"),
        (np.zeros(900, complex), r"samples of type complex128, expected numbers"),
        ([[0.0, 1.0], ["a"]], r"Recording 1 of 2 has samples of type <U1"),
        ("a.wav", r"A str is not a recording; pass a waveform .*load_audio reads files"),
        (None, r"A NoneType is not a recording"),
        (torch.zeros(900, requires_grad=True), r"A Tensor could not be read as an array"),
    ],
)
def test_bad_recordings(audio: Any, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        PROCESSOR(audio)


def test_bad_padding() -> None:
    audio = [np.zeros(900), np.zeros(1000)]
    with pytest.raises(ValueError, match=r"have \[900, 1000\] samples: unequal lengths need padding=True"):
        PROCESSOR(audio, padding=False)
    with pytest.raises(ValueError, match=r"padding is 'max_length', expected True"):
        PROCESSOR(audio, padding="max_length")
    with pytest.raises(ValueError, match=r"padding is \[\], expected True"):
        PROCESSOR(audio, padding=[])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("do_normalize", "yes"),
        ("return_attention_mask", 1),
        ("padding_side", "left"),
        ("padding_value", None),
        ("padding_value", math.nan),
        ("sampling_rate", 16000.5),
        ("sampling_rate", 0),
        ("feature_size", 80),
        ("feature_extractor_type", "WhisperFeatureExtractor"),
    ],
)
def test_bad_settings(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} in preprocessor_config\.json is {value!r}"):
        FeatureExtractor.from_dict({**PUBLISHED, field: value})


# ---- files and text ----


def test_defaults_are_transformers() -> None:
    theirs = Wav2Vec2FeatureExtractor().to_dict()
    assert {key: theirs[key] for key in FeatureExtractor.from_dict({}).to_dict()} == FeatureExtractor().to_dict()


def test_files_come_back_and_transformers_reads_them(tmp_path: Path) -> None:
    settings_ = {**PUBLISHED, "return_attention_mask": True, "processor_class": "Wav2Vec2Processor"}
    processor = Processor.from_files(settings_, {"do_lower_case": True}, VOCAB)
    files = processor.to_files()
    assert files[0] == settings_ and files[2] == VOCAB
    assert Processor.from_files(*files).to_files() == files
    for name, contents in zip(("preprocessor_config", "tokenizer_config", "vocab"), files, strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(contents), encoding="utf-8")
    reference = Wav2Vec2Processor.from_pretrained(tmp_path)
    audio = [np.arange(900.0), np.arange(1000.0)]
    expected = reference(audio, sampling_rate=16000, padding=True, return_tensors="np")
    assert_equal(processor(audio, sampling_rate=16000), expected)
    assert processor.encode("hi you") == reference(text="hi you").input_ids
    assert processor.batch_decode([[11, 11, 10, 4]]) == reference.batch_decode([[11, 11, 10, 4]]) == ["hi"]


def test_decode_with_offsets() -> None:
    decoded = PROCESSOR.decode([0, 11, 10, 10, 4, 5], output_word_offsets=True, output_char_offsets=True)
    assert decoded.text == "HI E"
    assert decoded.word_offsets[0] == {"word": "HI", "start_offset": 1, "end_offset": 4}
    assert [offset["char"] for offset in decoded["char_offsets"]] == ["H", "I", " ", "E"]
    assert PROCESSOR.batch_decode([[11], [10]], output_char_offsets=True).text == ["H", "I"]


def test_checkpoint_without_vocabulary() -> None:
    processor = Processor.from_files(PUBLISHED, {}, None)
    assert processor.tokenizer is None and processor.to_files() == (PUBLISHED, {}, None)
    for call in (processor.decode, processor.batch_decode, processor.encode):
        with pytest.raises(ValueError, match=r"no vocabulary \(vocab\.json\).*load a CTC checkpoint"):
            call([])
