"""SEWDConfig: every number and option that fixes a SEW-D model, checked once, plus the rates and lengths that follow.

The fields, their names and their defaults are those of a transformers ``config.json`` (``model_type`` "sew-d"), so a
published checkpoint's own file is read as it is. Beware of the defaults: they match no published checkpoint (those
have an odd positional kernel, for one); they are here because a file may leave a field out.

Nothing else in the package reads a configuration file, and no operation reads the configuration: ``model.py`` hands
each operation the few numbers it needs.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any

ACTIVATIONS = (
    "gelu",
    "gelu_python",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "relu6",
    "leaky_relu",
    "silu",
    "swish",
    "mish",
    "tanh",
    "sigmoid",
    "linear",
)
LARGEST = 2**31  # no whole number of a configuration reaches it: a damaged file must not ask for more than memory holds
MOST = {"num_hidden_layers": 1_000, "num_labels": 1_000_000}  # of what is listed one by one when a checkpoint is read
SAMPLING_RATE = 16_000  # samples per second; every published SEW-D hears at this rate


@dataclasses.dataclass(frozen=True)
class SEWDConfig:
    """The shape and options of a SEW-D model.

    Field names and defaults follow ``transformers.SEWDConfig`` (5.23). Those from ``attention_head_size`` to
    ``hidden_dropout_prob`` are not in that class: they come from DeBERTa, and the reference reads them where a file has
    them. Dropout, mask probabilities and ``initializer_range`` matter in training only, and are kept so that a saved
    file is complete; but where both mask probabilities are 0, there is no ``masked_spec_embed``.

    Raises ``ValueError`` naming the field for any value that the model cannot run with.
    """

    vocab_size: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    squeeze_factor: int = 2
    max_position_embeddings: int = 512
    position_buckets: int = 256
    share_att_key: bool = True
    relative_attention: bool = True
    pos_att_type: tuple[str, ...] = ("p2c", "c2p")
    norm_rel_ebd: str = "layer_norm"
    hidden_act: str = "gelu_python"
    hidden_dropout: float = 0.1
    activation_dropout: float = 0.1
    attention_dropout: float = 0.1
    feat_proj_dropout: float = 0.0
    final_dropout: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-7
    feature_layer_norm_eps: float = 1e-5
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    conv_dim: tuple[int, ...] = (64, 128, 128, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512)
    conv_stride: tuple[int, ...] = (5, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1)
    conv_kernel: tuple[int, ...] = (10, 3, 1, 3, 1, 3, 1, 3, 1, 2, 1, 2, 1)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    apply_spec_augment: bool = True
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    ctc_loss_reduction: str = "mean"
    ctc_zero_infinity: bool = False
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    pad_token_id: int = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    attention_head_size: int | None = None
    max_relative_positions: int = -1
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    hidden_dropout_prob: float = 0.1

    id2label: dict[int, str] = dataclasses.field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    architectures: tuple[str, ...] = ()
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _coerced(field.name, str(field.type), getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        self._check_sizes()
        self._check_convolutions()
        self._check_positions()
        self._check_names()

    # ------------------------------------------------------------------ checks

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "squeeze_factor",
            "max_position_embeddings",
            "num_conv_pos_embeddings",
            "num_conv_pos_embedding_groups",
            "classifier_proj_size",
        ):
            most = MOST.get(name, LARGEST - 1)
            _require(
                1 <= getattr(self, name) <= most,
                name,
                getattr(self, name),
                f"a whole number of at least 1 and at most {most:,}",
            )
        for name in ("layer_norm_eps", "feature_layer_norm_eps"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of num_attention_heads ({self.num_attention_heads})",
        )
        if self.attention_head_size is not None:
            _require(
                self.attention_head_size * self.num_attention_heads == self.hidden_size,
                "attention_head_size",
                self.attention_head_size,
                f"hidden_size / num_attention_heads = {self.hidden_size // self.num_attention_heads}, "
                "as the reference model can run no other",
            )
        _require(
            0 <= self.pad_token_id < self.vocab_size,
            "pad_token_id",
            self.pad_token_id,
            f"a token id below vocab_size ({self.vocab_size}); it is the CTC blank",
        )

    def _check_convolutions(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("conv_dim", "conv_kernel", "conv_stride")}
        _require(
            len(set(lengths.values())) == 1 and lengths["conv_dim"] > 0,
            "conv_dim",
            f"of length {lengths['conv_dim']}",
            f"as long as conv_kernel ({lengths['conv_kernel']}) and conv_stride ({lengths['conv_stride']})",
        )
        for name in ("conv_dim", "conv_kernel", "conv_stride"):
            _require(min(getattr(self, name)) >= 1, name, getattr(self, name), "made of whole numbers of at least 1")
        _require(
            self.hidden_size % self.num_conv_pos_embedding_groups == 0,
            "num_conv_pos_embedding_groups",
            self.num_conv_pos_embedding_groups,
            f"a divisor of hidden_size ({self.hidden_size})",
        )
        if self.conv_kernel_size > 0:
            _require(
                self.conv_kernel_size % 2 == 1,
                "conv_kernel_size",
                self.conv_kernel_size,
                "odd (an even kernel would change the number of frames)",
            )
            _require(
                self.conv_groups >= 1 and self.hidden_size % self.conv_groups == 0,
                "conv_groups",
                self.conv_groups,
                f"a divisor of hidden_size ({self.hidden_size})",
            )

    def _check_positions(self) -> None:
        unknown = [kind for kind in self.pos_att_type if kind not in ("c2p", "p2c")]
        _require(
            not unknown and len(set(self.pos_att_type)) == len(self.pos_att_type),
            "pos_att_type",
            self.pos_att_type,
            "any of 'c2p' and 'p2c', each at most once",
        )
        norms = {part.strip() for part in self.norm_rel_ebd.lower().split("|")}
        _require(norms <= {"layer_norm", "none"}, "norm_rel_ebd", repr(self.norm_rel_ebd), "'layer_norm' or 'none'")
        if self.relative_attention and self.position_buckets > 0:
            # With fewer buckets the logarithm of the bucket formula divides by zero or runs backwards.
            _require(
                self.position_buckets >= 4,
                "position_buckets",
                self.position_buckets,
                "at least 4, or -1 for one bucket per distance",
            )
            _require(
                self.max_relative_distance - 1 > self.position_buckets / 2,
                "max_relative_positions" if self.max_relative_positions >= 1 else "max_position_embeddings",
                self.max_relative_distance,
                f"more than position_buckets / 2 + 1 = {self.position_buckets / 2 + 1:g}",
            )

    def _check_names(self) -> None:
        for name in ("hidden_act", "feat_extract_activation", "conv_act"):
            _require(
                getattr(self, name) in ACTIVATIONS, name, repr(getattr(self, name)), "one of " + " ".join(ACTIVATIONS)
            )
        _require(
            self.feat_extract_norm in ("group", "layer"),
            "feat_extract_norm",
            repr(self.feat_extract_norm),
            "'group' or 'layer'",
        )
        _require(
            self.ctc_loss_reduction in ("mean", "sum", "none"),
            "ctc_loss_reduction",
            repr(self.ctc_loss_reduction),
            "'mean', 'sum' or 'none'",
        )
        _require(
            sorted(self.id2label) == list(range(len(self.id2label))) and len(self.id2label) > 0,
            "id2label",
            self.id2label,
            "a name for each label id 0, 1, 2, ...",
        )

    # --------------------------------------------------------- what follows from the fields

    @property
    def num_labels(self) -> int:
        """Number of classes of a sequence classifier."""
        return len(self.id2label)

    @property
    def head_size(self) -> int:
        """e: hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples per frame of the feature encoder and of the logits: the product of the strides (320, so 20 ms)."""
        return math.prod(self.conv_stride)

    @property
    def receptive_field(self) -> int:
        """Samples that one frame of the feature encoder sees (400, so 25 ms)."""
        field, step = 1, 1
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            field += (kernel - 1) * step
            step *= stride
        return field

    @property
    def minimum_samples(self) -> int:
        """Shortest waveform that yields one squeezed frame (720 samples, so 45 ms)."""
        return self.receptive_field + (self.squeeze_factor - 1) * self.inputs_to_logits_ratio

    @property
    def has_feature_projection(self) -> bool:
        """The projection from conv_dim[-1] to hidden_size exists only where the two differ."""
        return self.conv_dim[-1] != self.hidden_size

    @property
    def has_masked_spec_embed(self) -> bool:
        """The vector that stands for masked frames exists only where SpecAugment's probabilities ask for it."""
        return self.mask_time_prob > 0 or self.mask_feature_prob > 0

    @property
    def normalizes_positions(self) -> bool:
        """Whether ``encoder.encoder.LayerNorm`` exists: it normalises the relative-position table, not the states."""
        return "layer_norm" in [part.strip() for part in self.norm_rel_ebd.lower().split("|")]

    @property
    def max_relative_distance(self) -> int:
        """Distance, in squeezed frames, at which the log buckets end."""
        return self.max_relative_positions if self.max_relative_positions >= 1 else self.max_position_embeddings

    @property
    def position_span(self) -> int:
        """S: buckets on either side of distance 0; the relative-position table has p = 2·S rows."""
        return self.position_buckets if self.position_buckets > 0 else self.max_relative_distance

    @property
    def uses_c2p(self) -> bool:
        """Whether scores have a content-to-position term."""
        return self.relative_attention and "c2p" in self.pos_att_type

    @property
    def uses_p2c(self) -> bool:
        """Whether scores have a position-to-content term."""
        return self.relative_attention and "p2c" in self.pos_att_type

    @property
    def score_scale(self) -> float:
        """sqrt(e · (1 + number of ``pos_att_type`` terms)), by which every score term is divided.

        The reference counts the terms even where ``relative_attention`` is false and they are absent. It also rounds
        this number to float32; here it is exact, so float64 results differ from transformers' by about 1e-8.
        """
        return math.sqrt(self.head_size * (1 + len(self.pos_att_type)))

    def frames(self, samples: int) -> int:
        """s: frames of the feature encoder for n samples, floor((n - kernel) / stride) + 1 layer after layer.

        0 where the waveform is too short.
        """
        return self.conv_lengths(samples)[-1]

    def conv_lengths(self, samples: int) -> list[int]:
        """Output length of each convolution of the feature encoder for n samples."""
        lengths = []
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            samples = max((samples - kernel) // stride + 1, 0)
            lengths.append(samples)
        return lengths

    def squeezed(self, frames: int) -> int:
        """t: squeezed frames for s frames, floor(s / squeeze_factor)."""
        return frames // self.squeeze_factor

    # ------------------------------------------------------------- config.json

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SEWDConfig:
        """Build from the dictionary of a ``config.json``.

        Missing fields take transformers' defaults, fields this package does not use are kept in ``extra``,
        ``num_labels`` stands in for a missing ``id2label``. Raises ``ValueError`` naming the field.
        """
        values = dict(values)
        model_type = values.pop("model_type", "sew-d")
        if model_type != "sew-d":
            raise ValueError(
                f"config.json: model_type is {model_type!r}, but this package runs 'sew-d' only; "
                "choose a SEW-D checkpoint."
            )
        labels = values.pop("num_labels", None)
        if labels is not None:
            most = MOST["num_labels"]
            fits = _is_int(labels) and 1 <= labels <= most
            _require(fits, "num_labels", repr(labels), f"a whole number of at least 1 and at most {most:,}")
        if labels is not None and "id2label" not in values:
            values["id2label"] = {i: f"LABEL_{i}" for i in range(labels)}
        values.pop("label2id", None)
        values.pop("num_feat_extract_layers", None)
        known = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        extra = {name: values.pop(name) for name in list(values) if name not in known}
        return cls(**values, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The dictionary of a ``config.json`` that transformers reads back, unused fields included."""
        values: dict[str, Any] = {"model_type": "sew-d", **self.extra}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "extra" or (field.name == "attention_head_size" and value is None):
                continue
            values[field.name] = list(value) if isinstance(value, tuple) else value
        values["id2label"] = {str(i): name for i, name in self.id2label.items()}
        values["label2id"] = {name: i for i, name in self.id2label.items()}
        values["num_feat_extract_layers"] = len(self.conv_dim)
        return values


def _coerced(name: str, kind: str, value: Any) -> Any:
    """``value`` as the field's declared type (JSON has lists for tuples and string keys), or a ValueError."""
    if kind == "int":
        _require(_is_int(value), name, repr(value), f"a whole number below {LARGEST:,}")
    elif kind == "int | None":
        _require(value is None or _is_int(value), name, repr(value), f"a whole number below {LARGEST:,} or null")
    elif kind == "float":
        _require(
            isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max,
            name,
            repr(value),
            "a finite number",
        )
    elif kind == "bool":
        _require(isinstance(value, bool), name, repr(value), "true or false")
    elif kind == "str":
        _require(isinstance(value, str), name, repr(value), "a string")
    elif kind == "tuple[int, ...]":
        _require(
            isinstance(value, list | tuple) and all(map(_is_int, value)),
            name,
            repr(value),
            f"a list of whole numbers below {LARGEST:,}",
        )
        value = tuple(value)
    elif kind == "tuple[str, ...]":
        # DeBERTa and fairseq write "p2c|c2p"; transformers writes a list; null means none.
        if isinstance(value, str):
            value = [part.strip() for part in value.split("|") if part.strip()]
        value = () if value is None else value
        _require(
            isinstance(value, list | tuple) and all(isinstance(part, str) for part in value),
            name,
            repr(value),
            "a list of strings",
        )
        value = tuple(value)
    elif kind == "dict[int, str]":
        _require(isinstance(value, Mapping), name, repr(value), "a dictionary from label ids to names")
        try:
            value = {int(key): str(label) for key, label in value.items()}
        except (TypeError, ValueError):
            _require(False, name, repr(value), "a dictionary from label ids to names")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST


def _require(condition: bool, name: str, found: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"config field {name} is {found}; it must be {expected}.")
