"""Recordings of a list share model calls: each gives what it gives alone, in the order of the list.

The Numba backend does so, and a GPU. The NumPy operations take valid lengths too, so that the sums can be compared in
float64.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import sewd_np
from sewd_np import cli
from sewd_np.audio import AudioError
from sewd_np.backend import NUMPY, get_operations
from sewd_np.config import SEWDConfig
from sewd_np.model import SEWDForCTC, SEWDForSequenceClassification
from sewd_np.params import random_params
from sewd_np.trace import error_between
from sewd_np.transcribe import _batches

Array = np.ndarray
TOGETHER = dataclasses.replace(NUMPY, one_by_one=False)
OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "layer norm": {"feat_extract_norm": "layer"},
    "squeeze 3, even kernel": {"squeeze_factor": 3, "num_conv_pos_embeddings": 4},
    "convolution beside layer 0": {"conv_kernel_size": 3, "conv_groups": 2},
}


def config_with(**options: Any) -> SEWDConfig:
    return SEWDConfig(
        **{
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 12,
            "conv_dim": (4,) * 13,
            "position_buckets": 8,
            "max_position_embeddings": 16,
            "num_conv_pos_embeddings": 7,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 6,
            **options,
        }
    )


def noise(samples: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


@pytest.fixture(scope="module")
def recognizers() -> tuple[SEWDForCTC, SEWDForCTC]:
    """The same random model one by one and together."""
    config, processor = config_with(), sewd_np.load("an4").processor
    params = random_params(config, "ctc")
    return SEWDForCTC(config, params, NUMPY, processor), SEWDForCTC(config, params, TOGETHER, processor)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("classifies", [False, True])
def test_a_batch_under_alone_equals_each_alone(options: dict[str, Any], classifies: bool) -> None:
    """In float64: what differs is the order of sums, not what is summed."""
    config = config_with(**options)
    head, model_class = ("classification", SEWDForSequenceClassification) if classifies else ("ctc", SEWDForCTC)
    params = {name: value.astype(np.float64) for name, value in random_params(config, head).items()}
    model = model_class(config, params, TOGETHER)
    lengths = [5_000, 9_001, config.minimum_samples, 8_640]
    wave_bn = np.random.default_rng(0).standard_normal((4, 9_001))  # no zeros after a recording's end
    mask = (np.arange(9_001) < np.array(lengths)[:, None]).astype(np.int32)
    together = model(wave_bn, mask, padding="alone", output_hidden_states=True)
    for b, length in enumerate(lengths):
        alone = model(wave_bn[b : b + 1, :length], output_hidden_states=True)
        frames = config.frames(length)
        assert error_between(together.last_hidden_state[b, :frames], alone.last_hidden_state[0]) <= 1e-10
        logits = together.logits[b] if classifies else together.logits[b, :frames]
        assert error_between(logits, alone.logits[0]) <= 1e-10


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_transcribe_in_batches(recognizers: tuple[SEWDForCTC, SEWDForCTC], batch_size: int) -> None:
    plain, together = recognizers
    recordings = [noise(samples, samples) for samples in (16_000, 900, 7_000, 16_000, 1_234, 30_000, 7_001)]
    alone = [sewd_np.transcribe(recording, plain) for recording in recordings]
    assert sewd_np.transcribe(recordings, plain, batch_size=batch_size) == alone
    found = sewd_np.transcribe(tuple(recordings), together, batch_size=batch_size)
    assert [t.text for t in found] == [t.text for t in alone]
    assert [t.duration for t in found] == [t.duration for t in alone]
    for mine, own in zip(found, alone, strict=True):
        assert [word[:3] for word in map(dataclasses.astuple, mine.words)] == [
            word[:3] for word in map(dataclasses.astuple, own.words)
        ]
    assert sewd_np.transcribe([], together, batch_size=batch_size) == []


def test_long_lists_are_read_a_window_at_a_time(
    recognizers: tuple[SEWDForCTC, SEWDForCTC], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["sewd_np.transcribe"], "READ_AHEAD", 2)
    plain, together = recognizers
    recordings = [noise(1_000 + 700 * (i * 5 % 7), i) for i in range(11)]
    found = sewd_np.transcribe(recordings, together, batch_size=2, progress=True)
    assert [t.duration for t in found] == [len(recording) / 16_000 for recording in recordings]
    texts = [t.text for t in found]
    assert texts == [sewd_np.transcribe(recording, plain).text for recording in recordings] and len(set(texts)) > 5
    recordings[9] = noise(3)
    with pytest.raises(AudioError, match=r"^audio\[9\]: "):
        sewd_np.transcribe(recordings, together, batch_size=2)


@pytest.mark.parametrize("precision", ["high", "highest"])
@pytest.mark.parametrize(
    "options",
    [{}, {"feat_extract_norm": "layer"}, {"hidden_size": 64, "intermediate_size": 96}, {"conv_kernel_size": 3}],
)
def test_lists_on_numba_give_each_its_own_result_to_the_last_bit(
    options: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes for which products run on the matrix unit, where there is one, and sizes for which they do not."""
    ops = get_operations("numba", threads=2, precision=precision)
    config, processor = config_with(id2label={i: str(i) for i in range(5)}, **options), sewd_np.load("an4").processor
    recognizer = SEWDForCTC(config, random_params(config, "ctc"), ops, processor)
    classifier = SEWDForSequenceClassification(config, random_params(config, "classification"), ops, processor)
    recordings = [
        noise(int(samples), i) for i, samples in enumerate(np.random.default_rng(1).integers(400, 30_000, 40))
    ]
    alone = [sewd_np.transcribe(recording, recognizer, evidence=True) for recording in recordings]
    labels = [sewd_np.classify(recording, classifier) for recording in recordings]

    calls: list[int] = []
    logits = sys.modules["sewd_np.transcribe"]._logits
    monkeypatch.setattr(
        sys.modules["sewd_np.transcribe"], "_logits", lambda *each: [calls.append(len(each[1])), logits(*each)][1]
    )
    together = sewd_np.transcribe(recordings, recognizer, evidence=True)
    assert sum(calls) == 40 and 1 < max(calls) <= 8 and len(calls) < 15
    assert together == alone
    for one, other in zip(together, alone, strict=True):
        assert one.evidence is not None and other.evidence is not None
        np.testing.assert_array_equal(one.evidence.log_probs_sv, other.evidence.log_probs_sv)
    assert sewd_np.classify(recordings, classifier) == labels
    calls.clear()
    assert sewd_np.classify(recordings, classifier, batch_size=3) == labels
    assert max(calls) == 3
    calls.clear()
    sewd_np.transcribe(recordings, recognizer, edit={"lm_head": lambda x: x})
    assert calls == [1] * 40


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_hold_recordings_of_about_one_length(batch_size: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 5_000, 200)
    waves = {10 * i: np.zeros(length, np.float32) for i, length in enumerate(lengths)}
    batches = list(_batches(waves, batch_size, most=12_000))
    assert sorted(i for batch in batches for i in batch) == sorted(waves)
    for batch in batches:
        sizes = [len(waves[i]) for i in batch]
        padded = max(sizes) * len(sizes)
        assert len(batch) <= batch_size and padded <= 1.2 * sum(sizes) and padded <= 12_000
    if batch_size == 8:
        assert len(batches) < 70  # of some 1,200 samples here, as many as fit
    assert list(_batches({3: np.zeros(50)}, batch_size, most=10)) == [[3]]  # one by itself may be longer


