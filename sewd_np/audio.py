"""Recordings in: any file libsndfile reads, or an array, becomes one float32 waveform at the model's rate.

The order of work: read → mix the channels down to one (their mean) → check → resample. What the model hears is then
normalised by ``processor.py``, so samples outside ±1 are no mistake, and loudness does not matter from a peak of about
1e-4 (−80 dB of full scale) to ``LOUDEST``. What is much fainter drowns in the processor's ε and ends as silence.

Everything that is wrong with a recording is an ``AudioError``, with one sentence that says what was found and what to
do. Only a missing path is a ``FileNotFoundError``, and a path that may not be read a ``PermissionError``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np

from sewd_np.config import SAMPLING_RATE

# soundfile and soxr are imported where they are used: `import sewd_np` stays quick for those who bring arrays.

LOWEST_RATE = 1_000  # below it, someone has passed kilohertz, and 16 would stretch a minute to 17 hours
HIGHEST_RATE = 1_000_000  # above any recorder; the resampler does not come back from rates like 1e300
BLOCK = 1 << 18  # samples read at a time: a header that promises too much then costs no memory
LOUDEST = 1e15  # the squares of 10^8 such samples still sum up in float32, as the processor's variance does
UNKNOWN_LENGTH = 1 << 62  # libsndfile's length of a stream whose header gives none is near 2^63

# Full scale of the integer formats in which audio libraries hand out PCM: (value of silence, value of 1.0).
PCM_SCALES = {np.dtype(np.int16): (0, 1 << 15), np.dtype(np.int32): (0, 1 << 31), np.dtype(np.uint8): (128, 1 << 7)}


class AudioError(ValueError):
    """A recording that cannot be used; the message says why and what to do."""


def load_audio(source: Any, sampling_rate: float | None = None, target_rate: int = SAMPLING_RATE) -> np.ndarray:
    """One recording as a waveform (n,), float32, at ``target_rate`` samples per second.

    source: a path (``str`` or ``PathLike``; ``~`` is the home folder); a binary file object, read from where it stands
        to its end; or a waveform (n,): a NumPy array or whatever ``np.asarray`` takes (a torch tensor, say).
        Floating-point samples are taken as they are; ``int16``, ``int32`` and ``uint8`` are PCM and divided by their
        full scale. A plain list is refused: elsewhere in this package a list means several recordings.
    sampling_rate: samples per second of an array; without one it is ``target_rate``. A file says its own rate, and
        another one passed along with it is an error.

    Channels of a file are averaged: x[n] = mean over c of x[n, c]. Resampling is soxr's "HQ" (20 bit, linear
    phase), as ``librosa.load`` does it. The result may be the caller's own array: do not write to it.

    Raises ``AudioError``, also for samples beyond ±``LOUDEST``; ``FileNotFoundError``, ``PermissionError`` or another
    ``OSError`` where a path or a file object cannot be read.
    """
    check_rate(target_rate, "target_rate")
    if sampling_rate is not None:
        sampling_rate = check_rate(sampling_rate)
    if isinstance(source, str | os.PathLike):
        samples, rate = _read_path(source)
    elif hasattr(source, "read"):
        samples, rate = _read_object(source)
    else:
        return _resample(as_waveform(source), target_rate if sampling_rate is None else sampling_rate, target_rate)
    name = _name(source)
    if sampling_rate is not None and sampling_rate != rate:
        raise AudioError(
            f"{name} says {rate:g} samples per second in its header, but sampling_rate={sampling_rate:g} was passed; "
            "leave sampling_rate out for files."
        )
    return _resample(_check_finite(samples, name), check_rate(rate, f"the sampling rate of {name}"), target_rate)


def as_waveform(source: Any) -> np.ndarray:
    """A waveform given as an array, checked and scaled: (n,), float32, n ≥ 1, all within ±``LOUDEST``.

    PCM becomes x = (value − silence) / full scale: int16 / 2^15, int32 / 2^31, (uint8 − 128) / 2^7. Other integers
    are refused, for nothing says what their full scale is.

    Raises ``AudioError``.
    """
    if isinstance(source, Iterator | Set):
        raise AudioError(f"A {type(source).__name__} is not a recording; for several recordings pass list(...) of it.")
    samples = None if isinstance(source, list | tuple) else as_array(source)
    if samples is None or samples.ndim == 0:
        raise AudioError(
            f"A {type(source).__name__} is not a recording; pass a path, a binary file or a one-dimensional array "
            "(numpy.asarray makes one of a list of numbers)."
        )
    if samples.ndim != 1:
        raise AudioError(
            f"The recording has shape {samples.shape}, expected (samples,); for several recordings pass a list of "
            "one-dimensional arrays, and mix the channels of a single one down (their mean over the channel axis)."
        )
    native = samples.dtype.newbyteorder("=")
    if native in PCM_SCALES:
        silence, full_scale = PCM_SCALES[native]
        samples = (samples - np.float64(silence)) / full_scale
    elif samples.dtype.kind != "f":
        raise AudioError(
            f"The recording has samples of type {samples.dtype}, expected floating point in ±1 or PCM as int16, int32 "
            "or uint8; convert it so that full scale is 1."
        )
    return _check_finite(samples, "The recording")


def as_array(source: Any) -> np.ndarray:
    """``np.asarray``; what it refuses (a tensor on a GPU or one that requires grad, a ragged list) is an AudioError."""
    try:
        return np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:
        raise AudioError(f"A {type(source).__name__} could not be read as an array of samples: {error}") from error


def check_rate(rate: Any, what: str = "sampling_rate") -> float:
    """A sampling rate as a float, samples per second. Raises ``AudioError`` where it cannot be one."""
    is_number = isinstance(rate, int | float | np.integer | np.floating)
    if not is_number or not LOWEST_RATE <= rate <= HIGHEST_RATE:  # so are NaN and True refused
        found = f"{rate}" if is_number else f"{rate!r} ({type(rate).__name__})"
        raise AudioError(
            f"{what} is {found}, expected a number of samples per second from {LOWEST_RATE} to {HIGHEST_RATE}, "
            f"such as {SAMPLING_RATE}."
        )
    return float(rate)


def check_length(samples: np.ndarray, minimum: int, rate: int = SAMPLING_RATE) -> None:
    """Raise ``AudioError`` if a waveform (n,) is shorter than the model can hear (``config.minimum_samples``)."""
    if len(samples) < minimum:
        raise AudioError(
            f"The recording is too short: {len(samples)} samples ({len(samples) / rate * 1000:.3g} ms at {rate} Hz), "
            f"and the model needs at least {minimum} ({minimum / rate * 1000:.3g} ms); add silence or leave it out."
        )


def _name(source: Any) -> str:
    """How error messages call a source."""
    if isinstance(source, str | os.PathLike):
        return f"'{os.fspath(source)}'"
    name = getattr(source, "name", None)  # open files have one; sockets and pipes may have a number there
    return f"'{name}'" if isinstance(name, str) else f"the given {type(source).__name__}"


def _read_path(path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
    """Samples (n,), float32, and rate of the file at a path."""
    name = _name(path)
    path = os.path.expanduser(path)
    if not path:  # pathlib would take it for the folder that we are in
        raise FileNotFoundError("The path is empty (''); pass the path of an audio file.")
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no file {name}; check the path.")
    if Path(path).is_dir():
        raise AudioError(f"{name} is a folder; pass the audio files in it one by one or as a list.")
    with open(path, "rb") as file:
        if not Path(path).is_file():  # a named pipe or a device
            return _read_object(file)
        if os.fstat(file.fileno()).st_size == 0:
            raise AudioError(f"{name} is empty (0 bytes); expected an audio file.")
        # Not by its name: soundfile believes suffixes such as `.raw`, and the contents should decide.
        return _read_sound(file.fileno(), name)


def _read_object(file: Any) -> tuple[np.ndarray, float]:
    """Samples (n,), float32, and rate of an open binary file, which need not be seekable (a pipe, an upload)."""
    name = _name(file)
    if isinstance(file, io.TextIOBase):  # reading it would fail in the middle of a character, or turn bytes into others
        raise AudioError(f"{name} is open in text mode, expected a binary file; open it in binary mode ('rb').")
    try:
        contents = file.read()
    except ValueError as error:  # closed, open for writing only, or text in a wrapper
        raise AudioError(f"{name} cannot be read ({error}); pass a file that is open in binary mode ('rb').") from error
    if not isinstance(contents, bytes | bytearray | memoryview):
        raise AudioError(f"{name} gave {type(contents).__name__}, expected bytes; open it in binary mode ('rb').")
    if not contents:
        if _position(file) > 0:
            raise AudioError(f"{name} has been read to its end already; call its seek(0) first.")
        raise AudioError(f"{name} is empty (0 bytes); expected an audio file.")
    return _read_sound(io.BytesIO(contents), name)


def _position(file: Any) -> int:
    """How far an open file has been read, in bytes; 0 where it cannot tell (a pipe, an upload)."""
    try:
        return int(file.tell())
    except (AttributeError, OSError):
        return 0


def _read_sound(file: int | io.BytesIO, name: str) -> tuple[np.ndarray, float]:
    """Samples (n,), the mean of the channels, and rate of a seekable file (an int is a descriptor).

    libsndfile refuses some damaged files (FLAC) and hands out less than the header promises for others (MP3, Ogg).
    A WAV file that was cut short is read as far as it goes: its header cannot be told from a streamed one's.
    """
    import soundfile

    try:
        sound = soundfile.SoundFile(file, closefd=False)
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name} cannot be read as audio ({error.error_string.rstrip('.')}); "
            "expected WAV, FLAC, Ogg, MP3 or another format that libsndfile reads."
        ) from error
    with sound:
        promised = sound.frames
        if promised >= UNKNOWN_LENGTH:
            raise AudioError(
                f"{name} does not say how long it is, because it was streamed; convert it (ffmpeg -i OLD NEW.wav)."
            )
        blocks_n: list[np.ndarray] = []
        try:
            while len(block_nc := sound.read(BLOCK, dtype="float32", always_2d=True)):
                blocks_n.append(block_nc.mean(axis=1))
        except soundfile.LibsndfileError as error:
            raise AudioError(
                f"{name} is damaged or cut short ({error.error_string.rstrip('.')}); copy or record it again."
            ) from error
        rate = sound.samplerate
    read = sum(map(len, blocks_n))
    if read < promised:
        raise AudioError(
            f"{name} is damaged or cut short: {read} samples could be read of the {promised} that its header promises; "
            "copy or record it again."
        )
    return np.concatenate(blocks_n) if blocks_n else np.zeros(0, np.float32), rate


def _check_finite(samples: np.ndarray, name: str) -> np.ndarray:
    """Samples (n,) as contiguous float32, at least one, none of them NaN, infinite or beyond ``LOUDEST``."""
    if len(samples) == 0:
        raise AudioError(f"{name} holds no samples (zero length).")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and is found below
        samples = np.ascontiguousarray(samples, dtype=np.float32)
    finite = np.isfinite(samples)
    if not finite.all():
        raise AudioError(
            f"{name} holds {np.count_nonzero(~finite)} samples that are NaN, infinite or beyond float32, the first at "
            f"index {finite.argmin()} of {len(samples)}; repair or replace them."
        )
    check_peak(samples, name)
    return samples


def check_peak(samples: np.ndarray, name: str) -> None:
    """Raise ``AudioError`` if finite samples (n,), n ≥ 1, reach so far that sums of their squares would overflow."""
    peak = max(float(samples.max()), -float(samples.min()))
    if peak > LOUDEST:
        raise AudioError(
            f"{name} holds samples as large as {peak:.3g}, expected about ±1 and {LOUDEST:g} at most; "
            "divide them by their full scale."
        )


def _resample(samples: np.ndarray, rate: float, target_rate: int) -> np.ndarray:
    """Waveform (n,) from one rate to another; n becomes about n · target_rate / rate."""
    if rate == target_rate:
        return samples
    import soxr

    resampled: np.ndarray = soxr.resample(samples, rate, target_rate, quality="HQ")
    return resampled
