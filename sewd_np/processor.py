"""What stands before and behind the model: waveforms to ``input_values``, token ids to text.

``FeatureExtractor`` pads a batch and brings every recording to mean 0 and variance 1:

    y[n] = (x[n] − mean) / sqrt(var + 1e-7)         var = mean of (x − mean)², over all n counted, not n − 1

The 1e-7, the reference's own, keeps silence finite. It stands for a standard deviation of 3e-4 of full scale: fainter
recordings come out below 1, speech with a peak of 1e-4 (−80 dB) at about 0.05, which the model's own norms make good.
What is much fainter still ends as silence.

What is counted depends on the checkpoint. Where it returns an attention mask, each recording's own samples, and the
padding is set back to the padding value. Where it returns none (every published SEW-D), the whole padded row, padding
included: so a short recording in a batch is scaled otherwise than alone. ``transcribe`` therefore gives one recording
at a time; called with a batch it does what transformers' ``Wav2Vec2FeatureExtractor`` (5.23) does, to the bit.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sewd_np.audio import AudioError, as_array, check_peak, check_rate
from sewd_np.config import SAMPLING_RATE
from sewd_np.tokenizer import CTCTokenizer

NORMALISATION_EPSILON = 1e-7  # keeps silence finite: it becomes zeros
PADDING = {True: True, "longest": True, False: False, "do_not_pad": False}


class ProcessorOutput(dict[str, np.ndarray]):
    """``input_values`` (b, n) float32 and, where it is returned, ``attention_mask`` (b, n) int32, 1 for samples and 0
    for padding. A dict, so ``model(**out)`` works; both also as attributes.
    """

    @property
    def input_values(self) -> np.ndarray:
        return self["input_values"]

    @property
    def attention_mask(self) -> np.ndarray | None:
        return self.get("attention_mask")


@dataclasses.dataclass(frozen=True)
class FeatureExtractor:
    """The settings of ``preprocessor_config.json``, with transformers' defaults, checked; calling it applies them.

    ``extra`` keeps the fields that have no meaning here, so that a saved file has them again. Raises ``ValueError``
    naming the field.
    """

    do_normalize: bool = True
    return_attention_mask: bool = False
    padding_value: float = 0.0
    padding_side: str = "right"
    sampling_rate: int = SAMPLING_RATE
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        where = "in preprocessor_config.json is"
        for field in ("do_normalize", "return_attention_mask"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} {where} {getattr(self, field)!r}, expected true or false.")
        number = isinstance(self.padding_value, numbers.Real) and not isinstance(self.padding_value, bool)
        if not number or not math.isfinite(self.padding_value):
            raise ValueError(f"padding_value {where} {self.padding_value!r}, expected a finite number, usually 0.")
        if self.padding_side != "right":
            raise ValueError(f"padding_side {where} {self.padding_side!r}, expected 'right': SEW-D knows no other.")
        if check_rate(self.sampling_rate, "sampling_rate in preprocessor_config.json") % 1:
            raise ValueError(f"sampling_rate {where} {self.sampling_rate!r}, expected a whole number, such as 16000.")
        if self.extra.get("feature_size", 1) != 1:
            raise ValueError(f"feature_size {where} {self.extra['feature_size']!r}, expected 1: one waveform.")
        kind = self.extra.get("feature_extractor_type", "Wav2Vec2FeatureExtractor")
        if kind != "Wav2Vec2FeatureExtractor":
            raise ValueError(f"feature_extractor_type {where} {kind!r}, expected 'Wav2Vec2FeatureExtractor'.")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> FeatureExtractor:
        """From the contents of ``preprocessor_config.json``."""
        ours = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        extra = {key: value for key, value in settings.items() if key not in ours}
        return cls(**{key: value for key, value in settings.items() if key in ours}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The contents of ``preprocessor_config.json``, readable by transformers too."""
        settings = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, **self.extra}
        ours = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return settings | ours

    def __call__(
        self,
        audio: Any,
        sampling_rate: float | None = None,
        padding: bool | str = True,
        return_attention_mask: bool | None = None,
    ) -> ProcessorOutput:
        """A batch for the model, from one recording or several; see ``Processor.__call__``."""
        if sampling_rate is not None and check_rate(sampling_rate) != self.sampling_rate:
            raise ValueError(
                f"The recording has {sampling_rate:g} samples per second, but the model was trained on "
                f"{self.sampling_rate}; resample it first: sewd_np.audio.load_audio(recording, {sampling_rate:g}, "
                f"{self.sampling_rate})."
            )
        if not isinstance(padding, bool | str) or padding not in PADDING:
            raise ValueError(f"padding is {padding!r}, expected True, 'longest', False or 'do_not_pad'.")
        with_mask = self.return_attention_mask if return_attention_mask is None else return_attention_mask

        waves = _recordings(audio)
        lengths_b = [len(wave) for wave in waves]
        if not PADDING[padding] and len(set(lengths_b)) > 1:
            raise ValueError(f"The recordings have {lengths_b} samples: unequal lengths need padding=True.")
        values_bn = np.full((len(waves), max(lengths_b)), self.padding_value, dtype=np.result_type(*waves))
        for i, wave in enumerate(waves):
            values_bn[i, : len(wave)] = wave
        if values_bn.dtype == np.float64:
            # The reference rounds before it takes the mean, not after.
            values_bn = values_bn.astype(np.float32)

        if self.do_normalize:
            counted_b = lengths_b if with_mask else [values_bn.shape[1]] * len(waves)
            normalised_bn = np.empty(values_bn.shape, np.float32)
            for i, counted in enumerate(counted_b):
                normalised_bn[i] = _normalise(values_bn[i], counted, self.padding_value)
            values_bn = normalised_bn
        out = ProcessorOutput(input_values=values_bn.astype(np.float32, copy=False))
        if with_mask:
            samples_n = np.arange(values_bn.shape[1])
            out["attention_mask"] = (samples_n < np.array(lengths_b)[:, None]).astype(np.int32)
        return out


