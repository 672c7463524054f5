"""Pictures: what they show, that they can be read, and that they stay as they are (``tests/baseline``).

Reference images are drawn from made-up arrays, not from a model, so they change only when the drawing does. After a
wanted change look at the new pictures and write them with

    python -m tests.test_plot
"""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images
from matplotlib.text import Text

from sewd_np import plot
from sewd_np.attention import relative_index
from sewd_np.config import SEWDConfig
from sewd_np.decoding import Word
from sewd_np.model import SEWDOutput
from sewd_np.plot.features import cosines
from sewd_np.plot.positions import by_distance
from sewd_np.plot.sound import spectrogram
from sewd_np.plot.style import strongest
from sewd_np.results import Evidence, Transcript

BASELINE = Path(__file__).parent / "baseline"
DPI = 50  # small files; at half of the usual resolution a moved label or another colour still shows
DRAWN_WITH = "3.11."  # matplotlib's version, which the test extra pins: its fonts and their metrics come with it
LAYER = "encoder.encoder.layer"
CONFIG = SEWDConfig(position_buckets=8, max_position_embeddings=40)


# --------------------------------------------------------------------- made-up material


def spoken(seconds: float = 1.2, text: str = "AB A", every: int = 8) -> Transcript:
    """A transcript of a falling tone in which a letter fires every so many frames."""
    time = np.arange(int(seconds * 16_000)) / 16_000
    wave_n = (0.3 * np.sin(2 * np.pi * (900 - 200 * time) * time) * np.sin(np.pi * time / seconds)).astype(np.float32)
    tokens = ("<pad>", "|", "A", "B")
    probs = np.full((int(seconds * 50), 4), 0.02)
    probs[:, 0] = 0.94
    words, start = [], 0
    for i, letter in enumerate(text):
        frame = 4 + every * i
        probs[frame] = 0.05
        probs[frame, tokens.index(letter.replace(" ", "|"))] = 0.85
        if letter == " " or i == len(text) - 1:
            end = 0.02 * (frame + (letter != " "))
            words.append(Word(text[start : i + (letter != " ")], 0.02 * (4 + every * start), end, 0.85))
            start = i + 1
    evidence = Evidence(wave_n, 16_000, np.log(probs).astype(np.float32), tokens, 0, 0.02)
    return Transcript(text, tuple(words), seconds, evidence)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def traced(frames: int = 30, layers: int = 3, heads: int = 2, channels: int = 6) -> dict[str, np.ndarray]:
    """A trace, as a plain dictionary: waves over content, ridges over distance, and their softmax."""
    trace: dict[str, np.ndarray] = {}
    for i, length in enumerate(CONFIG.conv_lengths(frames * 640 + 400)):
        t, c = np.arange(length)[:, None] / length, np.arange(channels)
        trace[f"feature_extractor.conv_layers.{i}"] = np.maximum(np.sin(20 * t + c) * (1 + c + i), -0.17)[None]
    t, d = np.arange(frames)[:, None] / frames, np.arange(10)
    trace["encoder.encoder.input"] = np.cos(7 * t + d)[None]
    i, j = np.arange(frames)[:, None], np.arange(frames)
    for layer in range(layers):
        name = f"{LAYER}.{layer}.attention.self"
        shift = np.arange(heads)[:, None, None] - layer
        terms = {
            "c2c": np.sin(i / 5) * np.cos(j / 3) + 0 * shift,
            "c2p": 4 * np.exp(-((j - i - shift) ** 2) / 4.0),
            "p2c": 3 * np.exp(-((j - i + shift) ** 2) / 9.0) - 1,
        }
        trace |= {f"{name}.{term}": value[None] for term, value in terms.items()}
        trace[f"{name}.scores"] = sum(terms.values())[None]
        trace[f"{name}.probs"] = softmax(trace[f"{name}.scores"])
        trace[f"{LAYER}.{layer}"] = np.cos((7 + 5 * layer) * t + d * t * layer + d)[None]
    trace["lm_head"] = np.sin(t * d)[None]
    return trace


