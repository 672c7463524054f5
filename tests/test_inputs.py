"""What a model call refuses, and says; and that it stops before work that cannot fit into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sewd_np
from sewd_np import inputs, memory
from sewd_np.backend import NUMPY, get_operations
from sewd_np.config import SEWDConfig
from sewd_np.params import random_params
from sewd_np.trace import Trace

CONFIG = SEWDConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    conv_dim=(4, 4, 8),
    conv_kernel=(10, 8, 4),
    conv_stride=(5, 8, 8),
    num_conv_pos_embeddings=3,
    num_conv_pos_embedding_groups=4,
    position_buckets=8,
    max_position_embeddings=16,
)


@pytest.fixture(scope="module")
def model() -> sewd_np.SEWDForCTC:
    return sewd_np.SEWDForCTC(CONFIG, random_params(CONFIG, "ctc"), NUMPY)


def wave(batch: int = 1, samples: int = 4000) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, samples), dtype=np.float32)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (wave()[0], r"shape \(4000,\).*\(batch, samples\)"),
        (wave()[None], r"shape \(1, 1, 4000\)"),
        (np.array([["a"]]), "must be numbers"),
        (np.zeros((0, 4000), np.float32), r"shape \(0, 4000\)"),
        (wave(samples=CONFIG.minimum_samples - 1), f"needs at least {CONFIG.minimum_samples}"),
        (np.full((1, 4000), np.nan), "NaN or infinity"),
        (np.full((1, 4000), np.inf), "NaN or infinity"),
    ],
)
def test_bad_input_values(model: sewd_np.SEWDForCTC, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model(value)


def test_shortest_input(model: sewd_np.SEWDForCTC) -> None:
    logits = model(wave(samples=CONFIG.minimum_samples)).logits
    assert logits is not None and logits.shape == (1, CONFIG.squeeze_factor, 32)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.ones((1, 3999)), r"shape \(1, 3999\); it must match input_values, \(1, 4000\)"),
        (np.full((1, 4000), 2), "other values than 0"),
    ],
)
def test_bad_mask(model: sewd_np.SEWDForCTC, mask: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model(wave(), mask)


def test_mask_counts_only_through_its_sum(model: sewd_np.SEWDForCTC) -> None:
    right, left = np.zeros((2, 1, 4000), int)
    right[:, :3000] = left[:, 1000:] = 1
    np.testing.assert_array_equal(model(wave(), right).logits, model(wave(), left).logits)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.float16, np.float64])
def test_a_mask_may_have_any_dtype(model: sewd_np.SEWDForCTC, dtype: Any) -> None:
    """int8 holds no 4000, and float16 no 100,000."""
    samples, labels = np.random.default_rng(1).standard_normal((1, 100_000), dtype=np.float32), np.array([[5, 6]])
    mask = np.arange(100_000)[None] < 70_000
    want, got = (model(samples, asked, labels) for asked in (mask.astype(np.int64), mask.astype(dtype)))
    np.testing.assert_array_equal(got.logits, want.logits)
    assert got.loss == want.loss != model(samples, labels=labels).loss


def test_the_loss_of_half_precision_samples(model: sewd_np.SEWDForCTC) -> None:
    samples, labels = wave(samples=70_000).astype(np.float16), np.array([[5, 6]])
    assert model(samples, labels=labels).loss == model(samples.astype(np.float32), labels=labels).loss


def test_a_recording_too_short_to_stand_alone(model: sewd_np.SEWDForCTC) -> None:
    mask = np.ones((2, 4000), int)
    mask[1, 10:] = 0
    with pytest.raises(ValueError, match="leaves 10 samples"):
        model(wave(2), mask, padding="alone")


def test_padding_on_the_left_cannot_be_cut_off(model: sewd_np.SEWDForCTC) -> None:
    mask = np.ones((2, 4000), int)
    mask[1, :1000] = 0
    with pytest.raises(ValueError, match="all padding must be on the right"):
        model(wave(2), mask, padding="alone")


def test_labels_of_different_lengths(model: sewd_np.SEWDForCTC) -> None:
    with pytest.raises(ValueError, match="rows of different lengths; fill them up with -100"):
        model(wave(2), labels=[[5, 6], [7]])


def test_unknown_names(model: sewd_np.SEWDForCTC) -> None:
    with pytest.raises(ValueError, match="padding is 'left'; it must be one of transformers, original, alone"):
        model(wave(), padding="left")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend is 'tpu'; it must be one of 'numpy', 'numba'"):
        get_operations("tpu")
    with pytest.raises(ValueError, match=r"float16.*computes in float32 or float64"):
        get_operations("numpy", np.float16)
    with pytest.raises(ValueError, match=r"float64.*'numba' computes in float32"):
        get_operations("numba", np.float64)
    for threads in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=r"threads is .*at least 1"):
            get_operations("numba", threads=threads)  # type: ignore[arg-type]
    for precision in ("", "low", "HIGH", 32):
        with pytest.raises(ValueError, match=r"precision is .*; it must be one of 'high', 'highest'\."):
            get_operations("numba", precision=precision)  # type: ignore[arg-type]
    for given in ({"threads": 2}, {"precision": "highest"}, {"precision": "high"}):
        with pytest.raises(ValueError, match=rf"{next(iter(given))} is given for backend 'numpy'.* or choose 'numba'"):
            get_operations("numpy", **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'\*\.nothing' matches no point.*names look like"):
        model(wave(), trace=sewd_np.Trace("*.nothing"))
    with pytest.raises(TypeError, match="must be a string"):
        sewd_np.Trace(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="trace is '\\*'; it must be a Trace"):
        model(wave(), trace="*")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype is 'junk'"):
        get_operations("numpy", "junk")


def test_labels_need_a_head() -> None:
    headless = sewd_np.SEWDModel(CONFIG, random_params(CONFIG, "model"), NUMPY)
    with pytest.raises(ValueError, match="this model has no head"):
        headless(wave(), labels=np.array([[1]]))


def test_labels_are_checked_before_the_pass(model: sewd_np.SEWDForCTC, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr("sewd_np.model._Pass.encode", never)
    with pytest.raises(ValueError, match="labels contain 32; they must be below vocab_size = 32"):
        model(wave(), labels=np.array([[1, 32]]))


def test_padded_recordings_are_counted_one_by_one(model: sewd_np.SEWDForCTC, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under "alone" one recording's maps are in memory at a time, so two need no more than one."""
    asked: list[int] = []
    monkeypatch.setattr(inputs, "require_memory", lambda needed, what, advice: asked.append(needed))
    mask = np.ones((2, 4000), int)
    mask[1, 3000:] = 0

    def needed(recordings: int, **options: Any) -> int:
        asked.clear()
        model(wave(recordings), mask[:recordings], **options)
        return asked[0]  # of the whole call; under "alone" each recording then asks for itself

    assert needed(1) == needed(2, padding="alone")
    one, apart, both = (
        needed(n, padding=how, output_attentions=True) for n, how in [(1, "alone"), (2, "alone"), (2, "original")]
    )
    assert one < apart < both  # the maps of both are returned, but made one by one


