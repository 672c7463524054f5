"""Compile a kernel to machine code for several GPUs, on a machine that has none, and read what it needs.

Numba turns a kernel into PTX through the compiler library of the CUDA toolkit, and the toolkit's assembler turns PTX
into machine code: both run anywhere. What the assembler reports decides speed before anything has run: registers a
thread (65,536 are shared by all threads of a multiprocessor), shared memory a block, and whether numbers that should be
in registers went to memory. A *spill* is a register that did not fit; a *stack frame* without spills is an array whose
indices were not all known (``sewd_np/cuda_unroll.py``).
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from numba.cuda import compiler, dispatcher

from tests.cuda.toolkit import find_in_toolkit

TARGETS = ((7, 5), (8, 0), (9, 0))  # Turing, Ampere, Hopper
SHARED_BYTES = 48 * 1024  # of a block, without asking the driver for more


@dataclass(frozen=True)
class Usage:
    """What one thread, or the shared memory of one block, needs."""

    registers: int
    shared: int  # bytes
    stack: int  # bytes
    spills: int  # bytes stored and loaded
    ptx: str


def find_assembler() -> Path | None:
    """ptxas of the installed toolkit."""
    return find_in_toolkit("bin/ptxas")


@contextlib.contextmanager
def pretend_device(target: tuple[int, int]) -> Iterator[None]:
    """Device functions ask the driver which GPU they are compiled for; answer in its place."""
    real = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=target)
    try:
        yield
    finally:
        dispatcher.get_current_device = real


def compile_ptx(kernel: Any, signature: str) -> dict[tuple[int, int], str]:
    """PTX for each target. Numba's own part, by far the slowest, runs once."""
    options = {"launch_bounds": kernel.targetoptions["launch_bounds"], "fastmath": kernel.targetoptions["fastmath"]}
    with pretend_device(TARGETS[0]):
        library, _ = compiler._compile_pyfunc_with_fixup(
            kernel.py_func, signature, device=False, abi="numba", cc=TARGETS[0], **options
        )
        return {target: library.get_asm_str(cc=target) for target in TARGETS}


def assemble(ptx: str, target: tuple[int, int]) -> Usage:
    """What the assembler says of a kernel."""
    assembler = find_assembler()
    if assembler is None:
        raise FileNotFoundError("ptxas is not installed; install the extra: pip install 'sewd-np[cuda]'.")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler, f"-arch=sm_{target[0]}{target[1]}", "-v", source, "-o", source.with_suffix(".cubin")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"ptxas refuses the kernel:\n{run.stderr}{run.stdout}")
    return read_usage(run.stderr + run.stdout, ptx)


def read_usage(report: str, ptx: str) -> Usage:
    """What ``ptxas -v`` says of a kernel, in numbers."""

    def total(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, report))

    # Nothing found must not be taken for nothing used.
    for said in (r"Used \d+ registers", r"\d+ bytes stack frame", r"\d+ bytes spill stores"):
        if not re.search(said, report):
            raise RuntimeError(f"ptxas does not say {said!r}:\n{report}")
    return Usage(
        registers=total(r"Used (\d+) registers"),
        shared=total(r"(\d+) bytes smem"),
        stack=total(r"(\d+) bytes stack frame"),
        spills=total(r"(\d+) bytes spill"),
        ptx=ptx,
    )


def check(kernel: Any, signature: str, registers: int) -> dict[tuple[int, int], Usage]:
    """Compile for every target; assert no spills, no stack frame, and at most ``registers`` registers a thread."""
    usages = {target: assemble(ptx, target) for target, ptx in compile_ptx(kernel, signature).items()}
    for target, usage in usages.items():
        name = f"{kernel.py_func.__name__} for sm_{target[0]}{target[1]}"
        assert usage.spills == 0, f"{name} spills {usage.spills} bytes"
        assert usage.stack == 0, f"{name} keeps {usage.stack} bytes on the stack: an index is not a constant"
        assert usage.registers <= registers, f"{name} needs {usage.registers} registers; the budget is {registers}"
        assert usage.shared <= SHARED_BYTES, f"{name} needs {usage.shared} bytes of shared memory"
    return usages
