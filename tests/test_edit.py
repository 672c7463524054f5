"""Changing intermediates as they pass: every point, on every backend; and the ready-made ablations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import sewd_np
from sewd_np import ablate, backend, inputs, memory
from sewd_np.config import SEWDConfig
from sewd_np.params import random_params
from sewd_np.trace import Trace, error_between, points
from tests.reference import CLASSES, TINY, arrays_of

Array = np.ndarray
NUMPY = backend.NUMPY
NUMBA = backend.get_operations("numba", threads=1)
# The same operations, but a padded batch runs as one, as on a GPU.
TOGETHER = dataclasses.replace(NUMPY, one_by_one=False)
TABLES = [
    pytest.param(NUMPY, id="one by one"),
    pytest.param(TOGETHER, id="together"),
    pytest.param(NUMBA, id="numba"),
]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("ctc", {"conv_kernel_size": 3}),
    ("ctc", {"share_att_key": False, "feat_extract_norm": "layer", "norm_rel_ebd": "none"}),
    ("classification", {"pos_att_type": ["p2c"]}),
    ("classification", {"use_weighted_layer_sum": True, "pos_att_type": ["c2p"]}),
    ("model", {"relative_attention": False, "norm_rel_ebd": "none"}),
]
ROUNDING = 2e-5  # fused against explicit forms in float32: some 30 sums of 2^-24 each
LAYER = "encoder.encoder.layer.1"
TABLE = "encoder.encoder.rel_embeddings"


def build(
    options: dict[str, Any], head: str = "ctc", ops: backend.Operations = NUMPY, params: dict[str, Array] | None = None
) -> Any:
    config = SEWDConfig.from_dict({**TINY, **options})
    dtype = np.float32 if ops.name == "numba" else np.float64
    values = random_params(config, head, seed=9) if params is None else params
    return CLASSES[head](config, {name: value.astype(dtype) for name, value in values.items()}, ops)


def wave(batch: int = 2, samples: int = 90) -> Array:
    return np.random.default_rng(4).standard_normal((batch, samples))


def mask_of(*lengths: int) -> Array:
    return (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)


def noise(value: Array) -> Array:
    return value + np.random.default_rng(8).standard_normal(value.shape)


def twice_and_one(value: Array) -> Array:
    return 2 * value + 1


# ------------------------------------------------------------------------ every point


@pytest.mark.parametrize("ops", TABLES)
@pytest.mark.parametrize(("head", "options"), OPTIONS)
def test_every_point_can_be_changed(ops: backend.Operations, head: str, options: dict[str, Any]) -> None:
    """Noise anywhere reaches the end, in a trace as in the result; an edit that changes nothing changes nothing."""
    model = build(options, head, ops)
    rounding = ROUNDING if ops.name == "numba" else 1e-12
    call: dict[str, Any] = {"input_values": wave(), "attention_mask": mask_of(90, 70), "output_hidden_states": True}
    before, declared = arrays_of(model(**call)), points(model.config, head)
    for name in declared:
        trace, plain = Trace(name), Trace(name)
        same = arrays_of(model(**call, edit={name: lambda value: value}))
        other = arrays_of(model(**call, edit={name: noise}, trace=trace))
        model(**call, trace=plain)
        assert all(error_between(a, b) <= rounding for a, b in zip(same, before, strict=True)), name
        assert max(error_between(a, b) for a, b in zip(other, before, strict=True)) > 1e-3, name
        assert error_between(trace[name], noise(plain[name])) <= rounding, name


@pytest.mark.parametrize("name", [TABLE, "encoder.encoder.LayerNorm"])
def test_the_layers_see_an_edited_position_table(name: str) -> None:
    """They read it projected on load; an edited one passes its norm and each layer's projection again."""
    for ops in (NUMPY, NUMBA):
        model, trace, plain = build({}, "ctc", ops), Trace(), Trace()
        model(wave(1), trace=plain)
        model(wave(1), edit={name: noise}, trace=trace)
        changed = [point for point in trace if error_between(trace[point], plain[point]) > 1e-6]
        first = f"{LAYER.replace('1', '0')}.attention.self"
        assert changed[0] == name
        assert {f"{first}.pos_key_layer", f"{first}.pos_query_layer", f"{first}.c2p", f"{first}.p2c"} <= {*changed}
        assert f"{first}.c2c" not in changed