def test_everything_that_a_trace_keeps_is_counted(model: sewd_np.SEWDForCTC, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(inputs, "require_memory", lambda needed, what, advice: asked.append(needed))
    trace = Trace("feature_extractor.*", "encoder")
    inputs.require_score_memory(model, 2, 16_000, False, None, (), together=2)
    model(np.zeros((2, 16_000), np.float32), trace=trace)
    assert asked[1] - asked[0] == sum(trace[name].nbytes for name in trace) > 0


def test_params_must_fit_the_config() -> None:
    params = random_params(CONFIG, "ctc")
    with pytest.raises(ValueError, match=r"lack \['lm_head.bias'\] and have unknown \['x'\]"):
        sewd_np.SEWDForCTC(CONFIG, {**{k: v for k, v in params.items() if k != "lm_head.bias"}, "x": wave()}, NUMPY)
    with pytest.raises(ValueError, match=r"lm_head.bias has shape \(31,\); the config asks for \(32,\)"):
        sewd_np.SEWDForCTC(CONFIG, {**params, "lm_head.bias": np.zeros(31, np.float32)}, NUMPY)
    with pytest.raises(ValueError, match="dtype float16, float32; all must be float32 or all float64"):
        sewd_np.SEWDForCTC(CONFIG, {**params, "lm_head.bias": np.zeros(32, np.float16)}, NUMPY)


def test_ops_must_be_operations() -> None:
    with pytest.raises(TypeError, match=r"ops is 'numpy'; it must be operations, such as .*get_operations"):
        sewd_np.SEWDForCTC(CONFIG, random_params(CONFIG, "ctc"), "numpy")  # type: ignore[arg-type]


def test_parameters_are_read_only(model: sewd_np.SEWDForCTC) -> None:
    with pytest.raises(ValueError, match="read-only"):
        model.params["lm_head.bias"][0] = 1


def test_too_long_a_recording_stops_before_work(model: sewd_np.SEWDForCTC, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000)
    monkeypatch.setattr(inputs, "require_memory", memory.require_memory)
    monkeypatch.setattr("sewd_np.model._Pass.encode", never)
    long = np.zeros((1, 16_000 * 20), np.float32)
    said = r"attention over 20.0 s of sound \(500 squeezed frames, batch of 1\) on backend 'numpy' needs about .* GB"
    advice = r"cut the recording into shorter pieces or use backend 'numba', whose memory grows with the length"
    with pytest.raises(MemoryError, match=said + r".*0\.0 GB are free; " + advice):
        model(long)
    with pytest.raises(MemoryError, match="or ask for fewer attention maps"):
        model(long, output_attentions=True)


def test_available_memory(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    assert memory.available_memory(meminfo, cgroup) == 50 * 1024
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("20000\n")
    assert memory.available_memory(meminfo, cgroup) == 50 * 1024
    (cgroup / "memory.max").write_text("30000\n")
    assert memory.available_memory(meminfo, cgroup) == 10_000
    free = memory.available_memory(tmp_path / "absent", cgroup)
    assert free is None or free > 0
