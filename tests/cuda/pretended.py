"""The pretended driver (``pretended_driver.c``): built, put in the real one's place, and asked what was done to it.

With ``install(run_kernels=True)`` it runs each kernel that Numba compiles: from its PTX, turned into C
(``ptx_to_c.py``) and compiled for this processor.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tests.cuda.ptx_to_c import translate
from tests.cuda.toolkit import find_in_toolkit

HERE = Path(__file__).parent
SOURCES = (HERE / "pretended_driver.c", HERE / "pretended_gpu.c")
EXACT = ("-ffp-contract=off", "-fno-strict-aliasing", "-march=native")  # each operation rounds as PTX says
loaded: list[ctypes.CDLL] = []  # the one driver of this process, and the kernels


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


def build(sources: Iterable[Path], library: Path, *options: str) -> None:
    """A shared library of C. Raises ``RuntimeError`` without a C compiler, or with what it says."""
    compiler = os.environ.get("CC", "cc")
    command = [compiler, "-O2", "-fPIC", "-shared", f"-I{HERE}", *options, "-o", library, *sources]
    try:
        run = subprocess.run([*command, "-ldl", "-lpthread", "-lm"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"the C compiler {compiler} is not installed.") from error
    if run.returncode:
        raise RuntimeError(f"{library.stem} does not compile:\n{run.stderr}")


def install(run_kernels: bool = False) -> None:
    """Build the driver and load it under the real one's name: whoever asks for libcuda.so.1 from now on gets it.

    Must come before numba.cuda looks for a GPU. Raises ``RuntimeError`` without the ``cuda`` extra or a C compiler.
    """
    header = find_in_toolkit("include/cuda.h")
    if header is None:
        raise RuntimeError("cuda.h is not installed; install the extra: pip install -e '.[test,cuda]'.")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        build(SOURCES, library, f"-Wl,-soname,{library.name}", f"-I{header.parent}", "-fopenmp", *EXACT)
        loaded.append(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    if run_kernels:
        loaded[0].pretended_programs()
        give_programs()


def give_programs() -> None:
    """From now on each kernel that numba-cuda loads is translated, and the driver told what it does."""
    from numba.cuda.codegen import CUDACodeLibrary

    real = CUDACodeLibrary.get_cufunc

    def get_cufunc(library: Any) -> Any:
        known = bool(library._cufunc_cache)
        function = real(library)
        if not known:
            give_program(int(function.handle), library.get_asm_str())
        return function

    CUDACodeLibrary.get_cufunc = get_cufunc


def give_program(kernel: int, ptx: str) -> None:
    """Tell the driver what a kernel does."""
    program = translate(ptx)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.c"
        source.write_text(program.source)
        build([source], source.with_suffix(".so"), *EXACT)
        library = ctypes.CDLL(str(source.with_suffix(".so")))
    loaded.append(library)
    size = ctypes.c_uint64.in_dll(library, "registers").value
    pointer = ctypes.cast(library.program, ctypes.c_void_p)
    loaded[0].pretended_program(
        ctypes.c_void_p(kernel), pointer, ctypes.c_size_t(size), ctypes.c_uint32(program.shared)
    )


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
