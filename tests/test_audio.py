"""Recordings in: every kind that is accepted gives the waveform it should, and every bad one says what is wrong."""

from __future__ import annotations

import errno
import io
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sewd_np.audio import AudioError, as_waveform, check_length, check_rate, load_audio

RATES = [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000]


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    """A sine (n,), float32, with soft ends, as loud as half of full scale."""
    time_n = np.arange(round(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time_n) * np.hanning(len(time_n))).astype(np.float32)


def written(path: Path, samples: np.ndarray, rate: int, **options: Any) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


# ---- what is accepted ----


@pytest.mark.parametrize("suffix", ["wav", "flac", "aiff"])
def test_lossless_files_come_back_exactly(tmp_path: Path, suffix: str) -> None:
    pcm_n = (tone(16_000) * 32768).astype(np.int16)
    path = written(tmp_path / f"a.{suffix}", pcm_n, 16_000, subtype="PCM_16")
    for source in (path, str(path), io.BytesIO(path.read_bytes())):
        samples_n = load_audio(source)
        assert samples_n.dtype == np.float32
        np.testing.assert_array_equal(samples_n, pcm_n.astype(np.float32) / 32768)
    with path.open("rb") as file:
        np.testing.assert_array_equal(load_audio(file), load_audio(path))


def test_suffix_does_not_matter(tmp_path: Path) -> None:
    wave_n = tone(16_000)
    path = written(tmp_path / "a.wav", wave_n, 16_000, subtype="FLOAT")
    for suffix in (".mp3", ".raw", ""):
        np.testing.assert_array_equal(load_audio(path.rename(tmp_path / f"b{suffix}")), wave_n)
        path = tmp_path / f"b{suffix}"


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
def test_lossy_files_are_read(kind: str, subtype: str) -> None:
    if subtype not in soundfile.available_subtypes(kind):
        pytest.skip(f"this libsndfile writes no {kind} {subtype}")
    file = io.BytesIO()
    soundfile.write(file, tone(16_000), 16_000, format=kind, subtype=subtype)
    samples_n = load_audio(io.BytesIO(file.getvalue()))
    assert len(samples_n) == 8_000
    # A codec at a high bit rate keeps a plain tone to a few per cent.
    assert np.corrcoef(samples_n, tone(16_000))[0, 1] > 0.98


def test_channels_are_averaged(tmp_path: Path) -> None:
    channels_nc = np.random.default_rng(0).uniform(-1, 1, (400_000, 2)).astype(np.float32)  # more than one block
    path = written(tmp_path / "stereo.wav", channels_nc, 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(path), channels_nc.mean(axis=1))


@pytest.mark.parametrize("rate", RATES)
def test_files_and_arrays_of_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    path = written(tmp_path / "a.wav", tone(rate), rate, subtype="FLOAT")
    from_file_n, from_array_n = load_audio(path), load_audio(tone(rate), sampling_rate=rate)
    np.testing.assert_array_equal(from_file_n, from_array_n)
    assert abs(len(from_file_n) - 8_000) <= 1 and from_file_n.dtype == np.float32
    # A tone far below every Nyquist rate stays what it is; soxr's HQ is good to about 20 bit in the pass band, and
    # Hanning ends that begin at another fraction of a sample account for the rest.
    shared = min(len(from_file_n), 8_000)
    assert np.abs(from_file_n[:shared] - tone(16_000)[:shared]).max() < 2e-3


def test_resampling_lets_no_alias_through() -> None:
    # 15 kHz cannot be said in 16,000 samples a second; without a filter it would sound as 1 kHz. 20 bit are 1e-6.
    assert np.abs(load_audio(tone(48_000, hertz=15_000), sampling_rate=48_000)).max() < 1e-5


def test_another_target_rate() -> None:
    assert len(load_audio(tone(16_000), 16_000, target_rate=8_000)) == 4_000


