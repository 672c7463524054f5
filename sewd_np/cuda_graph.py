"""CUDA graphs: a short clip's pass recorded once and replayed with new samples.

A pass of the tiny shape is over a hundred kernels. Python needs tens of microseconds to start each; the GPU, for a
clip of a few seconds, less to run it. Recorded as a graph, all of them start with one call. A graph is bound to the
places in memory that it was recorded with: so each has a pool of its own, samples are copied in to where it reads them,
and results are copied out of where it leaves them.

A pass is recorded when a shape comes the second time: a list of recordings of all different lengths records nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from sewd_np.cuda_memory import DeviceArray, Pool

Work = Callable[[], Any]
# capture(stream, work): let work() put its kernels down instead of running them; returns what runs them.
Capture = Callable[[Any, Work], Callable[[], None]]

KEPT = 8  # graphs: each holds the memory of a pass, about 300 MB for 90 s of the tiny shape
REMEMBERED = 64  # shapes seen once


def capture_graph(stream: Any, work: Work) -> Callable[[], None]:
    """``Capture`` by the driver: what ``work`` launches on ``stream`` becomes a graph; the result launches it there."""
    from cuda.core import Stream

    own = Stream.from_handle(int(stream.handle))
    # "relaxed": numba may give memory back to the driver, and a place may be missing; the other modes forbid both.
    builder = own.create_graph_builder().begin_building("relaxed")
    try:
        work()
    finally:
        builder.end_building()
    graph = builder.complete()

    def launch() -> None:
        graph.launch(own)

    return launch


class Recording(NamedTuple):
    """A recorded pass: where it reads its samples, where it leaves its results, how to run it; and what it needs alive.

    ``owner``, the weights, is the object whose id is in the key: held, so that no other object can come by the same id.
    """

    samples: DeviceArray
    results: tuple[DeviceArray | None, DeviceArray | None]  # hidden states and logits
    launch: Callable[[], None]
    pool: Pool
    owner: Any


class Recordings:
    """The recorded passes of one ``Device``, the longest unused one given up for a new one."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Hashable, Recording] = OrderedDict()
        self.seen: OrderedDict[Hashable, bool] = OrderedDict()  # whether recording it may be tried

    def find(self, key: Hashable) -> Recording | None:
        """The recording of ``key``, now the most recently used."""
        if key not in self.kept:
            return None
        self.kept.move_to_end(key)
        return self.kept[key]

    def comes_again(self, key: Hashable) -> bool:
        """Whether ``key`` was asked about before and not refused since; remembered from now on."""
        again = self.seen.get(key, False)
        self.seen.setdefault(key, True)
        self.seen.move_to_end(key)
        if len(self.seen) > REMEMBERED:
            self.seen.popitem(last=False)
        return again

    def refuse(self, key: Hashable) -> None:
        """``key`` cannot be recorded: it is not tried again while remembered, for every attempt costs two passes."""
        self.seen[key] = False

    def keep(self, key: Hashable, recording: Recording) -> None:
        """Add a recording, dropping the one unused for longest if there are KEPT already."""
        self.kept[key] = recording
        if len(self.kept) > KEPT:
            self.kept.popitem(last=False)

    def clear(self) -> None:
        """Forget everything; the memory goes back to the driver."""
        self.kept.clear()
        self.seen.clear()
