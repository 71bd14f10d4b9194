"""Pictures from rows: what is drawn is what the rows say."""

import os
import re
import warnings
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

from nola_vision.cli.main import main
from nola_vision.results import store
from nola_vision.results.confusion import confusion_csv, entry_confusions
from nola_vision.results.page import html_page
from nola_vision.results.plots import (
    _drawing,
    accuracy_over,
    cell_plots,
    class_differences_plot,
    confusion_plot,
    entry_curves,
    learning_curves,
    write_plots,
)
from nola_vision.results.row import Row
from test_tables import CELL, grid, row

ROWS = [
    *grid("nola", [[70, 72], [80, 82]], adapter_file_bytes=900, adapter_parameters=640),
    *grid("lora", [[71, 71], [78, 78]], method_class="LoRA", adapter_file_bytes=5000, adapter_parameters=3000),
    row("1nn", 0.6, init=None, method_class="NearestNeighbor"),
    row("nola", 0.1, cell="another", split=7, adapter_file_bytes=1),
]


def placed(folder: Path) -> list[Row]:
    """The rows, each with a folder that exists."""
    rows = [replace(one, folder=folder / str(number)) for number, one in enumerate(ROWS)]
    for one in rows:
        one.folder.mkdir()
    return rows


@pytest.mark.parametrize(
    ("size", "costs"), [("adapter_file_bytes", [5000, 900]), ("trainable_parameters", [3000, 640])]
)
def test_accuracy_over_cost(size, costs: list[int]) -> None:
    (axes,) = accuracy_over(ROWS, CELL, size).axes
    points = [tuple(container.lines[0].get_xydata()[0]) for container in axes.containers]
    assert points == [(costs[0], pytest.approx(74.5)), (costs[1], pytest.approx(76))]
    spreads = [container.lines[2][0].get_segments()[0][:, 1].tolist() for container in axes.containers]
    assert spreads == [pytest.approx([71, 78]), pytest.approx([76 - 26**0.5, 76 + 26**0.5])]
    (legend,) = axes.figure.legends
    assert {text.get_text().partition(" (")[0] for text in legend.get_texts()} == {"1nn", "lora", "nola"}
    assert axes.get_xscale() == "log"


def test_learning_curves_are_the_mean_over_runs(tmp_path: Path) -> None:
    rows = placed(tmp_path)
    for number, one in enumerate(r for r in rows if r.method == "nola" and r.cell == CELL):
        (one.folder / "metrics.csv").write_text(
            "epoch,step,train_loss,val_loss\n" + f"0,0,{2 + number},\n0,1,{4 + number},\n0,1,,9\n1,2,{number},\n"
        )
    curves, problems = entry_curves(rows, CELL)
    (axes,) = learning_curves(curves, CELL).axes
    assert problems == []
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[1, 4.5], [2, 1.5]] and line.get_label() == "nola (4)"


def test_confusions_by_class(tmp_path: Path) -> None:
    """Two runs of nola, one of lora: nola is right for 3 of 4 cats and 2 of 4 dogs, lora for all cats and no dog."""
    counts = {"nola": [[[2, 0], [1, 1]], [[1, 1], [1, 1]]], "lora": [[[2, 0], [2, 0]]]}
    rows = placed(tmp_path)
    for method, matrices in counts.items():
        for one, matrix in zip((r for r in rows if r.method == method and r.cell == CELL), matrices, strict=False):
            text = confusion_csv(np.array(matrix), ["cat, tabby", "dog"])
            (one.folder / "confusion.csv").write_text(text)
    confusions, problems = entry_confusions(rows, CELL)
    assert problems == [] and entry_confusions(rows, "another") == ({}, [])
    figure = class_differences_plot(confusions, rows, CELL)
    assert figure is not None
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[25, -50]]  # nola has the better mean in ROWS
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["cat, tabby", "dog"]
    assert [text.get_text() for text in axes.texts] == ["+25.0", "-50.0"]
    matrices = confusion_plot(confusions, CELL)
    assert matrices is not None
    shares = {axes.get_title(): axes.images[0].get_array().tolist() for axes in matrices.axes[:2]}
    assert shares == {"lora": [[100, 0], [100, 0]], "nola": [[75, 25], [50, 50]]}
    assert class_differences_plot({}, rows, CELL) is None and confusion_plot({}, CELL) is None


NAMES = ["$_$", "$x^$", "$100%$", "\\frac", "_", "%", "\u65e5\U0001f600", "a\nb\x1b[31m", "x" * 90 + "end"]


def test_names_are_plain_text_whatever_they_contain() -> None:
    """Neither mathtext nor TeX reads them, and a letter that the font lacks costs no warning."""
    square = pd.DataFrame(np.eye(9, dtype="int64"), index=NAMES, columns=NAMES)
    rows = [row("$_$", 0.5, adapter_file_bytes=900), row("_hidden", 0.6, adapter_file_bytes=1000)]
    with warnings.catch_warnings(), matplotlib.rc_context({"text.usetex": True}):
        warnings.simplefilter("error")
        plots = cell_plots(rows, CELL)[0]
        matrices = confusion_plot({"$x^$": {0: square}}, CELL)
        with _drawing():
            matrices.savefig(os.devnull, format="png")
            differences = class_differences_plot({"$_$": {0: square}, "_hidden": {0: square}}, rows, CELL)
            differences.savefig(os.devnull, format="png")
    assert all(content.startswith(b"\x89PNG") for content in plots.values())
    shown = [*NAMES[:7], "a\\nb\\x1b[31m", "x" * 13 + "…xxend"]
    assert [tick.get_text() for tick in matrices.axes[0].get_xticklabels()] == shown
    assert [tick.get_text() for tick in differences.axes[0].get_xticklabels()] == shown
    assert matrices.axes[0].get_title() == "$x^$"
    figure = accuracy_over(rows, CELL, "adapter_file_bytes")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["$_$ (1)", " _hidden (1)"]
    ticks = [*figure.axes[0].get_xticklabels(which="both"), *figure.axes[0].get_yticklabels()]
    assert any(tick.get_text() for tick in ticks) and not any("$" in tick.get_text() for tick in ticks)


