"""The recordings that come with the package: something to transcribe and to look into at once.

None of them is a person: a text-to-speech program made them, and ``assets/clips/README.md`` says how. A clip's words
stand beside it, in a ``.txt`` of the same name.
"""

from __future__ import annotations

from pathlib import Path

CLIPS = Path(__file__).parent / "assets" / "clips"
DEFAULT_CLIP = "enter-six-two-four"


def clip(name: str = DEFAULT_CLIP) -> Path:
    """Path of a bundled clip (FLAC, 16 kHz, mono); ``sewd_np.transcribe(sewd_np.clip())`` takes it as any other file.

    Raises ``ValueError`` listing the names there are.
    """
    bundled = sorted(path.stem for path in CLIPS.glob("*.flac"))
    if name not in bundled:
        raise ValueError(f"clip {name!r} is not bundled; choose one of {', '.join(map(repr, bundled))}.")
    return CLIPS / f"{name}.flac"
