"""The committed notebooks as a reader meets them: executed, in order, short, and with nothing of the machine in them.

Nothing is run here; ``make notebooks`` does that. These tests read the files.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LONGEST_FUNCTION = 8  # lines: what is longer belongs into the package
LARGEST_FILE = 700_000  # bytes; a dozen pictures of 80 dots an inch
LIBRARIES = {"numpy", "matplotlib", "sewd_np"}
EXCEPTIONS: dict[str, dict[str, str]] = {  # notebook -> further library: why
    "08_numpy_to_numba": {
        "numba": "it compiles one rung that the package does not keep",
        "threadpoolctl": "NumPy's product on one thread, like the kernel beside it",
    },
    "09_gpu_kernels": {"tests": "the simulator's scheduler, which finds races, is a tool of the tests"},
}
IN_OUTPUTS = {  # what would tell of the machine, or change from run to run
    "an absolute path": r"(?<![\w/.])/(?:home|root|tmp|usr|work|opt|mnt|Users|var)/|[A-Z]:\\\\",
    "an address in memory": r"0x[0-9a-f]{6,}",
    "a time": r"\b\d+(?:\.\d+)?\s?(?:seconds elapsed|µs|us per|ms per|s per loop)|\d{1,2}:\d{2}:\d{2}",
}

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if kind is None or cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def shown(cell: dict[str, Any]) -> str:
    """Text of a code cell's outputs."""
    texts = []
    for output in cell["outputs"]:
        for kind, value in {"text": output.get("text", ""), **output.get("data", {})}.items():
            if kind.startswith("text"):
                texts.append("".join(value))
    return "\n".join(texts)


def test_opens_with_its_aim_and_closes_with_three_folded_questions(path: Path) -> None:
    first, last = cells(path)[0], cells(path)[-1]
    assert first["cell_type"] == "markdown" and last["cell_type"] == "markdown"
    assert source(first).startswith("# ")
    assert "will be able to explain" in source(first)
    assert "## Three questions\n" in source(last)
    assert source(last).count("<details>") == source(last).count("</details>") == 3
    assert source(last).count("<summary>") == 3


def test_has_15_to_25_cells_and_prose_before_code(path: Path) -> None:
    kinds = [cell["cell_type"] for cell in cells(path)]
    assert 15 <= len(kinds) <= 25
    assert set(kinds) <= {"markdown", "code"}
    for number, (before, kind) in enumerate(pairwise(kinds), start=2):
        assert kind == "markdown" or before == "markdown", f"cell {number} is code without prose before it"


def test_defines_no_long_function_and_no_class(path: Path) -> None:
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(source(cell))):
            assert not isinstance(node, ast.ClassDef), source(cell)
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno + 1 <= LONGEST_FUNCTION, node.name


def test_imports_the_package_numpy_and_matplotlib_only(path: Path) -> None:
    allowed = LIBRARIES | EXCEPTIONS.get(path.stem, {}).keys() | set(sys.stdlib_module_names)
    used = set()
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used.add((node.module or "").split(".")[0])
    assert "sewd_np" in used
    assert used <= allowed


def test_asserts_nothing(path: Path) -> None:
    """A notebook shows; what must hold is held by the tests."""
    for cell in cells(path, "code"):
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source(cell)))), source(cell)


def test_is_executed_in_order_and_without_errors(path: Path) -> None:
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "display_data", "stream"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    # The first code cell imports; the others show something, but for a few that prepare the next.
    assert sum(bool(cell["outputs"]) for cell in code) >= 0.7 * len(code)
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture"


def test_draws_nothing_twice(path: Path) -> None:
    pictures = [
        output["data"]["image/png"]
        for cell in cells(path, "code")
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert len(set(pictures)) == len(pictures)


def test_links_lead_somewhere(path: Path) -> None:
    texts = [source(cell) for cell in cells(path, "markdown")] + [(FOLDER / "README.md").read_text(encoding="utf-8")]
    for link in re.findall(r"\]\(([^)#]+)\)", "\n".join(texts)):
        assert link.startswith("https://") or (FOLDER / link).exists(), link


@pytest.mark.parametrize("what", IN_OUTPUTS)
def test_outputs_do_not_tell_of_the_machine(path: Path, what: str) -> None:
    for cell in cells(path, "code"):
        assert not re.search(IN_OUTPUTS[what], shown(cell)), f"{what} in: {shown(cell)}"


def test_metadata_says_the_language_only(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]) == (
        4,
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert not any(output.get("metadata") for output in cell.get("outputs", []))


def test_is_small_and_in_the_guide(path: Path) -> None:
    assert path.stat().st_size < LARGEST_FILE
    assert re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name)
    assert f"({path.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")