UNUSABLE = {
    "metrics.csv": [
        b"garbage\x00\n",
        b"epoch,train_loss\n0,high\n",
        b"epoch,train_loss\n0.5,2\n",
        b"epoch,train_loss\n-1,2\n",
        b"epoch,train_loss\n1e300,2\n",
        b"epoch,train_loss" + b"," * 10_000 + b"\n0,1",
        b"epoch,train_loss\n0,\xff\n",
    ],
    "confusion.csv": [b"garbage", b"true,predicted,count\na,a,-1\n", b"true,predicted,count\nz,z,1\n"],
}


def test_unusable_files_are_named_and_the_others_drawn(tmp_path: Path) -> None:
    contents = [(name, content) for name, of_name in UNUSABLE.items() for content in of_name]
    rows = [row("nola", 0.5, split=split, folder=tmp_path / str(split)) for split in range(len(contents) + 2)]
    for one in rows:
        one.folder.mkdir()
        (one.folder / "metrics.csv").write_text("epoch,train_loss\n0,2\n0,inf\n1,1\n1,")  # as a killed run leaves it
        (one.folder / "confusion.csv").write_text("true,predicted,count\na,a,3\nb,b,4\n")
    for one, (name, content) in zip(rows[1:], contents, strict=False):
        (one.folder / name).write_bytes(content)
    (rows[-1].folder / "metrics.csv").unlink()
    (rows[-1].folder / "confusion.csv").unlink()
    os.mkfifo(rows[-1].folder / "metrics.csv")
    (rows[-1].folder / "confusion.csv").symlink_to("confusion.csv")
    curves, bad_logs = entry_curves(rows, CELL)
    confusions, bad_matrices = entry_confusions(rows, CELL)
    assert [len(bad_logs), len(bad_matrices)] == [8, 4]
    for name, problems in (("metrics.csv", bad_logs), ("confusion.csv", bad_matrices)):
        expected = [one.folder for one, content in zip(rows[1:], contents, strict=False) if content[0] == name]
        for folder, problem in zip([*expected, rows[-1].folder], problems, strict=True):
            assert problem.startswith(f"{folder / name} ") and problem.isprintable()
    assert [losses.to_dict() for losses in curves["nola"]] == [{0: 2, 1: 1}] * 4
    assert {(counts.loc["a", "a"], counts.loc["b", "b"]) for counts in confusions["nola"].values()} == {(3, 4)}
    assert len(confusions["nola"]) == len(rows) - 4
    plots, problems = cell_plots(rows, CELL)
    assert problems == [*bad_logs, *bad_matrices] and {"learning-curves", "confusions"} < set(plots)


def test_a_long_cell_makes_file_names(tmp_path: Path) -> None:
    cells = ["é" * 250 + "a", "é" * 250 + "b"]
    written = write_plots({cell: {"accuracy-over-parameters": b""} for cell in cells}, tmp_path)
    assert len({path.name for path in tmp_path.iterdir()}) == len(set(written)) == 2


def test_report_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = replace(ROWS[0], run_hash="abc")
    folder = tmp_path / "runs" / CELL / "nola" / "split0-init0-abc"
    folder.mkdir(parents=True)
    store.write_row(folder, one)
    (folder / "metrics.csv").write_text("epoch,step,train_loss\n0,0,2\n1,1,1\n")
    assert [found.folder for found in store.read_rows(tmp_path / "runs")[0]] == [folder]
    assert main(["report", str(tmp_path / "runs"), "--plots", str(tmp_path / "p")]) == 0
    names = [
        f"{one.cell}-{name}.png" for name in ("accuracy-over-bytes", "accuracy-over-parameters", "learning-curves")
    ]
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == names
    (tmp_path / "file").touch()
    assert main(["report", str(tmp_path / "runs"), "--plots", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_the_page_is_whole_and_loads_nothing() -> None:
    rows = [*ROWS, row("<b>lora & co</b>", 0.9, cell="another")]
    page = html_page(rows, {cell: cell_plots(rows, cell)[0] for cell in (CELL, "another")})
    parser = Tags()
    parser.feed(page)
    assert parser.found["h1"] == 3 and parser.found["img"] == 6 and parser.found["table"] == 2 + 1 + 1
    assert "<b>" not in page and "&lt;b&gt;lora &amp; co&lt;/b&gt;" in page
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in parser.sources)
    assert not re.search(r"<(script|link)|https?://", page)
    assert "76.0 (5.1)" in page and page.count("<tr") >= len(ROWS)


class Tags(HTMLParser):
    """Counts a page's tags, and notes what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag] += 1
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
