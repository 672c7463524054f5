"""Every operation of every backend against the loops of ``naive`` and against PyTorch, at sizes that have tails.

A new backend joins by an entry in ``TABLES``, its tolerance and, where it has weights of its own layout, ``packed``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from sewd_np import backend
from sewd_np.cpu_conv import pack_encoder, pack_positional
from sewd_np.cpu_gemm import pack
from sewd_np.cpu_kernels import own
from sewd_np.cpu_positions import Distances, index_by_pair, pack_positions
from sewd_np.params import Linear, Norm
from sewd_np.trace import error_between
from tests import naive
from tests.operation_cases import CASES, Case, Index, lengths

Array = np.ndarray
NUMPY, NUMBA = backend.NUMPY, backend.get_operations("numba", threads=2)
TABLES = [NUMPY, NUMBA]

# float64: only the order of summation differs, over at most some 100 numbers; 1e-10 leaves room and still proves the
# algorithm. float32: inputs are equal to the last bit, so this is the rounding (2^-24 each) of sums over up to 100
# terms and of a division by a small standard deviation after them. Numba adds its exp and erf, 5e-7 of a number.
TOLERANCES = {("numpy", "float64"): 1e-10, ("numpy", "float32"): 2e-5, ("numba", "float32"): 2e-5}
RUNS = [(NUMPY, "float64"), (NUMPY, "float32"), (NUMBA, "float32")]
# What is in a table beside operations on activations.
PLUMBING = {"name", "one_by_one", "prepare", "from_numpy", "to_numpy", "run", "own_memory", "describe"}


@pytest.fixture(params=TABLES, ids=lambda table: table.name)
def ops(request: pytest.FixtureRequest) -> backend.Operations:
    table: backend.Operations = request.param
    return table


def widest(ops: backend.Operations) -> Any:
    """The most precise dtype of a backend."""
    return np.float64 if (ops.name, "float64") in TOLERANCES else np.float32


def runs_of(chosen: list[Case]) -> list[Any]:
    """(case, table, dtype) as parameters; where a table has NumPy's own function, NumPy's run covers it."""
    return [
        pytest.param(case, ops, dtype, id=f"{ops.name}-{dtype}-{case.operation}: {case.label}")
        for case, (ops, dtype) in itertools.product(chosen, RUNS)
        if ops is NUMPY or getattr(ops, case.operation) is not getattr(NUMPY, case.operation)
    ]


# --------------------------------------------------------------------- calling


def changed(value: Any, change: Callable[[Array], Array]) -> Any:
    """``change`` applied to every array of an argument; named tuples keep their names."""
    if isinstance(value, tuple):
        parts = [changed(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return change(value) if isinstance(value, np.ndarray) else value


def cast(dtype: Any) -> Callable[[Array], Array]:
    return lambda array: array.astype(dtype) if array.dtype.kind == "f" else array


def read_only(array: Array) -> Array:
    array = array.copy()
    array.flags.writeable = False
    return array


def strided(array: Array) -> Array:
    """The same values with every other element of a wider array."""
    wide = np.full((*array.shape[:-1], 2 * array.shape[-1]), 77, array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def transposed(array: Array) -> Array:
    """The same values in Fortran order."""
    return np.asfortranarray(array)


LAYOUTS: list[Callable[[Array], Array]] = [read_only, strided, transposed]


def packed(operation: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same call with its weights as the Numba table's ``prepare`` lays them out."""

    def linear(weights: Linear) -> Linear:
        return Linear(pack(weights.weight), own(weights.bias))

    match operation, args:
        case "linear" | "upsample", (x, weight, bias, *rest):
            return x, *linear(Linear(weight, bias)), *rest
        case "linear_add_norm", (x, weights, residual, norm, eps):
            return x, linear(weights), residual, Norm(*map(own, norm)), eps
        case "feed_forward", (x, intermediate, output, norm, *rest):
            return x, linear(intermediate), linear(output), Norm(*map(own, norm)), *rest
        case "feature_encoder", (wave, conv_layers, strides, norm, *rest):
            return wave, pack_encoder(conv_layers, strides, norm), strides, norm, *rest
        case "squeeze", (x, conv, *rest):
            return x, pack_positional(conv), *rest
        case "disentangled_attention", (qkv, heads, positions, index, scale, *masking):
            return qkv, heads, pack_positions(positions[0], positions[1], scale, False), index, scale, *masking
    return args


def with_index(args: tuple[Any, ...], relative_index: Callable[..., Any]) -> tuple[Any, ...]:
    return tuple(relative_index(*arg) if isinstance(arg, Index) else arg for arg in args)