class Processor:
    """Feature extractor and, for a CTC checkpoint, tokenizer: ``model.processor``.

    feature_extractor, tokenizer: as attributes under these names; the tokenizer is None for a checkpoint that has no
    vocabulary (a pre-trained or a classification model).
    """

    def __init__(self, feature_extractor: FeatureExtractor, tokenizer: CTCTokenizer | None = None) -> None:
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer

    @classmethod
    def from_files(
        cls, preprocessor: Mapping[str, Any], tokenizer: Mapping[str, Any], vocab: Mapping[str, Any] | None
    ) -> Processor:
        """From the contents of preprocessor_config.json, tokenizer_config.json and vocab.json (None: no such file).

        Raises ``ValueError`` naming the field that cannot be used.
        """
        return cls(FeatureExtractor.from_dict(preprocessor), None if vocab is None else CTCTokenizer(vocab, tokenizer))

    def to_files(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
        """What ``from_files`` takes: (preprocessor, tokenizer, vocabulary); ({}, None) for the last two without one."""
        preprocessor = self.feature_extractor.to_dict()
        if self.tokenizer is None:
            return preprocessor, {}, None
        return preprocessor, self.tokenizer.to_config(), dict(self.tokenizer.vocab)

    def __call__(
        self,
        audio: Any,
        sampling_rate: float | None = None,
        padding: bool | str = True,
        return_attention_mask: bool | None = None,
    ) -> ProcessorOutput:
        """A batch for the model.

        audio: one waveform (n,), as an array or a list of numbers; several, as a list of them or an array (b, n).
            Anything ``np.asarray`` takes is an array. As in transformers, integers are not scaled to ±1; files and
            other rates go through ``sewd_np.audio.load_audio`` first.
        sampling_rate: samples per second of the recordings; any other than the model's is an error.
        padding: True or "longest": shorter recordings are padded on the right. False or "do_not_pad": they must have
            one length.
        return_attention_mask: overrides the checkpoint's setting, and with it what is normalised over (see the top
            of this file).

        Returns ``ProcessorOutput``. Raises ``AudioError`` for a recording that cannot be used (shape, type, no
        samples, NaN, beyond ``audio.LOUDEST``), ``ValueError`` for a wrong rate or padding.
        """
        return self.feature_extractor(audio, sampling_rate, padding, return_attention_mask)

    def decode(
        self,
        ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
    ) -> Any:
        """Text of the ids (s,) of one CTC path: see ``CTCTokenizer.decode``."""
        return self._need_tokenizer().decode(
            ids, skip_special_tokens, clean_up_tokenization_spaces, output_char_offsets, output_word_offsets
        )

    def batch_decode(
        self,
        sequences: Iterable[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
    ) -> Any:
        """Texts of several paths, (b, s) or a list: see ``CTCTokenizer.batch_decode``."""
        return self._need_tokenizer().batch_decode(
            sequences, skip_special_tokens, clean_up_tokenization_spaces, output_char_offsets, output_word_offsets
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, as CTC labels: see ``CTCTokenizer.encode``."""
        return self._need_tokenizer().encode(text)

    def _need_tokenizer(self) -> CTCTokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "This checkpoint has no vocabulary (vocab.json), so there is no text; load a CTC checkpoint."
            )
        return self.tokenizer


def _recordings(audio: Any) -> list[np.ndarray]:
    """Waveforms (n,) of what the caller passed: each not empty, finite, of a real number type."""
    if isinstance(audio, list | tuple) and not (len(audio) and isinstance(audio[0], numbers.Real)):
        waves = [as_array(wave) for wave in audio]
    else:
        array = as_array(audio)
        if array.ndim == 0:
            raise AudioError(
                f"A {type(audio).__name__} is not a recording; pass a waveform (samples,) or a list of them. "
                "sewd_np.audio.load_audio reads files."
            )
        if array.ndim > 2:
            raise AudioError(f"The array has shape {array.shape}, expected (samples,) or (recordings, samples).")
        waves = [array] if array.ndim == 1 else list(array)
    if not waves:
        raise AudioError("There is no recording in the list; pass at least one.")
    for i, wave in enumerate(waves):
        which = f"Recording {i} of {len(waves)}" if len(waves) > 1 else "The recording"
        if wave.ndim == 0:  # of a list only: a path, None, one number among arrays
            raise AudioError(
                f"{which} is a {type(audio[i]).__name__}, expected a waveform (samples,); "
                "sewd_np.audio.load_audio reads files."
            )
        if wave.ndim != 1:
            raise AudioError(
                f"{which} has shape {wave.shape}, expected (samples,); mix channels down (their mean), and pass "
                "several recordings as a list of one-dimensional arrays."
            )
        if wave.dtype.kind not in "iuf":
            raise AudioError(f"{which} has samples of type {wave.dtype}, expected numbers.")
        if len(wave) == 0:
            raise AudioError(f"{which} holds no samples (zero length).")
        if not np.isfinite(wave).all():
            raise AudioError(f"{which} holds samples that are NaN or infinite; repair or replace them.")
        check_peak(wave, which)
    # Half precision overflows in the sum of squares; the reference would go on in it.
    return [wave.astype(np.float32) if wave.dtype == np.float16 else wave for wave in waves]


def _normalise(samples_n: np.ndarray, counted: int, padding_value: float) -> np.ndarray:
    """Samples (n,) with the mean and variance of the first ``counted`` taken out; the rest becomes padding."""
    counted_n = samples_n[:counted]
    normalised_n: np.ndarray = (samples_n - counted_n.mean()) / np.sqrt(counted_n.var() + NORMALISATION_EPSILON)
    normalised_n[counted:] = padding_value
    return normalised_n
