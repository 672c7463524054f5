"""Weight files: read tensors by name, bring the names to one form, compare them with what the configuration asks for.

Names differ by age and class: fine-tuned models carry the prefix ``sew_d.``, and the positional convolution's weight
norm is ``weight_g`` / ``weight_v`` or, in newer files, ``parametrizations.weight.original0`` / ``original1``. One form
is used here: no prefix, old names. The comparison is strict: every tensor is used once or named as ignored.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from sewd_np.config import SEWDConfig
from sewd_np.params import Shape, expected_shapes
from sewd_np.torch_pickle import CheckpointError
from sewd_np.torch_zip import describe_file, read_state_dict, widen_bfloat16

Tensors = Mapping[str, np.ndarray]

WEIGHT_NORM_NAMES = {
    "encoder.pos_conv_embed.conv.parametrizations.weight.original0": "encoder.pos_conv_embed.conv.weight_g",
    "encoder.pos_conv_embed.conv.parametrizations.weight.original1": "encoder.pos_conv_embed.conv.weight_v",
}
ARCHITECTURES = {"model": "SEWDModel", "ctc": "SEWDForCTC", "classification": "SEWDForSequenceClassification"}
HEAD_TENSORS = ("lm_head.", "projector.", "classifier.", "layer_weights")
SHOWN = 6  # names of a kind in a message; the counts are always given


# -------------------------------------------------------------------------- reading


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Tensors of one ``.safetensors`` or ``.bin`` file under the file's own names; half precision comes as float32.

    Raises ``CheckpointError`` for a damaged, hostile or foreign file.
    """
    return read_safetensors(path) if path.suffix == ".safetensors" else read_state_dict(path)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file by name; raises ``CheckpointError`` if it is cut short or no such file."""
    if path.stat().st_size == 0:
        raise CheckpointError(
            f"{path}: not a whole safetensors file, for it is empty (0 bytes); download or copy it again."
        )
    try:
        # The library checks the header against the file's length.
        with safe_open(path, framework="np") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
            arrays = {name: file.get_tensor(name) for name, kind in kinds.items() if kind != "BF16"}
    except AttributeError as error:  # of NumPy, which the library asks for the type
        raise CheckpointError(
            f"{path}: holds numbers of a type that NumPy lacks ({error}); save them as float32, float16 or bfloat16."
        ) from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); the file is {path.stat().st_size} bytes long: download "
            f"or copy it again{_foreign(path)}."
        ) from error
    brain_floats = [name for name, kind in kinds.items() if kind == "BF16"]
    arrays.update(_read_bfloat16(path, brain_floats))
    # In the file's order, and half precision widened.
    return {name: _at_least_float32(arrays[name]) for name in kinds}


def _foreign(path: Path) -> str:
    found = describe_file(path)
    return f"; it is {found}" if "text" in found or "zip" in found else ""


def _read_bfloat16(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    """NumPy has no bfloat16, so safetensors cannot hand it over: read those bytes where its header says they are."""
    if not names:
        return {}
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        arrays = {}
        for name in names:
            start, end = header[name]["data_offsets"]
            file.seek(8 + length + start)
            bits = np.frombuffer(file.read(end - start), "<u2").reshape(header[name]["shape"])
            arrays[name] = widen_bfloat16(bits)
    return arrays


def _at_least_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float16 else array


def read_shards(index_path: Path) -> dict[str, np.ndarray]:
    """Tensors of a sharded checkpoint, from its ``*.index.json``: ``weight_map`` says which shard holds which tensor.

    Raises ``CheckpointError`` if the index is malformed, a shard is missing, or a shard lacks a tensor it should hold.
    """
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: no 'weight_map' from tensor names to shard files.")
    for shard in weight_map.values():
        # A shard lies beside its index; a path that leads elsewhere is none.
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(f"{index_path}: {shard!r} is no file name of a shard; download the folder again.")
    shards = dict.fromkeys(weight_map.values())
    missing = [shard for shard in shards if not (index_path.parent / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{index_path}: {listed('shard', missing)} of {len(shards)} missing beside it; download the folder again."
        )
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        for name, tensor in read_weights(index_path.parent / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{index_path}: {shard} holds {name}, which the index does not place there.")
            tensors[name] = tensor
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(f"{index_path}: {listed('tensor', absent)} named by the index but in no shard.")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ``CheckpointError`` if it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{path}: not valid JSON ({error}); correct or download the file again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object ({{...}}), found a {type(values).__name__}.")
    return values


# ---------------------------------------------------------------------------- names


def canonical(tensors: Tensors, path: Path) -> dict[str, np.ndarray]:
    """``tensors`` under this package's names; raises ``CheckpointError`` if two of them are the same one."""
    params: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        renamed = name.removeprefix("sew_d.")
        renamed = WEIGHT_NORM_NAMES.get(renamed, renamed)
        if renamed in params:
            raise CheckpointError(f"{path}: {origin[renamed]} and {name} are the same tensor, {renamed}; expected one.")
        params[renamed], origin[renamed] = tensor, name
    return params


