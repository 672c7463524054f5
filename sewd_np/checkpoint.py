"""Checkpoints: find one, read it whole, check it strictly, build a model from it, write one that transformers reads.

A source is, in this order, the name of a bundled model ("an4"), a folder, one weights file, or a hub id
("asapp/sew-d-tiny-100k-ft-ls100h"). A folder holds ``config.json`` and, in order of preference, ``model.safetensors``,
a sharded ``model.safetensors.index.json``, ``pytorch_model.bin`` or its sharded index. A fairseq ``.pt`` brings its own
configuration. Nothing is guessed: what does not fit is an error that says what was found and what to do.

One field of ``config.json`` is this package's own: ``shared_encoder`` names a source whose encoder the folder's few
tensors belong to. The bundled classifier is such a head on the bundled recogniser; written out, it is whole again.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from sewd_np.config import SEWDConfig
from sewd_np.fairseq import config_from, published_vocabulary, read_dictionary, read_fairseq
from sewd_np.params import HEADS
from sewd_np.torch_pickle import CheckpointError
from sewd_np.weights import (
    ARCHITECTURES,
    HEAD_TENSORS,
    WEIGHT_NORM_NAMES,
    canonical,
    fitted,
    head_of,
    read_json,
    read_shards,
    read_weights,
)

if TYPE_CHECKING:
    from sewd_np.model import SEWDModel

__all__ = ["Checkpoint", "CheckpointError", "load_model", "read_checkpoint", "save_pretrained"]

ASSETS = Path(__file__).parent / "assets"
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Small files beside the weights; all but the first may be absent.
SIDE_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
# What the published repositories say, and so what holds where a file says nothing.
PREPROCESSOR = {
    "do_normalize": True,
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "feature_size": 1,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
    "sampling_rate": 16000,
}
TOKENIZER = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "word_delimiter_token": "|",
    "do_lower_case": False,
    "tokenizer_class": "Wav2Vec2CTCTokenizer",
}


class Checkpoint(NamedTuple):
    """A checkpoint as read: everything a model needs, checked, and nothing built yet.

    ``params`` are read-only arrays under the reference's names without ``sew_d.``; ``head`` is "model", "ctc" or
    "classification"; ``vocab`` is None where the checkpoint has none; ``ignored`` names the file's tensors that no
    model of this head uses.
    """

    config: SEWDConfig
    params: dict[str, np.ndarray]
    head: str
    preprocessor: dict[str, Any]
    tokenizer: dict[str, Any]
    vocab: dict[str, int] | None
    folder: Path | None
    ignored: tuple[str, ...]


def read_checkpoint(source: str | Path, head: str | None = None) -> Checkpoint:
    """Read a checkpoint; ``head`` None takes the checkpoint's own (its ``architectures``, else its tensors).

    Raises ``CheckpointError`` for whatever is missing, damaged, hostile or contradictory, a source that is nowhere
    included; ``ValueError`` for an unknown ``head``.
    """
    if head is not None and head not in HEADS:
        raise ValueError(f"head is {head!r}; it must be one of {', '.join(HEADS)}.")
    path = find(source)
    if path.is_file() and path.suffix in (".pt", ".pth"):
        return _read_fairseq(path, head)
    weights = path if path.is_file() else _weights_in(path)
    folder = weights.parent
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{folder}: no config.json there; a SEW-D checkpoint needs one beside its weights.")
    values = read_json(config_path)
    shared = values.pop("shared_encoder", None)
    config = _config(values, config_path)
    tensors = read_shards(weights) if weights.name.endswith(".index.json") else read_weights(weights)
    params = canonical(tensors, weights)
    if shared is not None:
        params = {**_encoder_of(shared, config_path), **params}
    head = head or _own_head(config, params)
    fitting, ignored = fitted(params, config, head, weights, values)
    vocab = _vocabulary(folder, config.vocab_size) if head == "ctc" else None
    names = tuple(ignored)
    return Checkpoint(config, fitting, head, _preprocessor(folder), _tokenizer(folder), vocab, folder, names)


def _encoder_of(source: Any, config_path: Path) -> dict[str, np.ndarray]:
    """The encoder's tensors of the checkpoint that a ``shared_encoder`` names; what does not fit is refused later."""
    if not isinstance(source, str):
        raise CheckpointError(f"{config_path}: shared_encoder is {source!r}; it must be the name of a model.")
    path = find(source)
    config = (path if path.is_dir() else path.parent) / "config.json"
    if config.is_file() and "shared_encoder" in read_json(config):
        raise CheckpointError(f"{config_path}: shared_encoder is {source!r}, which shares an encoder itself.")
    return read_checkpoint(source, "model").params


