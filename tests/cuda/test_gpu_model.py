"""The CUDA backend on a GPU: parity with the CPU backend and PyTorch, long recordings, memory, graphs, threads.

Nothing here asks for a certain GPU; `make test-gpu` prints which one it was.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import sewd_np
from benchmarks import peers
from sewd_np.backend import device_operations, get_operations
from sewd_np.clips import clip
from sewd_np.cuda_cublas import find_library
from sewd_np.cuda_device import free_bytes
from sewd_np.cuda_graph import KEPT, capture_graph
from sewd_np.cuda_intrinsics import cuda
from sewd_np.cuda_launch import Device, open_device
from sewd_np.trace import Trace, compare, points
from sewd_np.transcribe import hear
from tests.cuda.cases import error

pytestmark = pytest.mark.gpu
Array = np.ndarray

# By the largest logit. On the CPU ours and PyTorch's differ by 3e-6 of it (tiny and base, up to 2 s). Random weights
# attend to all frames alike, so a mistake in few of them hardly shows: `test_gpu_attention.py` looks at that kernel
# with scores that matter.
TOLERANCE = 2e-5
ALONE = 1e-5  # the same kernels in another batch, graph or thread


@pytest.fixture(scope="module", autouse=True)
def full_float32() -> Iterator[None]:
    """TF32 off on PyTorch's side as it is on ours."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any, Any]:
    """transformers' tiny, ours on the GPU, ours on the CPU."""
    reference = peers.transformers_model("tiny")
    return reference, peers.our_model(reference, "cuda"), on_the_cpu(reference)


def on_the_cpu(reference: Any) -> Any:
    """Ours in float32 everywhere, whatever unit the processor has."""
    return peers.our_model(reference, "numba", precision="highest")


def on_device(model: Any, device: Device) -> Any:
    """The same model on another device object."""
    return type(model)(model.config, model.params, device_operations(device))


@pytest.mark.parametrize("shape", peers.SHAPES)
def test_published_shapes(shape: str) -> None:
    reference = peers.transformers_model(shape)
    gpu, cpu = peers.our_model(reference, "cuda"), on_the_cpu(reference)
    for seconds in (0.1, 3.3, 10):
        wave_bn = np.concatenate([peers.audio(seconds, seed) for seed in range(2)])
        with torch.inference_mode():
            want = reference(torch.from_numpy(wave_bn)).logits.numpy()
        got = gpu(wave_bn).logits
        assert error(got, want) <= TOLERANCE
        assert error(got, cpu(wave_bn).logits) <= TOLERANCE


def test_every_trace_point(tiny: tuple[Any, Any, Any]) -> None:
    _, gpu, cpu = tiny
    mine, theirs = Trace(), Trace()
    gpu(peers.audio(2), trace=mine)
    cpu(peers.audio(2), trace=theirs)
    assert list(mine) == list(points(gpu.config, "ctc"))
    assert {row.status for row in compare(mine, theirs, TOLERANCE)} == {"OK"}


@pytest.mark.parametrize("padding", ["transformers", "original"])
def test_padded_batches(tiny: tuple[Any, Any, Any], padding: Any) -> None:
    _, gpu, cpu = tiny
    wave_bn = np.concatenate([peers.audio(5, seed) for seed in range(3)])
    mask = (np.arange(80_000) < np.array([80_000, 30_001, 400 * 3])[:, None]).astype(np.int32)
    mine, want = (model(wave_bn, mask, padding=padding).logits for model in (gpu, cpu))
    assert error(mine, want) <= TOLERANCE


def test_recordings_of_a_batch_are_as_alone(tiny: tuple[Any, Any, Any]) -> None:
    _, gpu, _ = tiny
    lengths = [80_000, 31_234, 4_000, 64_321]
    wave_bn = np.concatenate([peers.audio(5, seed) for seed in range(4)])
    mask = (np.arange(80_000) < np.array(lengths)[:, None]).astype(np.int32)
    together = gpu(wave_bn, mask, padding="alone").logits
    for b, length in enumerate(lengths):
        alone = gpu(wave_bn[b : b + 1, :length]).logits[0]
        assert error(together[b, : len(alone)], alone) <= ALONE


def test_transcripts_do_not_depend_on_the_batch() -> None:
    model = sewd_np.load("an4", backend="cuda")
    speech = hear(model, clip())
    recordings = [speech, speech[8_000:], speech[:20_000], speech[4_000:30_000], speech[:12_345]]
    alone = [sewd_np.transcribe(recording, model).text for recording in recordings]
    for batch_size in (2, 5, 8):
        assert [t.text for t in sewd_np.transcribe(recordings, model, batch_size=batch_size)] == alone
    assert alone[0] == sewd_np.transcribe(speech, "an4", backend="numba").text


