"""Original fairseq checkpoints (``.pt``): their tensor names, configuration and dictionary in this package's terms.

The original code (asappresearch/sew) trains in fairseq. Its files hold the tensors under ``model``, and what
the model was built with under ``cfg`` (nested dictionaries) or, in older ones, ``args`` (an
``argparse.Namespace``). A fine-tuned file wraps the pre-trained model, in names (``w2v_encoder.w2v_model.``)
and in configuration (``w2v_args``). Names follow transformers' conversion script for SEW-D, but as whole
paths, never as substrings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sewd_np.torch_pickle import CheckpointError, Record
from sewd_np.torch_zip import read_fairseq_file

PUBLISHED_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")

_FINE_TUNED = "w2v_encoder.w2v_model."
# Heads of the pre-training task. input_quantizer and project_inp are not among them: they change the
# features.
_PRETRAINING_HEADS = ("quantizer", "project_q", "final_proj", "target_glu")
_CONV = r"feature_extractor\.conv_layers\.(\d+)"
# Patterns match the whole path. In layer mode the norm sits one level deeper, between two transpositions.
_NAMES = (
    (r"mask_emb", r"masked_spec_embed"),
    (rf"{_CONV}\.0\.(weight|bias)", r"feature_extractor.conv_layers.\1.conv.\2"),
    (rf"{_CONV}\.2(?:\.1)?\.(weight|bias)", r"feature_extractor.conv_layers.\1.layer_norm.\2"),
    (r"post_extract_proj\.(weight|bias)", r"feature_projection.\1"),
    (r"encoder\.pos_conv\.0\.(.+)", r"encoder.pos_conv_embed.conv.\1"),
    (r"encoder\.upsample\.0\.(weight|bias)", r"encoder.upsample.projection.\1"),
)
# Our field, fairseq's field, fairseq's default (sew_asapp: SqueezeWav2Vec2DebertaConfig).
_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("hidden_size", "encoder_embed_dim", 768),
    ("num_hidden_layers", "encoder_layers", 12),
    ("num_attention_heads", "encoder_attention_heads", 12),
    ("intermediate_size", "encoder_ffn_embed_dim", 3072),
    ("hidden_act", "activation_fn", "gelu"),
    ("conv_bias", "conv_bias", False),
    ("num_conv_pos_embeddings", "conv_pos", 128),
    ("num_conv_pos_embedding_groups", "conv_pos_groups", 16),
    ("squeeze_factor", "squeeze_factor", 2),
    ("max_position_embeddings", "max_position_embeddings", 512),
    ("max_relative_positions", "max_relative_positions", -1),
    ("position_buckets", "position_buckets", 256),
    ("share_att_key", "share_att_key", True),
    ("relative_attention", "relative_attention", True),
    ("pos_att_type", "pos_att_type", "p2c|c2p"),
    ("norm_rel_ebd", "norm_rel_ebd", "layer_norm"),
    ("initializer_range", "initializer_range", 0.02),
)
# Training options, which fine-tuning sets anew on the wrapping configuration.
_TRAINING_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("hidden_dropout", "dropout", 0.1),
    ("activation_dropout", "activation_dropout", 0.0),
    ("attention_dropout", "attention_dropout", 0.1),
    ("feat_proj_dropout", "dropout_input", 0.0),
    ("final_dropout", "final_dropout", 0.0),
    ("mask_time_prob", "mask_prob", 0.65),
    ("mask_time_length", "mask_length", 10),
    ("mask_feature_prob", "mask_channel_prob", 0.0),
    ("mask_feature_length", "mask_channel_length", 10),
)
# Options of the original code that change the computation in ways SEW-D, as published, never uses.
_ONLY_VALUES = (("squeeze_method", "default"), ("fbank_dim", 0), ("mfcc_dim", 0), ("spec_feature_only", False))
_DEFAULT_CONV_LAYERS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]"


class FairseqCheckpoint(NamedTuple):
    """``params`` by canonical name; ``ignored`` names, as in the file; ``entries`` outside ``model``."""

    params: dict[str, np.ndarray]
    ignored: tuple[str, ...]
    entries: dict[str, Any]
    fine_tuned: bool


def read_fairseq(path: str | Path) -> FairseqCheckpoint:
    """Read a fairseq ``.pt`` and rename its tensors; raises ``CheckpointError`` as ``read_fairseq_file`` does.

    A name that no rule knows is kept as it is, so that the comparison with the expected tensors reports it.
    """
    tensors, entries = read_fairseq_file(path)
    params: dict[str, np.ndarray] = {}
    ignored = []
    for name, tensor in tensors.items():
        inner = name.removeprefix(_FINE_TUNED)
        if inner.split(".")[0] in _PRETRAINING_HEADS:
            ignored.append(name)
            continue
        renamed = canonical_name(name)
        if renamed in params:
            raise CheckpointError(f"{path}: two tensors of the 'model' entry are both {renamed} (one is {name}).")
        params[renamed] = tensor
    fine_tuned = any(name.startswith("w2v_encoder.") for name in tensors)
    return FairseqCheckpoint(params, tuple(ignored), entries, fine_tuned)


def canonical_name(name: str) -> str:
    """This package's name for a fairseq tensor, or the name itself where no rule fits the whole path."""
    head = re.fullmatch(r"w2v_encoder\.proj\.(weight|bias)", name)
    if head:
        return f"lm_head.{head[1]}"
    inner = name.removeprefix(_FINE_TUNED)
    for pattern, replacement in _NAMES:
        if match := re.fullmatch(pattern, inner):
            return match.expand(replacement)
    return inner