def call(ops: backend.Operations, operation: str, args: tuple[Any, ...]) -> Any:
    """Call an operation as the model does: activations and weights on the device, lengths and masks not."""

    def on_device(array: Array) -> Any:
        return ops.from_numpy(array) if array.dtype.kind == "f" else array

    if ops.name == "numba":
        args = packed(operation, args)
    result = getattr(ops, operation)(*with_index(changed(args, on_device), ops.relative_index))
    if isinstance(result, Distances):  # kept by difference, the definition's is by pair
        return index_by_pair(result, args[-1])
    return tuple(map(ops.to_numpy, result)) if isinstance(result, tuple) else ops.to_numpy(result)


# ----------------------------------------------------------------- against the loops


@functools.cache
def by_loops(number: int, dtype: str) -> tuple[Array, ...]:
    """What the loops make of a case; computed once for all backends."""
    case = CASES[number]
    args = with_index(changed(case.args, cast(dtype)), naive.relative_index)
    result = getattr(naive, case.operation)(*args)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(("case", "ops", "dtype"), runs_of(CASES))
def test_operation_equals_its_loops(case: Case, ops: backend.Operations, dtype: str) -> None:
    args = changed(case.args, cast(dtype))
    expected = by_loops(CASES.index(case), dtype)
    for layout in LAYOUTS:
        with np.errstate(over="raise", divide="raise", invalid="raise"):
            result = call(ops, case.operation, changed(args, layout))
        if not isinstance(result, tuple):
            result = (result,)
        assert len(result) == len(expected)
        for got, want in zip(result, expected, strict=True):
            assert got.shape == want.shape
            if case.operation == "relative_index":
                np.testing.assert_array_equal(got, want)
                continue
            assert got.dtype == dtype
            assert error_between(got, want) <= TOLERANCES[ops.name, dtype] * case.amplification, layout.__name__


def test_every_operation_has_cases() -> None:
    fields = {field.name for field in dataclasses.fields(backend.Operations)}
    # attention_bytes gives a number, not an activation; it has tests of its own below.
    assert fields - PLUMBING == {case.operation for case in CASES} | {"attention_bytes"}
    names = [(case.operation, case.label) for case in CASES]
    assert not [name for name in names if names.count(name) > 1], "cases of the same name"


def test_every_backend_has_the_same_signatures(ops: backend.Operations) -> None:
    for field in dataclasses.fields(backend.Operations):
        if field.name in PLUMBING - {"prepare", "run"}:
            continue
        definition, twin = getattr(NUMPY, field.name), getattr(ops, field.name)
        assert definition.__name__ == field.name

        def described(function: Any) -> list[tuple[str, Any, Any]]:
            return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

        assert described(twin) == described(definition), field.name
        # The loops are called with the same arguments.
        if hasattr(naive, field.name):
            names = [name for name, *_ in described(definition)]
            assert list(inspect.signature(getattr(naive, field.name)).parameters) == names


def test_arrays_come_back_from_a_backend_unchanged(ops: backend.Operations) -> None:
    for dtype in (np.float32, np.float64, np.int64):
        array = np.arange(30).reshape(2, 3, 5).astype(dtype)
        back = ops.to_numpy(ops.from_numpy(array))
        assert isinstance(back, np.ndarray) and back.dtype == dtype
        np.testing.assert_array_equal(back, array)


def test_backends_are_chosen_by_name() -> None:
    # "cuda" needs a process of its own, with the simulator: tests/cuda.
    assert (*(table.name for table in TABLES), "cuda") == backend.BACKENDS
    assert backend.get_operations("numpy") is NUMPY
    assert backend.get_operations("numba").name == "numba"
    assert backend.get_operations().name == backend.DEFAULT_BACKEND == "numba"
    assert backend.get_operations(dtype="float64") is NUMPY  # it alone has float64
    assert backend.get_operations(threads=3).name == "numba"
    with pytest.raises(ValueError, match=r"backend is 'torch'; it must be one of 'numpy', 'numba'"):
        backend.get_operations("torch")
    with pytest.raises(ValueError, match="dtype is float16; backend 'numpy' computes in float32 or float64"):
        backend.get_operations("numpy", np.float16)
    with pytest.raises(ValueError, match="dtype is float64; backend 'numba' computes in float32"):
        backend.get_operations("numba", np.float64)
    with pytest.raises(ValueError, match="threads is given for backend 'numpy'"):
        backend.get_operations("numpy", threads=2)


@pytest.mark.parametrize("name", ["relu7", "GELU", ""])
def test_unknown_activation_is_an_error(ops: backend.Operations, name: str) -> None:
    with pytest.raises(ValueError, match="activation is"):
        ops.activate(ops.from_numpy(np.zeros((1, 1, 1), np.float32)), name)


# ------------------------------------------------------------------- against PyTorch


