"""The CUDA backend in the simulator: every operation of the table, and whole small models, against NumPy.

Every launch goes through the race and divergence checks of ``fastsim``. Sizes are small: a simulated thread takes about
a millisecond.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numba import cuda
from numba.cuda.simulator.kernel import FakeCUDAKernel

import sewd_np
from sewd_np import cuda_attention, cuda_conv, cuda_cublas, cuda_gemm, cuda_queue, cuda_tiled_attention
from sewd_np.backend import NUMPY, Operations, get_operations
from sewd_np.config import SEWDConfig
from sewd_np.cuda_attention import relative_rows
from sewd_np.cuda_launch import Device
from sewd_np.cuda_memory import Pool
from sewd_np.model import SEWDForCTC, SEWDForSequenceClassification
from sewd_np.params import random_params
from sewd_np.trace import Trace
from tests.cuda.cases import (
    IN_COMPANY,
    OPTIONS,
    SMALL,
    assert_close,
    check_batch_is_as_alone,
    check_every_point,
    check_operation,
    chosen,
    mask_for,
    pair,
    waves,
)
from tests.operation_cases import Case
from tests.test_cuda_host import FakeCublas

Array = np.ndarray

PRODUCT_TILE = cuda_gemm.Tile(8, 8, 4, 4, 4, slices=1)  # 4 threads
FIRST_TILE = cuda_conv.FirstTile(fours=1, strips=8, own_frames=2)
ATTENTION_TILE = cuda_tiled_attention.Tile(side=4, rows=2, columns=2, chunk=4, resident=1)


@pytest.fixture(scope="module")
def device() -> Device:
    return Device()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few threads in place of hundreds, for whole models. The kernels' own tests vary tiles."""

    def scratch(*sizes: Any) -> int:
        return cuda_conv.encoder_room(*sizes, tile=FIRST_TILE).size

    monkeypatch.setattr(cuda_gemm, "choose_tile", lambda shape: PRODUCT_TILE)
    monkeypatch.setattr(cuda_conv, "feature_encoder", partial(cuda_conv.feature_encoder, tile=FIRST_TILE))
    monkeypatch.setattr(cuda_conv, "feature_encoder_scratch", scratch)
    attention_tile = lambda size, *_: ATTENTION_TILE if size % 4 == 0 else None  # noqa: E731
    monkeypatch.setattr(cuda_attention, "choose_tile", attention_tile)
    attention_parts = lambda tile, frames, _: 2 if tile is not None and frames > 10 else 1  # noqa: E731
    monkeypatch.setattr(cuda_attention, "choose_parts", attention_parts)


# ----------------------------------------------------------------------- single operations


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # a mean over no frames is NaN by definition
@pytest.mark.parametrize("case", chosen(), ids=lambda case: f"{case.operation}: {case.label}")
def test_operation(case: Case, device: Device) -> None:
    check_operation(case, device)


def test_every_operation_is_among_them() -> None:
    table = {field.name for field in dataclasses.fields(Operations)}
    plumbing = {"name", "one_by_one", "prepare", "from_numpy", "to_numpy", "run", "own_memory", "describe"}
    assert {case.operation for case in chosen()} == table - plumbing - {"attention_bytes"}


