"""Backends: the only place that chooses which code runs an operation.

An ``Operations`` table lists everything that ``model.py`` may do to an activation. Each backend fills it with functions
of the same names, argument order and meaning; arrays stay the backend's own from the first operation to the last.

The fused operations come first. The explicit ones below them take the same work apart, so that a trace can see what
lies inside; ``model.py`` picks them only when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from sewd_np import attention, layers, params


@dataclass(frozen=True)
class Operations:
    """One backend's operations. The NumPy functions of the same names define what each means."""

    name: str
    # Whether recordings of unequal length, each to be treated as alone, run one by one. Where a row's arithmetic does
    # not depend on what is beside it, they run together instead, and the operations are given their lengths.
    one_by_one: bool
    prepare: Callable[..., params.Weights]
    from_numpy: Callable[..., Any]
    to_numpy: Callable[..., np.ndarray]
    run: Callable[..., Any]
    # Bytes free where the operations keep their arrays; None where that is main memory, with everything else.
    own_memory: Callable[[], float] | None
    describe: Callable[[], dict[str, str]]  # what the backend runs on here, in words

    feature_encoder: Callable[..., Any]
    layer_norm: Callable[..., Any]
    linear: Callable[..., Any]
    linear_add_norm: Callable[..., Any]
    feed_forward: Callable[..., Any]
    spec_augment: Callable[..., Any]
    zero_padding: Callable[..., Any]
    squeeze: Callable[..., Any]
    relative_index: Callable[..., Any]
    disentangled_attention: Callable[..., Any]
    attention_bytes: Callable[..., int]
    upsample: Callable[..., Any]
    conv1d: Callable[..., Any]
    activate_add_norm: Callable[..., Any]
    weighted_layer_sum: Callable[..., Any]
    mean_over_time: Callable[..., Any]

    normalize: Callable[..., Any]
    activate: Callable[..., Any]
    positional_conv: Callable[..., Any]
    trim_and_activate: Callable[..., Any]
    average_pool: Callable[..., Any]
    add_pooled: Callable[..., Any]
    split_qkv: Callable[..., Any]
    content_scores: Callable[..., Any]
    content_to_position: Callable[..., Any]
    position_to_content: Callable[..., Any]
    add_scores: Callable[..., Any]
    masked_softmax: Callable[..., Any]
    context: Callable[..., Any]
    add_norm: Callable[..., Any]
    unsqueeze: Callable[..., Any]


def run(forward: Callable[[Any], Any], wave_bn: np.ndarray, weights: params.Weights, repeatable: bool) -> Any:
    """``forward(wave_bn)``, one whole pass.

    ``repeatable`` says that nothing looks inside and that what is done depends on the prepared ``weights`` and the
    shape of ``wave_bn`` alone: a GPU may then record the pass and replay it with other samples. Here it is just called.
    """
    return forward(wave_bn)


def describe() -> dict[str, str]:
    """What runs here, for people: a name and a line for each thing worth telling."""
    return {"arrays": f"NumPy {np.__version__}, on the processor"}


NUMPY = Operations(
    name="numpy",
    one_by_one=True,
    prepare=params.prepare,
    from_numpy=np.asarray,
    to_numpy=np.asarray,
    run=run,
    own_memory=None,
    describe=describe,
    feature_encoder=layers.feature_encoder,
    layer_norm=layers.layer_norm,
    linear=layers.linear,
    linear_add_norm=layers.linear_add_norm,
    feed_forward=layers.feed_forward,
    spec_augment=layers.spec_augment,
    zero_padding=layers.zero_padding,
    squeeze=layers.squeeze,
    relative_index=attention.relative_index,
    disentangled_attention=attention.disentangled_attention,
    attention_bytes=attention.attention_bytes,
    upsample=layers.upsample,
    conv1d=layers.conv1d,
    activate_add_norm=layers.activate_add_norm,
    weighted_layer_sum=layers.weighted_layer_sum,
    mean_over_time=layers.mean_over_time,
    normalize=layers.normalize,
    activate=layers.activate,
    positional_conv=layers.positional_conv,
    trim_and_activate=layers.trim_and_activate,
    average_pool=layers.average_pool,
    add_pooled=layers.add_pooled,
    split_qkv=attention.split_qkv,
    content_scores=attention.content_scores,
    content_to_position=attention.content_to_position,
    position_to_content=attention.position_to_content,
    add_scores=attention.add_scores,
    masked_softmax=attention.masked_softmax,
    context=attention.context,
    add_norm=layers.add_norm,
    unsqueeze=layers.unsqueeze,
)

