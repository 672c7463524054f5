"""The CUDA backend with its kernels as compiled, in the tiles that a GPU gets, on a machine without one.

Numba compiles each kernel to PTX as it does for a GPU; the pretended GPU runs that PTX, turned into C. So everything
counts here but the assembler, what a GPU does at the same time, and its speed.
"""

from __future__ import annotations

from typing import Any

import pytest

import sewd_np
from sewd_np import cuda_gemm
from sewd_np.clips import clip
from sewd_np.cuda_launch import Device, open_device
from sewd_np.trace import Trace, compare, points
from tests.cuda.cases import (
    IN_COMPANY,
    MODEL,
    assert_close,
    check_batch_is_as_alone,
    check_every_point,
    check_operation,
    chosen,
    error,
    mask_for,
    noise,
    pair,
    waves,
)
from tests.operation_cases import Case
from tests.test_cuda_host import FakeCublas


@pytest.fixture(scope="module")
def device() -> Device:
    return open_device()


# ------------------------------------------------------------------------------ small models


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # a mean over no frames is NaN by definition
@pytest.mark.parametrize("case", chosen(), ids=lambda case: f"{case.operation}: {case.label}")
def test_operation(case: Case, device: Device) -> None:
    check_operation(case, device)


@pytest.fixture
def one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """For products of small models, whose widths would get a dozen tiles, each compiled for seconds.

    The operations have had these above, and models of real widths get the GPU's choice below.
    """
    monkeypatch.setattr(cuda_gemm, "choose_tile", lambda shape: cuda_gemm.WIDE_TILES[2][0])


@pytest.mark.usefixtures("one_tile")
@pytest.mark.parametrize("case", IN_COMPANY)
def test_small_models(case: str, device: Device) -> None:
    numpy, gpu = pair(case, device)
    check_every_point(numpy, gpu)
    check_batch_is_as_alone(numpy, gpu)


@pytest.mark.usefixtures("one_tile")
def test_products_by_cublas() -> None:
    """A stand-in for the library multiplies what lies on the device, row by row, in every linear layer."""
    library = FakeCublas()
    numpy, gpu = pair("classification", Device(library))
    wave_bn = waves(numpy, 2, 9)
    assert_close(gpu(wave_bn), numpy(wave_bn))
    assert library.said.count("sgemm") == 1 + 2 * 4 + 1 + 2


# ------------------------------------------------------------------------------ bundled models


@pytest.fixture(scope="module")
def an4() -> tuple[Any, Any]:
    """The bundled model on the GPU and on the processor, in float32."""
    return sewd_np.load("an4", backend="cuda"), sewd_np.load("an4", backend="numba", precision="highest")


def test_every_point_of_the_bundled_model(an4: tuple[Any, Any]) -> None:
    """Weights of a real model, in the tiles that its widths get on a GPU."""
    traces = Trace(), Trace()
    for model, trace in zip(an4, traces, strict=True):
        model(noise(20_000), trace=trace)
    assert list(traces[0]) == list(points(an4[0].config, "ctc"))
    assert not [row for row in compare(*traces, MODEL) if row.status != "OK"]


def test_a_graph_and_one_launch_after_another_say_the_same(an4: tuple[Any, Any]) -> None:
    """The first pass of a length is launched, the second recorded, the third replayed, each with other sound."""
    gpu, cpu = an4
    for samples in (720, 16_000, 41_600):
        for seed in range(3):
            wave_bn = noise(samples, seed=seed)
            assert error(gpu(wave_bn).logits, cpu(wave_bn).logits) <= MODEL


@pytest.mark.parametrize("padding", ["transformers", "original", "alone"])
def test_padded_batches(an4: tuple[Any, Any], padding: Any) -> None:
    wave_bn = noise(48_000, 3)
    mask = mask_for(wave_bn, [48_000, 30_001, 1_200])
    mine, want = (model(wave_bn, mask, padding=padding).logits for model in an4)
    for b, frames in enumerate([149, 93, 3]):
        assert error(mine[b, :frames], want[b, :frames]) <= MODEL


def test_half_a_minute(an4: tuple[Any, Any]) -> None:
    """Beyond 510 frames, where tiles share one bucket."""
    gpu, cpu = an4
    wave_bn = noise(480_000)
    assert error(gpu(wave_bn).logits, cpu(wave_bn).logits) <= MODEL


def test_words_of_the_bundled_clips(an4: tuple[Any, Any]) -> None:
    """Many at once, from files to text and labels."""
    gpu, cpu = an4
    paths = [clip(name) for name in ("enter-six-two-four", "seven", "yes")]
    texts = [transcription.text for transcription in sewd_np.transcribe(paths, gpu, batch_size=3)]
    assert texts == [sewd_np.transcribe(path, cpu).text for path in paths]
    assert texts[0] == "ENTER SIX TWO FOUR"
    classifier = sewd_np.load("keywords", backend="cuda")
    labels = [found[0].label for found in sewd_np.classify(paths[1:], model=classifier, batch_size=2)]
    assert labels == ["seven", "yes"]
