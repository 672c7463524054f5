"""Where frames look: one head's map beside the sound, all heads at a glance, and one head's scores taken apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sewd_np.plot.given import (
    attention_maps,
    check_trace,
    chosen_head,
    evidence_of,
    number,
    one_of,
    point,
    positive,
    whole,
)
from sewd_np.plot.positions import by_distance
from sewd_np.plot.sound import Heard, draw_wave, empty_strip, listen, place_labels, write_labels
from sewd_np.plot.style import (
    PALETTE,
    SECONDS_PER_SQUEEZED_FRAME,
    SMALL,
    WIDTH,
    attention_colours,
    draw_map,
    drawn,
    new_figure,
    signed,
    strongest,
)
from sewd_np.trace import LAYER

TERMS = {  # trace point -> what it asks
    "c2c": "content to content (c2c)",
    "c2p": "content to position (c2p)",
    "p2c": "position to content (p2c)",
}


@drawn
def attention(
    out: Any,
    layer: int = 0,
    head: int = 0,
    transcript: Any = None,
    start: float = 0.0,
    end: float | None = None,
    seconds_per_frame: float = SECONDS_PER_SQUEEZED_FRAME,
    recording: int = 0,
) -> Figure:
    """One head's attention in seconds: a row is a frame that asks (query), a column one that is looked at (key).

    out: an output with attentions, a trace with ``*.attention.self.probs``, a list of arrays, or an array (t, t),
    (h, t, t) or (b, h, t, t); ``recording`` picks one of a batch. With a transcript that keeps its evidence, the
    waveform, words and letters stand along both axes. ``start`` and ``end``, in seconds, show a stretch. Every row sums
    to 1 over the whole recording; colours follow the square root of the probability.

    Raises ``ValueError`` where there is no such layer, head or stretch, or no attention or evidence was kept.
    """
    step = positive(seconds_per_frame, "seconds_per_frame")
    ((layer, maps_hij),) = attention_maps(out, whole(layer, "layer"), recording).items()
    map_ij = chosen_head(maps_hij, head)
    seconds = len(map_ij) * step
    end = seconds if end is None else min(number(end, "end"), seconds)
    if not 0 <= number(start, "start") < end:
        raise ValueError(f"the stretch from {start:g} s to {end:g} s is empty; the map covers 0 to {seconds:g} s.")
    if transcript is not None:
        _check_of_one_recording(transcript, len(map_ij), step)
    first, last = int(start / step + 1e-9), int(np.ceil(end / step - 1e-9))
    map_ij, origin = map_ij[first:last, first:last], first * step
    bounds = origin, origin + len(map_ij) * step

    figure: Figure
    if transcript is None:
        figure = new_figure(6.0, 7.2)
        panel = figure.add_subplot()
        panel.set_box_aspect(1)
        image = draw_map(panel, map_ij, attention_colours(map_ij), (step, step), (origin, origin))
        figure.colorbar(image, ax=panel, label="attention probability", fraction=0.04)
    else:
        heard = listen(transcript, *bounds)
        if heard.end < bounds[1] - 1e-6:
            raise ValueError(
                f"the transcript ends at {heard.end:g} s, but the map reaches {bounds[1]:g} s; they must be of one "
                "recording, and end= cuts what padding added."
            )
        figure, panel, scale = _between_strips(heard)
        image = draw_map(panel, map_ij, attention_colours(map_ij), (step, step), (origin, origin))
        figure.colorbar(image, cax=scale, label="attention probability")
    panel.set(xlabel="key: looked at [s]", ylabel="query: asks [s]")
    where = "" if isinstance(out, np.ndarray) else f"layer {layer}, "
    figure.suptitle(f"Attention of {where}head {head}")
    return figure


def _check_of_one_recording(transcript: Any, frames: int, seconds_per_frame: float) -> None:
    """Raise ``ValueError`` for a transcript that goes on after the map of so many frames ends.

    The convolutions leave less than two squeezed frames' worth of sound over, of every recording.
    """
    evidence = evidence_of(transcript)
    duration, seconds = len(evidence.wave_n) / evidence.sampling_rate, frames * seconds_per_frame
    if duration > seconds + 3 * seconds_per_frame:
        raise ValueError(
            f"the transcript ends at {duration:g} s, but the map at {seconds:g} s ({frames} frames of "
            f"{seconds_per_frame:g} s); they must be of one recording."
        )


def _between_strips(heard: Heard) -> tuple[Figure, Axes, Axes]:
    """A figure with words, waveform and letters along the top and the left; → it, the map's axes, the colours' axes.

    Words or letters that do not fit beside an axis take no room there.
    """
    side = 6.3  # inches of the map, along which the labels stand
    words, letters = (place_labels(labels, heard, side, 2) for labels in (heard.words, heard.letters))
    words_left = place_labels(heard.words, heard, side, 1, upright=0.7)
    letters_left = place_labels(heard.letters, heard, side, 4, upright=0.6)
    above = [0.3 if words else 0.02, 0.55, 0.3 if letters else 0.02]
    beside = [0.7 if words_left else 0.02, 0.55, 0.6 if letters_left else 0.02]
    figure = new_figure(sum(above) + side + 1.0)
    grid = figure.add_gridspec(4, 5, height_ratios=[*above, side], width_ratios=[*beside, side, 0.12])
    for upright, places in ((False, (words, letters)), (True, (words_left, letters_left))):
        strips = [figure.add_subplot(grid[3, i] if upright else grid[i, 3]) for i in range(3)]
        draw_wave(strips[1], heard, upright)
        write_labels(strips[0], places[0], 1 if upright else 2, upright)
        write_labels(strips[2], places[1], 4 if upright else 2, upright)
        for strip in strips:
            empty_strip(strip)
            if upright:
                strip.set_ylim(heard.end, heard.start)
            else:
                strip.set_xlim(heard.start, heard.end)
    return figure, figure.add_subplot(grid[3, 3]), figure.add_subplot(grid[3, 4])


@drawn
def heads(
    out: Any,
    layer: int | None = None,
    seconds_per_frame: float = SECONDS_PER_SQUEEZED_FRAME,
    recording: int = 0,
) -> Figure:
    """Every head of every layer, or of one, each as a small map like ``attention``'s, on one scale of colours.

    ``out`` and ``recording`` as for ``attention``. In each tile time runs down (query) and to the right (key).

    Raises ``ValueError`` where there is no such layer or no attention was kept.
    """
    seconds_per_frame = positive(seconds_per_frame, "seconds_per_frame")
    found = attention_maps(out, layer, recording)
    layers, count = list(found), max(map(len, found.values()))
    # Whichever there is more of runs across, as long as a tile stays readable.
    across = len(layers) > count and len(layers) <= 12
    rows, columns = (count, len(layers)) if across else (len(layers), count)
    folded = len(layers) == 1 and count > 6
    if folded:
        columns = 6 if count > 8 else 4
        rows = -(-count // columns)
    tile = min((WIDTH - 1.6) / columns, 2.6 if rows * columns > 1 else 5.0)
    frames = next(iter(found.values())).shape[-1]
    pixels = int(tile * 100)

    # One image of all tiles: hundreds of axes would take a minute to lay out.
    cells = len(strongest(np.empty((frames, frames)), (pixels, pixels))[0])
    repeat = -(-40 // cells)  # a map of one frame is a tile too
    side = cells * repeat
    gap = max(side // 20, 2)
    mosaic = np.full((rows * (side + gap), columns * (side + gap)), np.nan)
    for row, i in enumerate(layers):
        for column, map_ij in enumerate(found[i]):
            place = divmod(column, columns) if folded else (column, row) if across else (row, column)
            y, x = (at * (side + gap) for at in place)
            small = strongest(map_ij, (pixels, pixels))[0]
            mosaic[y : y + side, x : x + side] = np.kron(small, np.ones((repeat, repeat)))

    figure = new_figure(max(rows * tile, 1.2) + 0.8, max(columns * tile, 4.0) + 1.6)
    panel = figure.add_subplot()
    colours = attention_colours(*found.values())
    share = side / (side + gap)
    image = panel.imshow(
        mosaic,
        cmap=colours.map,
        norm=colours.norm,
        interpolation="none",
        extent=(0, columns, rows, 0),
    )
    panel.set(xlim=(0, columns - 1 + share), ylim=(rows - 1 + share, 0))
    middles_x, middles_y = (np.arange(n) + share / 2 for n in (columns, rows))
    head_names, layer_names = [str(i) for i in range(count)], [str(i) for i in layers]
    if folded:
        for number in range(count):
            y, x = divmod(number, columns)
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}
            panel.text(x + 0.04, y + 0.04, f"head {number}", va="top", fontsize=SMALL, bbox=box)
        panel.set(xticks=[], yticks=[])
    else:
        names = (layer_names, head_names) if across else (head_names, layer_names)
        panel.set_xticks(middles_x, names[0])
        panel.set_yticks(middles_y, names[1])
        panel.set(xlabel="layer" if across else "head", ylabel="head" if across else "layer")
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)
    figure.colorbar(image, ax=panel, label="attention probability", shrink=min(1.0, 3 / (rows * tile)), aspect=25)
    of_one = "All heads" if isinstance(out, np.ndarray) else f"Layer {layers[0]}: all heads"
    title = of_one if len(layers) == 1 else "All heads of all layers"
    figure.suptitle(f"{title}; a tile covers {frames * seconds_per_frame:.3g} s both ways")
    return figure


@drawn
def disentangle(
    trace: Any,
    layer: int,
    head: int,
    seconds_per_frame: float = SECONDS_PER_SQUEEZED_FRAME,
    recording: int = 0,
) -> Figure:
    """One head's scores taken apart: what frames want from content, from a place, a place from content; their sum.

    trace: with ``encoder.encoder.layer.N.attention.self.*`` (c2c, c2p and p2c as far as the model has them, scores,
    probs). The score panels share one scale of colours, 0 white; a row of ``attention = softmax(sum)`` sums to 1. The
    lines are each term's mean over all pairs of frames that are equally far apart.

    Raises ``ValueError`` where the trace lacks one of the points, or there is no such head.
    """
    seconds_per_frame = positive(seconds_per_frame, "seconds_per_frame")
    name = f"{LAYER}.{whole(layer, 'layer')}.attention.self"
    pattern = f"{name}.*"
    check_trace(trace, pattern)
    needed = ["c2c", *(term for term in ("c2p", "p2c") if f"{name}.{term}" in trace), "scores", "probs"]
    maps = {term: chosen_head(one_of(point(trace, f"{name}.{term}", pattern), recording), head) for term in needed}
    terms, total, probs = [maps[term] for term in needed[:-2]], maps["scores"], maps["probs"]
    # A model need not have every term, but a trace that lacks one would draw a sum of something else.
    if len(terms) < 3 and not np.allclose(sum(terms), total, rtol=1e-3, atol=1e-3 * max(1.0, np.abs(total).max())):
        raise ValueError(f"the trace holds only {', '.join(needed[:-2])} of the scores; use trace=Trace({pattern!r}).")

    figure = new_figure(6.3)
    grid = figure.add_gridspec(2, 4, width_ratios=[1, 1, 1, 0.04])
    step = (seconds_per_frame, seconds_per_frame)
    scores, chances = signed(*terms, total), attention_colours(probs)
    for column, term in enumerate(needed[:-2]):
        panel = figure.add_subplot(grid[0, column])
        image = draw_map(panel, maps[term], scores, step)
        panel.set(title=TERMS[term], xlabel="key [s]")
        panel.tick_params(labelleft=column == 0)
        if column == 0:
            panel.set_ylabel("query [s]")
    figure.colorbar(image, cax=figure.add_subplot(grid[0, 3]), label="score")

    panel = figure.add_subplot(grid[1, 0])
    draw_map(panel, total, scores, step)
    panel.set(title="their sum, same colours", xlabel="key [s]", ylabel="query [s]")
    panel = figure.add_subplot(grid[1, 2])
    image = draw_map(panel, probs, chances, step)
    panel.set(title="attention = softmax of each row", xlabel="key [s]")
    panel.tick_params(labelleft=False)
    figure.colorbar(image, cax=figure.add_subplot(grid[1, 3]), label="probability")

    panel = figure.add_subplot(grid[1, 1])
    marker = "o" if len(total) < 3 else ""
    for colour, term in zip(PALETTE, needed[:-2], strict=False):
        distance, mean = by_distance(maps[term])
        panel.plot(distance * seconds_per_frame, mean, marker=marker, color=colour, linewidth=1.1, label=term)
    distance, mean = by_distance(total)
    panel.plot(distance * seconds_per_frame, mean, marker=marker, color="black", linewidth=1.6, label="sum", zorder=1)
    panel.axhline(0, color="0.7", linewidth=0.6, zorder=0)
    panel.set(title="mean score at each distance", xlabel="key − query [s]", ylabel="score")
    low, high = panel.get_ylim()
    panel.set_ylim(low, high + 0.15 * (high - low))  # the legend lies above the curves
    panel.legend(frameon=False, ncols=4, loc="upper center", handlelength=1, columnspacing=1)
    figure.suptitle(f"Layer {layer}, head {head}: the score taken apart")
    return figure
