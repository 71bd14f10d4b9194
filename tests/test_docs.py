"""What the documents say in code is run: the README's Python lines and the notebooks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from nola_vision import load_adapter
from nola_vision.cli.main import main
from nola_vision.runs import store
from test_tables import CELL, grid, row

ROOT = Path(__file__).parent.parent


def test_the_readmes_python_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = re.search(r"<!-- test: python -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict = {}
    exec(found[1], names)
    assert names["model"].bank.merged
    assert (tmp_path / "pets.safetensors").stat().st_size < 20_000


def run_notebook(name: str, **parameters: Any) -> dict[str, Any]:
    """Runs a notebook's code cells in the current folder and returns their names.

    Args:
        name: the file's, without `.ipynb`.
        **parameters: instead of what its first code cell sets.
    """
    pytest.importorskip("IPython")
    matplotlib = pytest.importorskip("matplotlib")
    book = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    assert book["nbformat"] == 4 and all(cell["id"] for cell in book["cells"])
    settings, *code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in (settings, *code))
    names: dict[str, Any] = {}
    exec("".join(settings["source"]), names)
    assert parameters.keys() <= names.keys()
    names |= parameters
    with matplotlib.rc_context({"backend": "agg"}):
        for cell in code:
            exec("".join(cell["source"]), names)
        matplotlib.pyplot.close("all")
    return names


def test_the_results_notebook_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        *grid("small", [[70, 72], [80, 82], [75, 77]], adapter_file_bytes=900),  # 76
        *grid("larger-and-worse", [[60, None], [70, 72]], adapter_file_bytes=2000),
        *grid("larger-and-equal", [[70, 72], [80, 82.000001]], adapter_file_bytes=3000),
        *grid("best", [[80, 82], [90, 90], [85.5, 85.5]], adapter_file_bytes=5000),  # 85.5
        *grid("as-large-as-best", [[76, 78], [76, 78]], adapter_file_bytes=5000),  # 77
        *grid("largest", [[85, 85], [85, 85]], adapter_file_bytes=9000),
        row("1nn", 0.6, init=None, method_class="NearestNeighbor"),
        row("best", 0.99, stage="search", run_hash="s", adapter_file_bytes=5000),
        row("small", 0.99, cell="another", adapter_file_bytes=1),
    ]
    for number, one in enumerate(rows):
        folder = tmp_path / "runs" / str(number)
        folder.mkdir(parents=True)
        store.write_row(folder, one)
    names = run_notebook("few_shot_results", CELL=CELL)
    assert names["cells"] == ["another", CELL] and len(names["rows"]) == len(rows) - 1
    assert len(names["final"]) == 4 * 6 - 1 + 1 + 4
    assert [chart.name for chart in names["charts"]] == ["pareto", "by-split"]
    assert names["parts"].loc["small"].tolist() == pytest.approx([25 * 2 / 3, 1])
    assert names["parts"].loc["best"].tolist() == pytest.approx([4.5**2 * 2 / 3, 1 / 3])
    # by split: 71 - 81, 81 - 90 and 76 - 85.5; where a run failed, of the init that both have
    differences = names["differences"]
    half = stats.t.ppf(0.975, 2) * 0.5 / 3**0.5  # the std (ddof 1) of the three differences is 0.5
    expected = [-9.5, -9.5 - half, -9.5 + half, 3]
    assert differences.loc["small", ["mean", "low", "high", "splits"]].tolist() == pytest.approx(expected)
    assert differences.loc["larger-and-worse", "mean"] == pytest.approx((60 - 80 + 71 - 90) / 2)
    assert differences.loc["1nn", "mean"] == pytest.approx(60 - 81) and differences.isna().loc["1nn", "low"]
    assert "best" not in differences.index


def test_the_notebooks_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--threads=1", "--data.test_limit=20", "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
    targets = "--model.method.targets=[qv, mlp]"
    assert main(["fit", "--config=quickstart.yaml", "--method=nola", targets, *options]) == 0
    results = run_notebook("few_shot_results")
    assert sorted(results["final"]["method"]) == ["1nn", "logistic", "nearest-mean", "nola"]
    assert len(results["differences"]) == 3  # from the best

    names = run_notebook("what_an_adapter_changed")
    model = load_adapter(names["path"])
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    model.bank.merge()
    merged = {name: tensor - before[name] for name, tensor in model.backbone.state_dict().items()}
    relative = names["by_layer"]
    assert relative.shape == (6, 4)
    for layer in range(6):
        expected = {}
        for module in ("mlp.fc1", "mlp.fc2", "attn.qkv"):
            weight = f"blocks.{layer}.{module}.weight"
            changed, own = merged[weight], before[weight]
            if module == "attn.qkv":
                assert not changed[160:320].any()
                for first in (0, 320):
                    rows = slice(first, first + 160)
                    expected[f"{module}[{first}:{first + 160}]"] = (changed[rows].norm() / own[rows].norm()).item()
            else:
                expected[module] = (changed.norm() / own.norm()).item()
        assert min(expected.values()) > 0
        assert relative.loc[f"blocks.{layer}"].to_dict() == pytest.approx(expected, rel=1e-3)
    (trained,) = [row for row in names["rows"] if row.method == "nola"]
    assert sum(len(n) for factors in names["groups"].values() for n in factors.values()) == trained.adapter_parameters
    spectra = names["spectra"]  # of rank 4
    assert spectra.shape[1] == 4 and (spectra.loc[1] == 1).all()
    assert (spectra.loc[4] > 1e-3).all() and (spectra.loc[5:].fillna(0) < 1e-5).all(axis=None)


def test_the_coverage_notebook_runs() -> None:
    names = run_notebook("coverage", SIDES=(8, 16), SIZES=[10, 20, 50, 100])
    table = names["table"]
    assert table["pranc d=16"].tolist() == [n / 256 for n in (10, 20, 50, 100)]
    assert table["pranc d=8"].tolist() == [10 / 64, 20 / 64, 50 / 64, 1]
    assert (table["nola d=16"] > table["pranc d=16"]).all() and table["nola d=16"].iloc[3] == 1
    assert {line.get_label(): line.get_ydata().tolist() for line in names["axes"].lines} == table.to_dict("list")