def torch_of(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def channels_first(x_bnc: Array) -> torch.Tensor:
    return torch_of(x_bnc).transpose(1, 2)


def oik(weight_kgio: Array) -> torch.Tensor:
    kernel, groups, inputs, outputs = weight_kgio.shape
    return torch_of(weight_kgio.transpose(1, 3, 2, 0).reshape(groups * outputs, inputs, kernel))


def of_torch(operation: str, args: tuple[Any, ...]) -> Array | None:
    """The same call by PyTorch's own functions, or None where PyTorch has no such thing."""
    result: torch.Tensor
    if operation == "conv1d":
        x, weight, bias, stride, padding = args
        bias = None if bias is None else torch_of(bias)
        groups = weight.shape[1]
        result = functional.conv1d(channels_first(x), oik(weight), bias, stride, padding, groups=groups).transpose(1, 2)
    elif operation == "positional_conv":
        x, weight, bias, factor = args
        padding, groups = len(weight) // 2, weight.shape[1]
        y = functional.conv1d(channels_first(x), oik(weight), torch_of(bias), factor, padding, groups=groups)
        result = y.transpose(1, 2)
    elif operation == "normalize" and len(args) == 5 and args[1] == "group" and args[0].shape[1] > 1:
        x, _, weight, bias, eps = args
        y = functional.group_norm(channels_first(x), x.shape[-1], torch_of(weight), torch_of(bias), eps)
        result = y.transpose(1, 2)
    elif operation == "layer_norm":
        x, weight, bias, eps = args
        result = functional.layer_norm(torch_of(x), x.shape[-1:], torch_of(weight), torch_of(bias), eps)
    elif operation == "add_norm":
        x, residual, weight, bias, eps = args
        total = torch_of(x) + torch_of(residual)
        result = functional.layer_norm(total, x.shape[-1:], torch_of(weight), torch_of(bias), eps)
    elif operation == "linear":
        x, weight, bias, *activation = args
        result = functional.linear(torch_of(x), torch_of(weight.T), torch_of(bias))
        if activation:
            result = ACT2FN[activation[0]](result)
    elif operation == "linear_add_norm":
        x, (weight, bias), residual, (scale, shift), eps = args
        result = functional.linear(torch_of(x), torch_of(weight.T), torch_of(bias)) + torch_of(residual)
        result = functional.layer_norm(result, result.shape[-1:], torch_of(scale), torch_of(shift), eps)
    elif operation == "activate":
        result = ACT2FN[args[1]](torch_of(args[0]))
    elif operation == "average_pool":
        result = functional.avg_pool1d(channels_first(args[0]), args[1], args[1]).transpose(1, 2)
    elif operation == "masked_softmax" and args[1] is None:
        result = torch.softmax(torch_of(args[0]), -1)
    else:
        return None
    return result.numpy()


TORCH_CASES = [case for case in CASES if of_torch(case.operation, case.args) is not None]


def test_pytorch_has_a_say_on_these_operations() -> None:
    assert {case.operation for case in TORCH_CASES} == {
        *("conv1d", "positional_conv", "normalize", "layer_norm", "add_norm", "linear_add_norm"),
        *("linear", "activate", "average_pool", "masked_softmax"),
    }


@pytest.mark.parametrize(("case", "ops", "dtype"), runs_of(TORCH_CASES))
def test_operation_equals_pytorch(case: Case, ops: backend.Operations, dtype: str) -> None:
    args = changed(case.args, cast(dtype))
    expected = of_torch(case.operation, args)
    assert expected is not None
    got = call(ops, case.operation, args)
    assert got.shape == expected.shape
    # transformers writes gelu_fast's sqrt(2/π) with ten digits.
    assert error_between(got, expected) <= TOLERANCES[ops.name, dtype]


def test_gelu_is_the_exact_one() -> None:
    x = np.linspace(-6, 6, 1201)
    exact, tanh_form = (call(NUMPY, "activate", (x, name)) for name in ("gelu", "gelu_new"))
    assert error_between(exact, functional.gelu(torch_of(x)).numpy()) <= 1e-14
    np.testing.assert_array_equal(call(NUMPY, "activate", (x, "gelu_python")), exact)
    assert error_between(tanh_form, functional.gelu(torch_of(x), approximate="tanh").numpy()) <= 1e-14
    assert 1e-4 < np.abs(exact - tanh_form).max() < 1e-3


# ------------------------------------------------------- what single operations promise


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_softmax_survives_huge_scores(ops: backend.Operations, dtype: Any) -> None:
    scores = np.array([[[[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38], [1e30, 1e30, 0.0]]]], dtype)
    with np.errstate(over="ignore"):  # the lowest float minus a positive one
        free, masked = call(ops, "masked_softmax", (scores,)), call(ops, "masked_softmax", (scores, lengths(0)))
    np.testing.assert_allclose(free[0, 0], np.array([[6, 0, 0], [2, 2, 2], [3, 3, 0]]) / 6, atol=1e-6)
    np.testing.assert_array_equal(masked, np.zeros_like(scores))


def test_explicit_attention_equals_the_fused_one(ops: backend.Operations) -> None:
    tolerance = {np.float64: 1e-12, np.float32: 1e-5}[widest(ops)]
    for case in CASES:
        if case.operation != "disentangled_attention":
            continue
        args = changed(case.args, cast(widest(ops)))
        qkv, heads, (pos_key, pos_query), index, scale, *masking = args
        q, k, v = call(ops, "split_qkv", (qkv,))
        terms = [call(ops, "content_scores", (q, k, heads, scale))]
        if pos_key is not None:
            terms.append(call(ops, "content_to_position", (q, pos_key, index, scale)))
        if pos_query is not None:
            terms.append(call(ops, "position_to_content", (k, pos_query, index, scale)))
        probs = call(ops, "masked_softmax", (call(ops, "add_scores", tuple(terms)), *masking))
        fused = call(ops, "disentangled_attention", args)
        assert error_between(call(ops, "context", (probs, v)), fused) <= tolerance, case.label


def test_group_norm_over_the_valid_steps_is_that_of_the_clip_alone(ops: backend.Operations) -> None:
    rng = np.random.default_rng(3)
    x, weight, bias = rng.standard_normal((3, 20, 4)), rng.standard_normal(4), rng.standard_normal(4)
    valid = lengths(1, 13, 20)
    together = call(ops, "normalize", (x, "group", weight, bias, 1e-5, valid))
    for b, length in enumerate(valid):
        alone = call(ops, "normalize", (x[b : b + 1, :length], "group", weight, bias, 1e-5))
        assert error_between(together[b : b + 1, :length], alone) <= 1e-12


def test_group_norm_of_a_long_recording_keeps_its_digits(ops: backend.Operations) -> None:
    """50,000 steps with a mean far from 0: sums in float32, one number after the other, would lose three digits."""
    x = (10 + np.random.default_rng(5).standard_normal((1, 50_000, 2))).astype(np.float32)
    one, zero = np.ones(2, np.float32), np.zeros(2, np.float32)
    got = call(ops, "normalize", (x, "group", one, zero, 1e-5))
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(axis=1)) / np.sqrt(exact.var(axis=1) + 1e-5)
    assert error_between(got, exact) <= 2e-6