# Point → the parameters that turn its value x into 2 x + 1 when they are doubled and one is added to the last of them.
SAME_AS_PARAMETERS = {
    "feature_extractor.conv_layers.2.layer_norm": "feature_extractor.conv_layers.2.layer_norm",
    "layer_norm": "layer_norm",
    "feature_projection": "feature_projection",
    "encoder.pos_conv_embed.conv": "encoder.pos_conv_embed.conv",
    "encoder.encoder.LayerNorm": "encoder.encoder.LayerNorm",
    f"{LAYER}.attention.self.query_proj": f"{LAYER}.attention.self.query_proj",
    f"{LAYER}.attention.self.key_proj": f"{LAYER}.attention.self.key_proj",
    f"{LAYER}.attention.self.value_proj": f"{LAYER}.attention.self.value_proj",
    f"{LAYER}.attention.self.pos_key_layer": f"{LAYER}.attention.self.pos_key_proj",
    f"{LAYER}.attention.self.pos_query_layer": f"{LAYER}.attention.self.pos_query_proj",
    f"{LAYER}.attention.output.dense": f"{LAYER}.attention.output.dense",
    f"{LAYER}.attention": f"{LAYER}.attention.output.LayerNorm",
    f"{LAYER}.intermediate.dense": f"{LAYER}.intermediate.dense",
    f"{LAYER}.output.dense": f"{LAYER}.output.dense",
    LAYER: f"{LAYER}.output.LayerNorm",
    "encoder.encoder.conv.conv": "encoder.encoder.conv.conv",
    "encoder.encoder.conv": "encoder.encoder.conv.LayerNorm",
    "encoder.upsample.projection": "encoder.upsample.projection",
    "lm_head": "lm_head",
}


@pytest.mark.parametrize("ops", [pytest.param(NUMPY, id="numpy"), pytest.param(NUMBA, id="numba")])
@pytest.mark.parametrize("name", SAME_AS_PARAMETERS)
def test_an_edit_does_what_other_parameters_would(ops: backend.Operations, name: str) -> None:
    """Where a point is the result of a weight and a bias, 2 x + 1 is also what a model with other ones computes."""
    options = {"share_att_key": False, "feat_extract_norm": "layer", "conv_kernel_size": 3}
    model, prefix = build(options, ops=ops), SAME_AS_PARAMETERS[name]
    params = dict(model.params)
    weight = next(key for key in params if key in (f"{prefix}.weight", f"{prefix}.weight_g"))
    params[weight] = 2 * params[weight]
    params[f"{prefix}.bias"] = twice_and_one(params[f"{prefix}.bias"])
    got = model(wave(), edit={name: twice_and_one})
    want = build(options, ops=ops, params=params)(wave())
    assert error_between(got.logits, want.logits) <= (1e-11 if ops.name == "numpy" else 1e-4), name


def test_a_shuffled_table_is_the_model_with_shuffled_parameters() -> None:
    model = build({})
    params = dict(model.params)
    params[f"{TABLE}.weight"] = np.random.default_rng(3).permutation(params[f"{TABLE}.weight"], axis=0)
    want = build({}, params=params)(wave()).logits
    assert error_between(model(wave(), edit=ablate.shuffle_positions(3)).logits, want) <= 1e-12
    assert error_between(model(wave()).logits, want) > 1e-3


# ---------------------------------------------------------------- what an edit is given


