"""The rooms of the package and the order of their imports: upwards is refused, and so are circles."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import nola_vision

ROOT = Path(nola_vision.__file__).parent
# From the ground up; a room imports from itself and from the rooms of the floors below it
FLOORS = (
    ("common",),
    ("adapters", "images", "evaluation"),
    ("models", "data"),
    ("training",),
    ("runs",),
    ("sweep", "reports", "serving"),
    ("cli",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LONGEST_FILE = 400  # lines


def imported(path: Path) -> set[str]:
    """Every module or name that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def file_of(name: str) -> Path | None:
    """The file of the package that an imported module or name comes from."""
    parts = name.split(".")
    if parts[0] != "nola_vision":
        return None
    for length in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[1:length])
        if base.with_suffix(".py").is_file() and length > 1:
            return base.with_suffix(".py")
        if (base / "__init__.py").is_file():
            return base / "__init__.py"
    raise AssertionError(f"{name} does not exist")


FILES = sorted(ROOT.rglob("*.py"))
IMPORTS = {path: {file for name in imported(path) if (file := file_of(name)) is not None} for path in FILES}


def room(path: Path) -> str | None:
    """The folder of a file; None for the package's own `__init__.py`, which hands on public names."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else None


def test_every_file_is_in_a_room() -> None:
    assert {room(path) for path in FILES} - {None} == set(FLOOR_OF)
    assert [path for path in FILES if room(path) is None] == [ROOT / "__init__.py"]
    assert not [path for path in FILES if not (path.parent / "__init__.py").is_file()]


@pytest.mark.parametrize("name", FLOOR_OF)
def test_imports_lead_downwards(name: str) -> None:
    upwards = [
        f"{path.relative_to(ROOT)} -> {found.relative_to(ROOT)}"
        for path in FILES
        if room(path) == name
        for found in IMPORTS[path]
        if (other := room(found)) not in (None, name) and FLOOR_OF[str(other)] >= FLOOR_OF[name]
    ]
    assert not upwards


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {path: found - {path, ROOT / "__init__.py"} for path, found in IMPORTS.items() if room(path)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError([str(path.relative_to(ROOT)) for path in error.args[1]]) from None


def test_no_file_is_too_long_to_read() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


@pytest.mark.parametrize("name", ["common", "adapters", "images", "evaluation", "models", "reports", "sweep"])
def test_rooms_without_lightning(name: str) -> None:
    for path in (ROOT / name).rglob("*.py"):
        assert not [found for found in imported(path) if found.split(".")[0] == "lightning"], path


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("nola_vision.adapters.bank", "lightning timm"),
        ("nola_vision.adapters.methods.registry", "torch"),
        ("nola_vision.data.kshot_split", "torch"),
        ("nola_vision.data.sampling", "torch"),
        ("nola_vision.evaluation.estimates", "torch"),
        ("nola_vision.images.decoding", "torch"),
        ("nola_vision.models.prediction", "lightning sklearn pandas matplotlib scipy.optimize"),
        ("nola_vision.models.backbones.spec", "torch"),
        ("nola_vision.runs.config_files", "pandas"),
        ("nola_vision.runs.early_checks", "torch"),
        ("nola_vision.runs.photos", "torch"),
        ("nola_vision.runs.record", "torch"),
        ("nola_vision.sweep.plan", "torch"),
        ("nola_vision.sweep.engines.local", "torch"),
    ],
)
def test_importing_a_module_does_not_pull_in_what_it_must_not(module: str, without: str) -> None:
    code = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {without.split()}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
