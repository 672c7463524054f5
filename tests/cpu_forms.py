"""What the tests of the compiled kernels share: both forms of every kernel, random numbers, and results by threads.

A test that takes ``form`` runs twice: compiled, and with every compiled function of the ``cpu_*`` modules put back to
the Python it was written in, so that the lines themselves are run (and shown by a coverage report), and not only what
came of them.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba.core.registry import CPUDispatcher

from sewd_np import (
    cpu_amx,
    cpu_attention,
    cpu_conv,
    cpu_gemm,
    cpu_kernels,
    cpu_lines,
    cpu_math,
    cpu_positions,
    cpu_rows,
    cpu_split,
)
from sewd_np.cpu_kernels import Kernels

Array = np.ndarray
MODULES = (
    cpu_lines,
    cpu_math,
    cpu_gemm,
    cpu_amx,
    cpu_split,
    cpu_positions,
    cpu_conv,
    cpu_attention,
    cpu_rows,
    cpu_kernels,
)
# float32 rounds each of up to some 1,000 sums by 2^-24; exp and erf add 5e-7.
TOLERANCE = 2e-5
# The matrix unit's numbers are good to 2^-17 = 8e-6 each. Errors of a sum's terms have either sign and grow as its
# root, like the sum itself; a norm or an exponential of a few of them enlarges them by some.
SPLIT_TOLERANCE = 1e-4


def compiled_functions(module: types.ModuleType) -> dict[str, CPUDispatcher]:
    return {name: value for name, value in vars(module).items() if isinstance(value, CPUDispatcher)}


def _take_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        for name, function in compiled_functions(module).items():
            monkeypatch.setattr(module, name, function.py_func)


@pytest.fixture(params=["compiled", "python"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with the kernels as they are, then with the functions that they were compiled from."""
    if request.param == "python":
        _take_python(monkeypatch)
    return str(request.param)


@pytest.fixture(params=["compiled", "python"])
def split_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """``form`` for what goes to the matrix unit: Python's form of it runs anywhere, the compiled one where it is."""
    if request.param == "python":
        _take_python(monkeypatch)
    elif not cpu_amx.available():
        pytest.skip("this machine has no matrix unit (AMX), or the system does not lend it")
    return str(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, dtype=np.float32)


def same(results: list[Array]) -> Array:
    """The first of several float32 arrays; asserts that all are equal to the last bit."""
    for result in results:
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, results[0])
    return results[0]


def same_by_threads(operation: str, *args: Any) -> Array:
    """An operation of ``Kernels`` on 1, 2 and 3 threads; asserts that the results are equal to the last bit."""
    return same([getattr(Kernels(threads), operation)(*args) for threads in (1, 2, 3)])


def on_one_thread(operation: str, *args: Any) -> Array:
    """The same on one thread, for the slow Python forms."""
    result: Array = getattr(Kernels(1), operation)(*args)
    return result


def by_form(form: str) -> Callable[..., Array]:
    return same_by_threads if form == "compiled" else on_one_thread
