"""Where two runs part: the error of every trace point, in the order in which they fire."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sewd_np.plot.given import check_trace, number
from sewd_np.plot.style import PALETTE, Array, drawn, new_figure
from sewd_np.trace import Row
from sewd_np.trace import compare as compare_points

KINDS = {  # kind -> what its points' names look like; the first that matches counts
    "convolutions": r"feature_extractor\.",
    "position tables": r"encoder\.encoder\.(rel_embeddings|LayerNorm)$|.*\.pos_(key|query)_layer$",
    "attention scores": r".*\.attention\.self\.(c2c|c2p|p2c|scores|probs)$",
    "attention": r"encoder\.encoder\.layer\.\d+\.attention",
    "feed-forward": r"encoder\.encoder\.layer\.",
    "squeeze": r"layer_norm$|feature_projection$|encoder\.(input|pos_conv_embed.*|pool|encoder\.(input|conv.*))$",
    "upsample and head": r"",
}
MARKERS = "osDv^P*"
ALL_EQUAL = 1e-7  # an error to draw the scale around where there is none, and none is tolerated


def kind_of(name: str) -> str:
    """Which part of the model a trace point belongs to."""
    return next(kind for kind, pattern in KINDS.items() if re.match(pattern, name))


def stage_of(name: str) -> str:
    """A coarser cut, for the ticks: convolutions, squeeze, layer 0, layer 1, …, head."""
    layer = re.match(r"encoder\.encoder\.layer\.(\d+)", name)
    if layer:
        return layer[1]
    return {"convolutions": "conv", "upsample and head": "head"}.get(kind_of(name), "squeeze")


@drawn
def compare(trace_a: Any, trace_b: Any, tolerance: float = 1e-4, names: tuple[str, str] = ("A", "B")) -> Figure:
    """Where two runs part: a mark a trace point, in the order in which they fire, higher the more they differ.

    trace_a, trace_b: two traces, or mappings from names to arrays: two backends, two models, an input and a changed
    one. The error is ``trace.error_between``: max |a − b| / max(1, max |b|). Points that are equal to the last bit
    stand on the bottom line; crosses on top are points that cannot be compared (another shape, NaN, in one run only).
    The first beyond ``tolerance`` is named; 0 asks for runs that are equal.

    Raises ``ValueError`` where both traces are empty, or for a tolerance that is no number of at least 0.
    """
    if number(tolerance, "tolerance") < 0:
        raise ValueError(f"tolerance is {tolerance:g}; it must be a finite number of at least 0.")
    for trace in (trace_a, trace_b):
        check_trace(trace, "*")
    rows = compare_points(trace_a, trace_b, tolerance)
    if not rows:
        raise ValueError("both traces are empty; pass each to a model call first.")
    errors = np.array([row.error for row in rows])
    drawable = np.isfinite(errors)
    drawn_errors = [*errors[drawable & (errors > 0)], *([tolerance] if tolerance > 0 else [])] or [ALL_EQUAL]
    lowest = math.floor(math.log10(min(drawn_errors)) - 1)
    highest = math.log10(max(drawn_errors))
    # The top of the panel stays free of marks: the first point that differs is named there.
    floor, ceiling = 10.0**lowest, 10.0 ** math.ceil(max(highest + 1.5, lowest + (highest - lowest) / 0.85))
    heights = np.where(drawable, np.maximum(errors, floor), ceiling)

    figure = new_figure(4.6)
    panel = figure.add_subplot()
    kinds = np.array([kind_of(row.name) for row in rows])
    for kind, colour, marker in zip(KINDS, PALETTE, MARKERS, strict=False):
        at = np.flatnonzero((kinds == kind) & drawable)
        if len(at):
            panel.plot(at, heights[at], marker, color=colour, markersize=4, label=kind, clip_on=False)
    lost = np.flatnonzero(~drawable)
    if len(lost):
        panel.plot(lost, heights[lost], "x", color="black", markersize=5, label="not comparable", clip_on=False)
    if tolerance > 0:
        beside = panel.get_yaxis_transform()
        panel.axhline(tolerance, color="0.5", linestyle="--", linewidth=0.8)
        panel.text(1.005, tolerance, f"tolerance\n{tolerance:g}", transform=beside, va="center", fontsize=8)
    if (errors == 0).any():
        panel.text(1.005, floor, "equal", transform=panel.get_yaxis_transform(), va="center", fontsize=8)
    _mark_first(panel, rows, heights)
    _mark_stages(panel, rows)
    panel.set(
        yscale="log",
        ylim=(floor, ceiling),
        xlim=(-1, len(rows)),
        ylabel="max |a − b| / max(1, max |b|)",
    )
    panel.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    bad = sum(row.status != "OK" for row in rows)
    figure.suptitle(f"{names[0]} beside {names[1]}: {len(rows) - bad} of {len(rows)} points agree within {tolerance:g}")
    return figure


def _mark_first(panel: Any, rows: list[Row], heights: Array) -> None:
    """Name the first point that is not OK."""
    first = next((i for i, row in enumerate(rows) if row.status != "OK"), None)
    if first is None:
        return
    left = first < len(rows) / 2
    across = (first + 1) / (len(rows) + 1)
    panel.annotate(
        f"first that differs: {rows[first].name} ({rows[first].status})",
        (first, heights[first]),
        # Above the point, so that the line to it crosses neither text nor marks; the text takes up to half the width.
        (min(max(across, 0.02), 0.46) if left else max(min(across, 0.98), 0.54), 0.93),
        textcoords="axes fraction",
        ha="left" if left else "right",
        va="top",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "linewidth": 0.7, "relpos": (0.0 if left else 1.0, 0.0)},
    )


def _mark_stages(panel: Any, rows: list[Row]) -> None:
    """Separate the stages by thin lines and name them below, every second one where they are many."""
    stages = [stage_of(row.name) for row in rows]
    starts = [i for i, stage in enumerate(stages) if i == 0 or stage != stages[i - 1]]
    for start in starts[1:]:
        panel.axvline(start - 0.5, color="0.85", linewidth=0.6, zorder=0)
    ends = [*starts[1:], len(rows)]
    # On a line of their own, for these stages are short and their names are not.
    names = [("\n" if stages[start] in ("squeeze", "head") else "") + stages[start] for start in starts]
    panel.set_xticks([(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)], names)
    panel.tick_params(axis="x", length=0, pad=6)  # clear of the marks that stand on the bottom line
    panel.set_xlabel("trace points in the order in which they fire; a number is a transformer layer")
