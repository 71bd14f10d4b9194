"""Charts from rows: what is drawn is what the rows say, its text is real, and no label hides another."""

import io
import itertools
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from PIL import Image
from scipy.optimize import minimize
from scipy.stats import binomtest

from nola_vision.cli.main import main
from nola_vision.evaluation.confusion import confusion_csv
from nola_vision.reports.cell import Cell, cell_of
from nola_vision.reports.charts.drawing import Chart, plain_text
from nola_vision.reports.charts.labels import short_names, spread
from nola_vision.reports.charts.learning_curves import entry_curves
from nola_vision.reports.charts.looks import CSS_COLOURS, DARK_COLOURS, INK, MUTED, PALETTE, PAPER, entry_looks
from nola_vision.reports.charts.matrices import class_differences_plot, confusion_plot
from nola_vision.reports.charts.pareto import pareto_chart, pareto_front, size_ticks
from nola_vision.reports.charts.splits import split_chart
from nola_vision.reports.confusion import entry_confusions
from nola_vision.reports.entries import entries, summarise
from nola_vision.reports.formatting import bytes_text
from nola_vision.reports.plots import cell_charts, cell_plots, write_plots
from nola_vision.runs import run_id, store
from nola_vision.runs.config_files import load_config
from nola_vision.runs.published import published_figures
from nola_vision.runs.record import Row
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


def charts_of(rows: list[Row]) -> dict[str, Chart]:
    return {chart.name: chart for chart in cell_charts(cell_of(rows, CELL))[0]}


def drawn_lines(figure: Figure) -> list[Line2D]:
    return [one for one in figure.artists if isinstance(one, Line2D)]


def lines(figure: Figure) -> dict[str, list[list[float]]]:
    """The named lines and markers of a chart."""
    labels = {str(line.get_label()): line.get_xydata().tolist() for line in drawn_lines(figure)}
    return {label: points for label, points in labels.items() if label}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_accuracy_over_file_size() -> None:
    chart = charts_of(ROWS)["pareto"]
    drawn = lines(chart.figure)
    assert [point[1] for point in drawn.pop("1nn")] == pytest.approx([60, 60])
    assert drawn == {
        "nola": [[900, pytest.approx(76)]],
        "lora": [[5000, pytest.approx(74.5)]],
        "bar of nola": [[900, pytest.approx(76 - 26**0.5)], [900, pytest.approx(76 + 26**0.5)]],
        "bar of lora": [[5000, pytest.approx(71)], [5000, pytest.approx(78)]],
        "Pareto front": [[900, pytest.approx(76)]],
    }
    drawn = {line.get_label(): line for line in drawn_lines(chart.figure)}
    start, middle, end = drawn["nola"].get_transform().transform([(1000, 60), (2000, 60), (4000, 60)])[:, 0]
    assert end - middle == pytest.approx(middle - start)  # a logarithmic axis
    names = ["1 KB", "5 KB", "1nn", "2 KB", "500 B", "lora", "nola"]
    assert sorted(text for text in texts(chart.figure) if not text.isdecimal()) == sorted(
        [*names, "top-1 accuracy, %; bars: std", "adapter file, head included"]
    )
    assert chart.alt == (
        "Top-1 accuracy over the size of the adapter file: nola 76.0 % (std 5.1) at 900 B; "
        "lora 74.5 % (std 3.5) at 5 KB; 1nn 60.0 % without a file."
    )
    assert "pareto" not in charts_of([one for one in ROWS if one.adapter_file_bytes is None])
    # a method on frozen features is a line, with a file or without
    frozen = row("logistic", 0.7, init=None, method_class="LogisticRegression", adapter_file_bytes=700)
    chart = charts_of([*ROWS, frozen])["pareto"]
    (start, end) = lines(chart.figure)["logistic"]
    assert start[1] == end[1] == pytest.approx(70) and start[0] < 700 < 5000 < end[0]
    assert len(lines(chart.figure)["Pareto front"]) == 1 and "logistic 70.0 % at 700 B" in chart.alt


def test_the_bar_of_a_single_run_is_its_interval() -> None:
    one = row("nola", 0.9, adapter_file_bytes=900, data={"counts": {"test": 50}})
    chart = charts_of([one])["pareto"]
    (_, low), (_, high) = lines(chart.figure)["bar of nola"]
    interval = binomtest(45, 50).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((100 * interval.low, 100 * interval.high))
    assert "top-1 accuracy, %; bars: 95 % interval" in texts(chart.figure)


