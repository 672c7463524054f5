"""The trace: one window into the model.

``points(config, head)`` names every intermediate of a forward pass by the reference's own module path, with its shape
in the dimension key. A ``Trace`` picks some of them by pattern and keeps their values:

    trace = Trace("*.attention.self.probs", "encoder.pool")
    model(wave, trace=trace)
    trace["encoder.encoder.layer.3.attention.self.probs"]      # (b, h, i, j)

An *edit* changes values of the same table as they pass, and all that comes after follows from the changed value:

    model(wave, edit={"*.layer.3.attention.self.c2p": np.zeros_like})

The parity report reads this table and nothing else. Inside the model a point is written ``x = point(name, x)``. Where
the reference has no module for a value, the point is named after the module that takes it, as ``.input``.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
LAYER = "encoder.encoder.layer"  # how the names of all points of a layer begin, before its number


def points(config: Any, head: str) -> dict[str, str]:
    """Every trace point of a model: name → shape in the dimension key, in the order in which they fire.

    b batch, s frames at 50 Hz, t squeezed frames, d hidden, h heads, e head size, f feed-forward, v vocabulary,
    i query frame, j key frame, p relative-position bucket; ``n0`` steps and ``c0`` channels after convolution 0, ``r``
    frames of the raw positional convolution, ``q`` the same without an even kernel's surplus, ``kd``
    squeeze_factor · d, ``u`` frames after unfolding, ``m`` classifier_proj_size, ``l`` labels. Points of relative
    attention, norms and projections that the configuration lacks are not listed.
    """
    table: dict[str, str] = {}
    last = len(config.conv_dim) - 1
    for i in range(last + 1):
        name, shape = f"feature_extractor.conv_layers.{i}", f"b n{i} c{i}"
        table[f"{name}.conv"] = shape
        if i == 0 or config.feat_extract_norm == "layer":
            table[f"{name}.layer_norm"] = shape
        table[name] = shape
    table["layer_norm"] = f"b s c{last}"
    if config.has_feature_projection:
        table["feature_projection"] = "b s d"
    table["encoder.input"] = "b s d"
    table["encoder.pos_conv_embed.conv"] = "b r d"
    table["encoder.pos_conv_embed"] = "b q d"
    table["encoder.pool"] = "b t d"
    table["encoder.encoder.input"] = "b t d"
    if config.relative_attention:
        table["encoder.encoder.rel_embeddings"] = "p d"
        if config.normalizes_positions:
            table["encoder.encoder.LayerNorm"] = "p d"
    for i in range(config.num_hidden_layers):
        table.update(_layer_points(config, f"{LAYER}.{i}"))
        if i == 0 and config.conv_kernel_size > 0:
            table["encoder.encoder.conv.conv"] = "b t d"
            table["encoder.encoder.conv"] = "b t d"
    table["encoder.upsample.projection"] = "b t kd"
    table["encoder.upsample"] = "b u d"
    table["encoder"] = "b s d"
    if head == "ctc":
        table["lm_head"] = "b s v"
    elif head == "classification":
        if config.use_weighted_layer_sum:
            table["projector.input"] = "b t d"
        table["projector"] = "b t m" if config.use_weighted_layer_sum else "b s m"
        table["classifier.input"] = "b m"
        table["classifier"] = "b l"
    return table


def _layer_points(config: Any, layer: str) -> dict[str, str]:
    attention = f"{layer}.attention.self"
    table = {f"{attention}.{name}_proj": "b t d" for name in ("query", "key", "value")}
    table[f"{attention}.c2c"] = "b h i j"
    if config.uses_c2p:
        table[f"{attention}.pos_key_layer"] = "h p e"
        table[f"{attention}.c2p"] = "b h i j"
    if config.uses_p2c:
        table[f"{attention}.pos_query_layer"] = "h p e"
        table[f"{attention}.p2c"] = "b h i j"
    table[f"{attention}.scores"] = "b h i j"
    table[f"{attention}.probs"] = "b h i j"
    table[attention] = "b t d"
    table[f"{layer}.attention.output.dense"] = "b t d"
    table[f"{layer}.attention"] = "b t d"
    table[f"{layer}.intermediate.dense"] = "b t f"
    table[f"{layer}.intermediate"] = "b t f"
    table[f"{layer}.output.dense"] = "b t d"
    table[layer] = "b t d"
    return table


def shapes(config: Any, head: str, batch: int, samples: int) -> dict[str, tuple[int, ...]]:
    """The shape that each point must have for a batch of waveforms (batch, samples)."""
    lengths = config.conv_lengths(samples)
    s, factor, kernel = lengths[-1], config.squeeze_factor, config.num_conv_pos_embeddings
    t = config.squeezed(s)
    raw = (s + 2 * (kernel // 2) - kernel) // factor + 1
    sizes = {
        **{f"n{i}": n for i, n in enumerate(lengths)},
        **{f"c{i}": c for i, c in enumerate(config.conv_dim)},
        "b": batch,
        "s": s,
        "t": t,
        "i": t,
        "j": t,
        "u": t * factor,
        "r": raw,
        "q": raw - (kernel % 2 == 0),
        "d": config.hidden_size,
        "kd": factor * config.hidden_size,
        "h": config.num_attention_heads,
        "e": config.head_size,
        "f": config.intermediate_size,
        "p": 2 * config.position_span,
        "v": config.vocab_size,
        "m": config.classifier_proj_size,
        "l": config.num_labels,
    }
    return {name: tuple(sizes[key] for key in dims.split()) for name, dims in points(config, head).items()}


def matching(pattern: str, declared: Iterable[str], what: str) -> list[str]:
    """The declared names that a shell pattern matches. Raises ``ValueError``, with names like it, if none does."""
    declared = list(declared)
    names = fnmatch.filter(declared, pattern)
    if not names:
        last = pattern.rsplit(".", 1)[-1].strip("*")
        near = [name for name in declared if last and last in name][:3]
        near = near or difflib.get_close_matches(pattern, declared, 3) or declared[:3]
        raise ValueError(
            f"{what} {pattern!r} matches no point of this model; "
            f"names look like {', '.join(near)} (sewd_np.trace.points lists all)."
        )
    return names


def any_inside(asked: Iterable[str], *names: str) -> bool:
    """Whether a point that is asked for has one of these names, or begins with one that ends in a dot."""
    return any(point.startswith(name) if name.endswith(".") else point == name for name in names for point in asked)


class Trace(Mapping[str, Array]):
    """Values of the trace points whose names match one of ``patterns`` (shell style: ``*`` matches dots too).

    Pass it to a model call; afterwards it is a mapping from names to NumPy arrays, in the order in which they fired.
    ``dims`` gives each value's shape in the dimension key. A trace holds one call: the next call starts it anew. No
    pattern means every point, which for a long recording is a great deal of memory: each layer keeps five (b, h, t, t)
    arrays.
    """

    def __init__(self, *patterns: str) -> None:
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"a trace pattern is {pattern!r}; it must be a string such as '*.attention.self.probs'."
                )
        self.patterns = patterns or ("*",)
        self._arrays: dict[str, Array] = {}
        self.dims: dict[str, str] = {}

    def start(self, declared: dict[str, str]) -> None:
        """Forget the last call and resolve the patterns against the points that this model has.

        Raises ``ValueError`` for a pattern that matches none.
        """
        self._arrays = {}
        self.dims = {}
        chosen = {name for pattern in self.patterns for name in matching(pattern, declared, "trace pattern")}
        self.dims = {name: dims for name, dims in declared.items() if name in chosen}

    def record(self, name: str, value: Array) -> None:
        """Keep a copy of ``value``; a point fires once a call."""
        assert name not in self._arrays, f"trace point {name} fired twice"
        self._arrays[name] = np.array(value)

    def __getitem__(self, name: str) -> Array:
        if name not in self._arrays:
            raise KeyError(f"{name} was not recorded; this trace holds {len(self._arrays)} points.")
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    # A mapping's own comparison would ask an array whether it is true.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"Trace({', '.join(map(repr, self.patterns))}): {len(self._arrays)} points"


# ------------------------------------------------------------------- changing a value

Change = Callable[[Array], Array]
Edit = Mapping[str, Change]  # from names or shell patterns to functions


class InOrder(Mapping[str, Change]):
    """An edit of (pattern, function) pairs, of which several may have one pattern, with others between them.

    As a mapping it has each pattern once, with all that is done under it; ``pairs`` alone tells the whole order.
    """

    def __init__(self, pairs: Iterable[tuple[str, Change]]) -> None:
        self.pairs = tuple(pairs)

    def __getitem__(self, pattern: str) -> Change:
        changes = [change for own, change in self.pairs if own == pattern]
        if not changes:
            raise KeyError(pattern)
        return lambda value: functools.reduce(lambda x, change: change(x), changes, value)

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self.pairs))

    def __len__(self) -> int:
        return len(dict(self.pairs))


def pairs_of(edit: Edit) -> Iterable[tuple[str, Change]]:
    """An edit's patterns and functions, in the order in which they apply; ``TypeError`` for what is no mapping."""
    if not isinstance(edit, Mapping):
        raise TypeError(
            f"edit is {edit!r}; it must be a dictionary from names of points to functions, "
            "such as {'*.attention.self.c2p': np.zeros_like}."
        )
    return edit.pairs if isinstance(edit, InOrder) else edit.items()


