"""Who runs the CPU kernels and where: a team of threads, how they share out work, and a pool of scratch memory."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from sewd_np.cpu_gemm import aligned

Array = np.ndarray


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def claim(counter: Array) -> int:
    """The number in ``counter`` (1,), which becomes one more: each caller of all threads gets another one.

    Where work comes in many like pieces, each thread takes the next when it is done with one. Two cores are seldom
    equally fast: what else the machine does, or another tenant of it, slows one of them. Who computes a piece makes no
    difference to it.
    """
    taken = int(counter[0])
    counter[0] += 1
    return taken


@intrinsic
def _claim(typing_context, address):  # type: ignore[no-untyped-def]
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], word.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(word, 1), "monotonic")

    return types.int64(types.int64), emit


@overload(claim, inline="always")
def _compiled_claim(counter):  # type: ignore[no-untyped-def]  # Numba compares its signature with the next one
    return lambda counter: _claim(counter.ctypes.data)  # type: ignore[call-arg]


class Team:
    """``size`` threads that share out a kernel: the caller and ``size − 1`` of our own, which sleep in between.

    Kernels release Python's lock, so plain threads suffice. Nothing of the process changes: not Numba's threads, not
    a library's, no environment variable. Several callers may use one team at once. The threads are started by the
    first call, and end with the team. (concurrent.futures does the same at three times the cost of a hand-over, and a
    forward pass has 70 of them.)
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._process = -1
        self._tasks: SimpleQueue[Any] = SimpleQueue()

    def run(self, kernel: Any, *arguments: Any) -> None:
        """kernel(*arguments, worker, size) for each worker; returns when all are done."""
        if self._process != os.getpid():  # the first call, or the first in a forked process: threads are not inherited
            self._start()
        done: SimpleQueue[BaseException | None] = SimpleQueue()
        for worker in range(1, self.size):
            self._tasks.put((kernel, (*arguments, worker, self.size), done))
        try:
            kernel(*arguments, 0, self.size)
        finally:
            errors = [done.get() for _ in range(1, self.size)]
        for error in errors:
            if error is not None:
                raise error

    def _start(self) -> None:
        with self._lock:
            if self._process != os.getpid():
                self._tasks = SimpleQueue()
                for _ in range(1, self.size):
                    threading.Thread(target=_work, args=(self._tasks,), name="sewd_np", daemon=True).start()
                weakref.finalize(self, _dismiss, self._tasks, self.size - 1)
                self._process = os.getpid()


def _work(tasks: SimpleQueue[Any]) -> None:
    """A team member's life: take a task, do it, say so, until told to stop."""
    while (task := tasks.get()) is not None:
        kernel, arguments, done = task
        try:
            kernel(*arguments)
        except BaseException as error:  # the caller raises it
            done.put(error)
        else:
            done.put(None)
        del task, kernel, arguments, done


def _dismiss(tasks: SimpleQueue[Any], members: int) -> None:
    for _ in range(members):
        tasks.put(None)


class Pool:
    """Scratch arrays for kernels: a call takes one under a lock and gives it back, so calls never share.

    An array is handed out as large as it last was or larger; at most one array a concurrent call stays allocated.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Array] = []

    @contextmanager
    def take(self, size: int) -> Iterator[Array]:
        """At least ``size`` float32 numbers, flat, of any value, beginning at a multiple of 64 bytes."""
        with self._lock:
            array = self._free.pop() if self._free else np.empty(0, np.float32)
        if len(array) < size:
            array = aligned(size, np.float32)
        try:
            yield array[:size]
        finally:
            with self._lock:
                self._free.append(array)
