"""Pictures of what happens inside the model. Each function takes a transcript, an output, a trace, a configuration or
plain arrays and returns a matplotlib ``Figure``: the last expression of a notebook cell shows it once, ``savefig``
writes it, and no window is opened.

    transcript          what was heard: sound, spectrogram, letter probabilities, words
    attention, heads    where frames look: one head in seconds, all heads at a glance
    disentangle         one head's scores taken apart into content and position
    bucket_curve, bucket_map, position_profile      what the model knows of distance
    features, similarity                            what the convolutions and the layers make of the sound
    compare             where two runs part

Needs matplotlib: ``pip install 'sewd-np[plot]'``.
"""

try:
    import matplotlib  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "drawing needs matplotlib, which is not installed; install it with: pip install 'sewd-np[plot]'."
    ) from error

from sewd_np.plot.attention import attention, disentangle, heads
from sewd_np.plot.features import features, similarity
from sewd_np.plot.positions import bucket_curve, bucket_map, position_profile
from sewd_np.plot.runs import compare
from sewd_np.plot.sound import transcript

__all__ = [
    "attention",
    "bucket_curve",
    "bucket_map",
    "compare",
    "disentangle",
    "features",
    "heads",
    "position_profile",
    "similarity",
    "transcript",
]