def changed(trace: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same run with an error that grows along the way, one other shape and one point less."""
    other = {name: value * (1 + 1e-8 * 1.2**i) if i else value for i, (name, value) in enumerate(trace.items())}
    other[f"{LAYER}.0.attention.self.probs"] = np.zeros((1, 2, 3, 3))
    del other["lm_head"]
    return other


def probs_of(layers: int, heads: int, frames: int) -> list[np.ndarray]:
    trace = traced(frames, layers, heads)
    return [trace[f"{LAYER}.{i}.attention.self.probs"] for i in range(layers)]


PICTURES: dict[str, Callable[[], Figure]] = {
    "transcript": lambda: plot.transcript(spoken()),
    "attention": lambda: plot.attention(traced(), 1, 0, spoken()),
    "attention-alone": lambda: plot.attention(probs_of(1, 1, 30)[0]),
    "heads": lambda: plot.heads(traced()),
    "heads-of-one-layer": lambda: plot.heads(traced(heads=9), layer=1),
    "disentangle": lambda: plot.disentangle(traced(), 1, 0),
    "bucket-curve": lambda: plot.bucket_curve(CONFIG),
    "bucket-map": lambda: plot.bucket_map(CONFIG, 30),
    "position-profile": lambda: plot.position_profile(traced(), 1),
    "features": lambda: plot.features(traced(), transcript=spoken()),
    "similarity": lambda: plot.similarity(traced()),
    "compare": lambda: plot.compare(traced(), changed(traced()), tolerance=1e-6),
}
AWKWARD: dict[str, Callable[[], Figure]] = {  # short, long, silent, crowded, deep, single
    "one frame": lambda: plot.disentangle(traced(1, 1, 1), 0, 0),
    "one frame, profile": lambda: plot.position_profile(traced(1, 1, 1), 0),
    "one frame, heads": lambda: plot.heads(probs_of(1, 1, 1)),
    "one frame, similarity": lambda: plot.similarity(traced(1, 1, 1)),
    "one frame, buckets": lambda: plot.bucket_map(CONFIG, 1),
    "one frame, features": lambda: plot.features(traced(1, 1, 1)),
    "45 ms": lambda: plot.transcript(spoken(0.045, "")),
    "45 ms, attention": lambda: plot.attention(probs_of(1, 1, 1)[0], transcript=spoken(0.045, "")),
    "a minute": lambda: plot.transcript(spoken(60, "AB " * 120)),
    "a minute, attention": lambda: plot.attention(probs_of(1, 1, 1499)[0], 0, 0, spoken(60, "AB " * 120)),
    "a minute, similarity": lambda: plot.similarity([np.cos(np.outer(np.arange(1499), np.arange(8)))] * 3),
    "silence": lambda: plot.transcript(silent()),
    "a letter in every frame": lambda: plot.attention(probs_of(1, 1, 30)[0], transcript=spoken(1.2, "AB" * 25, 1)),
    "24 layers": lambda: plot.heads(probs_of(24, 12, 40)),
    "24 layers, similarity": lambda: plot.similarity(traced(8, 24, 1)),
    "24 layers, compare": lambda: plot.compare(traced(4, 24, 1), changed(traced(4, 24, 1))),
    "equal runs": lambda: plot.compare(traced(), traced()),
    "a bucket each": lambda: plot.bucket_curve(SEWDConfig(position_buckets=-1, max_position_embeddings=40)),
}


def silent() -> Transcript:
    evidence = Evidence(
        np.zeros(16_000, np.float32), 16_000, np.log(np.tile([0.97, 0.03], (49, 1))), ("_", "A"), 0, 0.02
    )
    return Transcript("", (), 1.0, evidence)


# -------------------------------------------------------------------- pictures as such


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    """matplotlib's own settings, whatever the machine's configuration says; warnings count as errors."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        warnings.simplefilter("error")
        yield


@pytest.mark.skipif(
    not matplotlib.__version__.startswith(DRAWN_WITH),
    reason=f"the reference images are drawn by matplotlib {DRAWN_WITH}; another sets type differently",
)
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_have_not_drifted(name: str, tmp_path: Path) -> None:
    actual = tmp_path / f"{name}.png"
    PICTURES[name]().savefig(actual, dpi=DPI)
    # RMS over all pixels, of 255: 0 on one machine; another processor may round a coordinate to the next pixel here and
    # there. One letter more in a title gives 3.8 or more.
    assert compare_images(str(BASELINE / f"{name}.png"), str(actual), tol=2.0) is None


@functools.cache
def drawn(name: str) -> Figure:
    """One of the pictures, laid out; drawing is what takes the time here."""
    figure = {**PICTURES, **AWKWARD}[name]()
    figure.canvas.draw()
    return figure


def visible_texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("name", [*PICTURES, *AWKWARD])
def test_pictures_can_be_read(name: str) -> None:
    figure = drawn(name)
    assert figure.get_figwidth() <= 10
    assert min(text.get_fontsize() for text in visible_texts(figure)) >= 8
    # Nothing is cut off by the picture's edge: labels that spread beyond it would be.
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    assert box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02


@pytest.mark.parametrize("name", PICTURES)
def test_axes_with_numbers_have_labels(name: str) -> None:
    for axes in drawn(name).axes:
        for axis in (axes.xaxis, axes.yaxis):
            numbers = [text for text in axis.get_ticklabels() if text.get_visible() and text.get_text()]
            assert not (axes.get_visible() and numbers) or axis.get_label_text()


def test_nothing_global_is_left_behind() -> None:
    code = (
        "import sys, matplotlib\n"
        "def settings(): return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = settings()\n"
        "from sewd_np import plot; from sewd_np.config import SEWDConfig\n"
        "figure = plot.bucket_curve(SEWDConfig())\n"
        "assert settings() == before\n"
        "print('matplotlib.pyplot' in sys.modules, figure._repr_png_()[1:4].decode())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "PNG"], done.stderr


def test_without_matplotlib_one_sentence_names_the_extra() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import sewd_np; sewd_np.plot"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: drawing needs matplotlib") and "sewd-np[plot]" in last


# ---------------------------------------------------------------------- what they show


def images(figure: Figure) -> list[Any]:
    return [image for axes in figure.axes for image in axes.get_images()]


def test_attention_shows_the_map_in_seconds() -> None:
    trace = traced()
    expected = trace[f"{LAYER}.2.attention.self.probs"][0, 1]
    (image,) = images(plot.attention(trace, 2, 1))
    np.testing.assert_array_equal(image.get_array(), expected)
    assert image.get_extent() == pytest.approx((0, 1.2, 1.2, 0))
    assert image.norm.vmax == expected.max()
    (part,) = images(plot.attention(trace, 2, 1, start=0.4, end=0.8))
    np.testing.assert_array_equal(part.get_array(), expected[10:20, 10:20])
    assert part.get_extent() == pytest.approx((0.4, 0.8, 0.8, 0.4))


def test_attention_takes_outputs_traces_lists_and_arrays() -> None:
    trace = traced()
    maps = [trace[f"{LAYER}.{i}.attention.self.probs"] for i in range(3)]
    output = SEWDOutput(last_hidden_state=np.zeros(1), attentions=tuple(maps))
    for out in (trace, output, maps, maps[1], maps[1][0]):
        (image,) = images(plot.attention(out, 1, 0))
        np.testing.assert_array_equal(image.get_array(), maps[1][0, 0])
    second = np.concatenate([maps[1], 2 * maps[1]])
    (image,) = images(plot.attention(second, 1, 0, recording=1))
    np.testing.assert_array_equal(image.get_array(), 2 * maps[1][0, 0])


def test_heads_stand_in_their_places() -> None:
    maps = np.zeros((3, 1, 2, 5, 5))
    for layer in range(3):
        for head in range(2):
            maps[layer, 0, head] = (1 + layer + 3 * head) / 10
    (image,) = images(plot.heads(list(maps)))
    mosaic = np.ma.filled(image.get_array(), np.nan)
    height, width = (size // count for size, count in zip(mosaic.shape, (2, 3), strict=True))  # more layers than heads
    for layer in range(3):
        for head in range(2):
            assert mosaic[head * height + 3, layer * width + 3] == (1 + layer + 3 * head) / 10
    assert len({image.norm.vmax for image in images(plot.heads(list(maps)))}) == 1


def test_score_panels_share_one_scale_about_zero() -> None:
    trace = traced()
    c2c, c2p, p2c, total, probs = images(plot.disentangle(trace, 1, 0))
    limit = np.abs(trace[f"{LAYER}.1.attention.self.scores"][0, 0]).max()
    for image, term in zip((c2c, c2p, p2c, total), ("c2c", "c2p", "p2c", "scores"), strict=True):
        assert (image.norm.vmin, image.norm.vmax) == (-c2p.norm.vmax, c2p.norm.vmax)
        np.testing.assert_array_equal(image.get_array(), trace[f"{LAYER}.1.attention.self.{term}"][0, 0])
    assert c2p.norm.vmax >= limit
    np.testing.assert_allclose(np.sum(probs.get_array(), axis=1), 1)


def test_means_by_distance() -> None:
    map_ij = np.random.default_rng(0).random((7, 7))
    distance, mean = by_distance(map_ij)
    assert list(distance) == list(range(-6, 7))
    for at, value in zip(distance, mean, strict=True):
        pairs = [map_ij[i, j] for i in range(7) for j in range(7) if j - i == at]
        assert value == pytest.approx(np.mean(pairs), rel=1e-14)


def test_bucket_pictures_show_the_tables_rows() -> None:
    curve, _ = plot.bucket_curve(CONFIG, longest=30).axes
    distance, row = (np.asarray(values) for values in curve.lines[0].get_data())
    index_ij = relative_index(31, 8, 40, CONFIG.position_span)
    for at, value in zip(distance.astype(int), row, strict=True):
        i, j = max(at, 0), max(-at, 0)
        assert value == index_ij[i, j]
    (image,) = images(plot.bucket_map(CONFIG, 31))
    np.testing.assert_array_equal(image.get_array(), index_ij - CONFIG.position_span)


def test_transcript_shows_its_words_and_letters() -> None:
    texts = [text.get_text() for text in visible_texts(drawn("transcript"))]
    assert texts.count("AB") == 1 and "blank" in texts
    assert [text for text in texts if text in ("A", "B", "|")].count("A") == 4  # a word, a row, two letters
    cut = [text.get_text() for text in visible_texts(plot.transcript(spoken(), start=0.5))]
    assert "AB" not in cut and "A" in cut
    crowded = [text.get_text() for text in visible_texts(drawn("a minute"))]
    assert "360 letters, too close to write here: start= and end= show a stretch" in crowded


def test_a_tone_stands_at_its_pitch() -> None:
    time = np.arange(8000) / 16_000
    power_ft = spectrogram(np.sin(2 * np.pi * 2000 * time), 16_000)
    assert power_ft.shape[0] == 201  # 0 to 8 kHz in steps of 40 Hz
    assert (power_ft[:, 20:80].argmax(axis=0) == 50).all()
    assert power_ft.max() == 0 and power_ft.min() >= -80


def test_cosines_of_frames_less_their_mean() -> None:
    frames_td = np.random.default_rng(0).standard_normal((6, 4))
    centred = frames_td - frames_td.mean(axis=0)
    expected = [[a @ b / np.sqrt(a @ a * (b @ b)) for b in centred] for a in centred]
    np.testing.assert_allclose(cosines(frames_td), expected, atol=1e-14)
    assert cosines(frames_td, 2).shape == (3, 3)
    assert (cosines(np.ones((3, 4))) == 0).all()


def test_large_maps_keep_their_strongest_cells() -> None:
    values = np.zeros((1000, 7))
    values[501, 2], values[502, 2] = -3, 2
    blocks, sizes = strongest(values, (100, 100))
    assert (blocks.shape, sizes) == ((100, 7), (10, 1))
    assert blocks[50, 2] == -3 and np.count_nonzero(blocks) == 1


def test_compare_marks_the_first_that_differs() -> None:
    texts = [text.get_text() for text in visible_texts(drawn("compare"))]
    (mark,) = (text for text in texts if text.startswith("first that differs"))
    assert mark == "first that differs: encoder.encoder.layer.0.attention.self.probs (SHAPE)"
    assert "not comparable" in texts and "equal" in texts
    equal = [text.get_text() for text in visible_texts(drawn("equal runs"))]
    assert not any("first that differs" in text for text in equal)


@pytest.mark.parametrize("change", [0.0, 1e-3])
def test_compare_may_tolerate_nothing(change: float) -> None:
    other = {name: value + change for name, value in traced().items()}
    texts = [text.get_text() for text in visible_texts(plot.compare(traced(), other, tolerance=0))]
    assert any("points agree within 0" in text for text in texts)
    assert any("first that differs" in text for text in texts) == (change > 0)


def test_features_know_their_frame_rates() -> None:
    texts = " ".join(text.get_text() for text in visible_texts(drawn("features")))
    assert "3200 frames/s" in texts and "50 frames/s" in texts
    config = SEWDConfig(conv_dim=(6, 6), conv_kernel=(8, 4), conv_stride=(8, 4))
    trace = {f"feature_extractor.conv_layers.{i}": np.ones((1, 9, 6)) for i in range(2)}
    texts = " ".join(text.get_text() for text in visible_texts(plot.features(trace, config)))
    assert "2000 frames/s" in texts and "500 frames/s" in texts
    texts = " ".join(text.get_text() for text in visible_texts(plot.features(trace, config, sampling_rate=8_000)))
    assert "1000 frames/s" in texts and "250 frames/s" in texts


# ---------------------------------------------------------------------------- mistakes

NO_ATTENTIONS = SEWDOutput(last_hidden_state=np.zeros(1))


@pytest.mark.parametrize(
    "draw, said",
    [
        (lambda: plot.attention(NO_ATTENTIONS), "output_attentions=True"),
        (lambda: plot.heads({}), "trace=Trace('*.attention.self.probs')"),
        (lambda: plot.attention(traced(), 7), "layer 7 is not here; the layers that are, counted from 0: 0, 1, 2"),
        (lambda: plot.attention(traced(), -1), "layer is -1"),
        (lambda: plot.attention(traced(), 0, 2), "head 2 does not exist; the layer has 2"),
        (lambda: plot.attention(traced(), 0, 0, recording=1), "recording 1 does not exist; the batch has 1"),
        (lambda: plot.attention(traced(), 0, 0, start=2), "the stretch from 2 s to 1.2 s is empty"),
        (lambda: plot.attention(traced(), 0, 0, recording=1.5), "recording is 1.5; it must be a whole number"),
        (lambda: plot.attention(traced(), 0, 0, start="1"), "start is '1'; it must be a finite number"),
        (lambda: plot.attention(traced(), 0, 0, seconds_per_frame=-1), "seconds_per_frame is -1; it must be"),
        (lambda: plot.heads(traced(), seconds_per_frame=0), "seconds_per_frame is 0; it must be a number above 0"),
        (lambda: plot.position_profile(traced(), 0, 0), "seconds_per_frame is 0; it must be a number above 0"),
        (lambda: plot.features(traced(), CONFIG, sampling_rate=0), "sampling_rate is 0; it must be a number above 0"),
        (lambda: plot.features(traced(), CONFIG, spoken(9.0)), "the transcript ends at 9 s, but the trace at"),
        (lambda: plot.compare(None, traced()), "a NoneType is given; a Trace is needed"),
        (lambda: plot.attention(np.ones((3, 4))), "shape (3, 4); expected (t, t)"),
        (lambda: plot.attention(3), "a int is given; a Trace is needed"),
        (lambda: plot.attention(traced(), transcript="hello"), "a str is given; a Transcript is needed"),
        (
            lambda: plot.attention(traced(), transcript=spoken(0.8)),
            "the transcript ends at 0.8 s, but the map reaches 1.2",
        ),
        (
            lambda: plot.attention(traced(), transcript=spoken(1.4)),
            "the transcript ends at 1.4 s, but the map at 1.2 s (30 frames of 0.04 s)",
        ),
        (lambda: plot.attention(traced(), None), "layer is None; it must be a whole number"),
        (lambda: plot.position_profile(traced(), None), "layer is None; it must be a whole number"),
        (lambda: plot.features(traced(), "an4"), "a str is given; a SEWDConfig is needed"),
        (lambda: plot.compare(traced(), traced(), -1), "tolerance is -1; it must be"),
        (lambda: plot.compare(traced(), traced(), "x"), "tolerance is 'x'; it must be"),
        (lambda: plot.transcript(Transcript("A", (), 1.0)), "evidence=True"),
        (lambda: plot.transcript(spoken(), start=3), "the stretch from 3 s to 1.2 s"),
        (lambda: plot.disentangle(traced(), 9, 0), "Trace('encoder.encoder.layer.9.attention.self.*')"),
        (lambda: plot.disentangle({k: v for k, v in traced().items() if "p2c" not in k}, 1, 0), "holds only c2c, c2p"),
        (lambda: plot.disentangle(None, 0, 0), "a NoneType is given; a Trace is needed"),
        (lambda: plot.bucket_curve("an4"), "a str is given; a SEWDConfig is needed"),
        (lambda: plot.bucket_map(SEWDConfig(relative_attention=False), 9), "no relative positions"),
        (lambda: plot.bucket_map(CONFIG, 0), "at least one"),
        (lambda: plot.position_profile({}, 0), "Trace('*.attention.self.probs')"),
        (lambda: plot.features({}), "Trace('feature_extractor.conv_layers.*')"),
        (lambda: plot.features({"feature_extractor.conv_layers.13": np.ones((1, 3, 2))}), "config=model.config"),
        (lambda: plot.similarity({}), "encoder.encoder.layer.?"),
        (lambda: plot.similarity(NO_ATTENTIONS), "output_hidden_states=True"),
        (lambda: plot.compare({}, {}), "both traces are empty"),
    ],
)
def test_mistakes_are_one_clear_sentence(draw: Callable[[], Figure], said: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        draw()
    message = str(caught.value)
    assert said in message and message.endswith(".")
    assert "\n" not in message


if __name__ == "__main__":
    matplotlib.rcdefaults()
    for picture, make in PICTURES.items():
        make().savefig(BASELINE / f"{picture}.png", dpi=DPI)
