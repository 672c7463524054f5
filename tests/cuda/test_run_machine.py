"""The test of the machine that runs compiled kernels: it computes what PTX says and notices what must not be done."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sewd_np.cuda_intrinsics import cuda, float32, group_max, group_sum, kernel, load, load4, store
from sewd_np.cuda_launch import Device, open_device
from tests.cuda.pretended import counts, forget_trouble
from tests.cuda.ptx_to_c import translate

Array = np.ndarray
WARP = 32
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 88.0, -104.0, 1e-39, 1e38, np.inf, -np.inf, np.nan]


@pytest.fixture(scope="module")
def device() -> Device:
    return open_device()


def run(device: Device, function: Any, *arrays: Array, blocks: int = 1, threads: int = WARP) -> list[Array]:
    """The arrays after a launch."""
    moved = [device.queue.upload(array) for array in arrays]
    function[blocks, threads, device.stream](*moved)
    out = [array.copy_to_host(stream=device.stream) for array in moved]
    device.queue.wait()
    return out


# ------------------------------------------------------------------------------------ arithmetic


@kernel(threads=WARP)
def whole_numbers(a, b, out):
    i = cuda.grid(1)
    if i < len(a):
        x, y = a[i], b[i]
        out[i, 0] = x + y
        out[i, 1] = x - y
        out[i, 2] = x * y
        out[i, 3] = x // y
        out[i, 4] = x % y
        out[i, 5] = min(x, y)
        out[i, 6] = max(x, y)
        out[i, 7] = x & y
        out[i, 8] = x | y
        out[i, 9] = x ^ y
        out[i, 10] = x << (y & 15)
        out[i, 11] = x >> (y & 15)
        out[i, 12] = -x
        out[i, 13] = ~x
        out[i, 14] = 1 if x < y else (2 if x == y else 3)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_whole_numbers(device: Device, dtype: Any) -> None:
    """Signs, and sums and products beyond the range, wrap around as in NumPy."""
    rng = np.random.default_rng(0)
    ends = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max, -1, 0, 1], dtype)
    a = np.concatenate([np.repeat(ends, 2), rng.integers(-1000, 1000, 70)]).astype(dtype)
    b = np.concatenate([np.tile([3, -7], 5), rng.integers(1, 50, 70) * rng.choice([-1, 1], 70)]).astype(dtype)
    _, _, got = run(device, whole_numbers, a, b, np.zeros((len(a), 15), dtype), blocks=3)
    with np.errstate(over="ignore"):
        order = np.where(a < b, 1, np.where(a == b, 2, 3))
        parts = [a + b, a - b, a * b, a // b, a % b, np.minimum(a, b), np.maximum(a, b), a & b, a | b, a ^ b,
                 a << (b & 15), a >> (b & 15), -a, ~a, order]  # fmt: skip
    np.testing.assert_array_equal(got, np.stack(parts, 1).astype(dtype))


@kernel(threads=WARP)
def real_numbers(a, b, out):
    i = cuda.grid(1)
    if i < len(a):
        x, y = a[i], b[i]
        out[i, 0] = x + y
        out[i, 1] = x * y
        out[i, 2] = x / y
        out[i, 3] = max(x, y)
        out[i, 4] = min(x, y)
        out[i, 5] = float32(1) if x < y else float32(0)
        out[i, 6] = float32(1) if x <= y else float32(0)
        out[i, 7] = float32(1) if x == y else float32(0)
        out[i, 8] = float32(1) if x != y else float32(0)
        out[i, 9] = float32(1) if not x > y else float32(0)
        out[i, 10] = math.copysign(x, y)
        out[i, 11] = abs(x)
        out[i, 12] = -x
        out[i, 13] = math.sqrt(abs(x))
        out[i, 14] = float32(i - 40)


def test_real_numbers(device: Device) -> None:
    """Exactly, infinities and NaN included: these operations round once."""
    pairs = [(x, y) for x in SPECIAL for y in SPECIAL]
    rng = np.random.default_rng(0)
    a, b = np.concatenate([np.array(pairs), rng.standard_normal((200, 2))]).astype(np.float32).T.copy()
    _, _, got = run(device, real_numbers, a, b, np.zeros((len(a), 15), np.float32), blocks=11)
    with np.errstate(all="ignore"):
        # Where one of both is no number, Python's min and max keep the first; a GPU's give the other one.
        parts = [a + b, a * b, a / b, np.fmax(a, b), np.fmin(a, b), a < b, a <= b, a == b, a != b, ~(a > b),
                 np.copysign(a, b), np.abs(a), -a, np.sqrt(np.abs(a)), np.arange(len(a)) - 40]  # fmt: skip
    np.testing.assert_array_equal(got, np.stack(parts, 1).astype(np.float32))


@kernel(threads=WARP)
def functions(x, out):
    i = cuda.grid(1)
    if i < len(x):
        out[i, 0] = math.exp(x[i])
        out[i, 1] = math.tanh(x[i])
        out[i, 2] = math.erf(x[i])
        out[i, 3] = math.log1p(abs(x[i]))


def test_functions(device: Device) -> None:
    x = np.concatenate([np.linspace(-20, 20, 999), [-np.inf, np.inf, np.nan, 0]]).astype(np.float32)
    _, got = run(device, functions, x, np.zeros((len(x), 4), np.float32), blocks=32)
    wide = x.astype(np.float64)
    erf = [math.erf(value) for value in wide]
    want = np.stack([np.exp(wide), np.tanh(wide), erf, np.log1p(np.abs(wide))], 1)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-37)


@kernel(threads=2 * WARP)
def across_lanes(x, out):
    i = cuda.threadIdx.x
    out[i, 0] = group_sum(x[i], 32)
    out[i, 1] = group_max(x[i], 4)
    out[i, 2] = group_sum(x[i], 8, 2)


def test_across_lanes(device: Device) -> None:
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    _, got = run(device, across_lanes, x, np.zeros((64, 3), np.float32), threads=64)
    whole = np.repeat(x.reshape(2, 32).sum(1), 32)
    fours = np.repeat(x.reshape(16, 4).max(1), 4)
    eights = np.tile(x.reshape(4, 8, 2).sum(1)[:, None], (1, 8, 1)).reshape(-1)  # lanes two apart
    np.testing.assert_allclose(got, np.stack([whole, fours, eights], 1), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- what is wrong


@kernel(threads=WARP)
def reads_beyond(x, out):
    store(out, cuda.threadIdx.x, load(x, cuda.threadIdx.x + 1))


@kernel(threads=WARP)
def reads_fours_askew(x, out):
    store(out, cuda.threadIdx.x, load4(x, 1)[0])


@kernel(threads=WARP)
def shares_beyond(x, out):
    shared = cuda.shared.array(WARP, float32)
    store(shared, cuda.threadIdx.x + 1, load(x, cuda.threadIdx.x))
    store(out, cuda.threadIdx.x, load(x, cuda.threadIdx.x))


@kernel(threads=WARP)
def waits_alone(x, out):
    if cuda.threadIdx.x < 7:
        cuda.syncthreads()
    store(out, cuda.threadIdx.x, load(x, cuda.threadIdx.x))


@kernel(threads=WARP)
def exchanges_alone(x, out):
    v = load(x, cuda.threadIdx.x)
    if cuda.threadIdx.x < 7:
        v = group_sum(v, 4)
    store(out, cuda.threadIdx.x, v)


@pytest.mark.parametrize("wrong", [reads_beyond, reads_fours_askew, shares_beyond, waits_alone, exchanges_alone])
def test_trouble_is_noticed(device: Device, wrong: Any) -> None:
    before = counts().trouble
    run(device, wrong, np.ones(WARP, np.float32), np.ones(WARP, np.float32))
    assert counts().trouble > before
    forget_trouble()


@kernel(threads=WARP)
def forgets_to_wait(x, out):
    shared = cuda.shared.array(WARP, float32)
    i = cuda.threadIdx.x
    store(shared, i, load(x, i))
    store(out, i, load(shared, WARP - 1 - i))


@kernel(threads=WARP)
def forgets_to_write(x, out):
    shared = cuda.shared.array(WARP, float32)
    cuda.syncthreads()
    store(out, cuda.threadIdx.x, load(shared, cuda.threadIdx.x))


@pytest.mark.parametrize("wrong", [forgets_to_wait, forgets_to_write])
def test_what_nobody_wrote_yet_is_no_number(device: Device, wrong: Any) -> None:
    x = np.ones(WARP, np.float32)
    assert np.isnan(run(device, wrong, x, x)[1]).any()


def test_memory_of_the_device_begins_as_no_numbers(device: Device) -> None:
    taken = cuda.device_array(1000, np.float32, stream=device.stream)
    assert np.isnan(device.to_numpy(device.queue.pool.take(7))).all()
    assert np.isnan(taken.copy_to_host(stream=device.stream)).all()


def test_an_instruction_that_is_not_known_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"PTX: sin\.approx\.f32"):
        translate(".visible .entry k()\n{\n.reg .f32 %f<3>;\nsin.approx.f32 %f1, %f2;\nret;\n}")
    with pytest.raises(NotImplementedError, match="%laneid"):
        translate(".visible .entry k()\n{\n.reg .b32 %r<3>;\nmov.u32 %r1, %laneid;\nret;\n}")
    with pytest.raises(ValueError, match="no kernel"):
        translate(".version 9.0")
