"""Statistics against numbers worked out by hand, and the tables that show them."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from nola_vision.cli.main import main
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.text import csv_cell
from nola_vision.reports.cell import Cell, cell_of, measured_cells, report_of
from nola_vision.reports.description import cell_facts, how_measured
from nola_vision.reports.entries import summarise
from nola_vision.reports.frames import frame, text_frame
from nola_vision.reports.html.page import html_page
from nola_vision.reports.markup import latex_table, markdown_table
from nola_vision.reports.plots import cell_plots
from nola_vision.reports.statistics import mean_std, on_the_same_images, paired_difference, variance_parts
from nola_vision.reports.terminal import cell_report, cell_table, row_panel
from nola_vision.runs import run_id, store
from nola_vision.runs.config_files import load_config
from nola_vision.runs.published import published_figures
from nola_vision.runs.record import Row, count_once

CELL = "tag-digits-5shot-quickstart"


CONFIG = {"model": {"backbone": {"tag": "b"}, "method": {"class_path": "NOLA"}}, "data": {"dataset": "digits"}}

SCALED = {**CONFIG, "model": {**CONFIG["model"], "method": {"class_path": "NOLA", "init_args": {"c": 16.0}}}}


def row(method: str = "nola", accuracy: float | None = 0.5, **columns: Any) -> Row:
    columns = {"split": 0, "init": 0, "entry_hash": "e" * 10, "method_class": "NOLA", "status": "completed"} | columns
    split, init = columns["split"], columns["init"]
    unique = f"{method}-{columns['entry_hash']}-{split}-{init}"
    return Row(
        **{"stage": "final", "cell": CELL, "run_hash": unique, "config": CONFIG, "basis_seed": init} | columns,
        method=method,
        split_seed=split,
        run_seed=init,
        test_accuracy=accuracy,
    )


def text_of(thing: RenderableType, width: int = 140) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(thing)
    return capture.get()


def test_runs_that_differ_in_more_than_their_method_are_named() -> None:
    short, longer = ({**CONFIG, "trainer": {"max_epochs": epochs}} for epochs in (3, 9))
    other_method = {**CONFIG, "model": {**CONFIG["model"], "run_seed": 1, "method": {"class_path": "LoRA"}}}
    assert "compare with care" not in text_of(cell_table(cell_of([row(), row("lora", config=other_method)], CELL)))
    table = text_of(cell_table(cell_of([row(config=short), row("lora", config=longer)], CELL)))
    assert "compare with care: trainer.max_epochs" in " ".join(table.split())


def test_mean_and_std_by_hand() -> None:
    # mean (70 + 72 + 77) / 3 = 73, squared distances 9 + 1 + 16 = 26, divided by n = 3
    assert mean_std([70.0, 72.0, 77.0]) == (73.0, pytest.approx(math.sqrt(26 / 3), abs=1e-12))
    values = [61.3, 64.9, 66.0, 70.2]
    assert mean_std(values) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=0)))
    assert mean_std(values)[1] != pytest.approx(np.std(values, ddof=1))
    assert mean_std([88.5]) == (88.5, 0.0)


def test_variance_parts_by_hand() -> None:
    # splits (1, 3) and (5, 7): means 2 and 6 around 4, so 4 between them, and 1 within each; in all 5
    assert variance_parts({0: [1.0, 3.0], 1: [5.0, 7.0]}) == (2.0, 1.0)
    assert variance_parts({0: [1.0], 1: [5.0]}) == (2.0, None)
    uneven = {0: [61.3, 64.9, 66.0], 1: [70.2], 4: [66.6, 60.1]}
    every = np.concatenate(list(uneven.values()))
    between, within = variance_parts(uneven)
    assert between**2 + (within or 0) ** 2 == pytest.approx(np.var(every), abs=1e-12)
    within_each = np.average([np.var(group) for group in uneven.values()], weights=[3, 1, 2])
    assert within == pytest.approx(math.sqrt(within_each), abs=1e-12)


def grid(method: str, points: list[list[float | None]], **columns: Any) -> list[Row]:
    """Rows of an entry whose accuracies are given in per cent, a list a split; None for a run that failed."""
    return [
        row(method, None if value is None else value / 100, split=split, init=init,
            status="failed" if value is None else "completed", **columns)
        for split, inits in enumerate(points)
        for init, value in enumerate(inits)
    ]  # fmt: skip


def test_paired_differences_by_hand() -> None:
    one = grid("nola", [[70, 72], [80, 82], [75, 71]])
    other = grid("lora", [[71, 71], [78, None], [75, 75]])
    found = paired_difference(one, other)
    # by split: 71 - 71; of the init that both have 80 - 78; 73 - 75
    assert found is not None and found.splits == 3 and found.mean == pytest.approx(0, abs=1e-9)
    # std (ddof 1) 2, so 4.3027 * 2 / sqrt(3) with 2 degrees of freedom
    assert (found.low, found.high) == (pytest.approx(-4.968, abs=1e-3), pytest.approx(4.968, abs=1e-3))
    assert not found.shown
    shifted = paired_difference(grid("a", [[70], [71], [75], [72.5]]), grid("b", [[69], [69.5], [72], [70]]))
    expected = scipy.stats.ttest_1samp([1.0, 1.5, 3.0, 2.5], 0).confidence_interval(0.95)
    assert shifted is not None and shifted.shown and shifted.splits == 4
    assert (shifted.low, shifted.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    for no_spread in (paired_difference(one, one), paired_difference(one[:4], other[:4])):  # equal; two splits
        assert no_spread is not None and (no_spread.low, no_spread.high, no_spread.shown) == (None, None, False)
    assert found == paired_difference(one[::-1], other[::-1])
    assert (paired_difference(other, one) or found).mean == pytest.approx(0, abs=1e-9)


def test_paired_differences_with_one_nn_and_of_what_does_not_meet() -> None:
    neighbour = [row("1nn", 0.6, init=None), row("1nn", 0.7, init=None, split=1)]
    found = paired_difference(grid("nola", [[70, 72], [69]]), neighbour)
    assert found is not None and found.mean == pytest.approx((11 - 1) / 2)
    assert paired_difference(neighbour, grid("nola", [[], [], [70]])) is None
    single = paired_difference(grid("a", [[70, 72]]), grid("b", [[70, 71]]))
    assert single is not None and (single.low, single.high) == (None, None) and single.mean == pytest.approx(0.5)


def test_the_second_table_says_where_the_spread_comes_from() -> None:
    rows = [
        *grid("nola", [[70, 72], [80, 82], [75, 77]]),
        *grid("lora", [[71, 71], [78, 78], [77, 77]], method_class="LoRA"),
        *grid("nola-big", [[71], [79]]),
        row("nola-small", 0.69),
    ]
    results, comparison = cell_of(rows, CELL).tables
    assert [[cell.text for cell in line] for line in comparison.lines] == [
        ["lora", "-0.7 [-5.8, +4.5]", "3", "3.1", "0.0"],
        ["nola", "-", "-", "4.1", "1.0"],
        ["nola-big", "0.0", "2", "4.0", "-"],
        ["nola-small", "-1.0", "1", "-", "-"],
    ]
    assert comparison.columns[1] == "difference to nola (95 % CI)" and len(comparison.notes) == 1
    assert cell_of([*rows[:4], *grid("nola-big", [[70], [80]])], CELL).tables[1].columns[1] == "difference to nola"
    for table in (results, comparison):
        assert len(table.column_help) == len(table.columns) and all(table.column_help)
    # one lucky run is not what the others are compared with
    lucky, compared = cell_of([*rows, row("nola-lucky", 0.99)], CELL).tables
    assert compared.columns == comparison.columns and compared.lines[0] == comparison.lines[0]
    assert {line[0].text: line[3].mark for line in lucky.lines} == {
        **{line[0].text: line[3].mark for line in results.lines},
        "nola-lucky": "plain",
    }
    assert "best of those with at least 3 splits in bold" in lucky.notes[0]
    assert len(cell_of([row()], CELL).tables) == 1


def test_the_papers_figure_stands_beside_with_its_doubts() -> None:
    shipped = load_config("vitb_cifar10_5shot")

    def rows(name: str, called: str = "", **changes: Any) -> list[Row]:
        config = run_id.resolve(shipped, name)
        config["model"]["backbone"] |= {"base": "pretrained", **changes}
        return grid(called or name, [[70, 72]], config=config, method_class=run_id.method_class(config))

    comparison = cell_of([*rows("nola-qv"), *rows("nola-mlp"), *rows("lora-r4", "mine")], CELL).tables[1]
    printed = {line[0].text: line[-1].text for line in comparison.lines}
    assert printed["nola-qv"] == "87.0 (0.9)" and printed["mine"] == "-"
    assert any(note.startswith("published nola-qv: ") and "read as ViT-B" in note for note in comparison.notes)
    for others in (rows("nola-mlp", base="random"), rows("lora-r4", "nola-mlp"), rows("nola-mlp", tag="vit_tiny")):
        assert "paper" not in cell_of(others, CELL).tables[1].columns[-1]


def test_latex_is_escaped_and_balanced() -> None:
    text = latex_table(cell_of([row("a_b & 50%", 0.801), row("c", 0.795), row("c", 0.795, split=1)], CELL))
    assert r"top-1 \% & n" in text
    assert r"a\_b \& 50\%" in text and r"\textbf{80.1}" in text and r"\underline{79.5 (0.0)}" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 4
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") + 1 for line in lines} == {7, 5}
    assert text.count(r"\begin{tabular}{lrrrrrr}") == text.count(r"\begin{tabular}{lrrrr}") == 1


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex (apt-get install texlive-latex-base)")
def test_latex_compiles(tmp_path: Path) -> None:
    body = latex_table(cell_of([*ROWS, *grid("a_b & 50% {é} ~^#$", [[70, 72], [80, 82]])], CELL))
    head = r"\documentclass{article}\usepackage{booktabs}"
    (tmp_path / "t.tex").write_text(rf"{head}\begin{{document}}{body}\end{{document}}")
    ended = subprocess.run(
        ["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert ended.returncode == 0 and (tmp_path / "t.pdf").stat().st_size > 5000, ended.stdout[-2000:]


def test_a_summary_is_over_completed_final_runs() -> None:
    rows = [
        row(accuracy=0.70, adapter_parameters=100, other_parameters=7, head_parameters=640, adapter_file_bytes=900),
        row(accuracy=0.72, split=1, learning_rate=0.005),
        row(accuracy=0.77, split=2),
        row(accuracy=None, split=3),
        row(accuracy=0.01, split=4, status="failed"),
        row(accuracy=0.02, split=5, status="interrupted"),
        row(accuracy=0.99, split=6, stage="search"),
    ]
    (summary,) = summarise(rows)
    assert summary.mean == pytest.approx(73) and summary.std == pytest.approx(math.sqrt(26 / 3))
    assert (summary.completed, summary.failed, summary.interrupted, summary.untested) == (3, 1, 1, 1)
    assert (summary.trainable_parameters, summary.adapter_file_bytes, summary.learning_rate) == (107, 900, 0.005)
    assert summary.label == "nola"


def test_an_entry_that_only_failed_has_no_mean() -> None:
    (summary,) = summarise([row(accuracy=None, status="failed")])
    assert (summary.completed, summary.failed, summary.mean, summary.std) == (0, 1, None, None)


def test_cells_are_kept_apart() -> None:
    summaries = summarise([row(accuracy=0.5), row(accuracy=0.7, cell="another")])
    assert [(item.cell, item.completed) for item in summaries] == [("another", 1), (CELL, 1)]


def with_settings(method: dict[str, Any], **sections: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG) | sections
    config["model"]["method"]["init_args"] = method
    return config


def test_a_label_names_the_settings_that_differ() -> None:
    def labels(*configs: dict[str, Any]) -> list[str]:
        rows = [row(config=config, entry_hash=f"{n}" * 10) for n, config in enumerate(configs)]
        return [item.label for item in summarise(rows)]

    one, other = {"rank": 4, "lr": 0.005, "targets": ["qkv"]}, {"rank": 8, "lr": 0.005, "targets": ["qkv"]}
    assert labels(with_settings(one), with_settings(other)) == ["nola (rank=4)", "nola (rank=8)"]
    both = {**other, "lr": 1e-3, "targets": ["qkv", "mlp"]}
    assert labels(with_settings(one), with_settings(both)) == [
        "nola (rank=4, lr=0.005, ...)",
        "nola (rank=8, lr=0.001, ...)",
    ]
    assert labels(with_settings({"targets": ["qkv"]}), with_settings({"targets": ["qkv", "mlp"]})) == [
        "nola (targets=qkv)",
        "nola (targets=qkv+mlp)",
    ]
    # the trainer's, which an older row may lack, and one key in two places
    longer = with_settings(one, trainer={"max_epochs": 9})
    assert labels(with_settings(one), longer) == ["nola (max_epochs=null)", "nola (max_epochs=9)"]
    twice = with_settings({"rank": 1}, trainer={"rank": 1})
    assert labels(twice, with_settings({"rank": 2}, trainer={"rank": 2})) == [
        "nola (model.method.init_args.rank=1, trainer.rank=1)",
        "nola (model.method.init_args.rank=2, trainer.rank=2)",
    ]
    # where the first two settings do not tell three entries apart, the digits do
    third = with_settings({**both, "targets": ["mlp"]})
    assert labels(with_settings(one), with_settings(both), third)[1:] == [
        "nola (rank=8, lr=0.001, ..., 1111)",
        "nola (rank=8, lr=0.001, ..., 2222)",
    ]
    long = with_settings({"x": "y" * 99, "z": None}), with_settings({"x": "w", "z": True})
    assert labels(*long) == [f"nola (x={'y' * 21}..., z=null)", "nola (x=w, z=true)"]


def test_one_name_with_two_settings_is_two_lines() -> None:
    rows = [row(entry_hash="ab12000000"), row(entry_hash="cd34000000"), row(entry_hash="ab12000000", split=1)]
    summaries = summarise([*rows, row(method="lora")])
    assert [(item.label, item.completed) for item in summaries] == [
        ("lora", 1),
        ("nola", 2),  # with more splits
        ("nola (cd34)", 1),
    ]
    both = summarise([*rows, row(entry_hash="cd34000000", split=1)])
    assert [item.label for item in both] == ["nola (ab12)", "nola (cd34)"]


def test_a_run_in_two_folders_counts_once_the_newest() -> None:
    old = row(accuracy=0.4, started="2026-01-01T10:00:00+00:00")
    new = row(accuracy=0.6, started="2026-01-02T10:00:00+00:00")
    other = row(accuracy=0.8, split=1, started="2026-01-01T00:00:00+00:00")
    for order in ([old, new, other], [new, old, other], [other, new, old]):
        assert sorted(found.test_accuracy or 0 for found in count_once(order)) == [0.6, 0.8]
        (summary,) = summarise(order)
        assert (summary.completed, summary.mean) == (2, pytest.approx(70))


ROWS = [
    row("other", 0.30, method_class="PRANC"),
    row("nola", 0.805, adapter_parameters=24552, adapter_file_bytes=98612, learning_rate=0.005, config=SCALED),
    row("nola", 0.795, split=1),
    row("nola-big", 0.801, adapter_file_bytes=3 * 2**20),
    row("lora", 0.790, method_class="LoRA"),
    row("lora", None, method_class="LoRA", status="failed", split=1),
    row("lora", None, method_class="LoRA", status="interrupted", split=2),
    row("full", 0.789, method_class="FullFinetune"),
    row("linear", 0.75, method_class="LinearProbe", adapter_parameters=0, adapter_file_bytes=800),
    row("nn1", 0.70, method_class="NearestNeighbor", init=None),
    row("elsewhere", 0.99, cell="another"),
]


def test_runs_on_other_versions_of_the_images_are_left_out() -> None:
    """After an image was removed, the old adapter's accuracy stands in no table next to the new baselines'."""
    old, new = ({**CONFIG, "content": {"data": digest}} for digest in ("old", "new"))
    first = [row("nola", 0.9, config=old, started="2026-01-01T10:00:00+00:00", run_hash="o")]
    second = [
        row("nola", 0.5, config=new, started="2026-01-02T10:00:00+00:00"),
        row("logistic", 0.6, config=new, started="2026-01-02T09:00:00+00:00", method_class="LogisticRegression"),
    ]
    failed = [row("lora", None, config=old, status="failed", started="2026-01-03T10:00:00+00:00")]
    others = [row("nola", 0.3, cell="another")]
    kept, notes = on_the_same_images([*first, *second, *failed, *others])
    assert kept == [*second, *others] and notes == [
        f"{CELL}: 2 runs on other versions of the images left out; `report --format csv` lists them"
    ]
    assert on_the_same_images([*first, *second], like=first[0])[0] == first
    assert on_the_same_images(others) == (others, [])


def test_markdown_table() -> None:
    best, close = "**80.1**", "<u>80.0 (0.5)</u>"
    text = re.sub(" +", " ", markdown_table(cell_of(ROWS, CELL)))  # without the padding of columns
    lines = re.sub("-+(?=[:|])", "-", text).split("\n\n### Differences")[0].splitlines()
    assert [line for line in lines if "have no row" not in line] == [
        "## digits: b",
        "",
        "### Results",
        "",
        "| method | trainable | file, bytes | top-1 % | n | lr | c |",
        "|:-|-:|-:|-:|-:|-:|-:|",
        "| nn1 | - | - | 70.0 | 1 | - | - |",
        "| linear | 0 | 800 | 75.0 | 1 | - | - |",
        "| full | - | - | 78.9 | 1 | - | - |",
        "| lora | - | - | 79.0 | 1 | - | - |",
        f"| nola | 24,552 | 98,612 | {close} | 2 | 0.005 | 16 |",
        f"| nola-big | - | 3,145,728 | {best} | 1 | - | - |",
        "| other | - | - | 30.0 | 1 | - | - |",
        "",
        "- mean (std) over n runs; best in bold, within 1 point underlined",
        "- lora: 1 failed, 1 interrupted, not in its mean; the last failure: unknown",
    ]


def test_what_is_not_in_a_mean_is_said_beneath() -> None:
    failed = {"accuracy": None, "status": "failed"}
    rows = [
        *grid("a", [[70, 72], [80, 82]]),
        *grid("b", [[70, 72]]),
        row("b", split=1, init=0, started="1", error="it ran out of memory", **failed),
        row("b", split=1, init=1, started="2", error="the loss is" + " no number" * 30, **failed),
        *grid("c", [[70], [80]]),
        row("1nn", init=None),
        row("late", split=1, init=0, error="no room", **failed),
        row("late", split=1, init=0, entry_hash="f" * 10, accuracy=None, status="interrupted"),
    ]
    assert list(cell_of(rows, CELL).tables[0].notes[1:]) == [
        "b: 2 failed, not in its mean; the last failure: the loss is" + " no number" * 18 + " no [...]",
        "late: none of its runs (1) was completed; the last failure: no room",
        "late: none of its runs (1) was completed",
        "1nn: 1 of 2 runs have no row (splits x inits of the others)",
        "c: 2 of 4 runs have no row (splits x inits of the others)",
    ]


ESTIMATE = {"repeats": 1, "images": 100, "correct": 71, "low": 0.61, "high": 0.79, "untested_classes": []}


def test_folds_count_where_there_is_no_test_set() -> None:
    folded = row("nola", None, estimate={**ESTIMATE, "folds": [0.60, 0.75, 0.78]}, data={"majority_share": 0.5})
    nearest = row("1nn", None, init=None, method_class="NearestNeighbor", data={"majority_share": 0.5},
                  estimate={**ESTIMATE, "folds": [0.4, 0.5, 0.5]})  # fmt: skip
    item = {item.method: item for item in summarise([folded, nearest])}["nola"]
    assert (item.completed, item.n, item.untested, item.cross_validated) == (1, 3, 0, True)
    assert item.mean == pytest.approx(71) and item.std == pytest.approx(np.std([60, 75, 78]))
    assert item.interval is None and item.split_std is None
    (results,) = cell_of([folded, nearest], CELL).tables
    assert [[cell.text for cell in line] for line in results.lines] == [
        ["1nn", "-", "-", "46.7 (4.7)", "3", "-", "-"],
        ["nola", "-", "-", "71.0 (7.9)", "3", "-", "-"],
    ]
    assert list(results.notes) == ["mean (std) over n folds; chance 50.0 %; best in bold, within 1 point underlined"]
    found = paired_difference([folded], [nearest])
    assert found is not None and found.mean == pytest.approx(71 - 140 / 3)
    # other splits divide the same images, so they give no interval
    rows = [dataclasses.replace(one, split=split, run_hash=f"{one.method}{split}",
                                estimate=one.estimate and {**one.estimate, "folds": [0.1 * split, 0.5, 0.5]}
                                if one is folded else one.estimate)
            for one in (folded, nearest) for split in range(4)]  # fmt: skip
    several = paired_difference(rows[:4], rows[4:])
    assert several is not None and (several.low, several.high, several.splits, several.shown) == (None, None, 4, False)
    comparison = cell_of(rows, CELL).tables[1]
    assert comparison.columns[1] == "difference to 1nn" and "divide the same images" in comparison.notes[0]
    skipped = row("nola", None, data={"folds": 5})
    assert "nola: 1 whose folds were not run, not in its mean" in cell_of([skipped, nearest], CELL).tables[0].notes
    assert "71.0 % (7.9), mean and std of 3 folds" in text_of(row_panel(folded))
    mixed = cell_of([folded, row("lora", 0.8), row("lora", 0.8, split=1)], CELL).tables[0]
    assert mixed.notes[0].startswith("mean (std) over n runs or folds; folds: nola; chance 50.0 %; best")


def test_one_test_set_has_wilsons_interval() -> None:
    data = {"counts": {"train": 50, "test": 81}, "majority_share": 0.1}
    rows = [row("nola", 65 / 81, data=data), row("lora", 0.7, data=data), row("lora", 0.8, split=1, data=data)]
    expected = scipy.stats.binomtest(65, 81).proportion_ci(method="wilson")
    accuracies = {line[0].text: line[3].text for line in cell_of(rows, CELL).tables[0].lines}
    assert accuracies == {
        "nola": f"80.2 [{100 * expected.low:.1f}, {100 * expected.high:.1f}]",
        "lora": "75.0 (5.0)",
    }
    note = (
        "mean (std) over n runs; one run with its 95 % interval; chance 10.0 %; best in bold, within 1 point underlined"
    )
    assert cell_of(rows, CELL).tables[0].notes[0] == note
    assert f"80.25 %, 95 % interval [{100 * expected.low:.1f}" in text_of(row_panel(rows[0]))
    part = row("nola", 0.8, data=data, config={**CONFIG, "trainer": {"limit_test_batches": 2}})
    assert summarise([part])[0].interval is None


def test_a_result_under_chance_is_not_marked() -> None:
    def marks(best: float, other: float, share: float) -> list[str]:
        rows = [row("a", best, data={"majority_share": share}), row("b", other, data={"majority_share": share})]
        return [line[3].mark for line in cell_of(rows, CELL).tables[0].lines]

    assert marks(0.42, 0.415, 0.40) == ["best", "close"]
    assert marks(0.42, 0.415, 0.418) == ["best", "plain"]
    assert marks(0.42, 0.415, 0.43) == ["plain", "plain"]
    assert marks(float(np.float32(0.7)), 0.1, 0.7) == ["best", "plain"]  # chance itself, in a row's float32


def test_heads_are_what_linear_methods_train() -> None:
    counts = {"adapter_parameters": 0, "other_parameters": 0}
    rows = [
        row("linear", method_class="LinearProbe", head_parameters=1610, **counts),
        row("1nn", method_class="NearestNeighbor", init=None, head_parameters=0, **counts),
        row("nola", adapter_parameters=24, other_parameters=0, head_parameters=1610),
    ]
    assert [line[1].text for line in cell_of(rows, CELL).tables[0].lines] == ["0", "1,610", "24"]


def test_further_metrics_by_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"balanced_accuracy": 0.7, "macro_f1": 0.65, "top5_accuracy": 0.95, "test_nll": 1.23456}
    rows = [row("nola", 0.8, **measured), row("lora", 0.7, macro_f1=0.5), row("lora", 0.7, split=1, macro_f1=0.7)]
    (table, _) = cell_of(rows, CELL, ("balanced", "f1", "top5", "nll")).tables
    assert table.columns == ("method", "trainable", "file, bytes", "top-1 %", "n",
                             "balanced %", "macro F1 %", "top-5 %", "NLL", "lr", "c")  # fmt: skip
    assert {line[0].text: [cell.text for cell in line[5:9]] for line in table.lines} == {
        "nola": ["70.0", "65.0", "95.0", "1.235"],
        "lora": ["-", "60.0 (10.0)", "-", "-"],
    }
    panel = text_of(row_panel(rows[0]))
    assert all(part in panel for part in ("balanced", "70.00 %", "macro F1", "top-5", "NLL", "1.235"))
    for number, one in enumerate(rows):
        (tmp_path / str(number)).mkdir()
        store.write_row(tmp_path / str(number), one)
    for name in ("table", "markdown", "latex"):
        out, _ = report(tmp_path, "--format", name, "--columns", "nll,f1", capsys=capsys)
        assert "1.235" in out and "macro F1" in out and "balanced" not in out, name
    assert main(["report", str(tmp_path), "--columns", "f2"]) == 2
    assert "'f2' is not a column: use some of balanced, f1, top5, nll" in capsys.readouterr().err


def test_a_table_of_a_cell_is_readable_at_80_columns() -> None:
    data = {"counts": {"test": 1000}, "majority_share": 0.1}
    rows = [row("logistic", 0.7, init=None, data=data), row("nola", 0.8123, data=data, adapter_parameters=24_552,
            adapter_file_bytes=98_612, learning_rate=0.0005)]  # fmt: skip
    rows += [row("full-ft", 0.7, data=data, adapter_parameters=303_301_632, adapter_file_bytes=1_213_206_528)]
    text = text_of(cell_table(cell_of(rows, CELL)), width=80)
    for part in ("81.2 [78.7, 83.5]", "303,301,632", "1,213,206,528", "0.0005", "logistic"):
        assert part in text


def test_exactly_one_point_is_close() -> None:
    table = markdown_table(cell_of([row("a", 0.801), row("b", 0.791), row("c", 0.790), row("d", 0.801)], CELL))
    for marked in ("**80.1**", "<u>79.1</u>", " 79.0 "):
        assert marked in table
    assert table.count("**80.1") == 2


def test_terminal_table_says_the_same() -> None:
    text = text_of(cell_table(cell_of(ROWS, CELL)))
    places = [text.index(name) for name in ("digits: b", "nn1", "linear", "full", "lora", "nola ", "nola-big", "other")]
    assert places == sorted(places)
    for part in ("24,552", "98,612", "80.0 (0.5)", "0.005", "mean (std) over n runs", "1 failed, 1 interrupted"):
        assert part in text
    assert "elsewhere" not in text


def test_terminal_table_marks_the_best_and_the_close() -> None:
    marks = [line[3].mark for line in cell_of(ROWS, CELL).tables[0].lines]
    assert marks == ["plain", "plain", "plain", "plain", "close", "best", "plain"]
    console = Console(width=140, color_system="standard", force_terminal=True)
    with console.capture() as capture:
        console.print(cell_table(cell_of(ROWS, CELL)))
    for style, text in ((1, "80.1"), (4, "80.0")):
        assert re.search(rf"\x1b\[{style}m *{text}\b", capture.get())


def test_a_narrow_terminal_loses_no_digit() -> None:
    text = text_of(cell_table(cell_of(ROWS, CELL)), width=60)
    assert "…" not in text


def test_names_are_no_markup() -> None:
    assert "[bold]x" in text_of(cell_table(cell_of([row("[bold]x")], CELL)))
    assert "a\\|b" in markdown_table(cell_of([row("a|b")], CELL))


# what a terminal, a spreadsheet, Markdown, HTML, LaTeX and rich would each act on
HARMFUL = (
    "=cmd()|`a` <script>alert(1)</script> [x](javascript:y) **b** $x^$ https://a.b \\input{/etc/passwd} [red] "
    "\x1b]0;t\x07\u202e\n# h"
)


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two good rows, one of a harmful name and error, and one that is not a row."""
    folder = tmp_path_factory.mktemp("harmed")
    rows = [
        row("fine", 0.75),
        row("fine", 0.75, split=1),
        row(HARMFUL, 0.5, run_hash="a"),
        row("f", None, status="failed", error=f"50% {HARMFUL}\\end{{table}}", run_hash="b"),
        row("f", None, cell="other", status="failed", error=HARMFUL, run_hash="c", warnings=[HARMFUL]),
        row("f", None, cell="other", status="failed", run_hash="../d"),
    ]
    for number, one in enumerate(rows):
        place = folder / f"run{number}"
        place.mkdir()
        store.write_row(place, one)
    return folder