def resolve_edit(edit: Edit | None, declared: Iterable[str]) -> dict[str, list[Change]]:
    """Each point that an edit changes, with its functions in the order of the edit.

    Raises ``TypeError`` for anything but a mapping from strings to functions, ``ValueError`` for a pattern that matches
    no point.
    """
    changes: dict[str, list[Change]] = {}
    if edit is None:
        return changes
    for pattern, change in pairs_of(edit):
        if not isinstance(pattern, str) or not callable(change):
            raise TypeError(
                f"edit has {pattern!r}: {change!r}; it must be the name of a point (a string) and a function that "
                "takes the point's array and returns another."
            )
        for name in matching(pattern, declared, "edit of"):
            changes.setdefault(name, []).append(change)
    return changes


def changed(name: str, changes: list[Change], value: Array) -> Array:
    """``value`` after every change, in its dtype. A function gets a copy, which it may write to.

    Raises ``TypeError`` where a function returns no array of numbers, ``ValueError`` where it returns another shape.
    """
    for change in changes:
        new = change(np.array(value))
        wanted = f"it must return an array of numbers of shape {value.shape}, the shape of what it was given."
        if not isinstance(new, np.ndarray | np.generic):
            raise TypeError(f"the edit of {name} returned {type(new).__name__}; {wanted}")
        if new.dtype.kind not in "biuf":
            raise TypeError(f"the edit of {name} returned an array of dtype {new.dtype}; {wanted}")
        if new.shape != value.shape:
            raise ValueError(f"the edit of {name} returned an array of shape {new.shape}; {wanted}")
        # A copy: the function may keep what it returned.
        value = np.array(new, value.dtype, order="C")
    return value


