"""The package as a whole: who imports whom, how light the import is, and what a wheel installed elsewhere can do."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import sewd_np
from sewd_np import cli

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sewd_np"
FILES = {  # room -> its files: a room is a file, or a folder of files that counts as one
    **{path.stem: [path] for path in PACKAGE.glob("*.py")},
    **{path.parent.name: sorted(path.parent.glob("*.py")) for path in PACKAGE.glob("*/__init__.py")},
}
ROOMS = sorted(FILES)


def imported(room: str) -> set[str]:
    """Dotted names that a room imports, wherever in its files, but not what only a type checker sees."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8")) for file in FILES[room]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{room}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            waiting += ast.iter_child_nodes(node)
    return names


def rooms_imported(room: str) -> set[str]:
    """Other rooms of the package that a room imports."""
    return {name.split(".")[1] for name in imported(room) if name.startswith("sewd_np.")} & set(ROOMS) - {room}


def libraries_imported(room: str) -> set[str]:
    return {name.split(".")[0] for name in imported(room)}


def is_kernel_room(room: str) -> bool:
    return room.startswith(("cpu_", "cuda_"))


@pytest.mark.parametrize("room", ["config", "trace", "memory", "page"])
def test_rooms_at_the_bottom_import_nothing_of_ours(room: str) -> None:
    if room in ROOMS:
        assert rooms_imported(room) == set()


def test_ablations_know_only_the_table_of_points() -> None:
    assert rooms_imported("ablate") == {"trace"}


@pytest.mark.parametrize("room", ["layers", "attention", "losses"])
def test_definitions_know_no_backend(room: str) -> None:
    assert rooms_imported(room) <= {"layers", "attention", "losses"}


def test_kernel_rooms_are_imported_by_backend_alone() -> None:
    kernels = set(filter(is_kernel_room, ROOMS))
    users = {room for room in ROOMS if rooms_imported(room) & kernels}
    assert users <= kernels | {"backend"}
    for room in kernels:
        assert not rooms_imported(room) & {"backend", "model"}, room


def test_model_is_composition_only() -> None:
    # checkpoint stands behind from_pretrained and save_pretrained; operations come as an argument.
    assert rooms_imported("model") <= {"config", "inputs", "outputs", "params", "losses", "trace", "checkpoint"}


def test_pictures_are_drawn_from_plain_arrays() -> None:
    # Two definitions are used as they are: which row of the position table a distance has, and what an error is.
    assert rooms_imported("plot") == {"attention", "trace"}
    assert {room for room in ROOMS if "plot" in rooms_imported(room)} == {"explain"}


def test_the_command_line_is_on_top() -> None:
    assert {room for room in ROOMS if "cli" in rooms_imported(room)} == {"__main__"}
    assert {room for room in ROOMS if "transcribe" in rooms_imported(room)} == {"__init__", "cli", "explain"}
    assert {room for room in ROOMS if "results" in rooms_imported(room)} == {"__init__", "cli", "explain", "transcribe"}
    assert {room for room in ROOMS if "explain" in rooms_imported(room)} == {"cli"}


def test_heavy_libraries_stay_in_their_rooms() -> None:
    for room in ROOMS:
        libraries = libraries_imported(room)
        assert not libraries & {"torch", "transformers", "onnxruntime"}, room
        assert "numba" not in libraries or is_kernel_room(room), room
        assert "matplotlib" not in libraries or room == "plot", room


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_import_is_light() -> None:
    code = "import sewd_np, sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = run("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "transformers", "numba", "matplotlib", "scipy", "huggingface_hub", "soundfile", "soxr", "tqdm"}
    assert not heavy & set(done.stdout.split())


def test_numpy_backend_needs_no_compiler() -> None:
    code = (
        "import sewd_np, sys; sewd_np.load('an4', backend='numpy'); "
        "print('numba' in sys.modules, 'torch' in sys.modules)"
    )
    done = run("-c", code, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_public_names_are_there() -> None:
    for name in sewd_np.__all__:
        assert getattr(sewd_np, name).__name__ == name
        assert name in dir(sewd_np)
    assert {"ablate", "audio", "config", "losses", "plot", "trace"} <= {*dir(sewd_np)}
    rooms = "import sewd_np; sewd_np.audio.load_audio, sewd_np.config.ACTIVATIONS, sewd_np.losses.ctc_lattice"
    done = run("-c", rooms, cwd=ROOT)  # a process in which nothing has imported them yet
    assert done.returncode == 0, done.stderr
    # The function, not the room of the same name, whichever was imported first.
    assert callable(sewd_np.transcribe)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sewd_np.nothing  # noqa: B018


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed from its wheel, as pip lays it out, and nothing else."""
    # Built from a copy: a build leaves folders behind, and a stale one would slip into the next wheel.
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    shutil.copytree(PACKAGE, source / "sewd_np", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    built = run(
        *pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source), cwd=wheels
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("*.whl")
    done = run(*pip, "install", "--no-index", "--no-deps", "--target", str(target), str(wheel), cwd=wheels)
    assert done.returncode == 0, done.stderr
    return target


def test_a_source_archive_holds_what_it_speaks_of_and_all_tests(tmp_path: Path) -> None:
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=unwanted)
    built = run(
        "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source), cwd=tmp_path
    )
    assert built.returncode == 0, built.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    ours = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    ours = {name for name in ours if ".egg-info/" not in name}
    assert ours <= held, ours - held
    links = re.findall(r"\]\(([^):#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 20 and {link for link in links if (source / link).is_file()} <= held


def test_installed_wheel_transcribes_its_clip(installed: Path, tmp_path: Path) -> None:
    code = "import sewd_np; print(sewd_np.__file__)"
    where = run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).stdout.strip()
    assert Path(where).is_relative_to(installed)
    # The NumPy backend: kernels installed in another place would be compiled anew.
    done = run("-m", "sewd_np", "transcribe", "--backend", "numpy", cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert done.stdout == cli.CLIP.with_suffix(".txt").read_text(encoding="utf-8")


def test_installed_wheel_carries_assets_and_notices(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    assert files(installed / "sewd_np" / "assets") == files(PACKAGE / "assets")
    (info,) = installed.glob("sewd_np-*.dist-info")
    notices = {path.name: path for path in (info / "licenses").rglob("*") if path.is_file()}
    assert notices.keys() == {"LICENSE", "NOTICE-AN4.txt", "NOTICE-LIBRISPEECH.txt"}
    assert "Carnegie Mellon University" in notices["NOTICE-AN4.txt"].read_text(encoding="utf-8")
    assert "Apache License" in notices["LICENSE"].read_text(encoding="utf-8")
    assert (installed / "sewd_np" / "py.typed").exists()
    assert "sewd-np = sewd_np.cli:main" in (info / "entry_points.txt").read_text(encoding="utf-8")


def test_assets_are_small_and_noted() -> None:
    assert (PACKAGE / "assets" / "an4" / "model.safetensors").stat().st_size < 8_000_000
    assert cli.CLIP.stat().st_size < 100_000
    assert "flite" in (cli.CLIP.parent / "README.md").read_text(encoding="utf-8")
    assert (PACKAGE / "assets" / "an4" / "README.md").exists()
