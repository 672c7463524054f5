"""From recordings to text or labels, in one call.

    read -> one channel at the model's rate -> processor (normalise) -> model -> greedy CTC -> words with times
                                                                              -> softmax -> labels with scores

Recordings of a list that are about as long as each other share a model call, in which nobody sees the others' padding:
what a recording gives never depends on what else is in the list.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, overload

import numpy as np

from sewd_np.results import Label, Transcript, check_blank, read_labels, read_transcript

if TYPE_CHECKING:
    from sewd_np.model import SEWDModel
    from sewd_np.trace import Edit

# Most other rooms are imported where they are used: `import sewd_np` imports this one.

Recording = str | os.PathLike[str] | BinaryIO | np.ndarray
Several = list[Any] | tuple[Any, ...]
Result = TypeVar("Result")

DEFAULT_MODEL = "an4"
DEFAULT_CLASSIFIER = "keywords"
HEADS = {  # what a task needs: the head, and how to say so
    "ctc": ("transcribe", "a CTC head", "choose a checkpoint fine-tuned for speech recognition"),
    "classification": ("classify", "a classification head", "choose a checkpoint fine-tuned to classify"),
}


def load(
    source: Any = DEFAULT_MODEL,
    backend: str | None = None,
    dtype: Any = np.float32,
    threads: int | None = None,
    precision: str | None = None,
) -> SEWDModel:
    """A model from a bundled name, a folder, a weights file or a Hugging Face hub id.

    The class (``SEWDModel``, ``SEWDForCTC``, ``SEWDForSequenceClassification``) follows from the head that the
    checkpoint has. ``backend`` "numba" runs compiled kernels on ``threads`` threads (None: all cores), "numpy" the
    definitions, "cuda" kernels on an NVIDIA GPU. ``dtype`` float64 computes in double precision, on "numpy" only. If no
    backend is given it is "numba" for float32 and "numpy" for float64.

    ``precision`` is for "numba". "high", the default, uses the processor's matrix unit where there is one (Intel's
    AMX): logits are then good to some 2e-5 of the largest instead of 2e-6, in two thirds to three quarters of the time.
    "highest" multiplies in float32 everywhere, as "high" does on a machine without the unit.

    "numba" compiles its kernels when they are first used on a machine, within a minute, and keeps them on disk;
    logger "sewd_np" says so, on standard error if no logging is set up. See ``checkpoint.load_model`` for errors.
    """
    from sewd_np.checkpoint import load_model

    model: SEWDModel = load_model(source, None, backend, dtype, threads, precision)
    return model


@overload
def transcribe(
    audio: Several,
    model: Any = ...,
    backend: str | None = ...,
    sampling_rate: float | None = ...,
    progress: bool = ...,
    threads: int | None = ...,
    evidence: bool = ...,
    edit: Edit | None = ...,
    batch_size: int | None = ...,
    precision: str | None = ...,
) -> list[Transcript]: ...
@overload
def transcribe(
    audio: Recording,
    model: Any = ...,
    backend: str | None = ...,
    sampling_rate: float | None = ...,
    progress: bool = ...,
    threads: int | None = ...,
    evidence: bool = ...,
    edit: Edit | None = ...,
    batch_size: int | None = ...,
    precision: str | None = ...,
) -> Transcript: ...
def transcribe(
    audio: Recording | Several,
    model: Any = DEFAULT_MODEL,
    backend: str | None = None,
    sampling_rate: float | None = None,
    progress: bool = False,
    threads: int | None = None,
    evidence: bool = False,
    edit: Edit | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
) -> Transcript | list[Transcript]:
    """Transcribe a recording, or each of a list (or tuple) of them.

    audio: a path, an open binary file or a waveform (n,), as ``audio.load_audio`` takes them; or a list of such.
    model: what ``load`` takes, or a loaded model, whose own backend, threads and precision then count.
    backend: "numba" if not given, "numpy" or "cuda"; see ``load``.
    threads: CPU threads of backend "numba", all cores if not given.
    sampling_rate: samples per second of arrays, the model's own (16,000) if not given; a file says its own. With a list
    it is for the arrays in it; with a single file that says another one it is an error.
    progress: draw a bar on standard error for a list.
    evidence: keep the sound and the probabilities with the transcript, for ``plot.transcript`` and ``plot.attention``.
    edit: change intermediates of the model on the way, as in a model call; ``ablate`` has ready ones.
    batch_size: how many recordings of a list share a model call at most, 8 if not given. Only those of about one length
    do, up to ten minutes in all, and none on "numpy" or with an edit. Each result is what it would be alone (on "numba"
    to the last bit), and they come in the order of the list.
    precision: "high" or "highest", of backend "numba"'s products; see ``load``.

    Returns a ``Transcript``, or a list of them for a list. An unusable recording in a list stops the call, and the
    error says which it was: ``audio[2]: ...``.

    Raises ``AudioError``, ``OSError`` and ``MemoryError`` for a recording, ``ValueError`` for a model without a CTC
    head, and what ``load`` raises.
    """
    recognizer = load_for("ctc", model, backend, threads, precision)

    def read(wave_n: np.ndarray, logits_sv: np.ndarray) -> Transcript:
        return read_transcript(recognizer, wave_n, logits_sv, evidence)

    return _each(recognizer, audio, read, sampling_rate, progress, batch_size, edit)


@overload
def classify(
    audio: Several,
    model: Any = ...,
    backend: str | None = ...,
    sampling_rate: float | None = ...,
    progress: bool = ...,
    top_k: int = ...,
    threads: int | None = ...,
    batch_size: int | None = ...,
    precision: str | None = ...,
) -> list[list[Label]]: ...
@overload
def classify(
    audio: Recording,
    model: Any = ...,
    backend: str | None = ...,
    sampling_rate: float | None = ...,
    progress: bool = ...,
    top_k: int = ...,
    threads: int | None = ...,
    batch_size: int | None = ...,
    precision: str | None = ...,
) -> list[Label]: ...
def classify(
    audio: Recording | Several,
    model: Any = DEFAULT_CLASSIFIER,
    backend: str | None = None,
    sampling_rate: float | None = None,
    progress: bool = False,
    top_k: int = 5,
    threads: int | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
) -> list[Label] | list[list[Label]]:
    """The ``top_k`` likeliest labels of a recording, best first, or of each of a list; all if there are fewer.

    score[l] = exp(logit[l]) / Σ_m exp(logit[m]), whatever ``top_k``. Arguments and errors otherwise as for
    ``transcribe``. The bundled classifier knows control words and digits, one in a recording; ``sewd-np info keywords``
    lists them.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; it must be a whole number of at least 1.")
    classifier = load_for("classification", model, backend, threads, precision)

    def read(wave_n: np.ndarray, logits_l: np.ndarray) -> list[Label]:
        return read_labels(classifier, logits_l)[:top_k]

    return _each(classifier, audio, read, sampling_rate, progress, batch_size)