@pytest.mark.parametrize("rate", [0, -16_000, float("nan"), "16k"])
def test_an_impossible_target_rate(rate: Any) -> None:
    with pytest.raises(AudioError, match=r"target_rate is .*expected a number of samples per second"):
        load_audio(tone(16_000), 16_000, target_rate=rate)


def test_array_without_rate_is_at_the_target_rate() -> None:
    wave_n = tone(16_000)
    np.testing.assert_array_equal(load_audio(wave_n), wave_n)
    np.testing.assert_array_equal(load_audio(wave_n, sampling_rate=16_000.0), wave_n)


@pytest.mark.parametrize(("kind", "silence", "full_scale"), [("i2", 0, 2**15), ("i4", 0, 2**31), ("u1", 128, 2**7)])
def test_integer_pcm_is_scaled(kind: str, silence: int, full_scale: int) -> None:
    limits = np.iinfo(kind)
    for order in "<>":
        pcm_n = np.array([limits.min, silence, limits.max], dtype=order + kind)
        samples_n = load_audio(pcm_n)
        assert samples_n.dtype == np.float32
        np.testing.assert_array_equal(samples_n, np.float32([-1, 0, (limits.max - silence) / full_scale]))


def test_floating_point_is_taken_as_it_is() -> None:
    for dtype in (np.float16, np.float32, np.float64, np.dtype(">f4")):
        samples_n = load_audio(np.array([0.5, -300.0, 2.0], dtype=dtype))
        assert samples_n.dtype == np.float32 and samples_n.dtype.isnative
        np.testing.assert_array_equal(samples_n, [0.5, -300.0, 2.0])
    strided_n = np.arange(10, dtype=np.float32)[::-2]
    np.testing.assert_array_equal(load_audio(strided_n), strided_n)
    assert load_audio(strided_n).flags.c_contiguous


def test_tensors_and_other_arrays() -> None:
    wave_n = tone(16_000)
    np.testing.assert_array_equal(load_audio(torch.from_numpy(wave_n)), wave_n)
    np.testing.assert_array_equal(load_audio(memoryview(wave_n)), wave_n)
    with pytest.raises(AudioError, match=r"A Tensor could not be read as an array of samples: .*requires grad"):
        load_audio(torch.zeros(9, requires_grad=True))


def test_silence_is_quiet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for silent_n in (np.zeros(8_000, np.int16), np.full(8_000, 128, np.uint8)):
            resampled_n = load_audio(silent_n, sampling_rate=8_000)
            assert len(resampled_n) == 16_000 and not resampled_n.any()


@given(samples=hnp.arrays(np.float64, st.integers(1, 50), elements=st.floats(-1e15, 1e15)))
@settings(deadline=None, derandomize=True)
def test_any_finite_waveform_is_rounded_to_float32(samples: np.ndarray) -> None:
    np.testing.assert_array_equal(as_waveform(samples), samples.astype(np.float32))


# ---- bad files ----


def error_of(source: Any, **options: Any) -> str:
    with pytest.raises(AudioError) as caught:
        load_audio(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file '.*nothing\.wav'; check the path"):
        load_audio(tmp_path / "nothing.wav")


def test_folder(tmp_path: Path) -> None:
    assert re.search(r"is a folder; pass the audio files in it", error_of(tmp_path))


def test_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.wav", tone(16_000), 16_000)

    def refuse(*arguments: object) -> None:  # the superuser may read everything, so a file's mode would not do
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError, match=r"a\.wav"):
        load_audio(path)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert error_of(tmp_path / name).endswith(f"{name}' is empty (0 bytes); expected an audio file.")
    assert error_of(io.BytesIO()) == "the given BytesIO is empty (0 bytes); expected an audio file."


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.raw"])
def test_text_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("This is no recording.\n" * 20, encoding="utf-8")
    assert re.search(rf"{name}' cannot be read as audio \(.+\); expected WAV, FLAC, Ogg, MP3", error_of(path))
    with path.open("rb") as file:
        assert re.search(rf"{name}' cannot be read as audio", error_of(file))


