"""Draw what one attention head does to the bundled clip: the picture in the README.

    python examples/look_inside.py picture.png            # needs matplotlib: pip install 'sewd-np[plot]'

Top: the waveform and the words. Below: the CTC probabilities of the letters that occur. Bottom: one head's scores taken
apart into content-to-content, content-to-position and position-to-content, on one colour scale, and what the softmax
makes of their sum.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

import sewd_np
from sewd_np.audio import load_audio
from sewd_np.decoding import greedy
from sewd_np.losses import log_softmax

CLIP = Path(sewd_np.__file__).parent / "assets" / "clips" / "enter-six-two-four.flac"


def draw(clip: Path, layer: int, head: int) -> Figure:
    """The figure for one recording, transformer layer and head of the bundled model."""
    model = sewd_np.load("an4")
    assert model.processor is not None and model.processor.tokenizer is not None
    name = f"encoder.encoder.layer.{layer}.attention.self"
    trace = sewd_np.Trace(f"{name}.c2c", f"{name}.c2p", f"{name}.p2c", f"{name}.probs")
    wave_n = load_audio(clip)
    out = model(model.processor(wave_n, sampling_rate=16_000)["input_values"], trace=trace)
    assert out.logits is not None
    transcript = sewd_np.transcribe(str(clip), model=model)
    seconds = len(wave_n) / 16_000

    figure = plt.figure(figsize=(11, 6.6), layout="constrained")
    rows = figure.add_gridspec(3, 4, height_ratios=[1, 1.5, 1.9])
    sound = figure.add_subplot(rows[0, :])
    sound.plot(np.arange(len(wave_n)) / 16_000, wave_n, color="0.35", linewidth=0.5)
    for word in transcript.words:
        sound.axvspan(word.start, word.end, color="tab:blue", alpha=0.15, linewidth=0)
        sound.text((word.start + word.end) / 2, 1.02, word.text, ha="center", transform=sound.get_xaxis_transform())
    sound.set(xlim=(0, seconds), yticks=[], ylabel="sound")
    sound.tick_params(labelbottom=False)

    letters = figure.add_subplot(rows[1, :], sharex=sound)
    ids = sorted({int(i) for i in greedy(out.logits[0])} - {model.config.pad_token_id})
    names = {i: token for token, i in model.processor.tokenizer.vocab.items()}
    probabilities = np.exp(log_softmax(out.logits[0]))[:, ids].T
    extent = (0, probabilities.shape[1] * 0.02, len(ids) - 0.5, -0.5)
    letters.imshow(probabilities, aspect="auto", extent=extent, cmap="cividis", vmin=0, vmax=1, interpolation="none")
    letters.set(yticks=range(len(ids)), yticklabels=[names[i] for i in ids], xlabel="time [s]", ylabel="letter")

    parts = [trace[f"{name}.{part}"][0, head] for part in ("c2c", "c2p", "p2c", "probs")]
    titles = ["content to content", "content to position", "position to content", "attention = softmax(sum)"]
    limit = max(float(np.abs(part).max()) for part in parts[:3])
    for column, (part, title) in enumerate(zip(parts, titles, strict=True)):
        panel = figure.add_subplot(rows[2, column])
        colours, low, high = ("PuOr", -limit, limit) if column < 3 else ("cividis", 0, 1)
        end = len(part) * 0.04
        image = panel.imshow(part, colours, vmin=low, vmax=high, extent=(0, end, end, 0), interpolation="none")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("key frame [s]")
        panel.set_ylabel("query frame [s]" if column == 0 else "")
        if column >= 2:
            figure.colorbar(image, ax=panel, shrink=0.6)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what one attention head does to a recording.")
    parser.add_argument("picture", type=Path, help="where to write it: .png, .svg or .pdf")
    parser.add_argument("--clip", type=Path, default=CLIP, help="recording (default: the bundled clip)")
    parser.add_argument("--layer", type=int, default=4)
    parser.add_argument("--head", type=int, default=1)
    options = parser.parse_args()
    draw(options.clip, options.layer, options.head).savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
