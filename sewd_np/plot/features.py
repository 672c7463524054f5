"""What the convolutions and the transformer layers make of the sound, against time."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sewd_np.plot.given import check_config, check_trace, hidden_states, one_of, positive
from sewd_np.plot.sound import draw_wave, listen
from sewd_np.plot.style import (
    SECONDS_PER_SQUEEZED_FRAME,
    SMALL,
    WIDTH,
    Array,
    Colours,
    draw_map,
    drawn,
    new_figure,
    signed,
    strongest,
)

STRIDES = (5, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1)  # of every published model
SAMPLING_RATE = 16_000
STRETCHES = 130  # along one side of a similarity map: about its pixels


@drawn
def features(
    trace: Any,
    config: Any = None,
    transcript: Any = None,
    recording: int = 0,
    sampling_rate: float | None = None,
) -> Figure:
    """What leaves each convolution: a row a channel, on one time axis, with the frame rate of each.

    trace: with ``feature_extractor.conv_layers.*``. config: where the strides are not the published ones. With a
    transcript that keeps its evidence, its waveform and words stand on top. sampling_rate: samples per second; without
    one the transcript's, or 16,000. Each panel has colours of its own scale, for each convolution's channels have a
    range of their own; what it spans is written beside it.

    Raises ``ValueError`` where the trace holds no convolution, or one that the strides do not reach, or ends before the
    transcript does; ``TypeError`` for a config that is none.
    """
    check_trace(trace, "feature_extractor.conv_layers.*")
    found: dict[int, Array] = {}
    for name in trace:
        match = re.fullmatch(r"feature_extractor\.conv_layers\.(\d+)", str(name))
        if match:
            found[int(match[1])] = one_of(np.asarray(trace[name], np.float64), recording)
    if not found:
        raise ValueError(
            "the trace holds no convolution; call the model with trace=Trace('feature_extractor.conv_layers.*')."
        )
    if config is not None:
        check_config(config)
    strides = STRIDES if config is None else config.conv_stride
    if max(found) >= len(strides):
        raise ValueError(
            f"the trace holds convolution {max(found)}, but strides are known for {len(strides)} from 0; "
            "give config=model.config."
        )
    sound = transcript is not None
    if sound:
        heard = listen(transcript)
    known = heard.rate if sound else SAMPLING_RATE
    rate = known if sampling_rate is None else positive(sampling_rate, "sampling_rate")
    heights = [0.8] * sound + [0.6] * len(found)
    figure = new_figure(sum(heights) + 0.9)
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    end = 0.0
    if sound:
        draw_wave(panels[0], heard)
        panels[0].set(ylabel="sound", yticks=[])
    for panel, i in zip(panels[sound:], sorted(found), strict=True):
        step = math.prod(strides[: i + 1]) / rate
        values = found[i].T
        low, high = float(values.min()), float(values.max())
        draw_map(panel, values, _by_most(values), (1.0, step))
        end = max(end, values.shape[1] * step)
        panel.set(yticks=[])
        panel.set_ylabel(f"conv {i}", rotation=0, ha="right", va="center")
        note = f"{1 / step:g} frames/s\n{len(values)} channels\n{low:.3g} to {high:.3g}".replace("-", "−")
        panel.text(1.01, 0.5, note, transform=panel.transAxes, va="center", fontsize=SMALL)
    if sound and heard.end > end + 2 * step:  # the convolutions leave less than a frame and a half's worth over
        raise ValueError(
            f"the transcript ends at {heard.end:g} s, but the trace at {end:g} s; they must be of one recording."
        )
    panels[-1].set(xlim=(0, heard.end if sound else end), xlabel="time [s]")
    figure.suptitle("What leaves each convolution")
    return figure


def _by_most(values: Array) -> Colours:
    """Colours up to what 99.5 % of the drawn cells stay under: a single outlier would leave the rest white."""
    return signed(np.quantile(np.abs(strongest(values, (64, 800))[0]), [0.995]))


@drawn
def similarity(trace: Any, seconds_per_frame: float = SECONDS_PER_SQUEEZED_FRAME, recording: int = 0) -> Figure:
    """How alike the frames are, layer by layer, and the frames themselves against time.

    trace: with ``encoder.encoder.input`` and ``encoder.encoder.layer.?`` (and ``.??`` for ten layers and more); or an
    output with hidden states, or a list of arrays (t, d). Above, the cosine between every two frames, each less the
    mean of all frames: 1 alike, 0 unrelated, −1 opposite. Of a long recording, means over stretches of frames are
    compared. Below, all dimensions of the first, the middle and the last.

    Raises ``ValueError`` where there are no hidden states.
    """
    seconds_per_frame = positive(seconds_per_frame, "seconds_per_frame")
    states = hidden_states(trace, recording)
    columns = min(len(states), 7)
    rows = -(-len(states) // columns)
    tile = min((WIDTH - 1.0) / columns, 2.6)
    names = list(states)
    shown = list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
    heights = [rows * (tile + 0.25) + 0.4, 1.0 * len(shown) + 0.5]
    figure = new_figure(sum(heights))
    parts = figure.add_gridspec(2, 1, height_ratios=heights)
    upper, lower = (figure.add_subfigure(parts[row]) for row in range(2))
    panels = upper.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.ravel()[len(states) :]:
        panel.set_visible(False)
    one = np.ones(1)
    for number, (panel, (name, frames_td)) in enumerate(zip(panels.ravel(), states.items(), strict=False)):
        panel.set_box_aspect(1)
        stretch = -(-len(frames_td) // STRETCHES)
        step = stretch * seconds_per_frame
        image = draw_map(panel, cosines(frames_td, stretch), signed(one), (step, step))
        panel.set_title(name)
        panel.label_outer()
        if number % columns == 0:
            panel.set_ylabel("frame [s]")
        if number // columns == rows - 1:
            panel.set_xlabel("frame [s]")
    upper.colorbar(image, ax=panels, label="cosine", aspect=30, fraction=0.03)
    upper.suptitle("How alike frames are, layer by layer")

    strips = lower.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for panel, name in zip(strips, shown, strict=True):
        values = states[name].T
        image = draw_map(panel, values, _by_most(values), (1.0, seconds_per_frame))
        panel.set(ylabel=f"{name}\ndimension")
        lower.colorbar(image, ax=panel, aspect=8, fraction=0.03, label="value")
    strips[-1].set_xlabel("time [s]")
    return figure


def cosines(frames_td: Array, stretch: int = 1) -> Array:
    """(t, d) → (t, t): cosine between frames less their mean; 0 for a frame that is the mean.

    ``stretch``: so many frames in a row are averaged first, and count as one.
    """
    starts = np.arange(0, len(frames_td), stretch)
    counts = np.diff(starts, append=len(frames_td))[:, None]
    centred = np.add.reduceat(frames_td, starts, axis=0) / counts - frames_td.mean(axis=0)
    length = np.sqrt((centred**2).sum(axis=1, keepdims=True))
    unit = np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)
    return unit @ unit.T