def head_of(params: Tensors) -> str:
    """The head that the tensors themselves speak of."""
    if "lm_head.weight" in params:
        return "ctc"
    return "classification" if "classifier.weight" in params else "model"


def listed(kind: str, names: list[str]) -> str:
    """ "3 tensors (a, b, c)", long lists cut."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {kind}{'s' if len(names) > 1 else ''} ({', '.join(names[:SHOWN])}{more})"


# ----------------------------------------------------------------------- comparison


class Difference(NamedTuple):
    """What separates a file's tensors from the expected ones."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]


def fitted(
    params: Tensors, config: SEWDConfig, head: str, path: Path, stated: Collection[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Exactly the tensors of a model, in the reference's order, contiguous and read-only, and the names left out.

    Left out without complaint: the heads' tensors where the model without head is wanted, and ``masked_spec_embed``
    (training only) where the configuration has no masking. ``stated`` are the fields that ``config.json`` gives: the
    message says which others are defaults. Raises ``CheckpointError`` that lists what is missing, unexpected or
    misshapen and names the configuration fields that the tensors contradict; also for whole-number and for
    non-finite weights.
    """
    expected = expected_shapes(config, head)
    ignored = [name for name in params if name not in expected and _may_be_left_out(name, head)]
    difference = Difference(
        missing=[name for name in expected if name not in params],
        unexpected=[name for name in params if name not in expected and name not in ignored],
        misshapen=[name for name in expected if name in params and params[name].shape != expected[name]],
    )
    if any(difference):
        raise CheckpointError(_explanation(params, config, head, path, stated, expected, difference))
    for name in expected:
        _check_numbers(name, params[name], path)
    fitting = {name: np.ascontiguousarray(params[name]) for name in expected}
    for array in fitting.values():
        array.flags.writeable = False
    return fitting, ignored


def _may_be_left_out(name: str, head: str) -> bool:
    return name == "masked_spec_embed" or (head == "model" and name.startswith(HEAD_TENSORS))


def _check_numbers(name: str, array: np.ndarray, path: Path) -> None:
    if array.dtype.kind != "f":
        raise CheckpointError(f"{path}: {name} holds {array.dtype} numbers; expected floating-point weights.")
    # One sum finds nearly every sound tensor without a mask of its size; it may overflow, so a bad one is counted.
    with np.errstate(all="ignore"):
        if np.isfinite(array.sum()):
            return
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise CheckpointError(
            f"{path}: {name} holds {bad} of {array.size} values that are not finite (NaN or infinity); the weights are "
            "damaged or training diverged."
        )


def _explanation(
    params: Tensors,
    config: SEWDConfig,
    head: str,
    path: Path,
    stated: Collection[str],
    expected: Mapping[str, Shape],
    difference: Difference,
) -> str:
    missing, unexpected, misshapen = difference
    found = head_of(params)
    parts = []
    if missing:
        parts.append(f"{listed('tensor', missing)} missing")
    if unexpected:
        parts.append(f"{listed('tensor', unexpected)} unexpected")
    if misshapen:
        shapes = [f"{name} is {params[name].shape}, expected {expected[name]}" for name in misshapen]
        parts.append(f"{listed('tensor', shapes)} misshapen")
    what = "; ".join(parts)
    if all(name.startswith(HEAD_TENSORS) for name in missing) and missing and head != found:
        kinds = {"model": "a pre-trained model without head", "ctc": "a CTC model", "classification": "a classifier"}
        advice = f"load it as {ARCHITECTURES[found]} or choose another file"
        return f"{path}: this is {kinds[found]}, not {kinds[head]}; {advice}: {what}."
    fields = []
    used = {name: array for name, array in params.items() if name in expected or not _may_be_left_out(name, head)}
    for name, value in implied_fields(used, config).items():
        has = getattr(config, name)
        in_file = name in stated or (name == "num_labels" and "id2label" in stated)
        given = "" if in_file else " (the default, as config.json lacks it)"
        if has != value:
            fields.append(f"{name} is {has}{given}, but the weights say {value}")
    if fields:
        return f"{path}: config and weights disagree: {', '.join(fields)}: {what}."
    return f"{path}: the weights are not those of the config: {what}."


def implied_fields(params: Tensors, config: SEWDConfig) -> dict[str, Any]:
    """Fields of the configuration as the tensors' shapes have them, each read off the one tensor that shows it best.

    Fields that no tensor shows (or whose tensor is absent or of the wrong rank) are left out. ``config`` says how to
    read a table or an absent tensor; stride, activations and the like leave no mark on a shape.
    """

    def size(name: str, axis: int, rank: int) -> int | None:
        array = params.get(name)
        return array.shape[axis] if array is not None and array.ndim == rank else None

    positional, upsample = "encoder.pos_conv_embed.conv", "encoder.upsample.projection"
    hidden = size(f"{positional}.bias", 0, 1)
    grouped, wide = size(f"{positional}.weight_v", 1, 3), size(f"{upsample}.bias", 0, 1)
    convs: list[Shape] = []
    while (conv := params.get(f"feature_extractor.conv_layers.{len(convs)}.conv.weight")) is not None:
        convs.append(conv.shape if conv.ndim == 3 else (0, 0, 0))
    layers = {name.split(".")[3] for name in params if name.startswith("encoder.encoder.layer.")}
    rows = size("encoder.encoder.rel_embeddings.weight", 0, 2)
    position_field = "max_relative_positions" if config.max_relative_positions >= 1 else "max_position_embeddings"
    table_conv = "encoder.encoder.conv.conv.weight"
    kernel, width = size(table_conv, 2, 3) or 0, size(table_conv, 1, 3)
    values: dict[str, Any] = {
        "hidden_size": hidden,
        "vocab_size": size("lm_head.weight", 0, 2),
        "num_hidden_layers": len(layers) or None,
        "intermediate_size": size("encoder.encoder.layer.0.intermediate.dense.weight", 0, 2),
        "squeeze_factor": wide // hidden if wide and hidden else None,
        "num_conv_pos_embeddings": size(f"{positional}.weight_v", 2, 3),
        "num_conv_pos_embedding_groups": hidden // grouped if hidden and grouped else None,
        "conv_dim": tuple(shape[0] for shape in convs) or None,
        "conv_kernel": tuple(shape[2] for shape in convs) or None,
        "conv_bias": "feature_extractor.conv_layers.0.conv.bias" in params if convs else None,
        "relative_attention": rows is not None,
        "position_buckets" if config.position_buckets > 0 else position_field: rows // 2 if rows else None,
        "conv_kernel_size": kernel if kernel or config.conv_kernel_size > 0 else None,
        "conv_groups": hidden // width if hidden and width else None,
        "classifier_proj_size": size("projector.weight", 0, 2),
        "num_labels": size("classifier.weight", 0, 2),
    }
    if len(convs) > 1:
        per_layer = "feature_extractor.conv_layers.1.layer_norm.weight" in params
        values["feat_extract_norm"] = "layer" if per_layer else "group"
    own = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
    kinds = {kind for kind, part in own.items() if f"encoder.encoder.layer.0.attention.self.{part}.weight" in params}
    if config.uses_c2p or config.uses_p2c:
        values["share_att_key"] = not kinds
    if kinds and kinds != set(config.pos_att_type):
        values["pos_att_type"] = tuple(sorted(kinds))
    if ("encoder.encoder.LayerNorm.weight" in params) != config.normalizes_positions:
        values["norm_rel_ebd"] = "none" if config.normalizes_positions else "layer_norm"
    if "projector.weight" in params:
        values["use_weighted_layer_sum"] = "layer_weights" in params
    if config.has_masked_spec_embed and "masked_spec_embed" not in params:
        values["mask_time_prob"] = 0.0
    return {name: value for name, value in values.items() if value is not None}
