"""How much memory is free: asked before work whose memory grows with the square of a recording's length."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can still be allocated without swapping, or None where the system does not say.

    Linux: MemAvailable, or what a container's limit leaves if that is less. Elsewhere: free physical pages.
    """
    try:
        lines = meminfo.read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, max(int(limit) - int(used), 0)) if limit != "max" else free
    except OSError:
        return free


def require_memory(needed: int, what: str, advice: str, free: float | None = None) -> None:
    """Raise ``MemoryError`` in one sentence if ``needed`` bytes are more than are ``free`` (default: main memory)."""
    if free is None:
        free = available_memory()
    if free is not None and needed > free:
        raise MemoryError(
            f"{what} needs about {needed / 1e9:.1f} GB at once, but {free / 1e9:.1f} GB are free; {advice}."
        )
