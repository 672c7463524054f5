"""Says, once in a process, that CPU kernels are about to be compiled, so that nobody takes the wait for a hang.

Numba compiles a kernel when it is first called and keeps it on disk; the next process reads it from there. So this
waits for Numba's own event, which fires when a kernel is really compiled and not when it is read from disk.
"""

from __future__ import annotations

import logging
import threading
from functools import cache

from numba.core.event import Event, Listener, register

LOGGER = "sewd_np"
ONCE = "sewd_np: compiling the CPU kernels for this machine (once, under a minute; they are kept on disk) ..."
EACH_TIME = (
    "sewd_np: compiling the CPU kernels (under a minute, in every process: no folder that would keep them can be "
    "written to; name one in NUMBA_CACHE_DIR) ..."
)


class Notice(Listener):
    """Hears of everything that Numba compiles, and says one sentence when the first of our kernels is among it.

    It is logged as a warning of logger "sewd_np": with no logging set up Python writes that to standard error, in a
    notebook too, and a program that has set it up decides for itself. Kernels are called by several threads at once.
    """

    def __init__(self) -> None:
        self._to_say = threading.Lock()  # taken by whoever says it, and never given back

    def on_start(self, event: Event) -> None:
        kernel = event.data["dispatcher"]
        if kernel.py_func.__module__.startswith("sewd_np.cpu_") and self._to_say.acquire(blocking=False):
            logging.getLogger(LOGGER).warning(EACH_TIME if kernel.stats.cache_path is None else ONCE)

    def on_end(self, event: Event) -> None:
        """Nothing: the result says that the wait is over."""


@cache
def announce_compiling() -> None:
    """From now on the first compilation of a CPU kernel in this process is announced. Further calls change nothing."""
    register("numba:compile", Notice())  # type: ignore[no-untyped-call]
