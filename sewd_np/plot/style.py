"""One look for all pictures: a figure that shows itself, type sizes, colours, and images of more cells than pixels.

Colours can be told apart by colour-blind readers and in grey print: cividis for what is at least 0, PuOr centred at 0
for what has a sign, the palette of Okabe and Ito for lines.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

Array = np.ndarray
P = ParamSpec("P")
R = TypeVar("R")

WIDTH = 9.5  # inches: what a notebook shows without scaling
SMALL, NORMAL = 8, 9  # points
GREY = "0.35"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#B8A800")
DASHES = ("-", "--", ":", "-.")
SECONDS_PER_SQUEEZED_FRAME = 0.04  # 25 frames a second inside the transformer, in every published model

_SETTINGS: dict[Any, Any] = {
    "font.size": NORMAL,
    "axes.titlesize": NORMAL,
    "axes.labelsize": NORMAL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "figure.titlesize": NORMAL + 1,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "figure.dpi": 100,
    "savefig.dpi": "figure",
}


class Picture(Figure):
    """A figure that a notebook draws by itself.

    pyplot would do it too, but keeps every figure in a list of its own until somebody closes it, and opens a window
    where there is a screen.
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def drawn(function: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function with this room's type sizes; the caller's own settings come back afterwards."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(_SETTINGS):
            return function(*args, **kwargs)

    return wrapped


def new_figure(height: float, width: float = WIDTH) -> Picture:
    """An empty figure, in inches; parts are laid out so that no label covers another."""
    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


class Colours(NamedTuple):
    """How numbers become colours: shared by all panels that are to be compared."""

    map: str
    norm: Normalize


def probabilities(limit: float = 1.0) -> Colours:
    """0 … limit, for probabilities."""
    return Colours("cividis", Normalize(0, limit))


def attention_colours(*maps: Array) -> Colours:
    """For attention: a square-root scale up to the largest value, so that a head that looks everywhere is not black
    beside one that looks at a single frame."""
    limit = max((float(values.max()) for values in maps if values.size), default=1.0)
    return Colours("cividis", PowerNorm(0.5, 0, limit or 1.0))


def signed(*maps: Array) -> Colours:
    """For scores: 0 is white, and the largest magnitude of all ``maps`` the deepest colour on either side."""
    limit = max((float(np.abs(values).max()) for values in maps if values.size), default=1.0)
    return Colours("PuOr", Normalize(-(limit or 1.0), limit or 1.0))


def strongest(values: Array, limits: tuple[int, int]) -> tuple[Array, tuple[int, int]]:
    """A (y, x) array cut down to at most ``limits`` cells, each the value of greatest magnitude in its block.

    Drawn as it is, an image of more cells than pixels loses most of its cells, and an average would make the one
    bright cell of a row vanish. Returns the blocks and how many cells one has on each axis.
    """
    sizes = []
    for axis, limit in enumerate(limits):
        size = -(-values.shape[axis] // limit)
        sizes.append(size)
        if size > 1:
            starts = np.arange(0, values.shape[axis], size)
            top, bottom = (np.asarray(pick.reduceat(values, starts, axis)) for pick in (np.maximum, np.minimum))
            values = np.where(top >= -bottom, top, bottom)
    return values, (sizes[0], sizes[1])


def draw_map(
    axes: Axes,
    values: Array,
    colours: Colours,
    step: tuple[float, float],
    origin: tuple[float, float] = (0.0, 0.0),
    upwards: bool = False,
) -> AxesImage:
    """A (y, x) array as an image: a cell measures ``step`` (y, x), the first begins at ``origin``, y runs downwards."""
    # The panel's size in pixels is not final before the layout is made, but it is close.
    blocks, sizes = strongest(values, (max(int(axes.bbox.height), 64), max(int(axes.bbox.width), 64)))
    (y, x), (rows, columns) = origin, blocks.shape
    below, right = y + rows * sizes[0] * step[0], x + columns * sizes[1] * step[1]
    image = axes.imshow(
        blocks,
        cmap=colours.map,
        norm=colours.norm,
        aspect="auto",
        interpolation="none",
        origin="lower" if upwards else "upper",
        extent=(x, right, y, below) if upwards else (x, right, below, y),
    )
    # The last block may be cut short by the end of the array.
    bottom = y + values.shape[0] * step[0]
    axes.set(xlim=(x, x + values.shape[1] * step[1]), ylim=(y, bottom) if upwards else (bottom, y))
    return image