def load_for(
    head: str, model: Any, backend: str | None, threads: int | None = None, precision: str | None = None
) -> SEWDModel:
    """The model that a task ("ctc" or "classification") needs: loaded, if it is not yet, and of the right kind.

    Raises ``ValueError`` for a model with another head or without the files that describe its input and output.
    """
    from sewd_np.model import SEWDModel

    task, needed, advice = HEADS[head]
    if model is None:
        model = DEFAULT_MODEL if head == "ctc" else DEFAULT_CLASSIFIER
    if isinstance(model, SEWDModel):
        other_backend = None if backend == model.ops.name else backend
        for argument, value in (("threads", threads), ("precision", precision), ("backend", other_backend)):
            if value is not None:
                raise ValueError(
                    f"{argument}={value!r} comes with a model that is already loaded on {model.ops.name!r}; give it to "
                    "load() instead."
                )
        name, loaded = "the given model", model
    else:
        name, loaded = f"model {str(model)!r}", load(model, backend, threads=threads, precision=precision)
    if loaded.head != head:
        found = HEADS[loaded.head][1] if loaded.head in HEADS else "no head"
        raise ValueError(f"{name} has {found}, but {task} needs {needed}; {advice}.")
    if loaded.processor is None or (head == "ctc" and loaded.processor.tokenizer is None):
        raise ValueError(
            f"{name} has no {'processor' if loaded.processor is None else 'vocabulary'}; "
            f"{task} needs one, as a folder with preprocessor_config.json and vocab.json gives it."
        )
    if head == "ctc":
        check_blank(name, loaded)
    return loaded


TOGETHER = 8  # recordings in a model call, where nobody says how many: more gain nothing on a processor
CALL_SECONDS = 600  # of sound in a call of several: memory grows with it
READ_AHEAD = 16  # batches' worth of recordings, among which those of about one length are found
MOST_PADDING = 1.2  # samples of a batch, padding included, over samples of sound


