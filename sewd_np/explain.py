"""All pictures of one recording: one of them in a file, or all in a folder with a page that says what they show.

``look`` runs the model once and keeps just the points that the pictures need, ``figure`` draws one of them, and
``write_picture`` and ``write_page`` make files that are there whole, or not at all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sewd_np import plot
from sewd_np.page import GENERATOR, KINDS, page
from sewd_np.plot.given import whole
from sewd_np.results import Transcript, check_blank, read_labels, read_transcript
from sewd_np.trace import LAYER, Trace, points
from sewd_np.transcribe import hear, load

if TYPE_CHECKING:
    from sewd_np.model import SEWDModel

NEEDS_WORDS = "transcript"  # the kind that only a model with a CTC head can give
FORMATS = (".pdf", ".png", ".svg")
SCRATCH = ".sewd-np-"  # how the folder begins in which files lie until they are complete


@dataclass(frozen=True)
class Seen:
    """One run over one recording: what the pictures are drawn from.

    kinds: the pictures that can be drawn. layer, head: which one ``attention`` and ``disentangle`` show; of the layer,
    ``position-profile`` shows all heads. every_layer: whether ``heads`` shows all. reference: some of the points in
    float64 by the NumPy definition, for ``compare``.
    """

    kinds: tuple[str, ...]
    config: Any
    transcript: Transcript | None
    label: str | None  # a classifier's likeliest, with its probability
    trace: Trace
    reference: Trace | None
    layer: int
    head: int
    every_layer: bool
    seconds_per_frame: float  # squeezed
    sampling_rate: int
    backend: str


def look(
    model: SEWDModel, source: Any, recording: Any, kind: str | None = None, layer: int | None = None, head: int = 0
) -> Seen:
    """Run ``model`` (loaded from ``source``) over a recording and keep what one kind of picture needs, or all (None).

    layer: None is the middle one. Raises ``ValueError`` for a layer or head that the model lacks, a kind that is
    unknown or needs another model, and what ``transcribe`` and ``load`` raise.
    """
    if kind is not None and kind not in KINDS:
        raise _unknown(kind)
    config, processor = model.config, model.processor
    if processor is None:
        raise ValueError("the model has no preprocessor_config.json, which says how sound must be prepared for it.")
    reads = model.head == "ctc" and processor.tokenizer is not None
    kinds = kinds_for(config, reads) if kind is None else [kind]
    if NEEDS_WORDS in kinds and not reads:
        raise ValueError("this model has no CTC head and vocabulary, so there is no transcript to draw.")
    if reads:
        check_blank(f"model {str(source)!r}", model)
    chosen = config.num_hidden_layers // 2 if layer is None else layer
    for name, value, count in (("layer", chosen, config.num_hidden_layers), ("head", head, config.num_attention_heads)):
        if whole(value, name) >= count:
            raise ValueError(f"{name} {value} does not exist; the model has {count}, counted from 0.")
    wave_n = hear(model, recording)
    rate = processor.feature_extractor.sampling_rate
    inputs = processor(wave_n, sampling_rate=rate)["input_values"]
    trace = Trace(*_names(model, kinds, chosen))
    logits = model(inputs, trace=trace).logits
    reference = None
    if "compare" in kinds:
        reference = Trace(*_names(model, ["compare"], chosen))
        load(source, "numpy", np.float64)(inputs.astype(np.float64), trace=reference)
    label = None
    if model.head == "classification" and logits is not None:
        best = read_labels(model, logits[0])[0]
        label = f"{best.label} ({100 * best.score:.0f} %)"
    return Seen(
        kinds=tuple(kinds),
        config=config,
        transcript=read_transcript(model, wave_n, logits[0], evidence=True) if reads and logits is not None else None,
        label=label,
        trace=trace,
        reference=reference,
        layer=chosen,
        head=head,
        every_layer=layer is None or kind is None,
        seconds_per_frame=config.inputs_to_logits_ratio * config.squeeze_factor / rate,
        sampling_rate=rate,
        backend=model.ops.name,
    )


def kinds_for(config: Any, reads: bool) -> list[str]:
    """The pictures that a model can give: those of letters need a CTC head, those of distance relative positions."""
    without = set() if reads else {NEEDS_WORDS}
    if not config.relative_attention:
        without |= {"bucket-curve", "bucket-map"}
    return [kind for kind in KINDS if kind not in without]


def _names(model: SEWDModel, kinds: Sequence[str], layer: int) -> list[str]:
    """Names of the trace points that these pictures need, in the order in which they fire."""
    table = points(model.config, model.head)
    layers = range(model.config.num_hidden_layers)
    needed = {
        # The maps of all layers, twice and in float64, would be most of what a long recording takes.
        "compare": {name for name, dims in table.items() if dims != "b h i j"},
        "features": {f"feature_extractor.conv_layers.{i}" for i in range(len(model.config.conv_dim))},
        "similarity": {"encoder.encoder.input", *(f"{LAYER}.{i}" for i in layers)},
        "heads": {f"{LAYER}.{i}.attention.self.probs" for i in layers},
        "attention": {f"{LAYER}.{layer}.attention.self.probs"},
        "position-profile": {f"{LAYER}.{layer}.attention.self.probs"},
        "disentangle": {f"{LAYER}.{layer}.attention.self.{x}" for x in ("c2c", "c2p", "p2c", "scores", "probs")},
        # Only the number of squeezed frames is asked for; a trace without a pattern would keep everything.
        "bucket-map": {"encoder.encoder.input"},
    }
    names = set().union(*(needed.get(kind, set()) for kind in kinds)) or {"encoder.encoder.input"}
    return [name for name in table if name in names]


def figure(seen: Seen, kind: str) -> Any:
    """The picture of one kind, a matplotlib figure."""
    trace, layer, head, step = seen.trace, seen.layer, seen.head, seen.seconds_per_frame
    match kind:
        case "transcript":
            return plot.transcript(seen.transcript)
        case "features":
            return plot.features(trace, seen.config, seen.transcript, sampling_rate=seen.sampling_rate)
        case "similarity":
            return plot.similarity(trace, step)
        case "heads":
            return plot.heads(trace, None if seen.every_layer else layer, step)
        case "attention":
            return plot.attention(trace, layer, head, seen.transcript, seconds_per_frame=step)
        case "disentangle":
            return plot.disentangle(trace, layer, head, step)
        case "position-profile":
            return plot.position_profile(trace, layer, step)
        case "bucket-curve":
            return plot.bucket_curve(seen.config)
        case "bucket-map":
            return plot.bucket_map(seen.config, trace["encoder.encoder.input"].shape[1], step)
        case "compare":
            names = (f"{seen.backend}, float32" if seen.backend == "numpy" else seen.backend, "numpy, float64")
            return plot.compare({name: trace[name] for name in seen.reference or ()}, seen.reference, names=names)
    raise _unknown(kind)


def _unknown(kind: Any) -> ValueError:
    return ValueError(f"picture {kind!r} is unknown; choose one of {', '.join(KINDS)}.")


# ------------------------------------------------------------------------------ files


def check_picture(path: Path) -> None:
    """Raise ``ValueError`` or ``OSError`` for a path that no picture can be written to, before any work is done."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the picture {str(path)!r} ends in {path.suffix!r}; it must end in {', '.join(FORMATS)}.")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "is in a folder that does not exist"
        raise ValueError(f"the picture {str(path)!r} {what}; name a file in a folder that does.")
    _check_writable(path, path.parent)


