"""What was heard: the waveform, its spectrogram, the probability of each letter, and the words; in seconds."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from sewd_np.plot.given import evidence_of, number
from sewd_np.plot.style import GREY, SMALL, Array, Colours, draw_map, drawn, new_figure, probabilities

WORD_COLOUR = "#0072B2"
WINDOW, HOP = 0.025, 0.005  # seconds: what one frame of the feature encoder hears, and a quarter of its step
FLOOR = -80.0  # dB below the loudest cell, where the spectrogram ends
GAP = 2.0  # points between two labels on one line
LINES = 3  # of labels above or under a time axis


@dataclasses.dataclass(frozen=True)
class Label:
    """A text that belongs to a stretch of time, in seconds."""

    text: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Heard:
    """A stretch of a transcript and its evidence, from ``start`` to ``end`` seconds, as drawing needs it.

    wave_n and probs_sv begin at the first sample and frame that reach into the stretch, at ``wave_start`` and
    ``frame_start`` seconds. letters: runs of one token on the greedy path, blanks left out.
    """

    start: float
    end: float
    wave_n: Array
    rate: int
    wave_start: float
    probs_sv: Array
    seconds_per_frame: float
    frame_start: float
    tokens: tuple[str, ...]
    blank: int
    letters: tuple[Label, ...]
    words: tuple[Label, ...]


def listen(transcript: Any, start: float = 0.0, end: float | None = None) -> Heard:
    """Cut a stretch out of a transcript with evidence.

    Raises ``ValueError`` where there is no evidence, or where the stretch does not begin before it ends, within the
    recording.
    """
    evidence = evidence_of(transcript)
    duration = len(evidence.wave_n) / evidence.sampling_rate
    end = duration if end is None else min(number(end, "end"), duration)
    if not 0 <= number(start, "start") < end:
        raise ValueError(
            f"the stretch from {start:g} s to {end:g} s is empty or begins before 0; the recording has {duration:g} s."
        )
    step, rate = evidence.seconds_per_frame, evidence.sampling_rate
    sample, frame = int(start * rate + 1e-9), int(start / step + 1e-9)
    ids_s = evidence.log_probs_sv.argmax(axis=-1)
    letters, position = [], 0
    for token, run in itertools.groupby(ids_s.tolist()):
        length = len(list(run))
        if token != evidence.blank:
            letters.append(Label(evidence.tokens[token], position * step, (position + length) * step))
        position += length
    words = (Label(word.text, word.start, word.end) for word in transcript.words)
    return Heard(
        start=start,
        end=end,
        wave_n=evidence.wave_n[sample : int(np.ceil(end * rate))],
        rate=rate,
        wave_start=sample / rate,
        probs_sv=np.exp(evidence.log_probs_sv[frame : int(np.ceil(end / step))]),
        seconds_per_frame=step,
        frame_start=frame * step,
        tokens=evidence.tokens,
        blank=evidence.blank,
        letters=tuple(label for label in letters if label.start < end and label.end > start),
        words=tuple(label for label in words if label.start < end and label.end > start),
    )


# ------------------------------------------------------------------ strips along a time axis


def draw_wave(axes: Axes, heard: Heard, upright: bool = False) -> None:
    """The waveform; ``upright``: time runs down instead of to the right. Long ones as the envelope of each stretch."""
    wave_n, columns = heard.wave_n, 2000
    size = max(len(wave_n) // columns, 1)
    time = heard.wave_start + np.arange(0, len(wave_n), size) / heard.rate
    starts = np.arange(0, len(wave_n), size)
    high, low = np.maximum.reduceat(wave_n, starts), np.minimum.reduceat(wave_n, starts)
    if size == 1:
        axes.plot(*((wave_n, time) if upright else (time, wave_n)), color=GREY, linewidth=0.5)
    else:
        fill = axes.fill_betweenx if upright else axes.fill_between
        fill(time, low, high, color=GREY, linewidth=0.4)
    # Silence keeps a scale of its own, lest rounding noise fill the panel.
    limit = max(float(np.abs(wave_n).max(initial=0)), 1e-3) * 1.05
    for word in heard.words:
        (axes.axhspan if upright else axes.axvspan)(word.start, word.end, color=WORD_COLOUR, alpha=0.18, linewidth=0)
    if upright:
        axes.set(ylim=(heard.end, heard.start), xlim=(-limit, limit))
    else:
        axes.set(xlim=(heard.start, heard.end), ylim=(-limit, limit))


class Place(NamedTuple):
    """Where a label stands: at ``middle`` seconds, on a line of its strip, 0 the nearest to what the strip is about."""

    text: str
    middle: float
    line: int


def place_labels(
    labels: tuple[Label, ...], heard: Heard, inches: float, lines: int, upright: float = 0.0
) -> list[Place] | None:
    """Put each label at the middle of its stretch, on the first line that is free there; None where they do not fit.

    inches: about how long the strip is. ``upright``: time runs down, a label takes its height of it, and this is the
    width of the strip in inches. Text that is longer than its line is cut short.
    """
    points_per_second = inches * 72 / (heard.end - heard.start)
    free, places = [-np.inf] * lines, []
    for label in labels:
        middle = (max(label.start, heard.start) + min(label.end, heard.end)) / 2
        text = _shortened(label.text, (upright / lines if upright else inches) * 72)
        half = (SMALL if upright else _width(text)) / 2
        at = (middle - heard.start) * points_per_second
        line = next((i for i in range(lines) if free[i] <= at - half), None)
        if line is None:
            return None
        free[line] = at + half + GAP
        places.append(Place(text, middle, line))
    return places


def write_labels(axes: Axes, places: list[Place] | None, lines: int, upright: bool = False, above: bool = True) -> None:
    """Write placed labels into an empty strip above or left of what it is about, or (not ``above``) under it."""
    for text, middle, line in places or ():
        across = (line + 0.5) / lines
        if upright:
            x, y, transform = 1 - across, middle, axes.get_yaxis_transform()
        else:
            x, y, transform = middle, across if above else 1 - across, axes.get_xaxis_transform()
        plain = text.replace("$", r"\$")  # a dollar sign would begin a formula
        written = axes.text(x, y, plain, transform=transform, ha="center", va="center", fontsize=SMALL)
        written.set_in_layout(False)  # the strip is as wide as it is; a long word must not squeeze the rest


def _shortened(text: str, points: float) -> str:
    """A text that is no wider than ``points``, its end given up where it must be."""
    width = _width(text)
    if width <= points or len(text) < 2:
        return text
    keep = int(len(text) * points / width)
    while keep > 0 and _width(text[:keep] + "…") > points:
        keep -= 1
    return text[:keep] + "…"


def _width(text: str) -> float:
    """Points that a small text takes."""
    return TextPath((0, 0), text, prop=FontProperties(size=SMALL)).get_extents().width if text.strip() else 0.0


def empty_strip(axes: Axes) -> None:
    """No frame and no ticks: a place to write."""
    axes.set_yticks([])
    axes.tick_params(bottom=False, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


# -------------------------------------------------------------------------- the picture


def spectrogram(wave_n: Array, rate: int) -> Array:
    """Power of each frequency (f, time) in dB below the loudest, not under ``FLOOR``; windows of 25 ms every 5 ms."""
    window, hop = round(WINDOW * rate), round(HOP * rate)
    # Half a window of silence on either side puts the middle of window k at k · hop.
    padded = np.pad(np.asarray(wave_n, np.float64), (window // 2, window + hop))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[: len(wave_n) + hop : hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window))) ** 2
    # Under 1e-12 there is only rounding. The loudest counts as 1e-4 at least, so that silence is black and not noise.
    decibels = 10 * np.log10(np.maximum(power, 1e-12) / max(float(power.max(initial=0)), 1e-4))
    return np.maximum(decibels, FLOOR).T


@drawn
def transcript(transcript: Any, start: float = 0.0, end: float | None = None) -> Figure:
    """What was heard, from top to bottom: waveform with the words, spectrogram, letter probabilities, letters.

    transcript: from ``sewd_np.transcribe(audio, evidence=True)``. The probabilities are those of the CTC head, one
    column a frame of 20 ms; their rows are the letters on the greedy path, in the order in which they first occur, and
    the blank. ``start`` and ``end``, in seconds, show a stretch of a long recording; words and letters are written
    where they fit.

    Raises ``TypeError`` for something else than a transcript, ``ValueError`` for one without evidence or for an empty
    stretch.
    """
    heard = listen(transcript, start, end)
    ids = list(dict.fromkeys(heard.tokens.index(letter.text) for letter in heard.letters))
    rows = [*ids, heard.blank]
    heights = [0.42, 1.1, 1.5, max(0.17 * len(rows), 0.9), 0.45]
    figure = new_figure(sum(heights) + 0.6)
    grid = figure.add_gridspec(5, 2, height_ratios=heights, width_ratios=[1, 0.012])
    names, wave, spectrum, letters, text = (figure.add_subplot(grid[row, 0]) for row in range(5))

    empty_strip(names)
    _write_or_say(names, heard.words, heard, "words", above=True)
    draw_wave(wave, heard)
    wave.set_ylabel("amplitude")

    power_ft = spectrogram(heard.wave_n, heard.rate)
    colours, step = Colours("magma", Normalize(FLOOR, 0)), (heard.rate / 2000 / (len(power_ft) - 1), HOP)
    image = draw_map(spectrum, power_ft, colours, step, (-step[0] / 2, heard.wave_start - HOP / 2), upwards=True)
    spectrum.set(ylim=(0, heard.rate / 2000), ylabel="frequency [kHz]")
    figure.colorbar(image, cax=figure.add_subplot(grid[2, 1]), label="power [dB]")

    step = (1.0, heard.seconds_per_frame)
    image = draw_map(letters, heard.probs_sv[:, rows].T, probabilities(), step, (-0.5, heard.frame_start))
    letters.set(yticks=range(len(rows)), yticklabels=[*(heard.tokens[i] for i in ids), "blank"], ylabel="letter")
    figure.colorbar(image, cax=figure.add_subplot(grid[3, 1]), label="probability", ticks=(0, 0.5, 1))

    empty_strip(text)
    text.tick_params(bottom=True, labelbottom=True)
    _write_or_say(text, heard.letters, heard, "letters", above=False)
    text.set_xlabel("time [s]")
    for axes in (names, wave, spectrum, letters, text):
        axes.set_xlim(heard.start, heard.end)
    for axes in (names, wave, spectrum, letters):
        axes.tick_params(labelbottom=False)
    return figure


def _write_or_say(axes: Axes, labels: tuple[Label, ...], heard: Heard, what: str, above: bool) -> None:
    """Write the labels into their strip, or how many there are where they do not fit."""
    places = place_labels(labels, heard, 8.0, LINES)
    write_labels(axes, places, LINES, above=above)
    note = "" if labels else f"no {what}" + (": the blank is always likeliest" if what == "letters" else "")
    if places is None:
        note = f"{len(labels)} {what}, too close to write here: start= and end= show a stretch"
    axes.text(0, 0.5, note, transform=axes.transAxes, va="center", fontsize=SMALL)