def test_every_method_has_the_signature_of_its_definition(device: Device) -> None:
    for field in dataclasses.fields(Operations):
        if field.name not in ("name", "one_by_one", "from_numpy", "to_numpy", "own_memory", "describe"):
            described = [
                [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
                for function in (getattr(device, field.name), getattr(NUMPY, field.name))
            ]
            assert described[0] == described[1], field.name


def test_relative_rows_are_cut_from_one_growing_table(device: Device) -> None:
    for frames in (1, 2, 30, 1024, 1025, 7, 1500):
        got = device.to_numpy(device.relative_index(frames, 8, 16, 8))
        np.testing.assert_array_equal(got, relative_rows(frames, 8, 16, 8))
    assert [len(table) for table in device.rows[8, 16, 8]] == [2 * 1024 - 1, 2 * 2048 - 1]


# ---------------------------------------------------------------------------- whole models


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", OPTIONS)
def test_every_option(case: str, device: Device) -> None:
    """Fused forms with a mask, and every trace point without one: each fires once and says what the definition says."""
    check_every_point(*pair(case, device))


@pytest.mark.parametrize("padding", ["transformers", "original"])
def test_as_launched_on_a_gpu(padding: Any, device: Device) -> None:
    """The tiles that a GPU gets, fused forms, padded and not."""
    numpy, gpu = pair("published", device)
    wave_bn = waves(numpy, 2, 13)
    mask = mask_for(wave_bn, [wave_bn.shape[1] - 5 * numpy.config.inputs_to_logits_ratio, wave_bn.shape[1]])
    assert_close(*(model(wave_bn, mask, padding=padding, output_hidden_states=True) for model in (gpu, numpy)))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", IN_COMPANY)
def test_recordings_of_a_batch_are_as_alone(case: str, device: Device) -> None:
    check_batch_is_as_alone(*pair(case, device))


@pytest.mark.usefixtures("small_tiles")
def test_spec_augment_edits_and_loss(device: Device) -> None:
    numpy, gpu = pair("published", device)
    wave_bn = waves(numpy, 2, 9)
    marks = np.random.default_rng(1).random((2, 9)) < 0.4
    labels = np.array([[3, 4, -100], [5, 5, 2]])
    mine, want = (model(wave_bn, labels=labels, mask_time_indices=marks) for model in (gpu, numpy))
    assert_close(mine, want)
    assert mine.loss == pytest.approx(want.loss, rel=1e-4)
    edit = {"*.layer.1.attention.self.c2p": np.zeros_like, "encoder.encoder.rel_embeddings": lambda x: 2 * x}
    assert_close(gpu(wave_bn, edit=edit), numpy(wave_bn, edit=edit))


@pytest.mark.usefixtures("small_tiles")
def test_products_by_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the library multiplies in every linear layer; bias and activation are our kernel's."""
    library = FakeCublas()
    monkeypatch.setattr(cuda_cublas, "declare", lambda library: library)
    monkeypatch.setattr(cuda_cublas, "address", lambda array: array._ary.ctypes.data)
    monkeypatch.setattr(cuda.stream, "handle", 0, raising=False)
    device = Device(library)
    assert device.products == "cuBLAS 13.0.2, float32, TF32 off"
    numpy, gpu = pair("classification", device)
    wave_bn = waves(numpy, 1, 9)
    assert_close(gpu(wave_bn), numpy(wave_bn))
    # feature projection, q·k·v, output and two of the feed-forward in each layer, upsample, projector, classifier
    assert library.said.count("sgemm") == 1 + 2 * 4 + 1 + 2
    assert "tiled" in Device().products


# ------------------------------------------------------------------- memory, graphs, threads


def record_launches(stream: Any, work: Callable[[], Any]) -> Callable[[], None]:
    """A stand-in for a CUDA graph: kernels that ``work`` launches are written down, not run, and run when replayed."""
    launches: list[tuple[Any, Any, Any, tuple[Any, ...]]] = []
    run = FakeCUDAKernel.__call__

    def write_down(kernel: Any, *args: Any) -> None:
        launches.append((kernel, kernel.grid_dim, kernel.block_dim, args))

    FakeCUDAKernel.__call__ = write_down
    try:
        work()
    finally:
        FakeCUDAKernel.__call__ = run

    def replay() -> None:
        for kernel, grid, block, args in launches:
            kernel[grid, block](*args)

    return replay


@pytest.mark.usefixtures("small_tiles")
def test_a_short_clip_is_recorded_and_replayed() -> None:
    recorded = []

    def capture(stream: Any, work: Callable[[], Any]) -> Callable[[], None]:
        recorded.append(stream)
        return record_launches(stream, work)

    device = Device(capture=capture)
    numpy, gpu = pair("weighted layer sum", device)
    inputs = [waves(numpy, 1, 9, seed=seed) for seed in range(4)]
    outputs = [gpu(wave_bn) for wave_bn in inputs]
    assert len(recorded) == 1 and len(device.queue.recordings.kept) == 1
    for wave_bn, out in zip(inputs, outputs, strict=True):
        assert_close(out, numpy(wave_bn))
    # What depends on more than samples and shape is not replayed, and a replay afterwards is still right.
    trace = Trace("*.probs")
    gpu(inputs[0], trace=trace)
    assert len(trace) == 2
    mask = mask_for(inputs[0], [inputs[0].shape[1] - 25])
    assert_close(gpu(inputs[0], mask), numpy(inputs[0], mask))
    assert gpu(inputs[0], output_hidden_states=True).hidden_states is not None
    assert_close(gpu(inputs[3]), numpy(inputs[3]))
    assert len(recorded) == 1
    # Other weights are another recording.
    first = gpu.weights
    gpu.weights = gpu.ops.prepare(random_params(gpu.config, gpu.head, seed=1), gpu.config)
    assert not device.queue.recordings.kept
    other = SEWDForSequenceClassification(gpu.config, random_params(gpu.config, gpu.head, seed=1), NUMPY)
    for _ in range(3):
        assert_close(gpu(inputs[0]), other(inputs[0]))
    gpu.weights = first
    assert_close(gpu(inputs[0]), numpy(inputs[0]))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("room", [0, 3, 10**9])
def test_a_pass_is_recorded_only_where_it_finds_room(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Room for so many arrays: for none, for some, for all, but then one is missing while the pass is recorded."""

    def new_pool() -> Pool:
        def allocate(numbers: int) -> Any:
            if pool.asked >= room:
                raise MemoryError("the GPU has no room")
            return cuda.device_array(numbers, np.float32)

        pool = Pool(allocate)
        return pool

    def capture(stream: Any, work: Callable[[], Any]) -> Callable[[], None]:
        device.queue.pool.release()
        return record_launches(stream, work)

    device = Device(capture=capture)
    numpy, gpu = pair("published", device)
    monkeypatch.setattr(cuda_queue, "new_pool", new_pool)
    wave_bn = waves(numpy, 1, 9)
    pool = device.queue.pool
    for _ in range(3):
        assert_close(gpu(wave_bn), numpy(wave_bn))
    assert not device.queue.recordings.kept and device.queue.pool is pool
    assert not device.queue.sent, "host arrays are let go once they have arrived"


@pytest.mark.usefixtures("small_tiles")
def test_a_recording_that_the_driver_breaks_off_is_not_tried_again() -> None:
    attempts = []

    def capture(stream: Any, work: Callable[[], Any]) -> Callable[[], None]:
        work()
        attempts.append(stream)
        raise OSError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")

    device = Device(capture=capture)
    numpy, gpu = pair("published", device)
    wave_bn, pool = waves(numpy, 1, 9), device.queue.pool
    assert_close(gpu(wave_bn), numpy(wave_bn))
    with pytest.warns(UserWarning, match="not be recorded as a CUDA graph and is slower: CUDA_ERROR_STREAM_CAPTURE"):
        assert_close(gpu(wave_bn), numpy(wave_bn))
    assert_close(gpu(wave_bn), numpy(wave_bn))
    assert len(attempts) == 1 and not device.queue.recordings.kept and device.queue.pool is pool


@pytest.mark.usefixtures("small_tiles")
def test_recordings_make_room_for_a_pass_that_finds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(capture=record_launches)
    numpy, gpu = pair("published", device)
    short, long = waves(numpy, 1, 5), waves(numpy, 1, 9)
    for _ in range(2):
        gpu(short)
    assert len(device.queue.recordings.kept) == 1
    pool = device.queue.pool
    allocate = pool.allocate

    def full_beside_recordings(numbers: int) -> Any:
        if device.queue.recordings.kept:
            raise MemoryError("the GPU has no room")
        return allocate(numbers)

    pool.release()
    monkeypatch.setattr(pool, "allocate", full_beside_recordings)
    with pytest.raises(MemoryError, match="the GPU has no room"):
        gpu(long, trace=Trace("*.layer.0", "*.layer.1"))  # starting again would let the points fire twice
    assert len(device.queue.recordings.kept) == 1
    pool.release()
    assert_close(gpu(long), numpy(long))
    assert not device.queue.recordings.kept


@pytest.mark.usefixtures("small_tiles")
def test_memory_does_not_grow_and_results_are_the_callers_own(device: Device) -> None:
    _, gpu = pair("published", device)
    inputs = [waves(gpu, 1, frames) for frames in (5, 6)]
    first = [gpu(wave_bn).logits for wave_bn in inputs]
    kept = [logits.copy() for logits in first]
    asked = device.queue.pool.asked
    for _ in range(3):
        for wave_bn in inputs:
            gpu(wave_bn)
    assert device.queue.pool.asked == asked
    for logits, copy in zip(first, kept, strict=True):
        np.testing.assert_array_equal(logits, copy)
    held = device.queue.pool.held
    del gpu
    assert device.queue.pool.idle() <= held
    device.queue.pool.release()
    assert device.queue.pool.held < held


@pytest.mark.usefixtures("small_tiles")
def test_threads_take_turns(device: Device) -> None:
    numpy, gpu = pair("published", device)
    inputs = [waves(numpy, 1, 5, seed=seed) for seed in range(3)]
    outputs: dict[int, Any] = {}
    members = [threading.Thread(target=lambda i=i: outputs.update({i: gpu(inputs[i])})) for i in range(3)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    for i, wave_bn in enumerate(inputs):
        assert_close(outputs[i], numpy(wave_bn))


@pytest.mark.usefixtures("small_tiles")
def test_no_room_on_the_device_is_one_sentence(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    _, gpu = pair("published", device)
    wave_bn = waves(gpu, 1, 9)
    ops = dataclasses.replace(gpu.ops, own_memory=lambda: 10_000)
    gpu.ops = ops
    with pytest.raises(MemoryError, match=r"on backend 'cuda' needs about .* but 0.0 GB are free; cut the recording"):
        gpu(waves(gpu, 1, 60), output_attentions=True)
    assert gpu(wave_bn).logits is not None, "the fused form needs no t × t memory"

    def full(numbers: int) -> Any:
        raise MemoryError("the GPU has no room")

    monkeypatch.setattr(device.queue.pool, "allocate", full)
    device.queue.pool.release()
    with pytest.raises(MemoryError, match="the GPU has no room"):
        gpu(wave_bn)


# -------------------------------------------------------------------------------- from the top


@pytest.mark.usefixtures("small_tiles")
def test_get_operations_and_batches_from_transcribe() -> None:
    ops = get_operations("cuda")
    assert ops.name == "cuda" and not ops.one_by_one
    processor = sewd_np.load("an4").processor
    config = SEWDConfig.from_dict({**SMALL, "vocab_size": 32, "num_hidden_layers": 1})
    model = SEWDForCTC(config, random_params(config, "ctc"), ops, processor)
    rng = np.random.default_rng(0)
    recordings = [rng.standard_normal(config.minimum_samples + extra).astype(np.float32) for extra in (90, 0, 300, 5)]
    alone = [sewd_np.transcribe(recording, model) for recording in recordings]
    assert sewd_np.transcribe(recordings, model, batch_size=3) == alone