def report(folder: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert main(["report", str(folder), *options]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_a_bad_row_is_named_beside_the_whole_table(harmed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("table", "markdown", "latex", "csv"):
        out, err = report(harmed, "--format", name, capsys=capsys)
        assert "fine" in out and ("75.0" in out or "0.75" in out), name
        (named,) = [line for line in (out + err).splitlines() if f"{harmed / 'run5' / 'row.json'}" in line]
        assert "../d" in named and named.startswith("% ") == (name == "latex"), name
        assert "\x1b" not in out and "\u202e" not in out and "\x07" not in out, name
    report(harmed, "--format", "parquet", "--out", str(harmed / "rows.parquet"), capsys=capsys)
    assert list(pd.read_parquet(harmed / "rows.parquet")["method"]) == ["fine", "fine", HARMFUL, "f", "f"]  # as it is


def test_no_format_acts_on_a_name(harmed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = report(harmed, "--format", "latex", capsys=capsys)
    inside, _, footer = out.rpartition(r"\end{table}")
    assert all(line.startswith("% ") for line in footer.strip().splitlines()) and "input" in footer
    assert not re.search(r"\\input|(?<!\\)[$#]|(?m:^\s*[\[*])", inside) and r"\textbackslash{}input\{/etc" in inside
    assert out.count(r"\begin{") == out.count(r"\end{") == 4
    assert "\n{[}x{]} & " in latex_table(cell_of([row("[x]")], CELL))  # else an argument of the line break before it

    out, _ = report(harmed, "--format", "markdown", capsys=capsys)
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {8, 6}
    for syntax in ("`a`", "<script", "[x]", "**b", "$x", "://a"):
        assert not re.search(rf"(?<!\\){re.escape(syntax)}", out), syntax
    assert not re.search("(?m)^# h", out) and "- other: no completed final run" in out

    out, _ = report(harmed, "--format", "csv", capsys=capsys)
    table = pd.read_csv(io.StringIO(out))
    assert len(table) == 5 and table["method"][2].startswith("'=cmd()|`a`")

    report(harmed, "--html", str(harmed / "p.html"), "--plots", str(harmed / "plots"), capsys=capsys)
    page = (harmed / "p.html").read_text()
    assert page.count("<script") == 1 and "&lt;script&gt;" in page and "\x1b" not in page and "run5/row.json" in page
    assert {path.name for path in (harmed / "plots").iterdir()} == {f"{CELL}-by-split.png"}
    assert "[red]" in text_of(row_panel(row(HARMFUL))) and "\x1b" not in text_of(row_panel(row(HARMFUL)))


def test_a_column_is_no_formula_either() -> None:
    table = text_frame([row(config={**CONFIG, "=1+1": -1, "x": "-1", "y": "-a"})], csv_cell)
    assert table["config.=1+1"].tolist() == [-1] and table["config.x"].tolist() == ["-1"]
    assert table["config.y"].tolist() == ["'-a"]
    assert next(iter(text_frame([row(config={**CONFIG})], lambda text: f"={text}"))) == "=status"


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([2**63, 10**30, -1, 7]) | st.floats() | st.text()
    | st.sampled_from(["\ud800", "../x", "=1+1", "$_$", "a\x1b\n|", "2026-01-01T10:00:00+00:00", "folder", "x" * 999]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
VALID = json.loads(
    dataclasses.replace(
        row(
            started="2026-01-01T10:00:00+00:00", error="e", warnings=["w"], versions={"torch": "2"}, git={"dirty": True}
        ),
        config={
            **run_id.resolve(load_config("vitb_cifar10_5shot"), "nola-mlp"),
            "data": {"dataset": "cifar10", "shots": 5, "root": "data"},
            "trainer": {"max_epochs": 3, "callbacks": [{"class_path": "RichProgressBar", "init_args": {"a": 1}}]},
        },
    ).to_json()
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in nested values with each of its keys or indices."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    return [(value, key) for key, _ in items] + [place for _, item in items for place in places(item)]


def test_any_row_is_refused_in_one_line_or_shown_by_everything() -> None:
    accepted: list[Row] = []

    @settings(max_examples=120, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        plain = copy.deepcopy(VALID)
        for _ in range(data.draw(st.integers(1, 2))):
            container, key = data.draw(st.sampled_from(places(plain)))
            action = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if action == "replace":
                container[key] = data.draw(ANY_JSON)
            elif action == "add" and isinstance(container, dict):
                container[data.draw(st.text(max_size=5))] = data.draw(ANY_JSON)
            else:
                del container[key]
        try:
            read = Row.from_json(json.dumps(plain), Path("/runs/row.json"))
        except NolaVisionError as error:
            assert (
                str(error).startswith("/runs/row.json ") and len(str(error).splitlines()) == 1 and len(str(error)) < 300
            )
            return
        accepted.append(read)
        rows = [row("other", 0.6, cell=read.cell), read, row("nola", 0.4, cell=read.cell, split=1)]
        tested, _ = measured_cells(rows)
        for cell in tested:
            assert text_of(cell_report(cell_of(rows, cell))) and how_measured(rows) and cell_facts(rows)
            assert markdown_table(cell_of(rows, cell)) and latex_table(cell_of(rows, cell))
        assert text_of(row_panel(read)) and Row.from_json(read.to_json(), Path("row.json")) == read

    check()
    assert len(accepted) > 20
    together = [dataclasses.replace(one, cell=CELL) for one in accepted]
    text_frame(together, csv_cell).to_csv(index=False).encode()
    frame(together).to_parquet(index=False)
    html_page(report_of(together)).text.encode()
    cell_plots(Cell(CELL, together))


def test_a_cell_without_final_runs_says_so() -> None:
    assert "no final run has finished yet" in markdown_table(cell_of([row(stage="search")], CELL))
    assert "no final run has finished yet" in text_of(cell_table(cell_of([], CELL)))


def test_row_panel() -> None:
    made = row(
        accuracy=0.8125, status="failed", error="it broke [here]", init=3, seconds_total=12.34, warnings=["small"]
    )
    text = text_of(row_panel(made))
    for part in (CELL, "nola (NOLA), split 0, init 3, final", "failed: it broke [here]", "81.25 %", "12.3", "small"):
        assert part in text
    assert "init" not in text_of(row_panel(row("nn1", init=None)))
    assert "98.6 KB (98,612 bytes)" in text_of(row_panel(row(adapter_file_bytes=98_612)))


def test_frame_is_flat(tmp_path: Path) -> None:
    config = {"model": {"run_seed": 2**60 + 1}, "list": [1, 2]}
    made = row(accuracy=0.5, config=config, versions={"torch": "2"}, threads=2)
    table = frame([made, row(init=None, accuracy=None)])
    assert table.loc[0, "config.model.run_seed"] == 2**60 + 1  # not by way of a float
    assert table.loc[0, "config.list"] == "[1, 2]"
    assert table.loc[0, "versions.torch"] == "2"
    assert table["test_accuracy"].isna().tolist() == [False, True]
    table.to_csv(tmp_path / "rows.csv", index=False)
    header, first, second = (tmp_path / "rows.csv").read_text().splitlines()
    init = header.split(",").index("init")
    assert (first.split(",")[init], second.split(",")[init]) == ("0", "")  # whole numbers stay whole beside a gap


def test_frame_without_rows_has_the_columns() -> None:
    assert set(frame([]).columns) == {item.name for item in dataclasses.fields(Row)} - {"folder"}


def test_published_figures() -> None:
    figures = published_figures()
    assert sorted(figures["table"].unique()) == [6, 7, 8, 9, 10]
    assert len(figures) == 248 + 9
    few = figures[(figures.table == 6) & (figures.backbone == "ViT-B") & (figures.method == "Nearest Neighbor")]
    assert few[(few.dataset == "CIFAR-100") & (few.shots == 5)]["mean"].tolist() == [52.4]
    scratch = figures[(figures.table == 8) & (figures.method == "NOLA")]
    assert scratch[["params", "mean"]].to_numpy().tolist() == [["12876", 82.4]]
    assert (figures.note != "").any() and figures.note.notna().all()