def load_model(
    source: str | Path,
    cls: type[SEWDModel] | None = None,
    backend: str | None = None,
    dtype: Any = np.float32,
    threads: int | None = None,
    precision: str | None = None,
) -> Any:
    """A model of class ``cls`` (None: the checkpoint's own) on a backend, computing in ``dtype``.

    ``backend`` None is "numba" for float32 and "numpy", the definition, for float64, which it alone computes in.
    ``threads`` and ``precision`` are for "numba" (``backend.get_operations``). A model without head leaves a fine-tuned
    checkpoint's head unused; the other way round is an error. Raises ``CheckpointError`` as ``read_checkpoint`` does,
    ``ValueError`` for a backend, dtype, number of threads or precision that cannot be.
    """
    from sewd_np import model
    from sewd_np.backend import get_operations
    from sewd_np.processor import Processor

    ops = get_operations(backend, dtype, threads, precision)
    checkpoint = read_checkpoint(source, None if cls is None else cls.head)
    if cls is None:
        cls = getattr(model, ARCHITECTURES[checkpoint.head])
    processor = Processor.from_files(checkpoint.preprocessor, checkpoint.tokenizer, checkpoint.vocab)
    params = {name: _cast(array, name, dtype, source) for name, array in checkpoint.params.items()}
    return cls(checkpoint.config, params, ops, processor)


def _cast(array: np.ndarray, name: str, dtype: Any, source: str | Path) -> np.ndarray:
    """``array`` in the numbers that the model computes in; float64 weights may be too large for float32."""
    if array.dtype.itemsize > np.dtype(dtype).itemsize and np.abs(array).max(initial=0) > np.finfo(dtype).max:
        raise CheckpointError(
            f"{source}: {name} holds numbers too large for {np.dtype(dtype)}; load it with dtype='float64'."
        )
    return array.astype(dtype, copy=False)


# --------------------------------------------------------------------------- finding


def find(source: str | Path) -> Path:
    """The folder or file that a source names; a hub id is downloaded, or taken from the hub's cache, first."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"the model is {source!r}; it must be a bundled name, a folder, a weights file or a hub id.")
    name = os.fspath(source)
    if isinstance(source, str) and re.fullmatch(r"[\w-]+", name) and (ASSETS / name / "config.json").is_file():
        return ASSETS / name
    path = Path(os.path.expanduser(name))  # leaves an unknown ~user as it is, where pathlib raises RuntimeError
    if name and path.is_dir():
        return path
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            raise CheckpointError(f"{path}: not a weights file; expected .safetensors, .bin or a fairseq .pt.")
        return path
    looks_like_path = isinstance(source, Path) or path.is_absolute() or name.startswith((".", "~"))
    if looks_like_path or path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".json"):
        raise CheckpointError(f"{name}: no such file or folder.")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", name) or "--" in name or ".." in name:
        bundled = ", ".join(sorted(config.parent.name for config in ASSETS.glob("*/config.json")))
        raise CheckpointError(
            f"{name!r} is no bundled model ({bundled}), no existing folder or file, and no hub id, which has the form "
            "owner/name."
        )
    return _from_hub(name)


def _from_hub(repository: str) -> Path:
    """The hub's local copy of a repository, with only the files that are read here; offline, what the cache holds."""
    folder = _snapshot(repository, [*SIDE_FILES, *SAFETENSORS, "model-*-of-*.safetensors"])
    if not any((folder / name).is_file() for name in SAFETENSORS):
        folder = _snapshot(repository, [*SIDE_FILES, *PICKLES, "pytorch_model-*-of-*.bin"])
    return folder


