"""exp, erf, the activations and row normalisation, in forms that LLVM turns into vector instructions.

``math.exp`` and ``math.erf`` are calls to the C library, one number at a time. A polynomial is a chain of multiply-adds
that a loop over a row can do for 16 numbers at once: gelu of a row is about seven times faster this way.

The flags ``contract`` (a·b + c in one rounding) and ``reassoc`` (a sum in any order) are the only liberties taken; none
assumes that NaN or infinity does not occur, and both pass through as they do in NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from sewd_np.cpu_gemm import compiled

f32 = np.float32

vector_kernel = compiled(fastmath={"contract", "reassoc"})

LOG2_E = f32(1.4426950408889634)
LN2_HIGH = f32(0.693359375)  # ln 2 in two parts: the first has few bits, so n · LN2_HIGH is exact
LN2_LOW = f32(-2.12194440054690582e-4)
SMALLEST_EXP = f32(-87.33)  # below it exp is less than the smallest normal float32; 0 here
SQRT_HALF = f32(0.7071067811865476)
SQRT_2_OVER_PI = f32(0.7978845608028654)
HALF, ONE, TWO = f32(0.5), f32(1), f32(2)

# erf(x) = x · P(x²) / Q(x²) for |x| ≤ ERF_END, beyond which erf is 1 in float32. Fitted by iterated least squares on
# the largest error: 2e-8 before rounding, below 5e-7 evaluated in float32.
ERF_END = f32(3.925)
P0, P1, P2 = f32(1.12837902e00), f32(1.92973441e-01), f32(5.30844645e-02)
P3, P4, P5 = f32(3.87636468e-03), f32(2.87492864e-04), f32(2.03085946e-06)
Q1, Q2, Q3 = f32(5.04349897e-01), f32(1.15167822e-01), f32(1.51884299e-02)
Q4, Q5 = f32(1.18975899e-03), f32(3.80313851e-05)

# Powers of 1/n!: the Taylor series of exp up to r⁷, whose rest is below 1e-8 for |r| ≤ ln(2)/2.
E2, E3, E4 = f32(1 / 2), f32(1 / 6), f32(1 / 24)
E5, E6, E7 = f32(1 / 120), f32(1 / 720), f32(1 / 5040)

ACTIVATION_CODES = {
    "linear": 0,
    "gelu": 1,
    "gelu_python": 1,
    "gelu_new": 2,
    "gelu_fast": 2,
    "gelu_pytorch_tanh": 2,
    "quick_gelu": 3,
    "relu": 4,
    "relu6": 5,
    "leaky_relu": 6,
    "silu": 7,
    "swish": 7,
    "mish": 8,
    "tanh": 9,
    "sigmoid": 10,
}


def whole_registers():
    """Ask LLVM for vectors as wide as the registers in the kernel that says this; in Python it does nothing.

    Left alone, LLVM makes vectors of 8 numbers where registers hold 16: the first processors with AVX-512 slowed down
    when they used it. Ours do not, and a loop over exp or erf becomes a third to a half faster. What one kernel says
    does not count for the kernels that it calls, nor for those that call it and into which LLVM may copy it.
    """


@intrinsic
def _whole_registers(typing_context):
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # Past llvmlite's list of known attributes, in which this one of LLVM's is missing.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), emit


@overload(whole_registers, inline="always")
def _compiled_whole_registers():
    return lambda: _whole_registers()  # type: ignore[call-arg]


@vector_kernel
def exp(x):
    """eˣ = 2ⁿ · eʳ with n = round(x / ln 2), |r| ≤ ln(2)/2; relative error below 5e-7. 0 below −87.33, NaN for NaN."""
    n = np.floor(x * LOG2_E + HALF)
    n = n if n > f32(-127) else f32(-127)
    n = n if n < f32(128) else f32(128)
    r = x - n * LN2_HIGH - n * LN2_LOW
    series = ONE + r * (ONE + r * (E2 + r * (E3 + r * (E4 + r * (E5 + r * (E6 + r * E7))))))
    power = (np.int32(n) + np.int32(127)) << np.int32(23)  # the exponent bits of a float32
    result = series * np.int32(power).view(np.float32)
    return result if not x < SMALLEST_EXP else f32(0)


@vector_kernel
def erf(x):
    """Error function; absolute error below 5e-7. For NaN some number: gelu multiplies it by the NaN."""
    x = x if x > -ERF_END else -ERF_END
    x = x if x < ERF_END else ERF_END
    z = x * x
    p = P0 + z * (P1 + z * (P2 + z * (P3 + z * (P4 + z * P5))))
    q = ONE + z * (Q1 + z * (Q2 + z * (Q3 + z * (Q4 + z * Q5))))
    y = x * p / q
    y = y if y < ONE else ONE  # rounding may overstep, and gelu(-1e20) multiplies what is over by 1e20
    return y if y > -ONE else -ONE


@vector_kernel
def tanh(x):
    """1 − 2/(e²ˣ + 1)."""
    return ONE - TWO / (exp(TWO * x) + ONE)


@vector_kernel
def sigmoid(x):
    """1/(1 + e⁻ˣ)."""
    return ONE / (ONE + exp(-x))


@vector_kernel
def activate(x, code):
    """Activation in place on every number of a flat array; ``code`` from ACTIVATION_CODES.

    Every loop counts from 0: with an offset in the index Numba must allow for a negative one, and no vector comes of
    it. So callers hand over a slice.
    """
    whole_registers()
    if code == 1:
        for i in range(len(x)):
            x[i] = HALF * x[i] * (ONE + erf(x[i] * SQRT_HALF))
    elif code == 2:
        for i in range(len(x)):
            v = x[i]
            x[i] = HALF * v * (ONE + tanh(SQRT_2_OVER_PI * (v + f32(0.044715) * v * v * v)))
    elif code == 3:
        for i in range(len(x)):
            x[i] = x[i] * sigmoid(f32(1.702) * x[i])
    elif code == 4:
        for i in range(len(x)):
            x[i] = f32(0) if x[i] < f32(0) else x[i]
    elif code == 5:
        for i in range(len(x)):
            v = f32(0) if x[i] < f32(0) else x[i]
            x[i] = f32(6) if v > f32(6) else v
    elif code == 6:
        for i in range(len(x)):
            x[i] = f32(0.01) * x[i] if x[i] < f32(0) else x[i]
    elif code == 7:
        for i in range(len(x)):
            x[i] = x[i] * sigmoid(x[i])
    elif code == 8:  # tanh(log(1 + e)) = (e² + 2e) / (e² + 2e + 2); it is 1 in float32 long before e² overflows
        for i in range(len(x)):
            e = exp(x[i] if x[i] < f32(20) else f32(20))
            x[i] = x[i] * ((e * e + TWO * e) / (e * e + TWO * e + TWO))
    elif code == 9:
        for i in range(len(x)):
            x[i] = tanh(x[i])
    elif code == 10:
        for i in range(len(x)):
            x[i] = sigmoid(x[i])


@vector_kernel
def normalize_row(x, weight, bias, eps, out):
    """Layer norm of one row; ``out`` may be ``x``."""
    whole_registers()
    total = f32(0)
    for i in range(len(x)):
        total += x[i]
    mean = total / f32(len(x))
    squares = f32(0)
    for i in range(len(x)):
        squares += (x[i] - mean) * (x[i] - mean)
    scale = ONE / np.sqrt(squares / f32(len(x)) + f32(eps))
    for i in range(len(x)):
        out[i] = (x[i] - mean) * scale * weight[i] + bias[i]