def test_ten_minutes_in_one_piece(tiny: tuple[Any, Any, Any]) -> None:
    _, gpu, cpu = tiny
    wave_bn = peers.audio(600)
    assert error(gpu(wave_bn).logits, cpu(wave_bn).logits) <= TOLERANCE


def test_our_own_products(tiny: tuple[Any, Any, Any]) -> None:
    """The same model without cuBLAS; where the machine has none, both are the same."""
    _, gpu, cpu = tiny
    tiled = on_device(gpu, Device(None, capture_graph))
    assert error(tiled(peers.audio(3)).logits, cpu(peers.audio(3)).logits) <= TOLERANCE


def test_a_replayed_pass_is_the_pass(tiny: tuple[Any, Any, Any]) -> None:
    _, gpu, _ = tiny
    device, plain_device = open_device(), Device(find_library())
    replayed, plain = on_device(gpu, device), on_device(gpu, plain_device)
    for seed in range(5):
        wave_bn = peers.audio(2, seed)
        assert error(replayed(wave_bn).logits, plain(wave_bn).logits) <= ALONE
    assert len(device.queue.recordings.kept) == 1 and not plain_device.queue.recordings.kept
    for hundredths in range(KEPT + 2):
        for _ in range(3):
            replayed(peers.audio(1 + hundredths / 100))
    assert len(device.queue.recordings.kept) == KEPT
    wave_bn = peers.audio(2, 9)
    assert error(replayed(wave_bn).logits, plain(wave_bn).logits) <= ALONE


def test_a_thousand_calls_take_no_more_memory(tiny: tuple[Any, Any, Any]) -> None:
    _, gpu, _ = tiny
    inputs = [peers.audio(1 + 0.25 * (i % 4)) for i in range(4)]
    kept = [gpu(wave_bn).logits for wave_bn in inputs]
    copies = [logits.copy() for logits in kept]
    for number in range(1000):
        gpu(inputs[number % 4])
        if number == 20:
            before = free_bytes(cuda)
    assert free_bytes(cuda) >= before  # memory of earlier tests may come back meanwhile: numba returns it late
    for logits, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(logits, copy)


def test_threads_share_a_model(tiny: tuple[Any, Any, Any]) -> None:
    _, gpu, _ = tiny
    inputs = [peers.audio(1 + 0.1 * (i % 3), seed=i) for i in range(12)]
    want = [gpu(wave_bn).logits for wave_bn in inputs]
    got: dict[int, Array] = {}
    members = [threading.Thread(target=lambda i=i: got.update({i: gpu(inputs[i]).logits})) for i in range(12)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    for i, logits in enumerate(want):
        assert error(got[i], logits) <= ALONE


def test_two_models_record_in_two_threads(tiny: tuple[Any, Any, Any]) -> None:
    """Each on a stream of its own: neither's copies and new memory disturb what the other is recording."""
    _, gpu, _ = tiny
    inputs = [peers.audio(1 + 0.1 * i, seed=i) for i in range(6)]
    want = [gpu(wave_bn).logits for wave_bn in inputs]
    models = [on_device(gpu, open_device()) for _ in range(2)]
    got: dict[tuple[int, int, int], Array] = {}

    def work(member: int) -> None:
        for i, wave_bn in enumerate(inputs):
            for turn in range(3):
                got[member, i, turn] = models[member](wave_bn).logits

    members = [threading.Thread(target=work, args=(member,)) for member in range(2)]
    for member in members:
        member.start()
    for member in members:
        member.join()
    assert len(got) == 2 * 6 * 3, "a thread that failed leaves gaps"
    for (_, i, _), logits in got.items():
        assert error(logits, want[i]) <= ALONE


def test_no_room_says_what_was_asked(tiny: tuple[Any, Any, Any]) -> None:
    _, gpu, _ = tiny
    with pytest.raises(MemoryError, match=r"needs about .* GB at once, but .* GB are free"):
        gpu(peers.audio(3600), output_attentions=True)
    device = open_device()
    with pytest.raises(MemoryError, match=r"the GPU has no room for another .* GB: .* are free"):
        device.queue.pool.take(10**12)
    assert gpu(peers.audio(1)).logits is not None


def test_choice_of_products_is_visible() -> None:
    said = get_operations("cuda").describe()
    assert said["matrix products"].startswith("cuBLAS " if find_library() else "our own")
    assert "compute capability" in said["GPU"]