def _snapshot(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        # Shows its own progress bars, and falls back to its cache where the hub cannot be reached.
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository}: the hub has no such repository, or it is private or gated; check the name, or log in with "
            "'hf auth login'."
        ) from error
    except LocalEntryNotFoundError as error:
        # Offline, newer versions name a copy that lacks some of the patterns' files: it may hold all that is needed.
        incomplete = getattr(error, "snapshot_path", None)
        if incomplete is not None:
            return Path(incomplete)
        raise CheckpointError(
            f"{repository}: the hub cannot be reached and its cache on this machine does not hold this repository; "
            "connect once to download it, check the name, or give a folder."
        ) from error
    except Exception as error:  # its HTTP library, and so its exceptions, differ between versions
        first_line = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{repository}: the hub refused ({type(error).__name__}: {first_line}).") from error


def _weights_in(folder: Path) -> Path:
    for name in (*SAFETENSORS, *PICKLES):
        if (folder / name).is_file():
            return folder / name
    originals = sorted(path.name for path in folder.glob("*.pt"))
    hint = f"; to read the fairseq file there, give its path: {folder / originals[0]}" if originals else ""
    raise CheckpointError(f"{folder}: no weights there; expected model.safetensors or pytorch_model.bin{hint}.")


# --------------------------------------------------------------------- parts of a checkpoint


def _config(values: dict[str, Any], path: Path) -> SEWDConfig:
    try:
        return SEWDConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _own_head(config: SEWDConfig, params: dict[str, np.ndarray]) -> str:
    heads = {architecture: head for head, architecture in ARCHITECTURES.items()}
    return next((heads[name] for name in config.architectures if name in heads), head_of(params))


def _read_fairseq(path: Path, head: str | None) -> Checkpoint:
    """A fairseq ``.pt``; a ``config.json`` or ``dict.ltr.txt`` beside it wins over what the file says itself."""
    original = read_fairseq(path)
    params = canonical(original.params, path)
    folder, config_path = path.parent, path.parent / "config.json"
    own_config = not config_path.is_file()
    values = config_from(original, path) if own_config else read_json(config_path)
    vocab = None
    head_weight = params.get("lm_head.weight")
    rows = len(head_weight) if head_weight is not None and head_weight.ndim else None
    if rows is not None and head in (None, "ctc"):
        if (folder / "dict.ltr.txt").is_file():
            vocab, origin = read_dictionary(folder / "dict.ltr.txt"), "dict.ltr.txt"
        elif not own_config and (folder / "vocab.json").is_file():
            vocab, origin = _vocabulary(folder, rows) or {}, "vocab.json"
        else:
            vocab, origin = published_vocabulary(), "the published vocabulary (no dict.ltr.txt lies beside the file)"
        if len(vocab) != rows:
            raise CheckpointError(
                f"{path}: the CTC head has {rows} outputs but {origin} has {len(vocab)} tokens, the four special ones "
                "included; put the dict.ltr.txt of its training beside it."
            )
        if own_config:
            values["vocab_size"] = rows
    config = _config(values, path if own_config else config_path)
    head = head or _own_head(config, params)
    fitting, ignored = fitted(params, config, head, path, values)
    preprocessor = _preprocessor(folder)
    if own_config and not (folder / "preprocessor_config.json").is_file():
        # As transformers' conversion has it: layer mode was trained with masks.
        preprocessor["return_attention_mask"] = config.feat_extract_norm == "layer"
    names = (*original.ignored, *ignored)
    return Checkpoint(config, fitting, head, preprocessor, _tokenizer(folder), vocab, folder, names)


