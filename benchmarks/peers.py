"""The same random-weight model in this package, in transformers and in ONNX Runtime, ready to be timed side by side."""

from __future__ import annotations

import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

import sewd_np
from sewd_np.backend import Operations, get_operations
from sewd_np.config import SEWDConfig

CONV_A = [64] + [128] * 4 + [256] * 4 + [512] * 4
CONV_B = [96] + [192] * 4 + [384] * 4 + [768] * 4
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "small": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8},
    "mid": {"hidden_size": 512, "num_hidden_layers": 24, "num_attention_heads": 8},
    "mid-k127": {
        "hidden_size": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_conv_pos_embeddings": 127,
    },
    "base": {"hidden_size": 768, "num_hidden_layers": 24, "num_attention_heads": 12},
    "base-plus": {
        "hidden_size": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 12,
        "conv_dim": CONV_B,
    },
}


def options(shape: str) -> dict[str, Any]:
    """config.json fields of a published shape."""
    own = SHAPES[shape]
    return {"intermediate_size": 4 * own["hidden_size"], "conv_dim": CONV_A, "num_conv_pos_embeddings": 31, **own}


def transformers_model(shape: str, seed: int = 0) -> torch.nn.Module:
    """transformers' SEWDForCTC with its own random initialisation, for inference."""
    torch.manual_seed(seed)
    return transformers.SEWDForCTC(transformers.SEWDConfig(**options(shape))).eval()


def our_model(
    reference: torch.nn.Module, backend: str, threads: int | None = None, precision: str | None = None
) -> sewd_np.SEWDForCTC:
    """This package's model with the reference's weights."""
    return our_model_on(reference, get_operations(backend, np.float32, threads, precision))


def our_model_on(reference: torch.nn.Module, ops: Operations) -> sewd_np.SEWDForCTC:
    """The same over a given table of operations."""
    params = {}
    for name, value in reference.state_dict().items():
        name = name.removeprefix("sew_d.").replace("conv.parametrizations.weight.original0", "conv.weight_g")
        params[name.replace("conv.parametrizations.weight.original1", "conv.weight_v")] = value.numpy()
    config = SEWDConfig.from_dict(reference.config.to_dict())
    return sewd_np.SEWDForCTC(config, params, ops)


def onnx_session(reference: torch.nn.Module, samples: int, threads: int) -> Any:
    """ONNX Runtime with the reference exported at exactly this length."""
    import onnxruntime

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = reference

        def forward(self, input_values: torch.Tensor) -> torch.Tensor:
            return self.model(input_values).logits

    file = io.BytesIO()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        example = (torch.zeros(1, samples),)
        torch.onnx.export(Logits().eval(), example, file, input_names=["x"], opset_version=17, dynamo=False)
    logging.disable(logging.NOTSET)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(file.getvalue(), settings, providers=["CPUExecutionProvider"])


def alternate(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call. The calls take turns, so that a busy spell of the machine meets them all."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(0.05)  # a peer's idle threads spin for a while and would be timed with the next one's
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def audio(seconds: float, seed: int = 0) -> np.ndarray:
    """(1, n) normalised noise: the arithmetic does not depend on what is said."""
    return np.random.default_rng(seed).standard_normal((1, int(seconds * 16_000)), dtype=np.float32)