def test_attention_bytes_grows_with_what_is_kept(ops: backend.Operations) -> None:
    """Explicit forms keep t × t matrices; of the fused ones only NumPy's does."""
    for itemsize, explicit in itertools.product((4, 8), (False, True)):
        few, many = (ops.attention_bytes(2, 3, t, itemsize, explicit) for t in (100, 1000))
        assert few > 0 and many >= (50 if explicit or ops is NUMPY else 10) * few
    assert ops.attention_bytes(2, 3, 5000, 4, True) > ops.attention_bytes(2, 3, 5000, 4, False)


@pytest.mark.parametrize("explicit", [False, True])
def test_attention_bytes_covers_what_is_taken(ops: backend.Operations, explicit: bool) -> None:
    """Python's allocator counts NumPy's arrays; results, of the size of the input, get an allowance."""
    batch, heads, t, e, span = 2, 2, 400, 2, 4
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((batch, t, 3 * heads * e)).astype(np.float32)
    table = rng.standard_normal((heads, 2 * span, e)).astype(np.float32)
    valid, index = lengths(t, t - 1), Index(t, span, 16, span)
    call(ops, "disentangled_attention", (qkv, heads, (table, table), index, 2.0, valid, True))  # compiles
    fresh = ops if ops is NUMPY else backend.get_operations("numba", threads=2)  # without scratch memory
    tracemalloc.start()
    if explicit:
        q, k, v = call(fresh, "split_qkv", (qkv,))
        terms = [call(fresh, "content_scores", (q, k, heads, 2.0))]
        terms.append(call(fresh, "content_to_position", (q, table, index, 2.0)))
        terms.append(call(fresh, "position_to_content", (k, table, index, 2.0)))
        probs = call(fresh, "masked_softmax", (call(fresh, "add_scores", tuple(terms)), valid, True))
        call(fresh, "context", (probs, v))
    else:
        call(fresh, "disentangled_attention", (qkv, heads, (table, table), index, 2.0, valid, True))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    linear = 20 * batch * t * heads * (e + span) * 4
    assert peak <= ops.attention_bytes(batch, heads, t, 4, explicit) + linear