def _each(
    model: SEWDModel,
    audio: Recording | Several,
    read: Callable[[np.ndarray, np.ndarray], Result],
    sampling_rate: float | None,
    progress: bool,
    batch_size: int | None,
    edit: Edit | None = None,
) -> Any:
    """``read`` (sound, logits) of a recording, or of each of a list, in the order of the list."""
    from sewd_np.audio import check_rate

    if batch_size is None:
        batch_size = TOGETHER
    elif isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1.")
    if not isinstance(audio, list | tuple):
        wave_n = hear(model, audio, sampling_rate)
        return read(wave_n, _logits(model, [wave_n], edit)[0])
    if sampling_rate is not None:
        check_rate(sampling_rate)  # here, for a list may hold nothing that it is for
    if model.ops.one_by_one or edit is not None:  # an edit meets the recordings in order
        batch_size = 1
    from tqdm import tqdm

    assert model.processor is not None
    most = CALL_SECONDS * model.processor.feature_extractor.sampling_rate
    ahead = 1 if batch_size == 1 else READ_AHEAD * batch_size
    results: dict[int, Result] = {}
    with tqdm(total=len(audio), unit="recording", disable=not progress) as bar:
        for waves in _read_ahead(model, audio, sampling_rate, ahead, 2 * most):
            for chosen in _batches(waves, batch_size, most):
                with _naming(chosen):
                    logits = _logits(model, [waves[i] for i in chosen], edit)
                results |= {i: read(waves[i], each) for i, each in zip(chosen, logits, strict=True)}
                bar.update(len(chosen))
    return [results[i] for i in range(len(audio))]


def _read_ahead(
    model: SEWDModel, audio: Several, sampling_rate: float | None, count: int, most: int
) -> Iterator[dict[int, np.ndarray]]:
    """A list's recordings by their number, ``count`` or some ``most`` samples at a time: all might fill memory."""
    waves: dict[int, np.ndarray] = {}
    for i, recording in enumerate(audio):
        is_file = isinstance(recording, str | os.PathLike) or hasattr(recording, "read")
        with _naming([i]):
            waves[i] = hear(model, recording, None if is_file else sampling_rate)
        if len(waves) == count or sum(map(len, waves.values())) >= most:
            yield waves
            waves = {}
    if waves:
        yield waves


def _batches(waves: dict[int, np.ndarray], batch_size: int, most: int) -> Iterator[list[int]]:
    """The numbers of the recordings, shortest first, in batches: little padding, and at most ``most`` samples."""
    batch: list[int] = []
    for i in sorted(waves, key=lambda i: len(waves[i])):
        samples = len(waves[i]) * (len(batch) + 1)
        sound = len(waves[i]) + sum(len(waves[k]) for k in batch)
        if batch and (len(batch) == batch_size or samples > min(most, MOST_PADDING * sound)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@contextmanager
def _naming(numbers: Sequence[int]) -> Iterator[None]:
    """Say of an error which recordings of the list it is about."""
    from sewd_np.audio import AudioError

    try:
        yield
    except (AudioError, OSError, MemoryError) as error:
        # Foreign kinds (NumPy's own MemoryError, an HTTP library's OSError) cannot all be made from a message.
        kinds = type(error).__mro__
        kind = next(kind for kind in kinds if kind is AudioError or kind.__module__ == "builtins")
        raise kind(f"{', '.join(f'audio[{i}]' for i in sorted(numbers))}: {error}") from error


def hear(model: SEWDModel, recording: Any, sampling_rate: float | None = None) -> np.ndarray:
    """A recording as a model's processor takes it: (n,) float32, one channel at the model's sampling rate.

    Raises what ``audio.load_audio`` raises, and ``AudioError`` for a recording shorter than the model's minimum.
    """
    from sewd_np.audio import check_length, load_audio

    assert model.processor is not None
    rate = model.processor.feature_extractor.sampling_rate
    wave_n = load_audio(recording, sampling_rate, rate)
    check_length(wave_n, model.config.minimum_samples, rate)
    return wave_n


def _logits(model: SEWDModel, waves: list[np.ndarray], edit: Edit | None = None) -> list[np.ndarray]:
    """A model's logits for each of what ``hear`` returned, as if it came alone, without the batch axis."""
    assert model.processor is not None
    rate = model.processor.feature_extractor.sampling_rate
    inputs = [model.processor(wave_n, sampling_rate=rate)["input_values"][0] for wave_n in waves]
    lengths = [len(input_n) for input_n in inputs]
    values_bn = np.zeros((len(inputs), max(lengths)), inputs[0].dtype)
    for row, input_n in zip(values_bn, inputs, strict=True):
        row[: len(input_n)] = input_n
    mask_bn = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
    even = min(lengths) == max(lengths)  # then there is no padding to speak of
    logits = model(values_bn, None if even else mask_bn, padding="alone", edit=edit).logits
    assert logits is not None
    if model.head == "classification":
        return list(logits)
    return [logits_sv[: model.config.frames(length)] for logits_sv, length in zip(logits, lengths, strict=True)]
