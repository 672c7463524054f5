"""One queue of work for the GPU: arrays in, whole passes, arrays out.

A queue has one stream, so work runs in the order in which it was started, and one lock: threads may share a model, and
their passes take turns. Python is some kernels ahead of the GPU and waits for it in ``to_numpy`` alone. Passes of short
clips are recorded as graphs and replayed (``cuda_graph``). Nothing uses CUDA's default stream, nor waits for what other
threads do on it (``cuda_device.new_stream``).
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from sewd_np.cuda_device import allocate, new_stream
from sewd_np.cuda_graph import Capture, Recording, Recordings
from sewd_np.cuda_intrinsics import SIMULATED, cuda
from sewd_np.cuda_memory import DeviceArray, Pool

Array = np.ndarray
Forward = Callable[[Any], tuple[Any, Any]]  # samples → hidden states and logits, either may be None

GRAPH_SAMPLES = 90 * 16_000  # of a whole batch: with more, kernels run for longer than Python takes to start them


def new_pool() -> Pool:
    """A pool of the GPU's memory."""
    return Pool(lambda numbers: allocate(cuda, numbers))


def quieten() -> None:
    """Numba warns of every launch of few blocks, and a short clip has nothing else: its own switch turns that off.

    Python's filters would do for one thread only: two that change them at once undo each other's.
    """
    config: Any = importlib.import_module("numba.cuda.core.config")
    config.CUDA_LOW_OCCUPANCY_WARNINGS = 0


class Queue:
    """The stream, the lock and the pool of one ``Device``. ``capture`` records graphs, or None to record none."""

    def __init__(self, capture: Capture | None) -> None:
        self.stream = cuda.stream() if SIMULATED else new_stream(cuda)
        if not SIMULATED:
            quieten()
        self.pool = new_pool()
        self.lock = threading.RLock()
        self.capture = capture
        self.recordings = Recordings()
        # Host arrays on their way to the device: where the GPU reads main memory itself, a copy may begin after the
        # call that asks for it.
        self.sent: list[Array] = []

    def from_numpy(self, array: Any) -> DeviceArray:
        """A copy of an array on the device, float32. What is there already stays as it is."""
        if isinstance(array, DeviceArray):
            return array
        with self.lock:
            out = self.pool.take(*np.shape(array))
            self._fill(out, array)
        return out

    def upload(self, array: Array) -> Any:
        """A copy on the device, of any dtype and in memory of its own: for what is small and not the pool's."""
        with self.lock:
            self.sent.append(array)
            return cuda.to_device(array, stream=self.stream)

    def wait(self) -> None:
        """Until the GPU has done everything before."""
        with self.lock:
            cuda.current_context()  # a thread's first CUDA call may be this one, and numba does not see to it here
            self.stream.synchronize()
            self.sent.clear()

    def to_numpy(self, array: Any) -> Array:
        """A copy on the host, after everything before it has run. What is there already stays as it is."""
        if not isinstance(array, DeviceArray):
            return np.asarray(array)
        with self.lock:
            out = np.empty(array.shape, array.data.dtype)
            array.data.copy_to_host(out, stream=self.stream)
            self.wait()
        return out

    def run(self, forward: Forward, wave_bn: Array, weights: Any, repeatable: bool) -> tuple[Any, Any]:
        """forward(wave_bn), from the second time on for one shape by replaying a recording of what it launches.

        Only where ``repeatable``, that is where all that ``forward`` does depends on ``weights`` and the shape, and
        where the samples are few. Nothing returned shares memory with the recording. A pass for which there is no room
        beside the pool's is not recorded; one that finds no room at all gets that of the recordings and starts again,
        if nothing looks inside, which would see it twice.
        """
        with self.lock:
            try:
                return self._run(forward, wave_bn, weights, repeatable)
            except MemoryError:
                if not (repeatable and self.recordings.kept):
                    raise
            self.forget()
            return self._run(forward, wave_bn, weights, repeatable)

    def _run(self, forward: Forward, wave_bn: Array, weights: Any, repeatable: bool) -> tuple[Any, Any]:
        if self.capture is None or not repeatable or wave_bn.size > GRAPH_SAMPLES:
            return forward(wave_bn)
        key = (id(weights), wave_bn.shape)
        recording = self.recordings.find(key)
        if recording is None:
            if not self.recordings.comes_again(key):
                return forward(wave_bn)
            recording = self._record(self.capture, forward, wave_bn, weights)
            if recording is None:
                self.recordings.refuse(key)
                return forward(wave_bn)
            self.wait()  # one that makes room for this one may still be running
            self.recordings.keep(key, recording)
        self._fill(recording.samples, wave_bn)
        recording.launch()
        hidden, logits = recording.results
        return self._copy(hidden), self._copy(logits)

    def forget(self) -> None:
        """Drop every recording: what they read has changed."""
        with self.lock:
            self.wait()
            self.recordings.clear()

    def _record(self, capture: Capture, forward: Forward, wave_bn: Array, weights: Any) -> Recording | None:
        """Run ``forward`` in a pool of its own, which then has every place that it needs, and again to record it.

        None where the device has no room for that, or the driver breaks the recording off. A pool that is full gives up
        the places on its shelves, but kernels put down already would write to them: so what asked for memory while it
        was recorded does not count either.
        """
        own, shared = new_pool(), self.pool
        self.pool = own
        try:
            samples = own.take(*wave_bn.shape)
            self._fill(samples, wave_bn)
            forward(samples)
            asked = own.asked
            results: list[Any] = []
            launch = capture(self.stream, lambda: results.extend(forward(samples)))
        except MemoryError:
            return None
        except Exception as error:  # numba's errors and cuda.core's share no class; what else is wrong will come again
            warnings.warn(f"a pass could not be recorded as a CUDA graph and is slower: {error}", stacklevel=2)
            return None
        finally:
            self.pool = shared
        if own.asked != asked:
            return None
        hidden, logits = results
        return Recording(samples, (hidden, logits), launch, own, weights)

    def _fill(self, target: DeviceArray, array: Array) -> None:
        array = np.ascontiguousarray(array, np.float32)
        self.sent.append(array)
        target.data.copy_to_device(array, stream=self.stream)

    def _copy(self, source: DeviceArray | None) -> DeviceArray | None:
        if source is None:
            return None
        out = self.pool.take(*source.shape)
        out.data.copy_to_device(source.data, stream=self.stream)
        return out
