"""The CUDA backend's side on the processor, without a GPU, a simulator or the extra.

Refusals in one sentence, memory handed out again, when passes are recorded, and how cuBLAS is called.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sewd_np import backend, cuda_device, cuda_memory
from sewd_np.cuda_cublas import DEFAULT_MATH, OP_N, WORKSPACE, Cublas, check, declare, find_library, version
from sewd_np.cuda_graph import KEPT, REMEMBERED, Recordings, capture_graph
from sewd_np.cuda_memory import Pool, place_size

Array = np.ndarray


# ----------------------------------------------------------------------------- refusals


def machine(
    error: str | None = None,
    available: bool = True,
    capability: tuple[int, int] = (9, 0),
    driver: tuple[int, int] = (13, 0),
    allocation: Exception | None = None,
) -> Any:
    """Numba's ``cuda`` on a machine that has this GPU, or none."""

    def device_array(numbers: int, dtype: Any) -> Array:
        if allocation is not None:
            raise allocation
        return np.empty(numbers, dtype)

    memory = SimpleNamespace(free=3_000_000_000, total=80_000_000_000)
    return SimpleNamespace(
        is_available=lambda: available,
        cuda_error=lambda: error,
        cudadrv=SimpleNamespace(driver=SimpleNamespace(get_version=lambda: driver)),
        get_current_device=lambda: SimpleNamespace(name=b"NVIDIA H200", compute_capability=capability),
        current_context=lambda: SimpleNamespace(get_memory_info=lambda: memory),
        device_array=device_array,
    )


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"available": False, "error": "\nCUDA driver library cannot be found.\n"}, "no NVIDIA driver was found"),
        ({"available": False, "error": "Call to cuInit results in CUDA_ERROR_NO_DEVICE (100)"}, "finds no GPU"),
        ({"available": False, "error": "Call to cuInit in\nCUDA_ERROR_UNKNOWN (999)"}, r"does not start \(Call"),
        ({"available": False}, "no CUDA 13 toolkit was found; install it with pip install 'sewd-np\\[cuda\\]'"),
        ({"driver": (12, 4)}, "supports CUDA 12.4 and 13.0 is needed; update the driver"),
        ({"capability": (7, 0)}, "NVIDIA H200 has compute capability 7.0 and 7.5 or newer is needed"),
    ],
)
def test_a_machine_that_cannot_is_refused_in_one_sentence(found: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as refusal:
        cuda_device.require_gpu(machine(**found))
    text = str(refusal.value)
    assert text.startswith("backend is 'cuda', but ") and text.endswith("to run on the processor.")
    assert "\n" not in text


def test_a_machine_that_can_is_described() -> None:
    cuda = machine()
    cuda_device.require_gpu(cuda)
    said = cuda_device.describe(cuda, "cuBLAS 13.0.2")
    assert said["GPU"] == "NVIDIA H200, compute capability 9.0"
    assert said["GPU memory"] == "3.0 GB free of 80.0 GB"
    assert said["driver"] == "supports CUDA 13.0"
    assert said["matrix products"] == "cuBLAS 13.0.2"
    assert cuda_device.free_bytes(cuda) == 3_000_000_000


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"its packages are not installed; .* pip install 'sewd-np\[cuda"):
        backend.get_operations("cuda")


def test_what_the_backend_does_not_take() -> None:
    with pytest.raises(ValueError, match="dtype is float64; backend 'cuda' computes in float32"):
        backend.get_operations("cuda", np.float64)
    with pytest.raises(ValueError, match="threads is given for backend 'cuda'"):
        backend.get_operations("cuda", threads=2)
    with pytest.raises(ValueError, match="precision is given for backend 'cuda'"):
        backend.get_operations("cuda", precision="highest")


def test_out_of_memory_says_what_was_asked_and_what_is_free() -> None:
    full = Exception("CUDA_ERROR_OUT_OF_MEMORY")
    full.code = 2  # type: ignore[attr-defined]
    with pytest.raises(MemoryError) as refusal:
        cuda_device.allocate(machine(allocation=full), 2_500_000_000)
    assert "no room for another 10.00 GB: 3.00 of its 80.0 GB are free; cut the recording" in str(refusal.value)
    other = RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(RuntimeError, match="ILLEGAL"):
        cuda_device.allocate(machine(allocation=other), 1)
    assert cuda_device.allocate(machine(), 7).shape == (7,)


# ------------------------------------------------------------------------------- memory


def test_places_waste_an_eighth_at_most() -> None:
    for size in [*range(1, 3000), 10**6 + 1, 123_456_789]:
        place = place_size(size)
        assert size <= place <= max(size * 9 / 8, cuda_memory.SMALLEST)
        assert place_size(place) == place and place % 4 == 0


