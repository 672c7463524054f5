"""The oracle: transformers' SEW-D, randomly initialised, run, and looked into point by point.

``points_of`` collects, with hooks and two patched functions, the value of every trace point of ``sewd_np.trace.points``
from transformers' own modules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from transformers.models.sew_d import modeling_sew_d as reference

import sewd_np
from sewd_np.backend import get_operations
from sewd_np.config import SEWDConfig

HF_CLASSES = {
    "model": transformers.SEWDModel,
    "ctc": transformers.SEWDForCTC,
    "classification": transformers.SEWDForSequenceClassification,
}
CLASSES = {
    "model": sewd_np.SEWDModel,
    "ctc": sewd_np.SEWDForCTC,
    "classification": sewd_np.SEWDForSequenceClassification,
}

# A small model with everything that the published ones have. Head size 12: 3 · 12 is a perfect square, so transformers'
# float32 rounding of the score scale is exact and float64 results agree to the last digits.
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "conv_dim": [8, 12, 12, 12, 12, 16, 16, 16, 16, 24, 24, 24, 24],
    "position_buckets": 8,
    "max_position_embeddings": 16,
    "num_conv_pos_embeddings": 31,
    "num_conv_pos_embedding_groups": 16,
    "classifier_proj_size": 20,
}
# Every product but the first convolution's has a depth that Intel's matrix unit takes: a multiple of 32.
FOR_THE_UNIT: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "conv_dim": [32] * 12 + [64],
    "classifier_proj_size": 32,
}
# Smaller still, for tests that run it thousands of times.
TINY: dict[str, Any] = {
    "vocab_size": 7,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [4, 6, 6],
    "conv_kernel": [5, 3, 1],
    "conv_stride": [3, 2, 1],
    "position_buckets": 8,
    "max_position_embeddings": 16,
    "num_conv_pos_embeddings": 7,
    "num_conv_pos_embedding_groups": 3,
    "classifier_proj_size": 5,
}


def build(
    options: dict[str, Any], head: str = "ctc", dtype: torch.dtype = torch.float64, seed: int = 0
) -> torch.nn.Module:
    """transformers' model with its own initialisation plus seeded noise on every parameter, biases and norms too."""
    torch.manual_seed(seed)
    model = HF_CLASSES[head](transformers.SEWDConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.to(dtype)


def canonical(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A transformers state dict under our names."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("sew_d.")
        name = name.replace("conv.parametrizations.weight.original0", "conv.weight_g")
        name = name.replace("conv.parametrizations.weight.original1", "conv.weight_v")
        renamed[name] = value.detach().numpy()
    return renamed


def ours(
    hf: torch.nn.Module, head: str = "ctc", backend: str = "numpy", precision: str | None = None
) -> sewd_np.SEWDModel:
    """Our model with the parameters of a transformers model, in its dtype."""
    params = canonical(hf.state_dict())
    config = SEWDConfig.from_dict(hf.config.to_dict())
    ops = get_operations(backend, next(iter(params.values())).dtype, precision=precision)
    return CLASSES[head](config, params, ops)


def wave(batch: int, samples: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arrays_of(out: sewd_np.SEWDOutput) -> list[np.ndarray]:
    """All arrays of an output that are there."""
    optional = [array for array in (out.last_hidden_state, out.logits) if array is not None]
    return [*optional, *(out.hidden_states or ()), *(out.attentions or ())]


def mask_of(lengths: list[int], samples: int) -> torch.Tensor:
    return (torch.arange(samples)[None, :] < torch.tensor(lengths)[:, None]).long()


@contextlib.contextmanager
def original_padding() -> Iterator[None]:
    """transformers with the padding rule of the original code, which it had itself until mid 2026.

    Squeezed valid length floor(valid / k), and the attention mask covers queries as well as keys.
    """

    def whole_windows(mask_b1s: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
        return -torch.max_pool1d(-mask_b1s, kernel_size, stride)

    def outer(self: Any, mask_bt: torch.Tensor) -> torch.Tensor:
        return (mask_bt[:, None, None, :] * mask_bt[:, None, :, None]).to(mask_bt.dtype)

    with (
        mock.patch.object(torch.nn.functional, "max_pool1d", whole_windows),
        mock.patch.object(reference.SEWDTransformerEncoder, "get_attention_mask", outer),
    ):
        yield


# ------------------------------------------------------------------------------ trace points


class _Recorder:
    """Collects values from hooks under our trace names; the first value of a name wins."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}
        self.attention: str | None = None

    def keep(self, name: str, value: torch.Tensor) -> None:
        self.values.setdefault(name, value.detach().clone().numpy())


def points_of(hf: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[dict[str, np.ndarray], Any]:
    """Run ``hf(*args, **kwargs)`` → (trace point → array, the model's output)."""
    recorder = _Recorder()
    handles = []
    heads = hf.config.num_attention_heads
    base = getattr(hf, "sew_d", hf)
    for path, module in hf.named_modules():
        name = path.removeprefix("sew_d.")
        if name in ("", "sew_d"):
            continue
        handles.append(module.register_forward_hook(_hook(recorder, name, heads)))
        if isinstance(module, reference.DisentangledSelfAttention):
            handles.append(module.register_forward_pre_hook(_enter(recorder, name)))
    handles.append(
        base.encoder.pos_conv_embed.register_forward_pre_hook(
            lambda module, inputs: recorder.keep("encoder.input", inputs[0].transpose(1, 2))
        )
    )
    handles.append(
        base.encoder.encoder.register_forward_pre_hook(
            lambda module, inputs: recorder.keep("encoder.encoder.input", inputs[0])
        )
    )
    for name in ("projector", "classifier"):
        if hasattr(hf, name):
            handles.append(
                getattr(hf, name).register_forward_pre_hook(
                    lambda module, inputs, name=name: recorder.keep(f"{name}.input", inputs[0])
                )
            )
    if getattr(base.encoder.encoder, "rel_embeddings", None) is not None:
        recorder.keep("encoder.encoder.rel_embeddings", base.encoder.encoder.rel_embeddings.weight)

    bmm, softmax = torch.bmm, reference.XSoftmax.apply
    bias = reference.DisentangledSelfAttention.disentangled_attention_bias

    def recording_bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = bmm(a, b)  # the first product inside an attention is query · key
        if recorder.attention is not None:
            recorder.keep(f"{recorder.attention}.c2c", product.unflatten(0, (-1, heads)))
        return product

    def recording_softmax(scores: torch.Tensor, mask: torch.Tensor, dim: int) -> torch.Tensor:
        probs = softmax(scores, mask, dim)
        recorder.keep(f"{recorder.attention}.scores", scores)
        recorder.keep(f"{recorder.attention}.probs", probs)
        return probs

    def recording_bias(self: Any, *bias_args: Any) -> torch.Tensor:
        both = self.pos_att_type
        for term in both:  # one term at a time, by the reference's own code
            self.pos_att_type = (term,)
            term_bij = bias(self, *bias_args)
            recorder.keep(f"{recorder.attention}.{term}", term_bij.unflatten(0, (-1, heads)))
        self.pos_att_type = both
        return bias(self, *bias_args)

    with (
        mock.patch.object(torch, "bmm", recording_bmm),
        mock.patch.object(reference.XSoftmax, "apply", recording_softmax),
        mock.patch.object(reference.DisentangledSelfAttention, "disentangled_attention_bias", recording_bias),
        torch.no_grad(),
    ):
        output = hf(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return recorder.values, output


def _enter(recorder: _Recorder, name: str) -> Any:
    def hook(module: torch.nn.Module, inputs: Any) -> None:
        recorder.attention = name

    return hook


def _hook(recorder: _Recorder, name: str, heads: int) -> Any:
    """A forward hook that keeps a module's output, channels last, under the module's path.

    A projection inside an attention is called on the content first and, where keys are shared, on the table next.
    """
    channels_first = name.startswith(("feature_extractor.", "encoder.pos_conv_embed", "encoder.pool"))
    channels_first = channels_first or name == "encoder.encoder.conv.conv"
    table_name = name.replace("pos_", "").replace("self.", "self.pos_").replace("_proj", "_layer")

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):
            output = output[0]
        if not isinstance(output, torch.Tensor):
            output = output.last_hidden_state
        if ".self.pos_" in name or (name.endswith(("query_proj", "key_proj")) and name in recorder.values):
            recorder.keep(table_name, output[0].unflatten(-1, (heads, -1)).transpose(0, 1))
        elif channels_first and not isinstance(module, torch.nn.LayerNorm):
            recorder.keep(name, output.transpose(1, 2))
        else:
            recorder.keep(name, output)

    return hook
