"""The sentence that announces compilation: where it is seen, when it is said, and when it is not.

Also, that no kernel is taken from disk that was compiled with another version of what it calls.

Processes of their own, with an empty cache folder, compile one small kernel each.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from numba.core.event import Event, EventStatus

from sewd_np import cpu_gemm
from sewd_np.cpu_compiling import EACH_TIME, LOGGER, ONCE, Notice
from sewd_np.sources import fingerprint, kept_on_disk

ROOT = Path(__file__).parent.parent
NORM = """
import numpy as np
from sewd_np import backend
x = np.random.default_rng(0).standard_normal((3, 5), dtype=np.float32)
for threads in (1, 2):
    got = backend.get_operations(threads=threads).layer_norm(x, x[0], x[1], 1e-5)
print(np.abs(got - backend.NUMPY.layer_norm(x, x[0], x[1], 1e-5)).max() < 1e-5)
"""


def start(code: str, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, **pipes)


def run(code: str, cache: Path) -> tuple[str, str]:
    return start(code, cache).communicate(timeout=300)


def test_it_is_said_once_and_not_again_when_kernels_are_on_disk(tmp_path: Path) -> None:
    assert run(NORM, tmp_path) == ("True\n", ONCE + "\n")
    assert run(NORM, tmp_path) == ("True\n", "")


def test_a_program_decides_where_it_goes(tmp_path: Path) -> None:
    quiet = f"import logging; logging.getLogger({LOGGER!r}).setLevel(logging.ERROR)\n"
    assert run(quiet + NORM, tmp_path) == ("True\n", "")


def test_two_processes_at_once(tmp_path: Path) -> None:
    both = [start(NORM, tmp_path) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert out == "True\n" and err in ("", ONCE + "\n")  # whoever comes later may find the kernel on disk
    assert run(NORM, tmp_path) == ("True\n", "")


def compiling(module: str, cache_path: str | None) -> Event:
    kernel = SimpleNamespace(py_func=SimpleNamespace(__module__=module), stats=SimpleNamespace(cache_path=cache_path))
    return Event("numba:compile", EventStatus.START, data={"dispatcher": kernel})


def test_only_our_kernels_are_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    notice = Notice()
    notice.notify(compiling("numba.np.arrayobj", None))
    notice.notify(compiling("__main__", "somewhere"))
    assert caplog.messages == []
    notice.notify(compiling("sewd_np.cpu_gemm", "somewhere"))
    notice.notify(compiling("sewd_np.cpu_gemm", None))
    assert caplog.record_tuples == [(LOGGER, logging.WARNING, ONCE)]


def test_without_a_cache_it_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    Notice().notify(compiling("sewd_np.cpu_conv", None))
    assert caplog.messages == [EACH_TIME] and "every process" in EACH_TIME and "NUMBA_CACHE_DIR" in EACH_TIME


def test_several_threads_say_it_once(caplog: pytest.LogCaptureFixture) -> None:
    notice, together = Notice(), threading.Barrier(4)

    def work() -> None:
        together.wait()
        notice.notify(compiling("sewd_np.cpu_conv", "somewhere"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert caplog.messages == [ONCE]


# -------------------------------------------------------------------- changed sources


CALLEE = """
from sewd_np.cpu_gemm import kernel

@kernel
def callee(x):
    return {} * x
"""
CALLER = """
from sewd_np.cpu_callee import callee
from sewd_np.cpu_gemm import kernel

@kernel
def caller(x):
    return callee(x)
"""
CALL = "from sewd_np.cpu_caller import caller; print(caller(21.0), sum(caller.stats.cache_hits.values()))"


def test_a_changed_callee_is_compiled_into_its_callers(tmp_path: Path) -> None:
    """Numba by itself looks at the file of the caller alone, and would go on with the old callee."""
    package = tmp_path / "sewd_np"
    shutil.copytree(Path(cpu_gemm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (package / "cpu_caller.py").write_text(CALLER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-B", "-c", CALL]
    for factor, said in ((2, "42.0 0\n"), (2, "42.0 1\n"), (3, "63.0 0\n"), (2, "42.0 1\n")):
        (package / "cpu_callee.py").write_text(CALLEE.format(factor))
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.stdout == said, done.stderr


def test_the_fingerprint_is_of_all_kernel_sources(tmp_path: Path) -> None:
    nothing = fingerprint(tmp_path, "cpu_*.py")  # a package without sources goes by its version
    (tmp_path / "layers.py").write_text("no kernel")
    assert fingerprint(tmp_path, "cpu_*.py") == nothing
    seen = {nothing}
    for name, text in (("cpu_a.py", "ab"), ("cpu_b.py", "c"), ("cpu_a.py", "a"), ("cpu_b.py", "bc")):
        (tmp_path / name).write_text(text)
        seen.add(fingerprint(tmp_path, "cpu_*.py"))
    assert len(seen) == 5 and all(part.isalnum() for part in seen)
    assert fingerprint(Path(cpu_gemm.__file__).parent, "cpu_*.py") == cpu_gemm.SOURCES


def test_where_nothing_can_be_kept_each_process_compiles() -> None:
    def jit(cache: bool = False) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: ("compiled", function.__qualname__)

    def kernel() -> None: ...

    name = kernel.__qualname__
    assert kept_on_disk(jit, kernel, "abc") == ("compiled", f"{name}_abc")