# ----------------------------------------------------------------- comparing two runs


class Row(NamedTuple):
    """One line of a report: a point, how it fared (OK, DIFF, SHAPE, ONLY A, ONLY B), its error, the two shapes."""

    name: str
    status: str
    error: float
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None


def error_between(a: Array, b: Array) -> float:
    """max |a − b| / max(1, max |b|): absolute for small values, relative to the largest for great ones.

    NaN where one side has a NaN or an infinity that the other has not. Raises ``ValueError`` for two shapes.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"arrays of shapes {a.shape} and {b.shape} were given; they must have one shape.")
    same = np.isfinite(b) & np.isfinite(a) | (a == b) | (np.isnan(a) & np.isnan(b))
    if not same.all():
        return math.nan
    finite = np.isfinite(b)
    if not finite.any():
        return 0.0
    return float(np.abs(a[finite] - b[finite]).max() / max(1.0, np.abs(b[finite]).max()))


def compare(a: Any, b: Any, tolerance: float = 1e-4) -> list[Row]:
    """Compare two traces (or mappings from names to arrays) point by point, in the order of ``a``.

    Raises ``TypeError`` for what is neither.
    """
    for run in (a, b):
        if not isinstance(run, Mapping):
            raise TypeError(
                f"{type(run).__name__} is no trace; pass two Trace objects or mappings from names to arrays."
            )
    rows = []
    a, b = ({name: np.asarray(run[name]) for name in run} for run in (a, b))
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b:
            only_a, shape = name in a, (a[name] if name in a else b[name]).shape
            status = "ONLY A" if only_a else "ONLY B"
            rows.append(Row(name, status, math.nan, shape if only_a else None, None if only_a else shape))
            continue
        left, right = a[name], b[name]
        if left.shape != right.shape:
            rows.append(Row(name, "SHAPE", math.nan, left.shape, right.shape))
            continue
        error = error_between(left, right)
        rows.append(Row(name, "OK" if error <= tolerance else "DIFF", error, left.shape, right.shape))
    return rows


def report(a: Any, b: Any, tolerance: float = 1e-4, write: Callable[[str], Any] = print) -> list[Row]:
    """Print the layer-by-layer table of two runs and return its rows.

    a, b: two traces of our own runs (two backends, dtypes, models), or mappings from names to arrays.
    ``error`` is max |a − b| / max(1, max |b|); a row is OK up to ``tolerance``. The first row that is not OK is
    where to look.
    """
    rows = compare(a, b, tolerance)
    width = max([len(row.name) for row in rows], default=4)
    write(f"{'point':<{width}}  status   error      shape")
    for row in rows:
        if row.shape_a == row.shape_b or row.shape_b is None:
            shape = f"{row.shape_a}"
        else:
            shape = f"{row.shape_a} against {row.shape_b}" if row.shape_a else f"{row.shape_b}"
        error = "" if math.isnan(row.error) and row.status not in ("OK", "DIFF") else f"{row.error:.1e}"
        write(f"{row.name:<{width}}  {row.status:<7}  {error:<9}  {shape}")
    bad = [row for row in rows if row.status != "OK"]
    write(
        f"{len(rows) - len(bad)} of {len(rows)} points agree within {tolerance:g}"
        + (f"; the first that does not: {bad[0].name} ({bad[0].status})" if bad else "")
    )
    return rows