def test_a_bar_ends_where_accuracies_do() -> None:
    folds = row("nola", None, adapter_file_bytes=900, estimate=estimate([1, 1, 0.7, 1, 1]))
    (_, low), (_, high) = lines(charts_of([folds])["pareto"].figure)["bar of nola"]
    assert (low, high) == pytest.approx((94 - 12, 100))


def test_the_front_by_hand() -> None:
    rows = [
        *grid("small", [[70, 72], [80, 82]], adapter_file_bytes=900),  # 76
        *grid("larger-and-worse", [[60, None], [70, 72]], adapter_file_bytes=2000),
        *grid("larger-and-equal", [[70, 72], [80, 82.000001]], adapter_file_bytes=3000),
        *grid("best", [[80, 82], [90, 90]], adapter_file_bytes=5000),  # 85.5
        *grid("as-large-as-best", [[76, 78], [76, 78]], adapter_file_bytes=5000),  # 77
        *grid("largest", [[85, 85], [85, 85]], adapter_file_bytes=9000),
        row("1nn", 0.9, init=None, method_class="NearestNeighbor"),
    ]
    assert [item.label for item in pareto_front(summarise(rows))] == ["small", "best"]
    corners = [[900, 76], [5000, 76], [5000, 85.5]]  # a step
    assert lines(charts_of(rows)["pareto"].figure)["Pareto front"] == [pytest.approx(corner) for corner in corners]


def test_the_papers_figures_are_hollow_markers() -> None:
    config = run_id.resolve(load_config("vitb_cifar10_5shot"), "nola-mlp")
    config["model"]["backbone"]["base"] = "pretrained"  # as a run has it
    one = row("nola-mlp", 0.8, config=config, adapter_file_bytes=90_000)
    chart = charts_of([one])["pareto"]
    drawn = {line.get_label(): line for line in drawn_lines(chart.figure)}
    paper, own = drawn["paper: nola-mlp"], drawn["nola-mlp"]
    figures = published_figures()
    (mean,) = figures[(figures.backbone == "ViT-B") & (figures.dataset == "CIFAR-10") & (figures.shots == 5)
                      & (figures.method == "NOLA-MLP")]["mean"]  # fmt: skip
    assert paper.get_xydata().tolist() == [[90_000, mean]] and f"paper: nola-mlp {mean:.1f} %" in chart.alt
    assert paper.get_markerfacecolor() == PAPER and own.get_markerfacecolor() == PALETTE[0]
    assert texts(chart.figure).count("paper") == 1


def estimate(folds: list[float], repeats: int = 1) -> dict[str, Any]:
    return {"folds": folds, "repeats": repeats, "images": 10, "correct": 5, "low": 0.2, "high": 0.8,
            "untested_classes": []}  # fmt: skip


def test_accuracy_by_split_and_by_fold() -> None:
    chart = charts_of(ROWS)["by-split"]
    assert lines(chart.figure) == {
        "nola": [[0, pytest.approx(71)], [1, pytest.approx(81)]],
        "lora": [[0, pytest.approx(71)], [1, pytest.approx(78)]],
        "1nn": [[0, pytest.approx(60)]],
        "runs of nola": [[0, 70], [0, 72], [1, 80], [1, 82]],
        "runs of lora": [[0, 71], [0, 71], [1, 78], [1, 78]],
        "runs of 1nn": [[0, 60]],
    }
    assert "nola 71.0 to 81.0 %, mean 76.0 %" in chart.alt and "split" in texts(chart.figure)

    folds = [
        row("nola", None, estimate=estimate([0.5, 0.7, 0.9, 0.1, 0.1, 0.1], repeats=2)),
        row("1nn", None, init=None, estimate=estimate([0.4, 0.6, 0.8]), method_class="NearestNeighbor"),
    ]
    chart = charts_of(folds)["by-split"]
    assert lines(chart.figure) == {
        "nola": [[0, 50], [1, pytest.approx(70)], [2, 90]],
        "1nn": [[0, 40], [1, 60], [2, 80]],
    }
    assert {"1", "2", "3", "fold"} < set(texts(chart.figure)) and "split" not in texts(chart.figure)
    # another split, or other folds: means of the first repeat by split
    later = row("nola", None, split=1, estimate=estimate([0.3, 0.3, 0.3]))
    assert lines(charts_of([*folds, later])["by-split"].figure)["nola"] == [[0, pytest.approx(70)], [1, 30]]
    other = replace(folds[1], estimate=estimate([0.4, 0.6]))
    assert "by-split" not in charts_of([folds[0], other]) and "by-split" not in charts_of([row("nola", 0.5)])


