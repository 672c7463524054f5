"""From recordings to text or labels, in one call.

    read -> one channel at the model's rate -> processor (normalise) -> model -> greedy CTC -> words with times
                                                                              -> softmax -> labels with scores

Each recording goes through the model by itself, so what it gives never depends on what else is in the list.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, overload

import numpy as np

if TYPE_CHECKING:
    from sewd_np.decoding import Word
    from sewd_np.model import SEWDModel

# The other rooms are imported where they are used: `import sewd_np` imports this one.

Recording = str | os.PathLike[str] | BinaryIO | np.ndarray
Several = list[Any] | tuple[Any, ...]
Result = TypeVar("Result")

DEFAULT_MODEL = "an4"
DEFAULT_BACKEND = "numpy"
HEADS = {  # what a task needs: the head, and how to say so
    "ctc": ("transcribe", "a CTC head", "choose a checkpoint fine-tuned for speech recognition"),
    "classification": ("classify", "a classification head", "choose a checkpoint fine-tuned to classify"),
}


@dataclass(frozen=True)
class Transcript:
    """What was said in one recording.

    text: as transformers' processor decodes it, so with two spaces where the model emits two word delimiters. words:
    the same words in order, with times in seconds. duration: seconds.
    """

    text: str
    words: tuple[Word, ...]
    duration: float


@dataclass(frozen=True)
class Label:
    """A label and its score: its softmax probability, 0 to 1. The scores of all labels sum to 1."""

    label: str
    score: float


def load(
    source: Any = DEFAULT_MODEL, backend: str = DEFAULT_BACKEND, dtype: Any = np.float32, threads: int | None = None
) -> SEWDModel:
    """A model from a bundled name, a folder, a weights file or a Hugging Face hub id.

    The class (``SEWDModel``, ``SEWDForCTC``, ``SEWDForSequenceClassification``) follows from the head that the
    checkpoint has. ``backend`` "numpy" runs the definitions, "numba" compiled kernels on ``threads`` threads (None: all
    cores); ``dtype`` float64 computes in double precision, on "numpy" only. See ``checkpoint.load_model`` for errors.
    """
    from sewd_np.checkpoint import load_model

    model: SEWDModel = load_model(source, backend=backend, dtype=dtype, threads=threads)
    return model


@overload
def transcribe(
    audio: Several,
    model: Any = ...,
    backend: str = ...,
    sampling_rate: float | None = ...,
    progress: bool = ...,
    threads: int | None = ...,
) -> list[Transcript]: ...
@overload
def transcribe(
    audio: Recording,
    model: Any = ...,
    backend: str = ...,
    sampling_rate: float | None = ...,
    progress: bool = ...,
    threads: int | None = ...,
) -> Transcript: ...
def transcribe(
    audio: Recording | Several,
    model: Any = DEFAULT_MODEL,
    backend: str = DEFAULT_BACKEND,
    sampling_rate: float | None = None,
    progress: bool = False,
    threads: int | None = None,
) -> Transcript | list[Transcript]:
    """Transcribe a recording, or each of a list (or tuple) of them.

    audio: a path, an open binary file or a waveform (n,), as ``audio.load_audio`` takes them; or a list of such.
    model: what ``load`` takes, or a loaded model, whose own backend and threads then count.
    threads: CPU threads of backend "numba", all cores if not given.
    sampling_rate: samples per second of arrays, the model's own (16,000) if not given; a file says its own.
    progress: draw a bar on standard error.

    Returns a ``Transcript``, or a list of them for a list. An unusable recording in a list stops the call, and the
    error says which it was: ``audio[2]: ...``.

    Raises ``AudioError``, ``OSError`` and ``MemoryError`` for a recording, ``ValueError`` for a model without a CTC
    head, and what ``load`` raises.
    """
    recognizer = load_for("ctc", model, backend, threads)
    return _each(audio, lambda recording: _transcript(recognizer, recording, sampling_rate), progress)


@overload
def classify(
    audio: Several,
    model: Any = ...,
    backend: str = ...,
    sampling_rate: float | None = ...,
    progress: bool = ...,
    top_k: int = ...,
    threads: int | None = ...,
) -> list[list[Label]]: ...
@overload
def classify(
    audio: Recording,
    model: Any = ...,
    backend: str = ...,
    sampling_rate: float | None = ...,
    progress: bool = ...,
    top_k: int = ...,
    threads: int | None = ...,
) -> list[Label]: ...
def classify(
    audio: Recording | Several,
    model: Any = None,
    backend: str = DEFAULT_BACKEND,
    sampling_rate: float | None = None,
    progress: bool = False,
    top_k: int = 5,
    threads: int | None = None,
) -> list[Label] | list[list[Label]]:
    """The ``top_k`` likeliest labels of a recording, best first, or of each of a list; all if there are fewer.

    score[l] = exp(logit[l]) / Σ_m exp(logit[m]), whatever ``top_k``. Arguments and errors otherwise as for
    ``transcribe``, but no classifier is bundled, so ``model`` must be given.
    """
    if isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; it must be a whole number of at least 1.")
    classifier = load_for("classification", model, backend, threads)
    return _each(audio, lambda recording: _labels(classifier, recording, sampling_rate)[:top_k], progress)


def load_for(head: str, model: Any, backend: str, threads: int | None = None) -> SEWDModel:
    """The model that a task ("ctc" or "classification") needs: loaded, if it is not yet, and of the right kind.

    Raises ``ValueError`` for a model with another head or without the files that describe its input and output.
    """
    from sewd_np.model import SEWDModel

    task, needed, advice = HEADS[head]
    if model is None and head == "ctc":
        model = DEFAULT_MODEL
    if model is None:
        raise ValueError(f"{task} needs a model: none with {needed} is bundled; give a folder or a hub id.")
    if isinstance(model, SEWDModel):
        if threads is not None or backend not in (DEFAULT_BACKEND, model.ops.name):
            raise ValueError(
                f"backend {backend!r} and threads {threads!r} are given with a model that is already loaded on "
                f"{model.ops.name!r}; give them to load() instead."
            )
        name, loaded = "the given model", model
    else:
        name, loaded = f"model {str(model)!r}", load(model, backend, threads=threads)
    if loaded.head != head:
        found = HEADS[loaded.head][1] if loaded.head in HEADS else "no head"
        raise ValueError(f"{name} has {found}, but {task} needs {needed}; {advice}.")
    if loaded.processor is None or (head == "ctc" and loaded.processor.tokenizer is None):
        raise ValueError(
            f"{name} has no {'processor' if loaded.processor is None else 'vocabulary'}; "
            f"{task} needs one, as a folder with preprocessor_config.json and vocab.json gives it."
        )
    return loaded


def _each(audio: Any, recognize: Callable[[Any], Result], progress: bool) -> Any:
    """``recognize`` applied to a recording, or to each of a list, one in memory at a time."""
    from sewd_np.audio import AudioError

    several = isinstance(audio, list | tuple)
    recordings: Iterable[Any] = audio if several else [audio]
    if progress:
        from tqdm import tqdm

        recordings = tqdm(recordings, unit="recording")
    results = []
    for index, recording in enumerate(recordings):
        try:
            results.append(recognize(recording))
        except (AudioError, OSError, MemoryError) as error:
            if not several:
                raise
            # NumPy's own MemoryError cannot be made from a message.
            kind = MemoryError if isinstance(error, MemoryError) else type(error)
            raise kind(f"audio[{index}]: {error}") from error
    return results if several else results[0]


def _logits(model: SEWDModel, recording: Any, sampling_rate: float | None) -> tuple[np.ndarray, float]:
    """A model's logits for one recording, without the batch axis, and the recording's duration in seconds."""
    from sewd_np.audio import check_length, load_audio

    processor = model.processor
    assert processor is not None
    rate = processor.feature_extractor.sampling_rate
    wave_n = load_audio(recording, sampling_rate, rate)
    check_length(wave_n, model.config.minimum_samples, rate)
    logits = model(processor(wave_n, sampling_rate=rate)["input_values"]).logits
    assert logits is not None
    return logits[0], len(wave_n) / rate


def _transcript(model: SEWDModel, recording: Any, sampling_rate: float | None) -> Transcript:
    from sewd_np.decoding import greedy, words

    processor = model.processor
    assert processor is not None and processor.tokenizer is not None
    logits_sv, duration = _logits(model, recording, sampling_rate)
    seconds_per_frame = model.config.inputs_to_logits_ratio / processor.feature_extractor.sampling_rate
    return Transcript(
        text=processor.tokenizer.decode(greedy(logits_sv)),
        words=tuple(words(logits_sv, processor.tokenizer, seconds_per_frame, duration)),
        duration=duration,
    )


def _labels(model: SEWDModel, recording: Any, sampling_rate: float | None) -> list[Label]:
    """All labels, best first; of equal scores the lower id first."""
    from sewd_np.losses import log_softmax

    logits_l, _ = _logits(model, recording, sampling_rate)
    scores_l = np.exp(log_softmax(logits_l))
    order = np.argsort(-scores_l, kind="stable")
    return [Label(model.config.id2label[int(i)], float(scores_l[i])) for i in order]
