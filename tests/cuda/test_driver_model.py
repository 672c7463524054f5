"""The CUDA backend on a driver that runs no kernel: copies, memory, graphs, threads, and what kernels are given.

Numba, its compiler and cuda.core are the real ones; only the driver below them is not (``pretended_driver.c``). So
numbers mean nothing here, and everything else does: these tests are about what the host asks for. After each of them
nothing may have been asked that a real driver or GPU would refuse, or do wrong without a word.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba import cuda

import sewd_np
from sewd_np import cuda_kernels
from sewd_np.backend import device_operations
from sewd_np.cuda_device import free_bytes
from sewd_np.cuda_graph import KEPT, capture_graph
from sewd_np.cuda_launch import Device, open_device
from sewd_np.trace import Trace, points
from tests.cuda.cases import noise
from tests.cuda.pretended import Counts, break_captures, counts, forget_trouble, free, set_capacity

Array = np.ndarray
RNG = np.random.default_rng
GIGABYTE = 1 << 30


@pytest.fixture(autouse=True)
def room() -> None:
    set_capacity(16 * GIGABYTE)


@pytest.fixture(scope="module")
def bundled() -> Any:
    return sewd_np.load("an4", backend="cuda")


def on_new_device(model: Any, device: Device | None = None) -> Any:
    """The same model with a stream, memory and recordings of its own."""
    return type(model)(model.config, model.params, device_operations(device or open_device()), model.processor)


def queue_of(model: Any) -> Any:
    return model.ops.run.__self__


def give_back() -> None:
    """What numba has been told to free, and does in its own time."""
    cuda.current_context().memory_manager.deallocations.clear()


def asked(before: Counts) -> Counts:
    """What was asked since ``before``."""
    return Counts(*(now - then for now, then in zip(counts(), before, strict=True)))


def test_samples_enter_once_and_logits_leave_once(bundled: Any) -> None:
    """A first pass of a shape launches its kernels, the second records them, later ones launch the recording."""
    model = on_new_device(bundled)
    before = counts()
    assert model(noise(16_000)).logits.shape == (1, 49, 32)
    first = asked(before)
    assert first.launches > 40 and first.graph_launches == 0
    assert first.to_host == 1 and first.to_device <= 2 and first.on_device == 0  # rows of the position table, once
    before = counts()
    model(noise(16_000, seed=1))
    second = asked(before)
    assert second.launches == 2 * first.launches and second.graph_kernels == first.launches
    before = counts()
    model(noise(16_000, seed=2))
    later = asked(before)
    assert later.launches == 0 and later.graph_kernels == first.launches and later.held == 0
    assert (later.to_device, later.on_device, later.to_host) == (1, 1, 1)


def test_a_thousand_calls_take_no_more_memory(bundled: Any) -> None:
    """Of four lengths, each recorded; and of any lengths, whose arrays come from the pool's shelves."""
    model = on_new_device(bundled)
    waves = [noise(16_000 + 4_000 * i) for i in range(4)]
    for number in range(1000):
        model(waves[number % 4])
        if number == 20:
            before = counts()
    assert asked(before).held == 0 and asked(before).launches == 0
    pool = queue_of(model).pool
    for seed in range(200):
        model(noise(int(RNG(seed).integers(720, 32_000))))
        if seed == 100:
            held = pool.held
    assert pool.held <= 1.1 * held  # places come in sizes an eighth apart: a hundred lengths have met nearly all


def test_long_and_short_and_padded(bundled: Any) -> None:
    """One minute and two frames, batches with lengths of their own, each kind of padding, twice and once more."""
    model = on_new_device(bundled)
    mask = (np.arange(48_000) < np.array([48_000, 30_001, 1_200])[:, None]).astype(np.int32)
    for _ in range(3):
        assert model(noise(720)).logits.shape == (1, 2, 32)
        assert model(noise(960_000)).logits.shape == (1, 2999, 32)
        for padding in ("transformers", "original", "alone"):
            assert model(noise(48_000, 3), mask, padding=padding).logits.shape == (3, 149, 32)