BACKENDS = ("numpy", "numba", "cuda")
DEFAULT_BACKEND = "numba"  # in float32; whoever asks for float64 and names no backend gets "numpy", which alone has it
MOST_THREADS = 1024  # beyond any processor, and within what an operating system lets a process start
PRECISIONS = ("high", "highest")  # of the products of "numba", in PyTorch's words; the first is the default


def get_operations(
    backend: str | None = None, dtype: Any = np.float32, threads: int | None = None, precision: str | None = None
) -> Operations:
    """The operations of a backend, by name; None is "numba" for float32 and "numpy" for any other ``dtype``.

    ``threads`` is the number of CPU threads of "numba", all by default. ``precision`` says how "numba" multiplies:
    "high", the default, on the processor's matrix unit where there is one (``cpu_amx``; products to about 17 bits, the
    logits of a model to some 2e-5 of the largest) and in float32 elsewhere; "highest" always in float32 (some 2e-6).
    With "highest" a result does not depend on whether the machine has the unit.

    Raises ``ValueError`` for an unknown name, a dtype, number of threads or precision that the backend does not take,
    and for "cuda" where the extra is not installed or no GPU can be used.
    """
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if backend is None:
        backend = DEFAULT_BACKEND if name == "float32" else "numpy"
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(map(repr, BACKENDS))}.")
    takes = ("float32", "float64") if backend == "numpy" else ("float32",)
    if name not in takes:
        raise ValueError(f"dtype is {name}; backend {backend!r} computes in {' or '.join(takes)}.")
    is_count = isinstance(threads, int | np.integer) and not isinstance(threads, bool) and 1 <= threads <= MOST_THREADS
    if threads is not None and not is_count:
        raise ValueError(f"threads is {threads!r}; it must be a whole number of at least 1 and at most {MOST_THREADS}.")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(map(repr, PRECISIONS))}.")
    for argument, value in (("threads", threads), ("precision", precision)):
        if value is not None and backend != "numba":
            raise ValueError(
                f"{argument} is given for backend {backend!r}, which has no say in it; leave it out, or choose 'numba'."
            )
    if backend == "cuda":
        return _cuda()
    return (
        NUMPY if backend == "numpy" else _numba(None if threads is None else int(threads), precision or PRECISIONS[0])
    )


def _numba(threads: int | None, precision: str) -> Operations:
    """NumPy's table with the Numba twins in it. The explicit forms stay NumPy's: they are to look at, not for speed.
    (Those of the two position terms only bring the index into NumPy's form.)"""
    from sewd_np.cpu_compiling import announce_compiling
    from sewd_np.cpu_kernels import Kernels

    announce_compiling()
    kernels = Kernels(threads, precision)
    return replace(
        NUMPY,
        name="numba",
        one_by_one=False,
        describe=kernels.describe,
        prepare=kernels.prepare,
        feature_encoder=kernels.feature_encoder,
        layer_norm=kernels.layer_norm,
        linear=kernels.linear,
        linear_add_norm=kernels.linear_add_norm,
        feed_forward=kernels.feed_forward,
        add_norm=kernels.add_norm,
        conv1d=kernels.conv1d,
        squeeze=kernels.squeeze,
        relative_index=kernels.relative_index,
        disentangled_attention=kernels.disentangled_attention,
        attention_bytes=kernels.attention_bytes,
        upsample=kernels.upsample,
        content_to_position=kernels.content_to_position,
        position_to_content=kernels.position_to_content,
    )


def _cuda() -> Operations:
    """The operations of the first GPU: a ``Device`` has a method for every one of them, the explicit forms too."""
    if find_spec("numba_cuda") is None:
        raise ValueError(
            "backend is 'cuda', but its packages are not installed; install them with pip install 'sewd-np[cuda]', "
            "or choose 'numba' or 'numpy' to run on the processor."
        )
    from sewd_np.cuda_launch import open_device

    return device_operations(open_device())


def device_operations(device: Any) -> Operations:
    """The table of a ``cuda_launch.Device``."""
    names = [field.name for field in fields(Operations) if field.name not in ("name", "one_by_one")]
    return Operations(name="cuda", one_by_one=False, **{name: getattr(device, name) for name in names})
