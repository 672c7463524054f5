"""Run the notebooks, each in a clean kernel and without a network, and stop at the first error.

    python notebooks/run.py                     all of them: nothing is written
    python notebooks/run.py --write             all of them, and their outputs are written into the files
    python notebooks/run.py --write 01 05       only those whose names begin so

Needs the extra ``notebooks``. A written notebook holds no time, no path and no trace of who ran it, so that running it
again changes the file only where what it shows has changed.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

from sewd_np.cpu_compiling import EACH_TIME, ONCE

FOLDER = Path(__file__).parent
KERNEL = "python3"  # of the interpreter that runs this file
SMALL_PICTURE = 150_000  # bytes; up to here a picture stays as it was drawn
SECONDS_A_CELL = 300  # a cell that takes longer hangs; compiling kernels takes a minute
FAILED = (CellExecutionError, CellTimeoutError, DeadKernelError)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": KERNEL},
    "language_info": {"name": "python"},
}


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs; an error of ``FAILED`` where a cell fails, hangs or takes its kernel with it."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=SECONDS_A_CELL,
        kernel_name=KERNEL,
        record_timing=False,
        coalesce_streams=True,  # what a cell prints is one output, however it arrived
        extra_arguments=["--log-level=ERROR"],  # its warning about unencrypted sockets is of no use on one machine
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return cleaned(notebook)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from run to run: names of cells are their numbers, metadata says the language only.

    Whether kernels have to be compiled first, which the package says on standard error, differs as well.
    """
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id, cell.metadata = f"cell-{number:02}", nbformat.NotebookNode()
        if "outputs" in cell:
            cell.outputs = [x for x in cell.outputs if x.get("text", "").strip() not in (ONCE, EACH_TIME)]
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.NotebookNode()
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = with_fewer_colours(output.data["image/png"])
    return notebook


def with_fewer_colours(png: str) -> str:
    """A large picture (base64) in 256 colours, a third of the size; a small one as it is, for pale maps show steps."""
    drawn = base64.b64decode(png)
    if len(drawn) <= SMALL_PICTURE:
        return png.replace("\n", "")
    picture, smaller = Image.open(io.BytesIO(drawn)).convert("RGB"), io.BytesIO()
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(smaller, "png", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode("ascii")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks from clean kernels.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="how their file names begin (default: all)")
    parser.add_argument("--write", action="store_true", help="write the outputs into the files")
    options = parser.parse_args()
    paths = sorted(FOLDER.glob("*.ipynb"))
    for name in options.names:
        if not any(path.name.startswith(name) for path in paths):
            print(f"no notebook begins with {name}; see {FOLDER}.", file=sys.stderr)
            return 2
    paths = [path for path in paths if path.name.startswith(tuple(options.names or [""]))]
    for path in paths:
        start = time.perf_counter()
        try:
            notebook = executed(path)
        except FAILED as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            return 1
        if options.write:
            nbformat.write(notebook, path)
        print(f"{path.name:<40} {time.perf_counter() - start:5.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
