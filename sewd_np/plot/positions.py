"""What the model knows of distance: the log buckets, the bucket of each pair of frames, attention against distance."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sewd_np.attention import relative_index
from sewd_np.plot.given import attention_maps, check_config, positive, whole
from sewd_np.plot.style import (
    DASHES,
    GREY,
    PALETTE,
    SECONDS_PER_SQUEEZED_FRAME,
    Array,
    draw_map,
    drawn,
    new_figure,
    signed,
)


def by_distance(map_ij: Array) -> tuple[Array, Array]:
    """Distances j − i in frames, from 1 − t to t − 1, and the map's mean over all pairs so far apart."""
    frames = len(map_ij)
    distance = np.arange(1 - frames, frames)
    sums = np.array([map_ij.trace(offset) for offset in distance.tolist()])
    return distance, sums / (frames - np.abs(distance))


def _rows_by_distance(config: Any, longest: int) -> tuple[Array, Array]:
    """Distances i − j from −longest to longest, and the row of the relative-position table that each uses."""
    buckets, span = config.position_buckets, config.position_span
    index_ij = relative_index(longest + 1, buckets, config.max_relative_distance, span)
    # i − j = −longest … 0 stand in the first row, read backwards, and 0 … longest in the first column.
    return np.arange(-longest, longest + 1), np.concatenate([index_ij[0, :0:-1], index_ij[:, 0]])


def _check_relative(config: Any) -> None:
    check_config(config)
    if not config.relative_attention:
        raise ValueError("this model has no relative positions (relative_attention is false), so it has no buckets.")


@drawn
def bucket_curve(config: Any, longest: int | None = None) -> Figure:
    """Which row of the relative-position table a distance uses, and how many distances share a row.

    config: a ``SEWDConfig``. Distance i − j, query minus key, in squeezed frames of 40 ms, up to ``longest`` (default:
    a fifth beyond the distance at which the rows end). Near distances have a row each, far ones share, the farther
    the more.

    Raises ``ValueError`` for a model without relative positions.
    """
    _check_relative(config)
    longest = int(config.max_relative_distance * 1.2) if longest is None else max(whole(longest, "longest"), 1)
    distance, row = _rows_by_distance(config, longest)
    figure = new_figure(4.0)
    curve, width = figure.subplots(1, 2, width_ratios=[1.5, 1])
    curve.step(distance, row, where="mid", color=PALETTE[0], label="row used")
    curve.plot(distance, distance + config.position_span, color=GREY, linewidth=0.8, linestyle=":", label="a row each")
    rows = 2 * config.position_span
    curve.set(
        xlim=(-longest, longest),
        ylim=(-0.03 * rows, 1.03 * rows),
        xlabel="distance i − j, query minus key [squeezed frames]",
        ylabel=f"row of the table (0 to {rows - 1})",
        title="← key later      key earlier →",
    )
    curve.legend(frameon=False, loc="upper left")

    # The last row is left out: ``longest`` cuts it short, or it takes everything beyond the end of the buckets.
    starts = np.flatnonzero(np.diff(row[distance >= 0], prepend=-1))
    width.plot(starts[:-1], np.diff(starts), ".", color=PALETTE[1], markersize=3)
    width.set(
        xlim=(0, longest),
        ylim=(0, None),
        xlabel="distance [squeezed frames]",
        ylabel="distances that share a row",
        title="how coarse a row is",
    )
    shared = config.position_buckets > 0
    figure.suptitle("Log buckets: exact nearby, coarse far away" if shared else "No buckets: a row for each distance")
    return figure


@drawn
def bucket_map(config: Any, frames: int, seconds_per_frame: float = SECONDS_PER_SQUEEZED_FRAME) -> Figure:
    """The bucket of every pair of query i and key j among ``frames`` squeezed frames: the table's row minus S.

    It depends on i − j alone, so every diagonal has one colour: white is distance 0.

    Raises ``ValueError`` for a model without relative positions or for no frames.
    """
    _check_relative(config)
    seconds_per_frame = positive(seconds_per_frame, "seconds_per_frame")
    if whole(frames, "frames") < 1:
        raise ValueError("frames is 0; there must be at least one.")
    span = config.position_span
    index_ij = relative_index(frames, config.position_buckets, config.max_relative_distance, span)
    bucket_ij = (index_ij - span).astype(np.float64)
    figure = new_figure(5.2, 6.6)
    panel = figure.add_subplot()
    image = draw_map(panel, bucket_ij, signed(bucket_ij), (seconds_per_frame, seconds_per_frame))
    panel.set_box_aspect(1)
    panel.set(xlabel="key j [s]", ylabel="query i [s]", title="Bucket of i − j for every pair of frames")
    figure.colorbar(image, ax=panel, label=f"bucket (row of the table minus {span})", fraction=0.05)
    return figure


@drawn
def position_profile(
    trace: Any, layer: int, seconds_per_frame: float = SECONDS_PER_SQUEEZED_FRAME, recording: int = 0
) -> Figure:
    """How far each head of a layer looks: its mean probability against how much later the key is than the query.

    trace: what ``plot.attention`` takes. Both axes are logarithmic, the distance only beyond half a second: a peak at
    0 looks at the frame itself, one to the right ahead, a flat line everywhere. The dotted line is even attention, 1/t.

    Raises ``ValueError`` where there is no such layer or no attention was kept.
    """
    seconds_per_frame = positive(seconds_per_frame, "seconds_per_frame")
    ((layer, maps_hij),) = attention_maps(trace, whole(layer, "layer"), recording).items()
    frames = maps_hij.shape[-1]
    figure = new_figure(4.2)
    panel = figure.add_subplot()
    for head, map_ij in enumerate(maps_hij):
        distance, mean = by_distance(map_ij)
        panel.plot(
            distance * seconds_per_frame,
            np.maximum(mean, 1e-6),
            color=PALETTE[head % len(PALETTE)],
            linestyle=DASHES[head // len(PALETTE) % len(DASHES)],
            linewidth=1.2,
            marker="o" if frames < 3 else "",
            label=f"head {head}",
        )
    panel.axhline(1 / frames, color=GREY, linestyle=":", linewidth=0.8, label="even")
    far = frames * seconds_per_frame
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= far]
    panel.set_xscale("symlog", linthresh=0.5)
    panel.set_xticks([*(-tick for tick in ticks[::-1]), 0, *ticks])
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.minorticks_off()
    panel.set(
        xlim=(-far, far),
        yscale="log",
        ylim=(max(min(0.1 / frames, 0.01), 1e-5), 1.3),
        xlabel="key − query [s]",
        ylabel="mean attention probability",
        title="← looks back      looks ahead →",
    )
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    where = "" if isinstance(trace, np.ndarray) else f"Layer {layer}: "
    figure.suptitle(f"{where}attention against distance")
    return figure
