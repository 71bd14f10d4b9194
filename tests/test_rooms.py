"""The law of the rooms: data flows one way, and imports follow it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nola_vision

ROOT = Path(nola_vision.__file__).parent


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_nothing_but_cli_imports_cli_or_sweep() -> None:
    for path in ROOT.rglob("*.py"):
        for name in imported(path):
            for closed in ("cli", "sweep"):
                if name.startswith(f"nola_vision.{closed}"):
                    assert room(path) in ("cli", closed), f"{path} imports {name}"


@pytest.mark.parametrize("closed", ["adapters", "results", "sweep"])
def test_rooms_without_lightning(closed: str) -> None:
    for path in (ROOT / closed).rglob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] == "lightning"], path
    for path in (ROOT / "adapters").rglob("*.py"):
        inside = [name for name in imported(path) if name.startswith("nola_vision.")]
        allowed = ("nola_vision.adapters.", "nola_vision.errors", "nola_vision.files")
        assert all(name.startswith(allowed) for name in inside), path
    inside = {name for name in imported(ROOT / "targets.py") if name.startswith("nola_vision.")}
    assert inside == {"nola_vision.adapters.target.Target", "nola_vision.errors.NolaVisionError"}


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("nola_vision.adapters.stack", "lightning"),
        ("nola_vision.data.kshot", "torch"),
        ("nola_vision.results.row", "torch"),
        ("nola_vision.sweep.plan", "torch"),
        ("nola_vision.model", "lightning"),
        ("nola_vision.config_files", "pandas"),
    ],
)
def test_importing_a_room_does_not_pull_in_what_it_must_not(module: str, without: str) -> None:
    code = f"import sys, {module}; sys.exit({without!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