# ---------------------------------------------------------------------- configuration


def config_from(checkpoint: FairseqCheckpoint, path: str | Path) -> dict[str, Any]:
    """The dictionary of a ``config.json`` from the file's own ``cfg`` or ``args``; absent fields: fairseq's defaults.

    Raises ``CheckpointError`` if neither is there, if a fine-tuned file does not say what it wraps, or if an
    option is set that SEW-D as published does not have.
    """
    outer, inner = _model_options(checkpoint, path)
    for name, only in _ONLY_VALUES:
        value = entry(inner, name, only)
        # An unresolved reference such as "${task.fbank_dim}" stands for the task's default, 0.
        if value != only and not (isinstance(value, str) and value.startswith("${")):
            raise CheckpointError(f"{path}: option {name} is {value!r}, but SEW-D is only known with {only!r}.")
    try:
        layers = parse_conv_layers(entry(inner, "conv_feature_layers", _DEFAULT_CONV_LAYERS))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    values = {ours: entry(inner, theirs, default) for ours, theirs, default in _FIELDS}
    values.update((ours, entry(outer, theirs, default)) for ours, theirs, default in _TRAINING_FIELDS)
    for name in ("mask_time_prob", "mask_feature_prob"):
        if not isinstance(values[name], int | float):
            raise CheckpointError(f"{path}: {name} is {values[name]!r}; expected a number.")
    mode = entry(inner, "extractor_mode", "default")
    if mode not in ("default", "layer_norm"):
        raise CheckpointError(f"{path}: extractor_mode is {mode!r}; expected 'default' or 'layer_norm'.")
    values.update(
        model_type="sew-d",
        architectures=["SEWDForCTC" if checkpoint.fine_tuned else "SEWDModel"],
        conv_dim=[channels for channels, _, _ in layers],
        conv_kernel=[kernel for _, kernel, _ in layers],
        conv_stride=[stride for _, _, stride in layers],
        feat_extract_activation="gelu",
        feat_extract_norm="layer" if mode == "layer_norm" else "group",
        # The original hands these two to DeBERTa and to torch as constants.
        layer_norm_eps=1e-7,
        feature_layer_norm_eps=1e-5,
        apply_spec_augment=values["mask_time_prob"] > 0 or values["mask_feature_prob"] > 0,
    )
    return values


def _model_options(checkpoint: FairseqCheckpoint, path: str | Path) -> tuple[Any, Any]:
    """The model's options (outer) and, for a fine-tuned file, those of the model it wraps (inner)."""
    cfg, args = checkpoint.entries.get("cfg"), checkpoint.entries.get("args")
    outer = entry(cfg, "model", None) if cfg is not None else args
    if outer is None:
        raise CheckpointError(
            f"{path}: the file has neither 'cfg' nor 'args' to say how the model was built; put its "
            "config.json beside it."
        )
    if not checkpoint.fine_tuned:
        return outer, outer
    wrapped = entry(outer, "w2v_args", None)
    if wrapped is None:
        raise CheckpointError(
            f"{path}: a fine-tuned file whose w2v_args are absent, so the pre-trained model's options are unknown; "
            "put its config.json beside it."
        )
    # A dictionary of sections in newer files, the flat arguments of the command line in older ones.
    return outer, entry(wrapped, "model", wrapped)


def entry(container: Any, name: str, default: Any) -> Any:
    """One option of a ``cfg`` or ``args``: a dictionary, or the record of a Namespace or of an OmegaConf node."""
    options: Any = container
    if isinstance(container, Record):
        state = container.state[0] if isinstance(container.state, tuple) and container.state else container.state
        options = state.get("_content", state) if isinstance(state, dict) else container.pairs
    if not isinstance(options, dict):
        return default
    value = options.get(name, default)
    if isinstance(value, Record):
        state = value.state
        if isinstance(state, dict) and "_val" in state:  # OmegaConf wraps each value in a node
            value = state["_val"]
        if isinstance(value, Record) and len(value.args) == 1:  # an enum's member is its class and its value
            value = value.args[0]
    return value


