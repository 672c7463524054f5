"""The activations as device functions: float32 → float32, the CUDA twin of ``cpu_math``.

A GPU has instructions for 2ˣ, division and multiply-add, and NVIDIA's libdevice builds ``exp``, ``erf`` and ``tanh``
from them to within 2 units in the last place. So the formulas stand here as in ``layers``, with two precautions: no
argument of ``exp`` is large and positive, so that nothing overflows, and NaN passes through every one of them.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from sewd_np.cuda_intrinsics import device, erf, float32

SQRT_HALF = float32(math.sqrt(0.5))
SQRT_2_OVER_PI = float32(math.sqrt(2 / math.pi))
CUBE = float32(0.044715)
QUICK = float32(1.702)
LEAK = float32(0.01)
ZERO, HALF, ONE, TWO, SIX, TWENTY = (float32(v) for v in (0, 0.5, 1, 2, 6, 20))


@device
def linear(v):
    return v


@device
def gelu(v):
    """v/2 · (1 + erf(v/√2))."""
    return HALF * v * (ONE + float32(erf(v * SQRT_HALF)))


@device
def gelu_tanh(v):
    """v/2 · (1 + tanh(√(2/π) · (v + 0.044715 v³)))."""
    return HALF * v * (ONE + float32(math.tanh(SQRT_2_OVER_PI * (v + CUBE * v * v * v))))


@device
def sigmoid(v):
    """1/(1 + e⁻ᵛ), or eᵛ/(1 + eᵛ) where v is negative."""
    e = float32(math.exp(-abs(v)))
    return (e if v < ZERO else ONE) / (ONE + e)


@device
def quick_gelu(v):
    return v * sigmoid(QUICK * v)


@device
def relu(v):
    return ZERO if v < ZERO else v


@device
def relu6(v):
    return ZERO if v < ZERO else (SIX if v > SIX else v)


@device
def leaky_relu(v):
    return LEAK * v if v < ZERO else v


@device
def silu(v):
    return v * sigmoid(v)


@device
def mish(v):
    """v · tanh(log(1 + e)) = v · (e² + 2e)/(e² + 2e + 2), e = eᵛ; the quotient is 1 in float32 long before v = 20."""
    e = float32(math.exp(TWENTY if v > TWENTY else v))
    square = e * e + TWO * e
    return v * (square / (square + TWO))


@device
def tanh(v):
    return float32(math.tanh(v))


@cache
def activation_function(activation: str) -> Any:
    """The device function of an activation, by its name in the configuration.

    A kernel factory closes over it: each kernel is compiled with its own activation, and none has to ask at run time.
    Raises ``ValueError`` for a name that the configuration would have refused.
    """
    match activation:
        case "linear":
            return linear
        case "gelu" | "gelu_python":
            return gelu
        case "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh":
            return gelu_tanh
        case "quick_gelu":
            return quick_gelu
        case "relu":
            return relu
        case "relu6":
            return relu6
        case "leaky_relu":
            return leaky_relu
        case "silu" | "swish":
            return silu
        case "mish":
            return mish
        case "tanh":
            return tanh
        case "sigmoid":
            return sigmoid
    raise ValueError(f"activation is {activation!r}; sewd_np.config.ACTIVATIONS lists the known ones.")