def test_learning_curves_are_the_mean_over_runs(tmp_path: Path) -> None:
    rows = placed(tmp_path)
    for number, one in enumerate(r for r in rows if r.method == "nola" and r.cell == CELL):
        (one.folder / "metrics.csv").write_text(
            "epoch,step,train_loss,val_loss\n" + f"0,0,{2 + number},\n0,1,{4 + number},\n0,1,,9\n1,2,{number},\n"
        )
    chart = charts_of(rows)["learning-curves"]
    assert lines(chart.figure) == {"nola": [[1, 4.5], [2, 1.5]]}
    (band,) = (
        one for one in chart.figure.artists if isinstance(one, Polygon)
    )  # epoch 1: means of 3 to 6; epoch 2: 0 to 3
    assert band.get_xy().tolist() == [[1, 3], [2, 0], [2, 3], [1, 6], [1, 3]]
    assert chart.alt == "Training loss over epochs: nola 4.5 to 1.5 after 2 epochs (mean of 4 runs)."


def test_confusions_by_class(tmp_path: Path) -> None:
    """Two runs of nola, one of lora: nola is right for 3 of 4 cats and 2 of 4 dogs, lora for all cats and no dog."""
    counts = {"nola": [[[2, 0], [1, 1]], [[1, 1], [1, 1]]], "lora": [[[2, 0], [2, 0]]]}
    rows = placed(tmp_path)
    for method, matrices in counts.items():
        for one, matrix in zip((r for r in rows if r.method == method and r.cell == CELL), matrices, strict=False):
            text = confusion_csv(np.array(matrix), ["cat, tabby", "dog"])
            (one.folder / "confusion.csv").write_text(text)
    found = cell_of(rows, CELL).entries
    confusions, problems = entry_confusions(found)
    assert problems == [] and entry_confusions([]) == ({}, [])
    figure = class_differences_plot(confusions, found, CELL)
    assert figure is not None
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[25, -50]]  # nola has the better mean in ROWS
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["cat, tabby", "dog"]
    assert [text.get_text() for text in axes.texts] == ["+25.0", "-50.0"]
    matrices = confusion_plot(confusions, CELL)
    assert matrices is not None
    shares = {axes.get_title(): axes.images[0].get_array().tolist() for axes in matrices.axes[:2]}
    assert shares == {"lora": [[100, 0], [100, 0]], "nola": [[75, 25], [50, 50]]}
    assert class_differences_plot({}, found, CELL) is None and confusion_plot({}, CELL) is None


def test_an_entry_looks_the_same_in_every_chart() -> None:
    rows = [
        *grid("lora", [[90], [91]], method_class="LoRA", adapter_file_bytes=5000),
        *grid("nola", [[80], [81]], adapter_file_bytes=900),
        *grid("1nn", [[70], [71]], method_class="NearestNeighbor"),
        *grid("logistic", [[70], [71]], method_class="LogisticRegression"),
    ]
    looks = entry_looks(summarise(rows))
    assert list(looks) == ["nola", "lora", "1nn", "logistic"]  # NOLA is the subject
    assert [look.colour for look in looks.values()] == [*PALETTE[:2], MUTED, MUTED]
    assert looks["nola"].strong and looks["1nn"].line != looks["logistic"].line
    for name in ("pareto", "by-split"):
        drawn = {line.get_label(): line.get_color() for line in drawn_lines(charts_of(rows)[name].figure)}
        assert all(drawn[label] == look.colour for label, look in looks.items() if label in drawn)
    many = entry_looks(summarise([row(f"m{i}", 0.5, method_class="LoRA") for i in range(20)])).values()
    assert len({(look.colour, look.marker) for look in many}) == 20
    assert len({look.marker for look in list(many)[: len(PALETTE)]}) == len(PALETTE)  # for readers without the colours


