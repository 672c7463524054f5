"""Memory on the GPU: arrays that give their place back when Python drops them, and the pool that hands it out again.

Asking the driver for memory, or returning it, makes the GPU wait until it has finished everything. A forward pass needs
some hundred arrays, so places are kept and reused. Reuse is safe without waiting because all work of a ``Device`` runs
in one stream, in order: whoever gets a place writes to it after its last reader has finished.

Places come in sizes: eight to every doubling, so at most an eighth is wasted, and calls of many lengths share them.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable
from operator import mul
from typing import Any, Self

SMALLEST = 256  # numbers: what lies below is rounded up to it


def place_size(size: int) -> int:
    """The size, in numbers, of the place for ``size`` numbers: rounded up to an eighth of a power of two."""
    size = max(size, SMALLEST)
    step = 1 << max(size.bit_length() - 4, 0)
    return -(-size // step) * step


def shaped(memory: Any, *shape: int) -> Any:
    """The first numbers of ``memory``, contiguous on the device, as an array of ``shape``: no copy.

    What a slice and a reshape give, in a tenth of their time on a GPU: numba works out 30 µs long where a slice lies,
    and a pass makes nearly a hundred.
    """
    if not hasattr(memory, "gpu_data"):  # NumPy's arrays and the simulator's
        return memory[: math.prod(shape)].reshape(*shape)
    strides = (*itertools.accumulate(shape[:0:-1], mul, initial=memory.dtype.itemsize),)[::-1]
    return type(memory)(shape, strides, memory.dtype, gpu_data=memory.gpu_data)


class Place:
    """A piece of device memory; goes back to its pool's shelf when nobody holds it any more."""

    def __init__(self, memory: Any, shelf: deque[Any]) -> None:
        self.memory = memory
        self.shelf = shelf

    def __del__(self) -> None:
        # May run at any time in any thread: deque.append needs no lock, and a lock might be held here already.
        self.shelf.append(self.memory)


class DeviceArray:
    """An array on the GPU, C-contiguous: what the operations of backend "cuda" take and return. float32, rows int32.

    ``data`` is numba's device array of ``shape``. ``place`` keeps its memory; arrays of other shapes may share it.
    """

    __slots__ = ("data", "place", "shape")

    def __init__(self, data: Any, place: Place | None) -> None:
        self.data = data
        self.place = place
        self.shape: tuple[int, ...] = tuple(data.shape)

    def reshape(self, *shape: int) -> Self:
        """The same numbers under another shape."""
        return type(self)(shaped(self.data, *shape), self.place)


class Pool:
    """Hands out arrays; ``allocate(numbers)`` gets memory from the driver and raises ``MemoryError`` if there is none.

    ``asked`` counts the calls of ``allocate`` and ``held`` the numbers that they returned and that are not released.
    """

    def __init__(self, allocate: Callable[[int], Any]) -> None:
        self.allocate = allocate
        self.shelves: dict[int, deque[Any]] = {}
        # All memory that is not released, by identity. Where arrays are dropped in a cycle, an exception's traceback
        # for one, Python's collector runs finalizers first and ``__del__`` after: numba would free what a place then
        # puts on its shelf. What the pool holds, the collector leaves alone.
        self.memories: dict[int, Any] = {}
        self.asked = 0
        self.held = 0
        self.lock = threading.Lock()

    def take(self, *shape: int) -> DeviceArray:
        """An array of ``shape``; its contents are whatever was there.

        Raises ``MemoryError`` if the device has no room even after the pool has given up all that lies on its shelves.
        """
        numbers = math.prod(shape)
        size = place_size(numbers)
        with self.lock:
            shelf = self.shelves.setdefault(size, deque())
        try:
            memory = shelf.pop()
        except IndexError:
            memory = self._ask(size)
        return DeviceArray(shaped(memory, *shape), Place(memory, shelf))

    def _ask(self, size: int) -> Any:
        try:
            memory = self.allocate(size)
        except MemoryError:
            self.release()
            memory = self.allocate(size)
        with self.lock:
            self.asked += 1
            self.held += size
            self.memories[id(memory)] = memory
        return memory

    def idle(self) -> int:
        """Numbers that lie on the shelves, ready to be taken or given back."""
        with self.lock:
            return sum(size * len(shelf) for size, shelf in self.shelves.items())

    def release(self) -> None:
        """Give everything that lies on the shelves back to the driver."""
        with self.lock:
            for size, shelf in self.shelves.items():
                while shelf:
                    del self.memories[id(shelf.pop())]
                    self.held -= size