def test_everything_inside_can_be_seen_and_changed(bundled: Any) -> None:
    model, trace = on_new_device(bundled), Trace()
    model(noise(16_000), trace=trace)
    assert list(trace) == list(points(model.config, "ctc"))
    out = model(noise(16_000), output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 6 and len(out.hidden_states) == 7
    changed = model(noise(16_000), edit=sewd_np.ablate.drop_p2c())
    assert changed.logits.shape == out.logits.shape


def test_old_recordings_make_room_for_new_ones(bundled: Any) -> None:
    model = on_new_device(bundled)
    for number in range(KEPT + 3):
        for _ in range(3):
            model(noise(16_000 + 640 * number))
    assert len(queue_of(model).recordings.kept) == KEPT
    for _ in range(3):  # the first one was given up: it is recorded anew
        model(noise(16_000))


def test_transcribing_and_classifying_many(bundled: Any) -> None:
    recordings = [noise(int(RNG(seed).integers(4_000, 40_000)), seed=seed)[0] for seed in range(9)]
    for batch_size in (1, 4):
        assert len(sewd_np.transcribe(recordings, on_new_device(bundled), batch_size=batch_size)) == 9
    classifier = sewd_np.load("keywords", backend="cuda")
    for _ in range(3):
        assert [len(labels) for labels in sewd_np.classify(recordings, model=classifier, top_k=2)] == [2] * 9


def test_threads_share_a_model_and_have_their_own(bundled: Any) -> None:
    """And Numba's hints about small grids, which are right and of no use here, reach nobody."""
    shared, got = on_new_device(bundled), []

    def work(member: int, model: Any) -> None:
        for turn in range(8):
            got.append(model(noise(16_000 + 1_600 * ((member + turn) % 3))).logits.shape[1])

    models = [shared, shared, on_new_device(bundled), on_new_device(bundled)]
    members = [threading.Thread(target=work, args=pair) for pair in enumerate(models)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for member in members:
            member.start()
        for member in members:
            member.join()
    assert len(got) == 4 * 8, "a thread that failed leaves gaps"
    assert not [str(warning.message) for warning in said]


def test_a_model_gives_its_memory_back(bundled: Any) -> None:
    gc.collect()
    before = counts()
    model = on_new_device(bundled)
    for _ in range(3):
        model(noise(16_000))
    assert asked(before).held > 5_000_000
    del model
    gc.collect()
    give_back()
    assert asked(before).held <= 0


def test_a_recording_that_breaks_off_costs_nothing_but_speed(bundled: Any) -> None:
    model = on_new_device(bundled)
    model(noise(16_000))
    break_captures(True)
    try:
        with pytest.warns(UserWarning, match="could not be recorded as a CUDA graph"):
            assert model(noise(16_000)).logits.shape == (1, 49, 32)
    finally:
        break_captures(False)
    before = counts()
    model(noise(16_000))
    assert asked(before).graph_launches == 0 and asked(before).launches > 40


def test_no_room(bundled: Any) -> None:
    """Shelves and recordings are given up for what needs the room; without any, one sentence, and all goes on."""
    model = on_new_device(bundled)
    queue = queue_of(model)
    for samples in (240_000, 245_000, 250_000, 255_000):
        for _ in range(3):
            model(noise(samples))
    assert len(queue.recordings.kept) == 4
    gc.collect()
    give_back()
    set_capacity(counts().held)  # the shelves hold what 16 s need, and each recording as much; a minute needs more
    assert model(noise(960_000)).logits.shape[1] == 2999
    assert not queue.recordings.kept
    with pytest.raises(MemoryError, match=r"needs about .* GB at once, but .* GB are free|no room for another .* GB"):
        model(noise(4_800_000))
    set_capacity(16 * GIGABYTE)
    for _ in range(3):
        assert model(noise(16_000)).logits.shape == (1, 49, 32)


def test_what_is_free_is_what_the_driver_says() -> None:
    set_capacity(counts().held + 5_000_000)
    assert free_bytes(cuda) == 5_000_000


def test_without_recordings_every_pass_is_launched(bundled: Any) -> None:
    model = on_new_device(bundled, Device())
    before = counts()
    for _ in range(3):
        model(noise(16_000))
    assert asked(before).graph_launches == 0 and asked(before).launches % 3 == 0


def test_the_driver_would_notice() -> None:
    """The test of the tests: what is wrong is trouble, so that no trouble means something."""
    do_wrong_things()
    gc.collect()
    give_back()
    forget_trouble()


def do_wrong_things() -> None:
    device = open_device()
    x, y = (cuda.device_array((4, 8), np.float32, stream=device.stream) for _ in range(2))

    def is_trouble(action: Callable[[], Any]) -> bool:
        before = counts().trouble
        action()
        return counts().trouble > before

    def work(stream: Any = device.stream) -> None:
        cuda_kernels.activate(stream, x, None, "gelu", y)

    assert not is_trouble(work)
    assert is_trouble(lambda: work(cuda.default_stream()))
    assert is_trouble(lambda: capture_graph(device.stream, lambda: y.copy_to_host(stream=device.stream)))
    replay = capture_graph(device.stream, work)
    assert not is_trouble(replay)
    address = x.gpu_data.device_pointer_value
    assert not is_trouble(lambda: free(address)) and is_trouble(lambda: free(address))
    assert is_trouble(work) and is_trouble(replay)  # both read memory that was freed
    assert is_trouble(lambda: x.copy_to_device(np.zeros((4, 8), np.float32), stream=device.stream))