@pytest.mark.parametrize("share", [0.98, 0.5, 0.05])
def test_truncated_flac(tmp_path: Path, share: float) -> None:
    wave_n = np.random.default_rng(0).uniform(-0.5, 0.5, 48_000)
    contents = written(tmp_path / "a.flac", wave_n, 16_000).read_bytes()
    path = tmp_path / "cut.flac"
    path.write_bytes(contents[: int(len(contents) * share)])
    assert re.search(r"cut\.flac' is damaged or cut short \(.+\); copy or record it again", error_of(path))


def test_flac_with_little_more_than_its_header(tmp_path: Path) -> None:
    contents = written(tmp_path / "a.flac", tone(16_000), 16_000).read_bytes()
    assert re.search(r"cannot be read as audio|is damaged or cut short", error_of(io.BytesIO(contents[:30])))


def test_file_that_gives_less_than_its_header_promises() -> None:
    if "MP3" not in soundfile.available_formats():
        pytest.skip("this libsndfile knows no MP3")
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).uniform(-0.5, 0.5, 48_000), 16_000, format="MP3")
    contents = file.getvalue()
    message = error_of(io.BytesIO(contents[: len(contents) // 2]))
    assert re.search(r"is damaged or cut short: \d+ samples could be read of the 48000", message)


def test_streamed_flac_of_unknown_length(tmp_path: Path) -> None:
    contents = bytearray(written(tmp_path / "a.flac", tone(16_000), 16_000).read_bytes())
    contents[21] &= 0xF0  # STREAMINFO's 36-bit count of samples: 0 stands for unknown
    contents[22:26] = bytes(4)
    assert re.search(
        r"does not say how long it is, because it was streamed; convert it", error_of(io.BytesIO(contents))
    )


def test_file_of_zero_length(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", np.zeros(0, np.float32), 16_000)
    assert error_of(path).endswith("a.wav' holds no samples (zero length).")


def test_file_with_nan(tmp_path: Path) -> None:
    wave_n = tone(16_000)
    wave_n[[7, 9]] = np.nan, np.inf
    path = written(tmp_path / "a.wav", wave_n, 16_000, subtype="FLOAT")
    assert re.search(
        r"a\.wav' holds 2 samples that are NaN, infinite or beyond float32, the first at index 7 of 8000",
        error_of(path),
    )


def test_rate_that_contradicts_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", tone(8_000), 8_000)
    assert len(load_audio(path, sampling_rate=8_000)) == 8_000
    message = error_of(path, sampling_rate=16_000)
    assert re.search(
        r"says 8000 samples per second .* but sampling_rate=16000 was passed; leave sampling_rate", message
    )


def test_text_mode_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.flac", tone(16_000), 16_000)
    with path.open() as file:
        assert re.search(r"a\.flac' is open in text mode, .*; open it in binary mode", error_of(file))
    assert "the given StringIO is open in text mode" in error_of(io.StringIO("text"))
    with tempfile.NamedTemporaryFile("w+", encoding="utf-8") as wrapper:  # says nothing of its mode before it is read
        wrapper.write("text")
        wrapper.seek(0)
        assert "gave str, expected bytes; open it in binary mode ('rb')." in error_of(wrapper)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", tone(16_000), 16_000)
    with path.open("rb") as file:
        load_audio(file)
        assert error_of(file).endswith("a.wav' has been read to its end already; call its seek(0) first.")
        file.seek(0)
        assert len(load_audio(file)) == 8_000
    assert re.search(r"a\.wav' cannot be read \(read of closed file\); pass a file that is open", error_of(file))
    with (tmp_path / "b.wav").open("wb") as file:
        assert re.search(r"b\.wav' cannot be read \(read\); pass a file that is open in binary mode", error_of(file))


def test_paths_from_home_and_empty_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "a.wav", tone(16_000), 16_000)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert len(load_audio("~/a.wav")) == len(load_audio(Path("~/a.wav"))) == 8_000
    with pytest.raises(FileNotFoundError, match=r"There is no file '~/b\.wav'"):
        load_audio("~/b.wav")
    with pytest.raises(FileNotFoundError, match=r"The path is empty \(''\)"):
        load_audio("")


def test_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", tone(16_000, 0.1), 16_000, subtype="FLOAT")
    for by_name in (False, True):
        reader, writer = os.pipe()
        os.write(writer, path.read_bytes())
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            if by_name and not Path(f"/dev/fd/{reader}").exists():
                pytest.skip("this system gives open files no names")
            source = f"/dev/fd/{reader}" if by_name else pipe
            np.testing.assert_array_equal(load_audio(source), tone(16_000, 0.1))


# ---- bad arrays ----


def test_two_dimensional_array() -> None:
    message = error_of(np.zeros((2, 16_000), np.float32))
    assert "shape (2, 16000), expected (samples,)" in message
    assert "pass a list of one-dimensional arrays" in message and "mix the channels of a single one down" in message


@pytest.mark.parametrize("source", [[0.0, 0.1], (np.zeros(9), 16_000), [], None, 0.5, b"RIFF", {"array": 1}])
def test_what_is_no_recording(source: Any) -> None:
    assert re.search(
        rf"A {type(source).__name__} is not a recording; pass a path, a binary file or a one-dim", error_of(source)
    )


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int8, bool, np.complex64, object, "U3"])
def test_types_that_are_no_samples(dtype: Any) -> None:
    samples = np.zeros(2_000, dtype=dtype)
    assert re.search(
        rf"samples of type {re.escape(str(samples.dtype))}, expected floating point in ±1 or PCM", error_of(samples)
    )


@pytest.mark.parametrize("several", [(x for x in ()), {"a.wav", "b.wav"}, map(str, ())])
def test_several_recordings_must_be_a_list(several: Any) -> None:
    assert "is not a recording; for several recordings pass list(...) of it." in error_of(several)


@pytest.mark.parametrize("peak", [-2e15, 1e25, 3.4e38])
def test_samples_too_large_to_be_normalised(peak: float) -> None:
    samples = np.zeros(1_000)
    samples[3] = peak
    for rate in (8_000, 16_000):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            message = error_of(samples, sampling_rate=rate)
        assert message.startswith(f"The recording holds samples as large as {abs(peak):.3g}, expected about ±1")


def test_array_of_zero_length() -> None:
    assert error_of(np.zeros(0)) == "The recording holds no samples (zero length)."


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_array_with_samples_that_are_not_finite(bad: float) -> None:
    samples = np.zeros(1_000)
    samples[3] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert re.search(
            r"holds 1 samples that are NaN, infinite or beyond float32, the first at index 3", error_of(samples)
        )


@pytest.mark.parametrize(
    "rate", [0, -8_000, 0.0, 16, float("nan"), float("inf"), 1e300, 10**400, True, np.True_, "16000", [16_000], 1j]
)
def test_bad_rates(rate: Any) -> None:
    message = error_of(np.zeros(16_000), sampling_rate=rate)
    assert re.match(r"sampling_rate is .+, expected a number of samples per second from 1000 to 1000000", message)


def test_rates_of_every_number_type() -> None:
    for rate in (8_000, 8_000.0, np.int32(8_000), np.float32(8_000)):
        assert check_rate(rate) == 8_000.0
        assert len(load_audio(np.zeros(800), sampling_rate=rate)) == 1_600


def test_length() -> None:
    check_length(np.zeros(720), 720)
    with pytest.raises(
        AudioError, match=r"719 samples \(44\.9 ms at 16000 Hz\), and the model needs at least 720 \(45 ms\)"
    ):
        check_length(np.zeros(719), 720)
    # Resampling may leave nothing of a very short recording; that is too short, no crash.
    with pytest.raises(AudioError, match=r"too short: \d samples"):
        check_length(load_audio(np.zeros(1), sampling_rate=96_000), 720)
