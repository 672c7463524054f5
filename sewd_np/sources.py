"""Compiled kernels on disk, taken from there only while the sources of all kernels are as they were.

Numba takes a kernel from disk as long as the kernel's own file is unchanged, even if a function that it calls, in
another file, has changed. But it looks for it under its name, so that is made to tell all sources apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sewd_np import __version__


def fingerprint(folder: Path, pattern: str) -> str:
    """A short name for the files in ``folder`` that match ``pattern``; for the version where there are none."""
    texts = [path.read_bytes() for path in sorted(folder.glob(pattern))] or [__version__.encode()]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:12]


def kept_on_disk(jit: Callable[..., Any], function: Callable[..., Any], sources: str) -> Any:
    """``jit(cache=True)(function)``, under a name that ends in ``sources``.

    Where neither the package's folder nor the user's cache can be written to, each process compiles for itself.
    """
    function.__qualname__ += f"_{sources}"
    try:
        return jit(cache=True)(function)
    except RuntimeError:
        return jit()(function)