def _preprocessor(folder: Path) -> dict[str, Any]:
    if (folder / "preprocessor_config.json").is_file():
        return {**PREPROCESSOR, **read_json(folder / "preprocessor_config.json")}
    if (folder / "processor_config.json").is_file():  # where newer transformers put it
        inner = read_json(folder / "processor_config.json").get("feature_extractor", {})
        if not isinstance(inner, dict):
            raise CheckpointError(f"{folder / 'processor_config.json'}: feature_extractor is {inner!r}, not an object.")
        return {**PREPROCESSOR, **inner}
    return dict(PREPROCESSOR)


def _tokenizer(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` over ``special_tokens_map.json`` over the published values; tokens as strings."""
    values: dict[str, Any] = dict(TOKENIZER)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            values.update(read_json(folder / name))
    for key, value in values.items():
        if key.endswith("_token") and isinstance(value, dict):
            values[key] = value.get("content")
    return values


def _vocabulary(folder: Path, size: int) -> dict[str, int] | None:
    """Token ids from ``vocab.json``, with ``added_tokens.json`` where only both together name every output.

    Fine-tunes made with letters only keep ``<s>`` and ``</s>`` there: some count them among the outputs, some not.
    """
    path = folder / "vocab.json"
    if not path.is_file():
        return None
    vocab, added = read_json(path), {}
    if len(vocab) < size and (folder / "added_tokens.json").is_file():
        added = read_json(folder / "added_tokens.json")
    tokens = {**vocab, **added}
    for token, i in tokens.items():
        if not isinstance(i, int) or isinstance(i, bool):
            raise CheckpointError(f"{path}: token {token!r} has id {i!r}; expected a whole number.")
    if sorted(tokens.values()) != list(range(size)):
        raise CheckpointError(
            f"{path}: {len(tokens)} entries with ids {min(tokens.values(), default=0)} to "
            f"{max(tokens.values(), default=0)}, but vocab_size is {size}; expected every id from 0 to {size - 1} once."
        )
    return tokens


# ---------------------------------------------------------------------------- writing


def save_pretrained(model: SEWDModel, folder: str | Path) -> None:
    """Write ``model`` as a folder that transformers and this package load back to equal logits.

    ``config.json``, ``model.safetensors`` (names and precision as transformers 5.23 would write them) and, where the
    model has a processor, its files. All is written aside first and moved into place whole, over files of the same
    names. Raises ``CheckpointError`` if ``folder`` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: this is a file; give the path of a folder to save into.")
    values = model.config.to_dict()
    # Half precision is widened on reading: the source's own dtype would make transformers narrow it again.
    values.pop("torch_dtype", None)
    values["dtype"] = next(iter(model.params.values())).dtype.name
    values["architectures"] = [ARCHITECTURES[model.head]]
    files: dict[str, dict[str, Any]] = {"config.json": values}
    if model.processor is not None:
        preprocessor, tokenizer, vocab = model.processor.to_files()
        files["preprocessor_config.json"] = {**preprocessor, "processor_class": "Wav2Vec2Processor"}
        if vocab:
            files["tokenizer_config.json"] = {"tokenizer_class": "Wav2Vec2CTCTokenizer", **tokenizer}
            files["vocab.json"] = vocab
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        for name, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            Path(scratch, name).write_text(text, encoding="utf-8")
        # safetensors writes the bytes as they lie in memory, so strided arrays are made contiguous.
        tensors = {_saved_name(name, model.head): np.ascontiguousarray(a) for name, a in model.params.items()}
        save_file(tensors, Path(scratch, "model.safetensors"), metadata={"format": "pt"})
        for name in ("model.safetensors", *files):
            os.replace(Path(scratch, name), folder / name)


def _saved_name(name: str, head: str) -> str:
    """The name transformers gives a tensor: prefixed inside a model with a head, weight norm under its new names."""
    new_names = {old: new for new, old in WEIGHT_NORM_NAMES.items()}
    prefix = "" if head == "model" or name.startswith(HEAD_TENSORS) else "sew_d."
    return prefix + new_names.get(name, name)