def test_memory_comes_back_and_is_handed_out_again() -> None:
    pool = Pool(lambda numbers: np.empty(numbers, np.float32))
    first = pool.take(3, 5, 40)
    assert first.shape == (3, 5, 40) and first.data.flags.c_contiguous
    view = first.reshape(15, 40)
    memory = first.data.ctypes.data
    del first
    assert pool.take(600).data.ctypes.data != memory, "a view still holds it"
    del view
    again = pool.take(601)
    assert again.data.ctypes.data == memory
    asked = []
    for length in range(1000):
        kept = [pool.take(2, 40 + length % 13, 8), pool.take(700)]
        assert kept[0].data.ctypes.data != kept[1].data.ctypes.data
        asked.append(pool.asked)
    assert asked[-1] == asked[26] < 13, "after two rounds of all lengths there is a place for every one"
    del kept, again
    assert pool.idle() == pool.held
    pool.release()
    assert pool.idle() == pool.held == 0


def test_memory_that_a_cycle_held_is_not_freed_with_it() -> None:
    """The collector runs the finalizers of what it finds before ``__del__``: memory would come to its shelf freed."""

    class Pointer:
        """As numba's: the GPU's memory is freed with it, whoever finds it."""

        def __init__(self, numbers: int) -> None:
            weakref.finalize(self, freed.append, numbers)

    class OnDevice:
        def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, gpu_data: Pointer) -> None:
            self.shape, self.dtype, self.gpu_data = shape, np.dtype(dtype), gpu_data

    freed: list[int] = []
    pool = Pool(lambda numbers: OnDevice((numbers,), (4,), np.float32, Pointer(numbers)))
    cycle: list[Any] = [pool.take(700)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pool.idle() == pool.held and not freed
    pool.release()
    assert freed == [704] and pool.held == 0


def test_a_full_device_gets_back_what_lies_idle() -> None:
    room = 3000

    def allocate(numbers: int) -> Array:
        if pool.held + numbers > room:
            raise MemoryError("full")
        return np.empty(numbers, np.float32)

    pool = Pool(allocate)
    del_me = [pool.take(1000), pool.take(500)]
    del del_me
    big = pool.take(2048)  # fits only without the two
    assert pool.held == 2048
    with pytest.raises(MemoryError, match="full"):
        pool.take(2048)
    del big
    assert pool.take(2048).shape == (2048,)


# ------------------------------------------------------------------------------- graphs


def test_a_shape_is_recorded_when_it_comes_again() -> None:
    recordings: Any = Recordings()
    assert not recordings.comes_again("a") and recordings.comes_again("a")
    for number in range(REMEMBERED):
        assert not recordings.comes_again(number)
    assert not recordings.comes_again("a"), "forgotten among so many others"
    assert recordings.find("a") is None
    for number in range(KEPT):
        recordings.keep(number, f"recording {number}")
    assert recordings.find(0) == "recording 0"
    recordings.keep("new", "new recording")
    assert recordings.find(1) is None and recordings.find(0) is not None, "the longest unused one made room"
    assert len(recordings.kept) == KEPT and isinstance(recordings.kept, OrderedDict)
    recordings.clear()
    assert recordings.find(0) is None and not recordings.comes_again("new")
    recordings.refuse("new")
    assert not recordings.comes_again("new"), "one attempt is enough"
    recordings.clear()
    assert not recordings.comes_again("new") and recordings.comes_again("new")


class FakeBuilder:
    """cuda.core's GraphBuilder as far as ``capture_graph`` uses it; ``said`` is the order of calls."""

    def __init__(self, said: list[Any]) -> None:
        self.said = said

    def begin_building(self, mode: str) -> FakeBuilder:
        self.said.append(("begin", mode))
        return self

    def end_building(self) -> FakeBuilder:
        self.said.append("end")
        return self

    def complete(self) -> Any:
        self.said.append("complete")
        return SimpleNamespace(launch=lambda stream: self.said.append(("launch", stream.handle)))


def test_capture_puts_the_work_between_begin_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    core = SimpleNamespace(
        Stream=SimpleNamespace(
            from_handle=lambda handle: SimpleNamespace(handle=handle, create_graph_builder=lambda: FakeBuilder(said))
        )
    )
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(core=core))
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    launch = capture_graph(SimpleNamespace(handle=77), lambda: said.append("work"))
    assert said == [("begin", "relaxed"), "work", "end", "complete"]
    launch()
    launch()
    assert said[4:] == [("launch", 77)] * 2
    said.clear()

    def fails() -> None:
        raise MemoryError("full")

    with pytest.raises(MemoryError, match="full"):
        capture_graph(SimpleNamespace(handle=77), fails)
    assert said == [("begin", "relaxed"), "end"], "a stream must not be left recording"