def parse_conv_layers(text: Any) -> list[tuple[int, int, int]]:
    """(channels, kernel, stride) of each convolution from fairseq's text, e.g. ``[(512, 10, 5)] + [(512, 3, 2)] * 4``.

    fairseq evaluates this text as Python. Here it is parsed: whole numbers, tuples and lists, joined by ``+``
    and repeated by ``*``. Raises ``CheckpointError`` for anything else.
    """
    parser = _ConvLayers(text)
    layers = parser.sum()
    if parser.tokens or not isinstance(layers, list | tuple):
        raise parser.error()
    for layer in layers:
        if not isinstance(layer, list | tuple) or len(layer) != 3:
            raise parser.error()
        if not all(isinstance(number, int) and number > 0 for number in layer):
            raise parser.error()
    return [tuple(layer) for layer in layers]


class _ConvLayers:
    """sum: product ("+" product)*; product: atom ("*" atom)*; atom: number, (sum, ...) or [sum, ...]."""

    LONGEST = 1000  # characters of text
    LARGEST = 100_000  # number, or length of a list: repetition must not fill the memory
    DEEPEST = 8  # brackets inside brackets

    def __init__(self, text: Any) -> None:
        self.text = text
        if not isinstance(text, str) or len(text) > self.LONGEST or re.search(r"[^0-9\s()\[\],+*]|\d{7}", text):
            raise self.error()
        self.tokens = re.findall(r"[0-9]+|\S", text)
        self.depth = 0

    def error(self) -> CheckpointError:
        shown = repr(self.text[:80]) if isinstance(self.text, str) else f"a {type(self.text).__name__}"
        return CheckpointError(
            f"conv_feature_layers is {shown}; expected lists of (channels, kernel, stride) joined by + and *, "
            "such as [(64, 10, 5)] + [(128, 3, 2), (128, 1, 1)] * 2."
        )

    def next_is(self, token: str) -> bool:
        """Whether the next token is ``token``, which is then taken."""
        found = bool(self.tokens) and self.tokens[0] == token
        if found:
            self.tokens.pop(0)
        return found

    def sum(self) -> Any:
        total = self.product()
        while self.next_is("+"):
            addend = self.product()
            if type(total) is not type(addend) or self.size(total) + self.size(addend) > self.LARGEST:
                raise self.error()
            total = total + addend
        return total

    def product(self) -> Any:
        result = self.atom()
        while self.next_is("*"):
            factor = self.atom()
            count, repeated = (result, factor) if isinstance(result, int) else (factor, result)
            if not isinstance(count, int) or count * self.size(repeated) > self.LARGEST:
                raise self.error()
            result = count * repeated
        return result

    def atom(self) -> Any:
        if self.tokens and self.tokens[0].isdigit():
            return int(self.tokens.pop(0))
        opening = self.tokens.pop(0) if self.tokens else ""
        closing = {"(": ")", "[": "]"}.get(opening)
        self.depth += 1
        if closing is None or self.depth > self.DEEPEST:
            raise self.error()
        items, comma = [], True
        while not self.next_is(closing):
            if not comma:
                raise self.error()
            items.append(self.sum())
            comma = self.next_is(",")
        self.depth -= 1
        if opening == "[":
            return items
        return items[0] if len(items) == 1 and not comma else tuple(items)

    @staticmethod
    def size(value: Any) -> int:
        return value if isinstance(value, int) else len(value)


# ------------------------------------------------------------------------- vocabulary


def read_dictionary(path: str | Path) -> dict[str, int]:
    """Token ids from fairseq's ``dict.ltr.txt``: one ``token count`` a line, after four special tokens.

    fairseq numbers ``<s> <pad> </s> <unk>`` 0 to 3 and lets ``<s>`` be the CTC blank; transformers names the
    blank ``<pad>``. So the two swap names, and the head's rows stay where they are: pad 0, bos 1, eos 2, unk
    3.
    """
    tokens = ["<pad>", "<s>", "</s>", "<unk>"]
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not UTF-8 text; expected lines of 'token count'.") from None
    for number, line in enumerate(lines, 1):
        token, _, count = line.rstrip("\r").removesuffix(" #fairseq:overwrite").rpartition(" ")
        if not token or not count.lstrip("-").isdigit():
            raise CheckpointError(f"{path}: line {number} is {line[:40]!r}; expected a token, a space and its count.")
        if token in tokens:
            raise CheckpointError(f"{path}: line {number} gives token {token!r} a second time.")
        tokens.append(token)
    return {token: i for i, token in enumerate(tokens)}


def published_vocabulary() -> dict[str, int]:
    """The 32 tokens of every published SEW-D CTC model: pad (the blank) 0, then bos, eos, unk, ``|`` and letters."""
    return {token: i for i, token in enumerate(PUBLISHED_TOKENS)}