def contrast(one: str, other: str) -> float:
    """WCAG 2.1's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_every_colour_can_be_read_in_both_themes() -> None:
    assert set(CSS_COLOURS.values()) == set(DARK_COLOURS) and len(set(CSS_COLOURS)) == len(PALETTE) + 4
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    dark = {colour: DARK_COLOURS[variable] for colour, variable in CSS_COLOURS.items()}
    for colour in (*PALETTE, INK, MUTED):
        assert contrast(colour, PAPER) >= 4.5 and contrast(dark[colour], dark[PAPER]) >= 4.5, colour


def crowd(count: int, name: str = "method-{}") -> list[Row]:
    """Entries of nearly the same accuracy and size, and three on frozen features."""
    rows = []
    for number in range(count - 3):
        points = [[93 + number % 4 * 0.2, 94], [94 + number % 3 * 0.1, 95]]
        size = int(38_000 * 1.25 ** (number % 5) * (30 if number % 6 == 5 else 1))
        rows += grid(name.format(number), points, method_class="LoRA" if number else "NOLA", adapter_file_bytes=size)
    for number, method in enumerate(("NearestNeighbor", "NearestMean", "LogisticRegression")):
        rows += grid(method.lower()[:12], [[92 + number / 10], [93]], method_class=method)
    return rows


@pytest.mark.parametrize("count", [3, 4, 8, 14])
@pytest.mark.parametrize("name", ["m{}", "a-rather-long-name (rank={}, num_basis=1024)"])
def test_no_label_hides_another_or_a_marker(tmp_path: Path, count: int, name: str) -> None:
    rows = crowd(count, name)
    for number, one in enumerate(rows):
        rows[number] = replace(one, folder=tmp_path / str(number))
        rows[number].folder.mkdir()
        if one.adapter_file_bytes:
            (rows[number].folder / "metrics.csv").write_text("epoch,train_loss\n0,2\n1,1\n2,0.01\n")
    charts = charts_of(rows)
    assert set(charts) == ({"pareto", "by-split", "learning-curves"} if count > 3 else {"by-split"})
    for chart in charts.values():
        figure = chart.figure
        with plain_text():
            renderer = FigureCanvasAgg(figure).get_renderer()
            figure.draw_without_rendering()
            boxes = [text.get_window_extent(renderer) for text in figure.texts]
        assert all(0 <= box.x0 and box.x1 <= 420 and 0 <= box.y0 and box.y1 <= 300 for box in boxes), chart.name
        for one, other in itertools.combinations(boxes, 2):
            across = min(one.x1, other.x1) - max(one.x0, other.x0)
            assert across <= 1 or min(one.y1, other.y1) - max(one.y0, other.y0) <= 2, chart.name
        labels = [text for text in texts(figure) if re.match("m[0-9]|a-", text)]
        assert len(labels) == len(set(labels)) and len(labels) >= min(count - 3, 9), chart.name
        if chart.name == "pareto":
            markers = [line for line in drawn_lines(figure) if line.get_label() and len(line.get_xydata()) == 1]
            for (x, y), *_ in (line.get_transform().transform(line.get_xydata()) for line in markers):
                assert not any(box.x0 < x < box.x1 and box.y0 + 3 < y < box.y1 - 3 for box in boxes)


def test_labels_are_spread_as_little_as_possible() -> None:
    assert spread([5, 5], 4, 0, 100) == [3, 7] and spread([], 4, 0, 1) == [] and spread([9, 1], 4, 0, 10) == [9, 1]
    assert spread([99, 98, 10], 4, 0, 100) == [100, 96, 10]  # at the upper end
    rng = np.random.default_rng(0)
    for wanted in rng.uniform(0, 60, (5, 6)):
        wanted.sort()
        apart = {"type": "ineq", "fun": lambda positions: np.diff(positions) - 8}
        found = minimize(lambda p, wanted=wanted: ((p - wanted) ** 2).sum(), 10.0 * np.arange(6), constraints=[apart])
        assert spread(wanted.tolist(), 8, -100, 200) == pytest.approx(found.x.tolist(), abs=1e-3)


def test_short_names_are_distinct() -> None:
    names = [f"nola (targets=qkv, rank={rank}, num_basis=1024)" for rank in range(3)] + ["nola", "a\nb"]
    short = short_names(names, 18)
    assert len(set(short.values())) == 5 and short["nola"] == "nola" and short["a\nb"] == "a\\nb"
    assert all(len(text) <= 18 for text in short.values())
    assert [text[:15] for text in list(short.values())[:3]] == ["nola (…rank=0, ", "nola (…rank=1, ", "nola (…rank=2, "]
    assert short_names(["日" * 30, "x" * 30], 18) == {"日" * 30: "日" * 6 + "…日日", "x" * 30: "x" * 12 + "…xxxxx"}


def test_sizes_are_round_numbers() -> None:
    sizes = (900, 999, 1000, 37_200, 999_600, 1.5e6, 3e8, 4e12)
    assert [bytes_text(size) for size in sizes] == [
        "900 B", "999 B", "1 KB", "37.2 KB", "1 MB", "1.5 MB", "300 MB", "4e+03 GB",
    ]  # fmt: skip
    assert size_ticks(20_000, 80_000, 350) == [20_000, 50_000] and size_ticks(5_000, 2e6, 300) == [1e4, 1e5, 1e6]
    assert size_ticks(5_000, 2e5, 250) == [1e4, 3e4, 1e5] and len(size_ticks(1, 1e18, 350)) <= 7


def test_svg_has_real_text_and_follows_the_theme() -> None:
    for chart in charts_of(ROWS).values():
        svg = chart.svg("cell1-x")
        assert svg == charts_of(ROWS)[chart.name].svg("cell1-x")  # the same each time
        assert svg.startswith("<svg ") and not re.search(r"style|<metadata|<\?xml|font-family|<!DOCTYPE", svg)
        root = ElementTree.fromstring(svg)
        space = "{http://www.w3.org/2000/svg}"
        assert root.get("viewBox") == "0 0 420 300" and root.get("role") == "img" and "width" not in root.attrib
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids)) and all(one.startswith("cell1-x-") for one in ids)
        references = {one for two in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg) for one in two if one}
        assert references <= set(ids) and root.get("aria-labelledby").split() == ids[:2]
        assert [root[0].tag, root[0].text, root[1].tag, root[1].text] == [
            f"{space}title", chart.title, f"{space}desc", chart.alt,
        ]  # fmt: skip
        shown = [element.text for element in root.iter(f"{space}text")]
        assert set(texts(chart.figure)) <= set(shown) and "nola" in shown
        colours = set(re.findall(r'(?:fill|stroke)="([^"]+)"', svg)) - {"none"}
        assert colours <= {f"var({variable}, {colour})" for colour, variable in CSS_COLOURS.items()}
        assert f"var(--c0, {PALETTE[0]})" in colours
        assert len(svg) < 40_000
        before = texts(chart.figure)
        pixels = np.asarray(Image.open(io.BytesIO(chart.png())).convert("L"))
        assert pixels.shape == (718, 925) and texts(chart.figure) == before
        assert pixels[:, :20].min() == pixels[-20:].min() == 255 > pixels[25:50].min()  # a margin, and the title
        # what is drawn in data units is where the texts are: the axis at 46 points, above a margin of 12
        assert (abs(pixels[595:600, 150:600].astype(int) - 96) < 16).all(axis=1).any()


NAMES = ["$_$", "$x^$", "$100%$", "\\frac", "_", "%", "\u65e5\U0001f600", "a\nb\x1b[31m", "x" * 90 + "end"]
HOSTILE = [
    *NAMES,
    "</text><script>alert(1)</script>",
    '"&<!--]]>',
    "\ufffe\ud800\x00",
    'url(#a) href="#b"',
    "\u202eabc",
]


def test_of_many_entries_the_first_have_labels() -> None:
    many = [one for k in range(60) for one in grid(f"m{k}", [[50 + k % 30], [51]], method_class="LoRA",
                                                   adapter_file_bytes=1000 + 900 * k)]  # fmt: skip
    many += [one for k in range(40) for one in grid(f"f{k}", [[50 + k], [51]], method_class="NearestMean")]
    for chart in charts_of(many).values():
        names = [text for text in texts(chart.figure) if re.fullmatch("[mf][0-9]+", text)]
        assert 14 <= len(names) <= 24 + 14 and "m29" in names and "m29" in lines(chart.figure)
        assert sum(label[0] in "mf" for label in lines(chart.figure)) == 100 and "and 86 more" in chart.alt


def test_names_are_plain_text_whatever_they_contain() -> None:
    """Neither mathtext, TeX, XML nor HTML reads them, and a letter that the font lacks costs no warning."""
    square = pd.DataFrame(np.eye(9, dtype="int64"), index=NAMES, columns=NAMES)
    rows = [
        one
        for number, name in enumerate(HOSTILE)
        for one in grid(name, [[60 - number], [61]], method_class="LoRA", adapter_file_bytes=1000 * 2**number)
    ]
    with warnings.catch_warnings(), matplotlib.rc_context({"text.usetex": True}):
        warnings.simplefilter("error")
        charts = charts_of(rows)
        pages = {name: chart.svg("a") for name, chart in charts.items()}
        plots = cell_plots(Cell(CELL, rows))[0]
        matrices = confusion_plot({"$x^$": {0: square}}, CELL)
        with plain_text():
            matrices.savefig(os.devnull, format="png")
            differences = class_differences_plot({"$_$": {0: square}, "_": {0: square}}, entries(rows), CELL)
            differences.savefig(os.devnull, format="png")
    assert set(pages) == {"pareto", "by-split"} and set(plots) == set(pages)
    assert all(content.startswith(b"\x89PNG") for content in plots.values())
    short = ["$_$", "$x^$", "\\frac", "_", "a\\nb\\x1b[31m", "\u65e5\U0001f600", '"&<!--]]>', "\\ufffe\\ud800\\x00"]
    for svg in pages.values():
        shown = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert set(short) <= set(shown)
        assert "<script" not in svg and all(letter.isprintable() or letter == "\n" for letter in svg)
    assert [tick.get_text() for tick in matrices.axes[0].get_xticklabels()] == [
        *NAMES[:7],
        short[4],
        "x" * 13 + "…xxend",
    ]
    assert matrices.axes[0].get_title() == "$x^$"


UNUSABLE = {
    "metrics.csv": [
        b"garbage\x00\n",
        b"epoch,train_loss\n0,high\n",
        b"epoch,train_loss\n0.5,2\n",
        b"epoch,train_loss\n-1,2\n",
        b"epoch,train_loss\n1e300,2\n",
        b"epoch,train_loss" + b"," * 10_000 + b"\n0,1",
        b"epoch,train_loss\n0,\xff\n",
        b"epoch,train_loss\n" + b"0,1\n" * 2**21,  # over 8 MiB
    ],
    "confusion.csv": [b"garbage", b"true,predicted,count\na,a,-1\n", b"true,predicted,count\nz,z,1\n"],
}


def _place(problem: str) -> int:
    return int(Path(problem.partition(" ")[0]).parent.name)


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
    curves, bad_logs = entry_curves(entries(rows))
    confusions, bad_matrices = entry_confusions(entries(rows))
    assert [len(bad_logs), len(bad_matrices)] == [9, 4]
    for name, problems in (("metrics.csv", bad_logs), ("confusion.csv", bad_matrices)):
        expected = [one.folder for one, content in zip(rows[1:], contents, strict=False) if content[0] == name]
        for folder, problem in zip([*expected, rows[-1].folder], sorted(problems, key=_place), strict=True):
            assert problem.startswith(f"{folder / name} ") and problem.isprintable()
    assert curves["nola"] == [{0: 2, 1: 1}] * 4
    assert {(counts.loc["a", "a"], counts.loc["b", "b"]) for counts in confusions["nola"].values()} == {(3, 4)}
    assert len(confusions["nola"]) == len(rows) - 4
    plots, problems = cell_plots(Cell(CELL, rows))
    assert problems == [*bad_logs, *bad_matrices] and {"learning-curves", "confusions"} < set(plots)


def test_a_long_cell_makes_file_names(tmp_path: Path) -> None:
    cells = ["é" * 250 + "a", "é" * 250 + "b"]
    written = write_plots({cell: {"pareto": b""} for cell in cells}, tmp_path)
    assert len({path.name for path in tmp_path.iterdir()}) == len(set(written)) == 2


def test_report_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = replace(ROWS[0], run_hash="abc")
    folder = tmp_path / "runs" / CELL / "nola" / "split0-init0-abc"
    folder.mkdir(parents=True)
    store.write_row(folder, one)
    (folder / "metrics.csv").write_text("epoch,step,train_loss\n0,0,2\n1,1,1\n")
    assert [found.folder for found in store.read_rows(tmp_path / "runs")[0]] == [folder]
    assert main(["report", str(tmp_path / "runs"), "--plots", str(tmp_path / "p")]) == 0
    names = [f"{one.cell}-{name}.png" for name in ("learning-curves", "pareto")]
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == names
    (tmp_path / "file").touch()
    assert main(["report", str(tmp_path / "runs"), "--plots", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_accuracies_of_100_have_a_line_at_100() -> None:
    found = entries([row("nola", 1.0, split=split, adapter_file_bytes=9) for split in range(2)])
    looks = entry_looks([item for item, _ in found])
    for chart in (pareto_chart(found, looks), split_chart(found, looks)):
        assert chart is not None and "100" in texts(chart.figure)
