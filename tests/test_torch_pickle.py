"""Reading torch.save's files without torch: equal arrays for honest files, a refusal and no side effect for others."""

from __future__ import annotations

import argparse
import datetime
import io
import os
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sewd_np.torch_pickle import CheckpointError, Global, Record, Window, interpret
from sewd_np.torch_zip import read_fairseq_file, read_state_dict

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def saved(tmp_path: Path, content: Any, name: str = "pytorch_model.bin", **options: Any) -> Path:
    path = tmp_path / name
    torch.save(content, path, **options)
    return path


def zipped(tmp_path: Path, pickled: bytes, storages: dict[str, bytes] | None = None, name: str = "a.bin") -> Path:
    """A file laid out like torch.save's around any pickle."""
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, raw in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", raw)
    return path


def tensor_pickle(offset: int, size: tuple[int, ...], stride: tuple[int, ...], count: int) -> bytes:
    """{"x": tensor}, as torch.save would write it, with a window of the caller's choice on storage 0."""

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            storage = torch.FloatStorage()
            return torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, torch.FloatStorage):
                return ("storage", torch.FloatStorage, "0", "cpu", count)
            return None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"x": Tensor()})
    return buffer.getvalue()


class Evil:
    """Pickles as a call of ``function``; unpickling it for real would leave a mark on the disk."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


# ---------------------------------------------------------------------------- honest files


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_reads_as_torch_has_it(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(3, 4, 5) * 50).to(dtype)
    array = read_state_dict(saved(tmp_path, {"x": x}))["x"]
    expected = x.float().numpy() if dtype in (torch.float16, torch.bfloat16) else x.numpy()
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)
    assert not array.flags.writeable


def test_bfloat16_extremes_are_exact(tmp_path: Path) -> None:
    x = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40, 3.3e38, float("nan")], dtype=torch.bfloat16)
    array = read_state_dict(saved(tmp_path, {"x": x}))["x"]
    np.testing.assert_array_equal(array.view(np.uint32), x.float().numpy().view(np.uint32))


def test_windows_on_storages(tmp_path: Path) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    content = {
        "whole": base,
        "transposed": base.permute(2, 0, 1),
        "inner": base[1:, 2, ::2],
        "expanded": base[0, 0, :1].expand(7),
        "scalar": base[2, 3, 4],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base.clone()),
    }
    arrays = read_state_dict(saved(tmp_path, content))
    assert list(arrays) == list(content)
    for name, tensor in content.items():
        np.testing.assert_array_equal(arrays[name], tensor.detach().numpy(), err_msg=name)
    assert np.shares_memory(arrays["whole"], arrays["inner"])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 4), torch.nn.BatchNorm1d(3))
    path = saved(tmp_path, model.state_dict(), pickle_protocol=protocol)  # an OrderedDict with _metadata
    arrays = read_state_dict(path)
    assert list(arrays) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(arrays[name], tensor.numpy())


def test_big_endian_files(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = zipped(tmp_path, tensor_pickle(0, (2, 3), (3, 1), 6), {"0": x.astype(">f4").tobytes()})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    np.testing.assert_array_equal(read_state_dict(path)["x"], x)


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -(2**40), 2**100, 1.5, None, True, False, "é", b"raw", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]},
        [[], {}, [[1], [2]], {1: {2: 3}}, "x" * 300, list(range(300)), {str(i): i for i in range(300)}],
    ],
)
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_values_as_pickle_itself_reads_them(value: Any, protocol: int) -> None:
    if protocol < 3 and isinstance(value, dict):
        value = {"a": [item for item in value["a"] if not isinstance(item, bytes)]}  # those ask for _codecs.encode
    assert interpret(pickle.dumps(value, protocol), Path("x"), keep_unknown=False) == value


# --------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ["system", "call", "open", "eval", "exec"])
def test_a_bin_that_calls_anything_is_refused_and_runs_nothing(tmp_path: Path, name: str, protocol: int) -> None:
    mark = tmp_path / "mark"
    evil = {
        "system": Evil(os.system, f"touch {mark}"),
        "call": Evil(subprocess.call, ["touch", str(mark)]),
        "open": Evil(open, str(mark), "w"),
        "eval": Evil(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(mark)!r}, 'w')"),
    }[name]
    path = saved(tmp_path, {"x": torch.ones(2), "y": evil}, pickle_protocol=protocol)
    with pytest.raises(
        CheckpointError, match=rf"asks for \w+\.{name}, which no tensor needs; it is refused and nothing"
    ):
        read_state_dict(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(evil))  # what Python's own unpickler would have done
    assert mark.exists()


def test_a_pt_that_calls_anything_outside_the_model_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    evil = Evil(os.system, f"touch {mark}")
    path = saved(tmp_path, {"model": {"x": torch.ones(2)}, "extra": evil, "deeper": [{"a": evil}]}, "a.pt")
    tensors, entries = read_fairseq_file(path)
    assert list(tensors) == ["x"]
    record = entries["extra"]
    assert isinstance(record, Record) and record.of.name == "system" and record.args == (f"touch {mark}",)
    assert not mark.exists()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_record_inside_the_model_entry_is_refused(tmp_path: Path, depth: int) -> None:
    mark = tmp_path / "mark"
    evil: Any = Evil(os.system, f"touch {mark}")
    path = saved(tmp_path, {"model": {"x": torch.ones(2), "y": [evil] if depth else evil}}, "a.pt")
    with pytest.raises(CheckpointError, match="must hold tensors only, but 'y' is"):
        read_fairseq_file(path)
    assert not mark.exists()


def test_a_record_keeps_what_it_was_given(tmp_path: Path) -> None:
    namespace = argparse.Namespace(layers=3, inner=argparse.Namespace(a=[1, 2]))
    path = saved(tmp_path, {"model": {}, "args": namespace, "counter": {"when": datetime.date(2021, 1, 2)}}, "a.pt")
    _, entries = read_fairseq_file(path)
    assert entries["args"].state["layers"] == 3
    assert entries["args"].state["inner"].state == {"a": [1, 2]}
    assert entries["counter"]["when"].of == Global("datetime", "date")
    assert "Record(argparse.Namespace)" in repr(entries["args"])


def test_optimizer_tensors_stay_unread(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": {"x": torch.ones(2)}, "state": {0: torch.zeros(1000)}}, "a.pt")
    _, entries = read_fairseq_file(path)
    assert isinstance(entries["state"][0], Window)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (6, (1,), (1,)),
        (0, (3, 2), (3, 1)),
        (0, (2,), (6,)),
        (0, (2,), (2**62,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (2, (-1,), (1,)),
        (0, (2**40,), (0,)),
        (0, (1,), (2**62,)),  # reaches nothing, but no NumPy array has it
        (0, (0, 2**40), (1, 1)),
    ],
)
def test_windows_beyond_their_storage_are_refused(
    tmp_path: Path, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    path = zipped(tmp_path, tensor_pickle(offset, size, stride, 6), {"0": bytes(24)})
    with pytest.raises(CheckpointError, match="outside its storage of 6 numbers"):
        read_state_dict(path)


def test_the_last_number_of_a_storage_is_inside(tmp_path: Path) -> None:
    path = zipped(tmp_path, tensor_pickle(1, (2, 2), (3, 1), 6), {"0": np.arange(6, dtype="<f4").tobytes()})
    np.testing.assert_array_equal(read_state_dict(path)["x"], [[1, 2], [4, 5]])


@pytest.mark.parametrize("count", [5, 7])
def test_storage_length_must_match(tmp_path: Path, count: int) -> None:
    path = zipped(tmp_path, tensor_pickle(0, (2,), (1,), count), {"0": bytes(24)})
    with pytest.raises(CheckpointError, match=f"has 24 bytes, but its {count} numbers"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"", "damaged"),
        (b".", "damaged"),
        (b"\x80\x02}q\x00", "damaged"),  # ends without STOP
        (b"\x80\x02R.", "damaged"),  # empty stack
        (b"\x80\x02h\x05.", "damaged"),  # unknown memo
        (b"\x80\x02\xff.", "damaged"),  # unknown opcode
        (b"\x80\x02\x82\x01.", "EXT1"),  # copyreg's extension registry
        (b"Pid\n.", "PERSID"),
        (b"\x80\x02]]a}s.", "damaged"),  # a list as a key
        (b"ccollections\nOrderedDict\n}\x8c\x08__dict__K\x01sb.", "damaged"),  # state set on the class itself
        (b"ctorch._utils\n_rebuild_tensor_v2\n(}\x8c\x0c__defaults__)sb.", "damaged"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "damaged"),
        (b"ctorch\nFloatStorage\n)R.", "in a way no tensor needs"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))tR.", "in a way no tensor needs"),
        (b"(i__builtin__\nexec\n.", "no tensor needs"),  # INST
        (b"(cbuiltins\nexec\nV1\no.", "no tensor needs"),  # OBJ
        (b"\x8c\x08builtins\x8c\x04exec\x93.", "no tensor needs"),  # STACK_GLOBAL
        (b"ctorch.serialization\nload\n.", "no tensor needs"),
        (b"ctorch._utils\n_rebuild_parameter\n.", r"the file is the global torch\._utils\._rebuild_parameter, not"),
    ],
)
def test_crooked_pickles(tmp_path: Path, pickled: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(zipped(tmp_path, pickled))


def test_a_bomb_of_shared_tuples_is_quick(tmp_path: Path) -> None:
    # t = (t, t), sixty levels deep: harmless as long as nobody walks, hashes or prints it.
    bomb = b")" + b"2\x86" * 60
    with pytest.raises(CheckpointError, match="'x' is a tuple"):
        read_fairseq_file(zipped(tmp_path, b"}\x8c\x05model}\x8c\x01x" + bomb + b"ss."))
    with pytest.raises(CheckpointError, match="damaged"):  # as a dictionary's key it would be hashed
        interpret(b"}" + bomb + b"K\x01s.", Path("x"), keep_unknown=True)


# --------------------------------------------------------------------------- damaged files


def test_no_zip_but_what(tmp_path: Path) -> None:
    legacy, tar = tmp_path / "legacy.bin", tmp_path / "tar.bin"
    torch.save({"x": torch.ones(3)}, legacy, _use_new_zipfile_serialization=False)
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("tensors"), io.BytesIO())
    cases = {
        "empty": (b"", "an empty file"),
        "text": (b"<!DOCTYPE html>\n<html>Not found</html>\n", "a text file"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
        "noise": (bytes(range(256)) * 4, "in no format known"),
        "safetensors": (struct.pack("<Q", 20) + b'{"x":0}', "laid out like safetensors"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"expected a zip of torch.save, but this is.*{message}"):
            read_state_dict(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"legacy format of before 1\.6"):
        read_state_dict(legacy)
    with pytest.raises(CheckpointError, match="a tar file"):
        read_state_dict(tar)
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path / "absent.bin")


def test_a_zip_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    whole = saved(tmp_path, {"x": torch.arange(1000.0)}).read_bytes()
    for length in [*range(1, len(whole), 97), len(whole) - 1]:
        path = tmp_path / "cut.bin"
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_state_dict(path)


def test_every_flipped_byte_is_an_error_or_harmless(tmp_path: Path) -> None:
    x = torch.arange(40.0)
    whole = saved(tmp_path, {"x": x}).read_bytes()
    path = tmp_path / "flipped.bin"
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            arrays = read_state_dict(path)
        except CheckpointError:
            continue
        # Padding, dates and unused entries of the zip may change; the checksum keeps the numbers.
        np.testing.assert_array_equal(arrays["x"], x.numpy())


def test_other_zips(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")
    with pytest.raises(CheckpointError, match=r"without one data\.pkl"):
        read_state_dict(path)
    script = tmp_path / "script.bin"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_state_dict(script)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
    with pytest.raises(CheckpointError, match="compressed"):
        read_state_dict(path)
    with pytest.raises(CheckpointError, match="data/0 is missing"):
        read_state_dict(zipped(tmp_path, tensor_pickle(0, (6,), (1,), 6)))


def test_a_negation_put_off_is_an_error(tmp_path: Path) -> None:
    """PyTorch writes the numbers as they lie, and beside them that their signs are to be turned."""
    imaginary = torch.complex(torch.ones(3), torch.ones(3)).conj().imag
    path = tmp_path / "model.bin"
    torch.save({"x": imaginary}, path)
    with pytest.raises(CheckpointError, match=r"operations put off.*'neg': True.*resolve_neg"):
        read_state_dict(path)
    torch.save({"x": imaginary.resolve_neg()}, path)
    np.testing.assert_array_equal(read_state_dict(path)["x"], -np.ones(3, np.float32))


def test_a_storage_described_in_two_ways_is_refused(tmp_path: Path) -> None:
    """Two tensors on one storage of 24 bytes, of which one takes it for six numbers, the other for three doubles."""
    both = {"x": torch.ones(6), "y": torch.ones(3, dtype=torch.float64)}
    path = saved(tmp_path, both)
    with zipfile.ZipFile(path) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    (pickled,) = [entry for entry in files if entry.endswith("/data.pkl")]
    key = b"X\x01\x00\x00\x00"  # a pickled text of one character
    assert files[pickled].count(key + b"1") == 1
    files[pickled] = files[pickled].replace(key + b"1", key + b"0")
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in files.items():
            archive.writestr(entry, content)
    with pytest.raises(CheckpointError, match="storage 0 is described in two ways; the file is refused"):
        read_state_dict(path)


def test_contents_that_are_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a list, not a dictionary of tensors"):
        read_state_dict(saved(tmp_path, [torch.ones(1)]))
    with pytest.raises(CheckpointError, match="'epoch' is a int"):
        read_state_dict(saved(tmp_path, {"x": torch.ones(1), "epoch": 3}))
    with pytest.raises(CheckpointError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        read_state_dict(saved(tmp_path, torch.nn.Linear(2, 2)))
    with pytest.raises(CheckpointError, match="no 'model' entry"):
        read_fairseq_file(saved(tmp_path, {"x": torch.ones(1)}, "a.pt"))
