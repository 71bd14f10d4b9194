"""What the documents say in code is run: the README's Python lines and the notebook."""

import json
import re
from pathlib import Path

import pytest

from nola_vision.cli.main import main

ROOT = Path(__file__).parent.parent


def test_the_readmes_python_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = re.search(r"<!-- test: python -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict = {}
    exec(found[1], names)
    assert names["model"].stack.merged
    assert (tmp_path / "pets.safetensors").stat().st_size < 20_000


def test_the_notebook_runs_on_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("IPython")
    monkeypatch.chdir(tmp_path)
    options = ["--method=1nn", "--threads=1", "--data.test_limit=20", "--trainer.enable_progress_bar=false"]
    assert main(["fit", "--config=quickstart.yaml", *options]) == 0
    cells = json.loads((ROOT / "notebooks" / "few_shot_results.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert len(names["final"]) == 1


def test_the_coverage_notebook_runs() -> None:
    (cell,) = [
        c for c in json.loads((ROOT / "notebooks" / "coverage.ipynb").read_text())["cells"] if c["cell_type"] == "code"
    ]
    names: dict = {}
    exec("".join(cell["source"]), names)
    table = names["table"]
    assert (table["nola d=16"] >= table["pranc d=16"]).all() and table["nola d=16"].iloc[3] == 1
