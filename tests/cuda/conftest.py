"""Which of the CUDA runs this is: each file in this folder belongs to one of them, and its name says to which.

    NUMBA_ENABLE_CUDASIM=1 pytest tests/cuda     test_sim_*      kernels as plain Python in the simulator, races raise
    pytest tests/cuda                            test_ptx_*      kernels compiled and assembled, not run
                                                 test_gpu_*      kernels on a GPU; left out where there is none
    PRETENDED_DRIVER=1 pytest tests/cuda         test_driver_*   what is around kernels, on a driver that runs none
    PRETENDED_DRIVER=runs pytest tests/cuda      test_run_*      kernels as compiled, run by a pretended GPU; with
                                                                 -m gpu the tests for a GPU too, as far as one has time

The simulator is chosen once, when Numba is first imported, and so is the driver: one process cannot do two of these.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from numba.core import config as numba_config

SIMULATED = bool(numba_config.ENABLE_CUDASIM)
INSTALLED = importlib.util.find_spec("numba_cuda") is not None

PRETENDED = os.environ.get("PRETENDED_DRIVER", "")
RUNS = PRETENDED == "runs"

if SIMULATED:
    from tests.cuda import fastsim

    fastsim.install()
elif PRETENDED:
    from tests.cuda import pretended

    pretended.install(RUNS)


@pytest.fixture(autouse=True)
def no_trouble() -> Iterator[None]:
    """Nothing may have been asked of a pretended driver that a real one would refuse, or do wrong without a word."""
    yield
    if PRETENDED:
        assert pretended.counts().trouble == 0, "see what the pretended driver said on standard error"


def belongs(name: str) -> bool:
    """Whether a test file is part of this run."""
    if name.startswith("test_sim_"):
        return SIMULATED
    if name.startswith("test_driver_"):
        return bool(PRETENDED) and not RUNS
    if name.startswith("test_run_"):
        return RUNS
    if not name.startswith(("test_ptx_", "test_gpu_")):
        return True
    if SIMULATED or not INSTALLED or (PRETENDED and (not RUNS or name.startswith("test_ptx_"))):
        return False
    if name.startswith("test_ptx_"):
        from tests.cuda.ptx import find_assembler

        return find_assembler() is not None
    from numba import cuda

    return cuda.is_available()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if collection_path.suffix == ".py" and not belongs(collection_path.name):
        return True
    return None
