"""The pretended driver (``pretended_driver.c``): built, put in the real one's place, and asked what was done to it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.cuda.toolkit import find_in_toolkit

SOURCE = Path(__file__).with_name("pretended_driver.c")
loaded: list[ctypes.CDLL] = []  # the one driver of this process


class Counts(NamedTuple):
    """What was asked of the driver since the process began, in the order of its own ``counts``."""

    launches: int  # of kernels, those that were recorded included
    to_device: int  # copies
    to_host: int
    on_device: int
    graph_launches: int
    graph_kernels: int  # in the graphs that were launched
    held: int  # bytes that were given and not freed
    trouble: int  # what a real driver or GPU would not have put up with


def install() -> None:
    """Build the driver and load it under the real one's name: whoever asks for libcuda.so.1 from now on gets it.

    Must come before numba.cuda looks for a GPU. Raises ``RuntimeError`` without the ``cuda`` extra or a C compiler.
    """
    header = find_in_toolkit("include/cuda.h")
    if header is None:
        raise RuntimeError("cuda.h is not installed; install the extra: pip install -e '.[test,cuda]'.")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        compiler = os.environ.get("CC", "cc")
        options = ["-O1", "-fPIC", "-shared", f"-Wl,-soname,{library.name}", f"-I{header.parent}", "-o", library]
        try:
            run = subprocess.run([compiler, *options, SOURCE, "-ldl", "-lpthread"], capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError(f"the C compiler {compiler} is not installed.") from error
        if run.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile:\n{run.stderr}")
        loaded.append(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))


def counts() -> Counts:
    """What was done so far."""
    out = (ctypes.c_long * len(Counts._fields))()
    loaded[0].pretended_counts(out)
    return Counts(*out)


def set_capacity(number: int) -> None:
    """From now on the GPU has so many bytes."""
    loaded[0].pretended_capacity(ctypes.c_size_t(number))


def break_captures(broken: bool) -> None:
    """From now on no recording of a graph succeeds, or again every one does."""
    loaded[0].pretended_broken_captures(int(broken))


def forget_trouble() -> None:
    """What went wrong so far was wanted."""
    loaded[0].pretended_forget_trouble()


def free(address: int) -> None:
    """Take memory away from whoever has it."""
    loaded[0].cuMemFree_v2(ctypes.c_ulonglong(address))