def test_a_new_stream_does_not_wait_for_the_default_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    def device(number: int) -> Any:
        made = SimpleNamespace(handle=77)
        return SimpleNamespace(
            set_current=lambda: said.append(number), create_stream=lambda options: said.append(options) or made
        )

    core = SimpleNamespace(Device=device, StreamOptions=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(core=core))
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    numba_cuda = SimpleNamespace(
        current_context=lambda: said.append("context"),
        get_current_device=lambda: SimpleNamespace(id=3),
        external_stream=lambda handle: SimpleNamespace(handle=handle),
    )
    stream = cuda_device.new_stream(numba_cuda)
    assert said == ["context", 3, SimpleNamespace(nonblocking=True)]
    assert stream.handle == 77 and stream.made.handle == 77, "what made it lives as long as the stream"


def test_a_shape_of_memory_is_a_view() -> None:
    memory = np.arange(300, dtype=np.float32)
    view = cuda_memory.shaped(memory, 2, 3, 4)
    assert view.shape == (2, 3, 4) and np.shares_memory(view, memory)
    assert cuda_memory.shaped(view, 24).shape == (24,)


# ------------------------------------------------------------------------------- cuBLAS


class OnHost:
    """A host array that says where it lies as a device array does."""

    def __init__(self, array: Array) -> None:
        self.array, self.shape = array, array.shape
        self.__cuda_array_interface__ = {"data": (array.ctypes.data, False)}


class FakeCublas:
    """The library's C functions on host memory, column by column as the real ones count."""

    def __init__(self) -> None:
        self.said: list[Any] = []

        def function(name: str, work: Any) -> Any:
            def call(*arguments: Any) -> int:
                status = work(*arguments)
                self.said.append(name)
                return status or 0

            return call

        def create(handle: Any) -> None:
            handle._obj.value = 42

        def property_of(which: int, value: Any) -> None:
            value._obj.value = (13, 0, 2)[which]

        self.cublasCreate_v2 = function("create", create)
        self.cublasDestroy_v2 = function("destroy", lambda handle: None)
        self.cublasGetProperty = function("property", property_of)
        self.cublasSetMathMode = function("math", lambda handle, mode: self.said.append(mode))
        self.cublasSetStream_v2 = function("stream", lambda handle, stream: self.said.append(stream))
        self.cublasSetWorkspace_v2 = function("workspace", lambda handle, at, size: self.said.append(size))
        self.cublasSgemm_v2 = function("sgemm", self.sgemm)

    @staticmethod
    def sgemm(handle: Any, ta: int, tb: int, m: int, n: int, k: int, alpha: Any, a: int, lda: int, b: int, ldb: int,
              beta: Any, c: int, ldc: int) -> int:  # fmt: skip
        if handle.value != 42 or ta != OP_N or tb != OP_N or lda < m or ldb < k or ldc < m:
            return 7  # CUBLAS_STATUS_INVALID_VALUE

        def columns(at: int, leading: int, count: int) -> Array:
            flat = np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_float)), (count, leading))
            return flat.T

        result = columns(a, lda, k)[:m] @ columns(b, ldb, n)[:k]
        columns(c, ldc, n)[:m] = alpha._obj.value * result
        return 0 if beta._obj.value == 0 else 7


def test_cublas_is_set_up_and_multiplies_by_rows() -> None:
    library = declare(FakeCublas())
    assert version(library) == "13.0.2"
    library.said.clear()
    cublas = Cublas(library, SimpleNamespace(handle=99), OnHost(np.empty(8, np.float32)))
    # Full float32; and the workspace after the stream, which would take it away.
    assert library.said == ["create", DEFAULT_MATH, "math", 99, "stream", WORKSPACE, "workspace"]
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 3, 5), np.float32), rng.standard_normal((5, 7), np.float32)
    out = np.full((2, 3, 7), np.nan, np.float32)
    cublas.product(OnHost(x), OnHost(weight), OnHost(out))
    np.testing.assert_allclose(out, x @ weight, atol=1e-6)
    del cublas
    assert library.said[-1] == "destroy"


def test_a_cublas_error_is_raised_with_its_number() -> None:
    with pytest.raises(RuntimeError, match="cublasSgemm returned cuBLAS status 13; 0 was expected"):
        check(13, "cublasSgemm")


@pytest.mark.parametrize("fault", [RuntimeError("no such library"), OSError("not for this machine")])
def test_no_cublas_is_no_error(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def load(name: str) -> Any:
        assert name == "cublas"
        raise fault

    pathfinder = SimpleNamespace(load_nvidia_dynamic_lib=load)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(pathfinder=pathfinder))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", pathfinder)
    assert find_library() is None