def write_picture(picture: Any, path: Path) -> None:
    """Write a figure; a file that was there before is replaced only when the new one is complete."""
    check_picture(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=SCRATCH) as work:
        part = Path(work) / path.name
        picture.savefig(part, format=path.suffix[1:].lower())
        os.replace(part, path)


def check_folder(folder: Path) -> None:
    """Raise ``ValueError`` or ``OSError`` for a folder that holds something else than an earlier page, or cannot be
    made or written to.
    """
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{str(folder)!r} is a link to nothing; name a folder.")
    if not folder.resolve().parent.is_dir():
        raise ValueError(f"the folder {str(folder)!r} cannot be made, for the one it is in does not exist.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; name a folder.")
    # Scratch folders may be left of a run that was killed.
    if folder.is_dir() and not all(path.name.startswith(SCRATCH) for path in folder.iterdir()):
        index = folder / "index.html"
        if not index.is_file() or GENERATOR not in index.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"the folder {str(folder)!r} holds other files; name a new or an empty one.")
    _check_writable(folder, _beside(folder))


def _beside(folder: Path) -> Path:
    """Where a page's files are made: from there they can be moved, for it is on the same disk as ``folder``."""
    return folder if folder.is_dir() else folder.resolve().parent


def _check_writable(path: Path, where: Path) -> None:
    """Raise ``OSError`` if nothing can be made in the folder ``where``, or nothing of that name."""
    try:
        with tempfile.TemporaryDirectory(dir=where, prefix=SCRATCH) as work:
            (Path(work) / os.path.basename(os.path.realpath(path))).touch()  # resolve() fails on a loop of links
    except OSError as error:
        raise OSError(f"{str(path)!r} cannot be written ({error.strerror}); name another place.") from error


def write_page(seen: Seen, folder: Path, heading: str) -> None:
    """All pictures of ``seen``, and ``index.html`` beside them.

    Everything is drawn before an earlier page is touched, and the new one is put there last; pictures of the earlier
    one that it does not show are then removed. ``heading`` names the recording and the model.
    """
    check_folder(folder)
    kinds = seen.kinds
    with tempfile.TemporaryDirectory(dir=_beside(folder), prefix=SCRATCH) as work:
        for kind in kinds:
            figure(seen, kind).savefig(Path(work) / f"{kind}.png", format="png", dpi=120)
        text = None if seen.transcript is None else seen.transcript.text
        html = page(kinds, heading, text, seen.label, seen.layer, seen.head)
        # A file name need not be UTF-8, and stands in the heading.
        (Path(work) / "index.html").write_text(html, encoding="utf-8", errors="backslashreplace")
        folder.mkdir(exist_ok=True)
        for name in (*(f"{kind}.png" for kind in kinds), "index.html"):
            os.replace(Path(work) / name, folder / name)
    for kind in set(KINDS) - set(kinds):
        (folder / f"{kind}.png").unlink(missing_ok=True)
