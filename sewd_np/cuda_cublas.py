"""cuBLAS, if the machine has it: NVIDIA's own matrix products, called through ctypes with no package in between.

Which library file is loaded: the one that the process already has, else the one of the Python package nvidia-cublas,
else a CUDA toolkit's (``cuda.pathfinder`` knows the order). Where there is none, ``cuda_gemm`` computes every product;
``sewd-np info MODEL --backend cuda`` says which of the two it is.

Products are in full float32. TF32, which keeps 10 of the 23 bits of a fraction, stays off.
"""

from __future__ import annotations

import ctypes
import math
import sys
from typing import Any

OP_N = 0  # CUBLAS_OP_N: a matrix as it is
DEFAULT_MATH = 0  # CUBLAS_DEFAULT_MATH: for float32, full float32
WORKSPACE = 32 << 20  # bytes of scratch, what NVIDIA advises for Hopper; given once, so that no call asks for memory


def find_library() -> Any | None:
    """The loaded cuBLAS library with its functions' types declared, or None where there is none."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    try:
        path = load_nvidia_dynamic_lib("cublas").abs_path
        library = ctypes.CDLL(path)
    except (RuntimeError, OSError):
        return None
    return declare(library)


def declare(library: Any) -> Any:
    """Say what the functions take: without it ctypes would cut pointers to 32 bits."""
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    library.cublasCreate_v2.argtypes = [ctypes.POINTER(pointer)]
    library.cublasDestroy_v2.argtypes = [pointer]
    library.cublasGetProperty.argtypes = [integer, ctypes.POINTER(integer)]
    library.cublasSetMathMode.argtypes = [pointer, integer]
    library.cublasSetStream_v2.argtypes = [pointer, pointer]
    library.cublasSetWorkspace_v2.argtypes = [pointer, pointer, size]
    library.cublasSgemm_v2.argtypes = [
        pointer, integer, integer, integer, integer, integer, ctypes.POINTER(ctypes.c_float), pointer, integer, pointer,
        integer, ctypes.POINTER(ctypes.c_float), pointer, integer,
    ]  # fmt: skip
    return library


def version(library: Any) -> str:
    """The library's version, such as "13.0.2"."""
    parts = []
    for which in range(3):
        value = ctypes.c_int()
        check(library.cublasGetProperty(which, ctypes.byref(value)), "cublasGetProperty")
        parts.append(str(value.value))
    return ".".join(parts)


def check(status: int, function: str) -> None:
    """Raise ``RuntimeError`` unless a cuBLAS function returned 0."""
    if status != 0:
        raise RuntimeError(f"{function} returned cuBLAS status {status}; 0 was expected.")


def address(array: Any) -> int:
    """Where a device array begins."""
    return int(array.__cuda_array_interface__["data"][0])


class Cublas:
    """cuBLAS bound to one stream. ``workspace`` is a device array of WORKSPACE bytes that it may scribble on."""

    def __init__(self, library: Any, stream: Any, workspace: Any) -> None:
        self.library = library
        self.workspace = workspace
        self.stream = stream  # held: it must not be destroyed before the handle that is bound to it
        self.handle = ctypes.c_void_p()
        check(library.cublasCreate_v2(ctypes.byref(self.handle)), "cublasCreate")
        check(library.cublasSetMathMode(self.handle, DEFAULT_MATH), "cublasSetMathMode")
        # In this order: setting the stream takes the workspace away again.
        check(library.cublasSetStream_v2(self.handle, int(stream.handle)), "cublasSetStream")
        check(library.cublasSetWorkspace_v2(self.handle, address(workspace), WORKSPACE), "cublasSetWorkspace")

    def __del__(self) -> None:
        # On exit the driver's side may be gone before, and then destroying what was on it would crash.
        if self.handle and not sys.is_finalizing():
            self.library.cublasDestroy_v2(self.handle)

    def product(self, x: Any, weight: Any, out: Any) -> None:
        """out = x · weight: (…, k) by (k, o) into (…, o), C-contiguous float32 device arrays."""
        *leading, depth = x.shape
        rows, outputs = math.prod(leading), weight.shape[1]
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        # cuBLAS counts by columns, and a matrix by rows is its own transpose by columns: outᵀ = weightᵀ · xᵀ.
        status = self.library.cublasSgemm_v2(
            self.handle, OP_N, OP_N, outputs, rows, depth, ctypes.byref(one), address(weight), outputs, address(x),
            depth, ctypes.byref(zero), address(out), outputs,
        )  # fmt: skip
        check(status, "cublasSgemm")
