"""Make a spoken clip with flite, as the bundled ones were made.

    python examples/make_clip.py "enter six two four" enter-six-two-four.flac

Needs the Debian package ``flite`` (``apt-get install flite``). Flite is deterministic: the same version, voice and
text give the same samples.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import soundfile


def make_clip(text: str, path: Path, voice: str, stretch: float) -> None:
    """Speak ``text`` into ``path``, 16-bit mono at the voice's own rate (16 kHz for rms, slt and awb).

    ``stretch`` multiplies every duration; the format follows the path's ending (.flac, .wav).
    """
    if shutil.which("flite") is None:
        sys.exit("flite is not installed; try: apt-get install flite.")
    with tempfile.TemporaryDirectory() as folder:
        wave = Path(folder, "clip.wav")
        command = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}", "-t", text, "-o", str(wave)]
        subprocess.run(command, check=True)
        samples, rate = soundfile.read(wave, dtype="int16")
    soundfile.write(path, samples, rate, subtype="PCM_16")
    print(f"{path}: {len(samples) / rate:.2f} s at {rate} Hz, {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a spoken clip with flite.")
    parser.add_argument("text", help="what to say, in lower case")
    parser.add_argument("path", type=Path, help="where to write it: .flac or .wav")
    parser.add_argument("--voice", default="rms", help="flite voice (default: rms)")
    parser.add_argument("--stretch", type=float, default=1.15, help="factor on every duration (default: 1.15)")
    options = parser.parse_args()
    make_clip(options.text, options.path, options.voice, options.stretch)


if __name__ == "__main__":
    main()
