"""SEW-D speech recognition in NumPy.

``sewd_np.transcribe("a.flac").text`` is the short way; ``sewd_np.load("an4")`` gives the model itself. The classes
below are imported on first use, so that ``import sewd_np`` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sewd_np.results import Label, Transcript
from sewd_np.transcribe import classify, load, transcribe

if TYPE_CHECKING:
    from sewd_np.clips import clip
    from sewd_np.config import SEWDConfig
    from sewd_np.decoding import Word
    from sewd_np.model import SEWDForCTC, SEWDForSequenceClassification, SEWDModel
    from sewd_np.trace import Trace

__version__ = "0.1.0"

__all__ = [
    "Label",
    "SEWDConfig",
    "SEWDForCTC",
    "SEWDForSequenceClassification",
    "SEWDModel",
    "Trace",
    "Transcript",
    "Word",
    "classify",
    "clip",
    "load",
    "transcribe",
]

_ROOM = {  # where to find a public name that is imported on first use
    "SEWDConfig": "config",
    "SEWDForCTC": "model",
    "SEWDForSequenceClassification": "model",
    "SEWDModel": "model",
    "Trace": "trace",
    "trace": "trace",  # the room itself, for sewd_np.trace.report
    "Word": "decoding",
    "ablate": "ablate",  # a room, for sewd_np.ablate.drop_head
    "audio": "audio",  # for sewd_np.audio.load_audio
    "clip": "clips",
    "config": "config",  # for sewd_np.config.ACTIVATIONS
    "losses": "losses",  # for sewd_np.losses.ctc_lattice
    "plot": "plot",  # the package itself, for sewd_np.plot.attention
}


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = import_module(f"{__name__}.{_ROOM[name]}")
    return room if name == _ROOM[name] else getattr(room, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOM})
