"""The page of ``sewd-np explain``: which pictures there are, what each shows in words, and the HTML around them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple


class Kind(NamedTuple):
    """A picture: its title, and what it shows in words for somebody who has not seen the model.

    with_letters: said first where there is a transcript, for then the picture shows it too.
    """

    title: str
    caption: str
    with_letters: str = ""


KINDS = {
    "transcript": Kind(
        "What was heard",
        "From top to bottom: the sound; its spectrogram, that is, how much of each pitch it holds at each moment; "
        "and the probability that the model gives to each letter in each frame. Most of the time the "
        "likeliest answer is the “blank”, which means “nothing new”. A letter fires for a frame or two only, "
        "often later than it is heard, and reading the letters that fire from left to right gives the text; “|” "
        "stands between words.",
    ),
    "features": Kind(
        "The sound becomes frames",
        "Convolutions, one after the other, each fed with the one above. Each row of a panel is one of "
        "its channels, a detector that answers to one pattern of sound. Every second convolution or so takes "
        "steps of two or more, so the frames become fewer and longer: in the published models from 16,000 samples a "
        "second down to 50 frames.",
    ),
    "similarity": Kind(
        "What the layers make of the frames",
        "Before the transformer neighbouring frames are squeezed into one, in the published models two, which leaves "
        "25 a second. "
        "Each square compares every moment of the recording with every other as one layer describes them: violet "
        "where two moments are described alike, orange where they are opposite. Blocks along the diagonal are "
        "stretches of one and the same sound. Below, the descriptions themselves.",
    ),
    "heads": Kind(
        "Where every head looks",
        "A layer has several heads, and each head lets every frame look at all others and take something from "
        "them. In each tile a row is a frame that looks and a column a frame that is looked at; bright means that "
        "it looks there. A diagonal line looks at the frame itself, or a fixed step before or after it; a column "
        "is a moment that all frames look at.",
    ),
    "attention": Kind(
        "One head, from near",
        "Pick a moment on the left, go right until it is bright, then up: that is the moment it looks at. The colours "
        "follow the square root of the probability, so that weak attention can be seen too; every row sums to 1.",
        "One of the tiles above, with the sound and the letters along both sides. ",
    ),
    "disentangle": Kind(
        "Why it looks there",
        "SEW-D keeps what a frame sounds like and where it stands apart, so the score of every pair is a sum of "
        "up to three: what one frame's content wants from the other's content, what it wants from a place so many "
        "frames away, and what that place wants from the other's content. The first is a pattern of rows and "
        "columns, the other two run along diagonals. The softmax turns each row of the sum into probabilities.",
    ),
    "position-profile": Kind(
        "How far the heads look",
        "The same layer's attention, averaged over all pairs of frames that are equally far apart. A peak at 0 "
        "looks at the frame itself, one to the left looks back in time, one to the right ahead. The dotted line "
        "is a head that looks everywhere alike.",
    ),
    "bucket-curve": Kind(
        "Near places are told apart, far ones are not",
        "What a head can know of distance is one row of a learnt table. Up to a limit every distance has a row of "
        "its own; beyond it, ever more distances share one. So a table of fixed size serves a recording of any "
        "length. This depends on the model only, not on the recording.",
    ),
    "bucket-map": Kind(
        "Which place each pair of frames uses",
        "The row of that table for every pair of frames of this recording, counted from the middle row, which is "
        "distance 0. Colours are constant along each diagonal: only the distance matters, never the moment.",
    ),
    "compare": Kind(
        "How exact the numbers are",
        "The same recording, computed once as above and once by the NumPy definition with twice as many digits. "
        "Each mark is one intermediate result, in the order of the computation, and its height is the largest "
        "difference. Rounding grows slowly from layer to layer; a mistake in a step would stand out as a jump.",
    ),
}
GENERATOR = '<meta name="generator" content="sewd-np explain">'  # by which an earlier page is known


def page(kinds: Sequence[str], heading: str, text: str | None, label: str | None, layer: int, head: int) -> str:
    """The HTML of the page, with a picture ``KIND.png`` beside it for each kind; nothing is loaded from elsewhere.

    heading: names the recording and the model. text: the transcript, None where there is none. label: a classifier's
    likeliest one, else None. layer, head: those that pictures of a single head show.
    """
    heard = text if label is None else label
    said = "" if heard is None else f"<p>The model heard: <strong>{html.escape(heard) or 'nothing'}</strong></p>"
    which = f"layer {layer}, head {head}"
    ending = ""
    if text is not None:
        ending = ", and a last layer gives each frame a probability for every letter"
    elif label is not None:
        ending = ", and a last layer gives their mean a probability for every label"
    sections = []
    for kind in kinds:
        title, caption, with_letters = KINDS[kind]
        if text is not None:
            caption = with_letters + caption
        if kind in ("attention", "disentangle"):
            title += f": {which}"
        sections.append(
            f'<section id="{kind}">\n<h2>{html.escape(title)}</h2>\n'
            f'<img src="{kind}.png" alt="{html.escape(title)}">\n<p>{html.escape(caption)}</p>\n</section>'
        )
    return _PAGE.format(
        generator=GENERATOR,
        heading=html.escape(heading),
        text=said,
        ending=ending,
        sections="\n".join(sections),
        which=which,
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{generator}
<title>{heading}</title>
<style>
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.55 system-ui, sans-serif; color: #222; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.15rem; margin: 2.5rem 0 0.5rem; }}
img {{ max-width: 100%; height: auto; }}
section p {{ max-width: 46rem; }}
</style>
</head>
<body>
<h1>{heading}</h1>
{text}
<p>These pictures follow the recording through SEW-D, a speech model: convolutions turn the sound into frames, a
transformer lets the frames look at each other{ending}.
Layers and heads count from 0; where a picture shows only one, it is {which}.</p>
{sections}
</body>
</html>
"""
