"""Where the ``cuda`` extra has put the CUDA toolkit. Imports nothing of Numba: the driver is put in place before it."""

from __future__ import annotations

import site
from pathlib import Path


def find_in_toolkit(name: str) -> Path | None:
    """A file of the toolkit by its place in it, such as ``bin/ptxas``."""
    for folder in site.getsitepackages():
        for found in sorted(Path(folder).glob(f"nvidia/cu*/{name}")):
            return found
    return None
