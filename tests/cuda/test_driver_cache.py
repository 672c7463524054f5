"""No CUDA kernel is taken from disk that was compiled with another version of what it calls.

Processes of their own, on the pretended driver: they compile one small kernel each, with a copy of the package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import sewd_np

ROOT = Path(__file__).parent.parent.parent
CALLEE = """
from sewd_np.cuda_intrinsics import device, float32


@device
def callee():
    return float32({})
"""
CALLER = """
from sewd_np.cuda_callee import callee
from sewd_np.cuda_intrinsics import kernel, store


@kernel(threads=32)
def caller(out):
    store(out, 0, callee())
"""
CALL = """
from tests.cuda import pretended
pretended.install()
import numpy as np
from numba import cuda
from sewd_np.cuda_caller import caller
from sewd_np.cuda_device import new_stream
stream = new_stream(cuda)
caller[1, 32, stream](cuda.device_array(1, np.float32, stream=stream))
print(sum(caller.stats.cache_hits.values()))
"""


def test_a_changed_callee_is_compiled_into_its_callers(tmp_path: Path) -> None:
    """Numba by itself looks at the file of the caller alone, and would go on with the old callee."""
    package = tmp_path / "sewd_np"
    shutil.copytree(Path(sewd_np.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (package / "cuda_caller.py").write_text(CALLER)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "NUMBA_CACHE_DIR": str(tmp_path / "kept"),
    }
    for number, hits in ((2, "0\n"), (2, "1\n"), (3, "0\n"), (2, "1\n")):
        (package / "cuda_callee.py").write_text(CALLEE.format(number))
        done = subprocess.run(
            [sys.executable, "-B", "-W", "ignore", "-c", CALL],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.stdout == hits, done.stderr