def test_memory_that_a_batch_lacks_is_said_of_its_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise MemoryError("it does not fit.")

    monkeypatch.setattr(sys.modules["sewd_np.transcribe"], "_logits", full)
    with pytest.raises(MemoryError, match=r"^audio\[0\], audio\[2\]: it does not fit\.$"):
        sewd_np.transcribe([noise(9_000), noise(30_000), noise(9_100)], sewd_np.load("an4"))
    with pytest.raises(MemoryError, match=r"^it does not fit\.$"):
        sewd_np.transcribe(noise(9_000), sewd_np.load("an4"))


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "4", True])
def test_batch_size_is_a_whole_number(recognizers: tuple[SEWDForCTC, SEWDForCTC], wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"batch_size is .*; it must be a whole number of at least 1"):
        sewd_np.transcribe(noise(1_000), recognizers[0], batch_size=wrong)


def test_command_line_in_batches(
    recognizers: tuple[SEWDForCTC, SEWDForCTC],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Results in the order of the files; a file that cannot be used costs its own line only."""
    paths = []
    for i, samples in enumerate((9_000, 2_000, 5_000, 3_000, 8_000)):
        paths.append(str(tmp_path / f"{i}.wav"))
        soundfile.write(paths[-1], noise(samples, i), 16_000)
    Path(paths[2]).write_bytes(b"no sound")
    taken: list[Any] = []
    monkeypatch.setattr(
        cli, "transcribe", lambda files, **how: [taken.append(files), sewd_np.transcribe(files, **how)][1]
    )
    alone = [f"{path}: {sewd_np.transcribe(path, recognizers[0]).text}" for path in paths if path != paths[2]]
    assert len({line.split(": ")[1] for line in alone}) == 4
    for model in recognizers:
        monkeypatch.setattr(cli, "load_for", lambda *_, model=model: model)
        taken.clear()
        assert cli.main(["transcribe", *paths, "--batch-size", "2"]) == 2
        assert taken == [paths[:2], paths[2:4], paths[2], paths[3], paths[4]]  # two with a bad one: each by itself
        said = capsys.readouterr()
        assert said.out.splitlines() == alone
        assert said.err.count("\n") == 1 and paths[2] in said.err and "audio[" not in said.err


@pytest.mark.parametrize(("backend", "says"), [("numpy", "arrays: NumPy"), ("numba", "kernels: Numba, on")])
def test_info_says_what_a_backend_runs_on(capsys: pytest.CaptureFixture[str], backend: str, says: str) -> None:
    assert cli.main(["info", "an4", "--backend", backend]) == 0
    assert says in capsys.readouterr().out
    assert get_operations(backend).own_memory is None


def test_a_pass_is_just_called_on_the_processor() -> None:
    assert NUMPY.run(lambda x: (x, 2 * x), 21, None, True) == (21, 42)