@pytest.mark.parametrize("ops", TABLES)
def test_an_edit_cannot_change_the_model(ops: backend.Operations) -> None:
    """A function may write to its array, return a view or keep what it returned."""
    model = build({"conv_kernel_size": 3}, "ctc", ops)
    before, kept = model(wave()).logits, []

    def change(value: Array) -> Array:
        value[...] = 0.25
        kept.append(value[::-1])
        return kept[-1]

    out = model(wave(), edit={"*": change})
    np.testing.assert_array_equal(out.logits, np.full_like(before, 0.25))
    for value in kept:
        value[...] = np.nan
    assert np.isfinite(out.logits).all()
    np.testing.assert_array_equal(model(wave()).logits, before)


def test_patterns_and_their_order() -> None:
    """A pattern changes each point that it matches; functions on one point follow one another."""
    model, seen, trace = build({}), [], Trace("*.c2p", "*.probs", "*.scores")

    def look(value: Array) -> Array:
        seen.append(value.copy())
        return value

    model(wave(), edit={"*.c2p": np.ones_like, "*.layer.1.*.c2p": twice_and_one, "*.scores": look}, trace=trace)
    assert (trace["encoder.encoder.layer.0.attention.self.c2p"] == 1).all()
    assert (trace["encoder.encoder.layer.1.attention.self.c2p"] == 3).all()
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[1], trace["encoder.encoder.layer.1.attention.self.scores"])


def test_results_show_what_was_changed() -> None:
    model = build({})
    edit = {f"{LAYER}.attention.self.probs": np.zeros_like, LAYER: twice_and_one}
    trace = Trace(LAYER)
    out = model(wave(), edit=edit, output_attentions=True, output_hidden_states=True, trace=trace)
    assert (out.attentions[1] == 0).all() and (out.attentions[0] != 0).any()
    np.testing.assert_array_equal(out.hidden_states[2], trace[LAYER])
    assert trace[LAYER].dtype == np.float64
    # Integers and booleans are numbers; they become the model's.
    bits = model(wave(), edit={LAYER: lambda value: value > 0}, trace=trace)
    assert trace[LAYER].dtype == bits.logits.dtype == np.float64 and set(np.unique(trace[LAYER])) <= {0, 1}
    nan = model(wave(), edit={LAYER: lambda value: value * np.nan})
    assert np.isnan(nan.logits).all()


