"""Layer-by-layer parity with transformers, as a tool: ``make parity MODEL=an4`` or ``python -m tests.parity MODEL``.

Loads a checkpoint (bundled name, folder, weights file or hub id) with this package, hands the same tensors to
transformers, runs both on one recording and prints every trace point as OK, DIFF or SHAPE.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import numpy as np
import torch

import sewd_np
from sewd_np.audio import load_audio
from sewd_np.backend import PRECISIONS
from sewd_np.trace import Trace, points, report
from tests.reference import HF_CLASSES, points_of


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 0 if every point agrees."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("model", nargs="?", default="an4", help="bundled name, folder, weights file or hub id")
    parser.add_argument("--audio", default=str(sewd_np.clip()), help="recording to run on (default: the bundled clip)")
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--precision", choices=PRECISIONS, help="of backend numba's products (default: high)")
    parser.add_argument("--double", action="store_true", help="compare in float64 (1e-7) instead of float32 (1e-4)")
    options = parser.parse_args(arguments)

    # transformers rounds the score scale to float32 even in double: that alone is about 1e-8.
    dtype, tolerance = (np.float64, 1e-7) if options.double else (np.float32, 1e-4)
    try:
        model = sewd_np.load(options.model, options.backend, dtype, precision=options.precision)
        wave_n = load_audio(options.audio)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        hf = HF_CLASSES[model.head].from_pretrained(folder, dtype=torch.float64 if options.double else torch.float32)
    assert model.processor is not None
    wave_bn = model.processor(wave_n, sampling_rate=16_000)["input_values"].astype(dtype)

    trace = Trace()
    model(wave_bn, trace=trace)
    theirs, _ = points_of(hf.eval(), torch.from_numpy(wave_bn))
    declared = points(model.config, model.head)
    print(f"a: sewd_np, backend {options.backend}; b: transformers; {options.model} in {np.dtype(dtype)}")
    rows = report(trace, {name: value for name, value in theirs.items() if name in declared}, tolerance)
    return int(any(row.status != "OK" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
