"""The zip files of ``torch.save`` (``pytorch_model.bin``, fairseq's ``.pt``) read without PyTorch.

``NAME/data.pkl`` describes the objects (``torch_pickle`` interprets it), ``NAME/data/KEY`` holds the raw
numbers of one storage, ``NAME/byteorder`` says "little" or "big" (absent: little). Only storages that a
wanted tensor uses are read; tensors that share a storage share it here too.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sewd_np.torch_pickle import STORAGE_DTYPES, CheckpointError, Storage, Window, describe, interpret


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Tensors by name of a ``.bin`` that holds a state dict; all read-only, float16 and bfloat16 as float32.

    Raises ``CheckpointError`` if the file is no zip of ``torch.save``, is damaged, names any global that
    tensors do not need (nothing of it runs), or holds anything but tensors.
    """
    path = Path(path)
    with _open(path) as archive:
        content = interpret(_member(archive, path, "data.pkl"), path, keep_unknown=False)
        return _tensors(archive, path, content, "the file")


def read_fairseq_file(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors of the ``model`` entry of a fairseq ``.pt``, and its other entries (unknown: ``Record``s).

    Tensors outside ``model`` (an optimizer's state) stay unread ``Window``s. Raises ``CheckpointError`` as
    ``read_state_dict`` does, except for unknown globals outside ``model``.
    """
    path = Path(path)
    with _open(path) as archive:
        content = interpret(_member(archive, path, "data.pkl"), path, keep_unknown=True)
        if not isinstance(content, dict) or "model" not in content:
            raise CheckpointError(
                f"{path}: this .pt has no 'model' entry, so it is no fairseq checkpoint; if it is a plain "
                "state dict, name it pytorch_model.bin and put its config.json beside it."
            )
        tensors = _tensors(archive, path, content["model"], "the 'model' entry")
        return tensors, {key: value for key, value in content.items() if key != "model"}


def describe_file(path: Path) -> str:
    """In a few words, what a file that should hold weights really is."""
    with path.open("rb") as file:
        head = file.read(512)
    again = "load it in PyTorch and save it again with torch.save"
    if not head:
        return "an empty file"
    if head.startswith(b"PK"):
        return "a zip whose end is missing or damaged: probably cut short, so download or copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (a text file), not the weights: fetch the real file with 'git lfs pull'"
    if head[257:262] == b"ustar":
        return f"a tar file, PyTorch's legacy format of before 0.1.11: {again}"
    if head.startswith(b"\x80") and b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" in head[:32]:
        return f"in PyTorch's legacy format of before 1.6: {again}"
    if head[8:9] == b"{":
        return "laid out like safetensors: if it is that, name it model.safetensors"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return "a text file, not weights: perhaps an error page saved by a failed download"
    return "in no format known here"


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 numbers from bfloat16 given as uint16, exactly: a bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _open(path: Path) -> zipfile.ZipFile:
    path.open("rb").close()  # a file that is absent or may not be read says so itself; what follows is damage
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, RuntimeError, ValueError, OSError, struct.error) as error:
        raise CheckpointError(f"{path}: expected a zip of torch.save, but this is {describe_file(path)}.") from error


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> bytes:
    """The bytes of NAME/``name``; zipfile checks their checksum."""
    entries = archive.namelist()
    pickles = [entry for entry in entries if entry.count("/") == 1 and entry.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: a zip without one data.pkl, so torch.save did not write it.")
    root = pickles[0].split("/")[0]
    if f"{root}/constants.pkl" in entries:
        raise CheckpointError(f"{path}: a TorchScript program; save model.state_dict() from PyTorch instead.")
    try:
        entry = archive.getinfo(f"{root}/{name}")
    except KeyError:
        raise CheckpointError(f"{path}: {name} is missing; download or copy the file again.") from None
    if entry.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{path}: {name} is compressed, as torch.save never does; it is refused.")
    try:
        return archive.read(entry)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, ValueError, OSError, EOFError, struct.error) as error:
        message = f"{path}: {name} is damaged ({error}); download or copy the file again."
        raise CheckpointError(message) from error


def _tensors(archive: zipfile.ZipFile, path: Path, content: Any, where: str) -> dict[str, np.ndarray]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: {where} is {describe(content)}, not a dictionary of tensors.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Window):
            raise CheckpointError(
                f"{path}: {where} must hold tensors only, but {name!r} is {describe(value)}; it is refused."
            )
    has_byteorder = any(entry.endswith("/byteorder") for entry in archive.namelist())
    big_endian = has_byteorder and _member(archive, path, "byteorder").strip() == b"big"
    storages: dict[str, tuple[Storage, np.ndarray]] = {}
    arrays = {}
    for name, window in content.items():
        key = window.storage.key
        if key not in storages:
            storages[key] = (window.storage, _numbers(archive, path, window.storage, big_endian))
        storage, numbers = storages[key]
        if storage != window.storage:
            raise CheckpointError(f"{path}: storage {key} is described in two ways; the file is refused.")
        arrays[name] = _view(numbers, window)
    return arrays


def _numbers(archive: zipfile.ZipFile, path: Path, storage: Storage, big_endian: bool) -> np.ndarray:
    dtype = np.dtype(STORAGE_DTYPES[storage.kind])
    raw = _member(archive, path, f"data/{storage.key}")
    if len(raw) != storage.count * dtype.itemsize:
        raise CheckpointError(
            f"{path}: storage {storage.key} has {len(raw)} bytes, but its {storage.count} numbers "
            f"({storage.kind}) need {storage.count * dtype.itemsize}; download or copy the file again."
        )
    numbers = np.frombuffer(raw, dtype.newbyteorder(">" if big_endian else "<")).astype(dtype, copy=False)
    if storage.kind == "BFloat16Storage":
        numbers = widen_bfloat16(numbers)
    elif storage.kind == "HalfStorage":
        numbers = numbers.astype(np.float32)
    numbers.flags.writeable = False
    return numbers


def _view(numbers: np.ndarray, window: Window) -> np.ndarray:
    if 0 in window.size:
        return np.zeros(window.size, numbers.dtype)
    # numpy too refuses a window that reaches beyond its buffer: a second guard behind interpret's own check.
    width = numbers.dtype.itemsize
    strides = [stride * width for stride in window.stride]
    return np.ndarray(window.size, numbers.dtype, numbers, window.offset * width, strides)