@pytest.mark.parametrize("ops", TABLES)
def test_recordings_meet_an_edit_one_by_one(ops: backend.Operations) -> None:
    """Under "alone" a function sees each recording by itself, so a list gives what each gives alone."""
    model, lengths, shapes = build({"conv_kernel_size": 3}, "ctc", ops), (90, 61), []
    wave_bn = wave() * mask_of(*lengths)

    def change(value: Array) -> Array:
        shapes.append(value.shape)
        return value + np.arange(value.shape[1])[:, None]

    trace = Trace("encoder.encoder.input")
    edit = {"encoder.input": change}
    out = model(wave_bn, mask_of(*lengths), padding="alone", edit=edit, trace=trace)
    frames = [model.config.frames(length) for length in lengths]
    assert [shape[:2] for shape in shapes] == [(1, count) for count in frames]
    for b, (length, count) in enumerate(zip(lengths, frames, strict=True)):
        alone = Trace("encoder.encoder.input")
        want = model(wave_bn[b : b + 1, :length], edit=edit, trace=alone)
        np.testing.assert_array_equal(out.logits[b, :count], want.logits[0])
        np.testing.assert_array_equal(
            trace["encoder.encoder.input"][b, : count // 2], alone["encoder.encoder.input"][0]
        )


# ------------------------------------------------------------------------------ errors


def test_what_is_refused() -> None:
    model = build({})
    with pytest.raises(
        ValueError, match=r"edit of '\*\.self\.prob' matches no point.*layer\.0\.attention\.self\.probs"
    ):
        model(wave(), edit={"*.self.prob": np.zeros_like})
    with pytest.raises(ValueError, match=r"edit of 'encoder\.encodr' matches no point.*names look like encoder"):
        model(wave(), edit={"encoder.encodr": np.zeros_like})
    with pytest.raises(TypeError, match=r"edit is <function .*; it must be a dictionary from names of points"):
        model(wave(), edit=np.zeros_like)
    with pytest.raises(TypeError, match="edit has 'encoder': 3; it must be the name of a point"):
        model(wave(), edit={"encoder": 3})
    with pytest.raises(ValueError, match=r"edit of encoder returned an array of shape \(2, 1, 12\); .* \(2, 14, 12\)"):
        model(wave(), edit={"encoder": lambda value: value[:, :1]})
    with pytest.raises(TypeError, match=r"edit of encoder returned NoneType; it must return an array of numbers"):
        model(wave(), edit={"encoder": lambda value: None})
    with pytest.raises(TypeError, match=r"edit of encoder returned an array of dtype complex128"):
        model(wave(), edit={"encoder": lambda value: 1j * value})
    with pytest.raises(ValueError, match=r"edit of '.*layer\.2\.attention\.self\.probs' matches no point"):
        model(wave(), edit=ablate.drop_head(2, 0))
    for head in (2, -1):
        with pytest.raises(ValueError, match=f"head is {head}; this model has heads 0 to 1"):
            model(wave(), edit=ablate.drop_head(1, head))
    with pytest.raises(ValueError, match=r"edit of '.*c2p' matches no point"):
        build({"pos_att_type": ["p2c"]})(wave(), edit=ablate.drop_c2p())


@pytest.mark.parametrize("name", [f"{LAYER}.attention.self.value_proj", TABLE])
def test_an_edit_counts_as_looking_inside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the explicit form, all heads at once: what cannot fit is refused before the work."""
    model = build({})
    monkeypatch.setattr(memory, "available_memory", lambda: 60_000_000)
    monkeypatch.setattr(inputs, "require_memory", memory.require_memory)
    long = np.zeros((1, 12_000))  # 1000 squeezed frames: 8 MB a matrix, 40 MB without the edit
    model(long)
    with pytest.raises(MemoryError, match="shorter pieces or leave out what looks inside the attention"):
        model(long, edit={name: noise})


# --------------------------------------------------------------------------- ablations


def test_a_dropped_head_adds_nothing() -> None:
    model, trace, plain = build({}), Trace(f"{LAYER}.attention.self*"), Trace(f"{LAYER}.attention.self*")
    model(wave(), trace=plain)
    model(wave(), edit=ablate.drop_head(1, 0), trace=trace)
    name = f"{LAYER}.attention.self"
    assert (trace[name][..., :6] == 0).all() and (trace[f"{name}.probs"][:, 0] == 0).all()
    np.testing.assert_array_equal(trace[name][..., 6:], plain[name][..., 6:])


def test_dropped_terms_and_uniform_attention() -> None:
    model, trace, name = build({}), Trace(), f"{LAYER}.attention.self"
    for drop, term in ((ablate.drop_c2c, "c2c"), (ablate.drop_c2p, "c2p"), (ablate.drop_p2c, "p2c")):
        model(wave(), edit=drop(), trace=trace)
        kept = [trace[f"{name}.{other}"] for other in ("c2c", "c2p", "p2c") if other != term]
        np.testing.assert_allclose(trace[f"{name}.scores"], kept[0] + kept[1], atol=1e-14)
        assert (trace[f"encoder.encoder.layer.0.attention.self.{term}"] == 0).all()
        model(wave(), edit=drop(1), trace=trace)
        assert (trace[f"encoder.encoder.layer.0.attention.self.{term}"] != 0).any()
    mask = mask_of(90, 60)
    model(wave(), mask, edit=ablate.uniform_attention(1), trace=trace)
    valid = (model.config.frames(60) + 1) // 2
    np.testing.assert_allclose(trace[f"{name}.probs"][1, :, :, :valid], 1 / valid, atol=1e-15)
    assert (trace[f"{name}.probs"][1, :, :, valid:] == 0).all()


def test_mirrored_positions() -> None:
    """Row S + δ goes to S − δ, so S stays; twice is nothing."""
    model, trace, plain = build({}), Trace(TABLE), Trace(TABLE)
    before = model(wave(), trace=plain).logits
    other = model(wave(), edit=ablate.mirror_positions(), trace=trace).logits
    rows, span = plain[TABLE], model.config.position_span
    for distance in range(1 - span, span):
        np.testing.assert_array_equal(trace[TABLE][span + distance], rows[span - distance])
    twice = ablate.together(ablate.mirror_positions(), ablate.mirror_positions())
    assert error_between(other, before) > 1e-3
    assert error_between(model(wave(), edit=twice).logits, before) <= 1e-12


def test_together() -> None:
    """The edits of two heads of one layer are of one point, which a plain union of dictionaries would forget."""
    model, trace = build({}), Trace("*.probs")
    edit = ablate.together(ablate.drop_head(1, 0), ablate.drop_head(1, 1), ablate.drop_head(0, 1))
    assert len(edit) == 2
    model(wave(), edit=edit, trace=trace)
    assert (trace[f"{LAYER}.attention.self.probs"] == 0).all()
    assert (trace["encoder.encoder.layer.0.attention.self.probs"][:, 0] != 0).any()
    assert ablate.together() == {}


def test_together_keeps_the_order_of_patterns_that_come_again() -> None:
    """((0 + 1) + 1) · 10; a dictionary would call both functions of "lm_head" before that of "lm_*"."""
    first, second = {"lm_head": lambda x: 0 * x + 1}, {"lm_*": lambda x: x + 1}
    edit = ablate.together(ablate.together(first, second), {"lm_head": lambda x: 10 * x})
    assert (build({})(wave(), edit=edit).logits == 20).all()
    assert list(edit) == ["lm_head", "lm_*"] and edit["lm_head"](np.zeros(1)) == 10
    with pytest.raises(KeyError):
        edit["encoder"]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: ablate.drop_head(0, 1.0), "head is 1.0; it must be a whole number"),
        (lambda: ablate.drop_c2c("*"), "layer is '*'; it must be a whole number"),
        (lambda: ablate.uniform_attention(True), "layer is True; it must be a whole number"),
        (lambda: ablate.drop_head("0", 1), "layer is '0'; it must be a whole number"),
        (lambda: ablate.shuffle_positions(-1), "seed is -1; it must be a whole number of at least 0"),
    ],
)
def test_ablations_take_whole_numbers(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make()


def test_what_is_no_edit_cannot_be_put_together() -> None:
    for other in (None, "a", [("encoder.input", np.zeros_like)]):
        with pytest.raises(TypeError, match=r"edit is .*; it must be a dictionary from names of points"):
            ablate.together(other)


def test_a_trace_is_a_mapping() -> None:
    trace = Trace("encoder.*input")
    build({})(wave(), trace=trace)
    names = ["encoder.input", "encoder.encoder.input"]
    assert list(trace.keys()) == list(dict(trace)) == names
    for (name, value), other in zip(trace.items(), trace.values(), strict=True):
        assert value is other is trace[name] is trace.get(name)
    assert trace.get("encoder") is None and trace == trace and trace != Trace("encoder.*input") and {trace}


def test_transcribe_with_an_edit() -> None:
    """A model that hears every frame as the blank writes nothing; the same call without the edit is as before."""
    model, clip = sewd_np.load("an4"), sewd_np.clip()

    def blank(logits_bsv: Array) -> Array:
        return np.eye(1, logits_bsv.shape[-1], model.config.pad_token_id)[None].repeat(logits_bsv.shape[1], 1)

    said = sewd_np.transcribe(clip, model=model)
    assert said.text
    assert sewd_np.transcribe(clip, model=model, edit={"lm_head": blank}).text == ""
    assert [one.text for one in sewd_np.transcribe([clip, clip], model=model, edit={"lm_head": blank})] == ["", ""]
    assert sewd_np.transcribe(clip, model=model, edit={}) == said
