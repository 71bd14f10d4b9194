"""The charts and plots of a cell, and their PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import write_file
from nola_vision.common.hashing import sha256
from nola_vision.reports.cell import Cell
from nola_vision.reports.charts.drawing import Chart, plain_text, png
from nola_vision.reports.charts.league import league_chart
from nola_vision.reports.charts.learning_curves import entry_curves, learning_curves
from nola_vision.reports.charts.looks import entry_looks
from nola_vision.reports.charts.matrices import class_differences_plot, confusion_plot
from nola_vision.reports.charts.pareto import pareto_chart
from nola_vision.reports.charts.splits import split_chart
from nola_vision.reports.confusion import entry_confusions
from nola_vision.reports.league import has_budgets


def cell_charts(cell: Cell) -> tuple[list[Chart], list[str]]:
    """The charts `pareto`, `by-split` and `learning-curves` of a cell, those that it has data for.

    Of a cell with byte budgets, `pareto` alone: the others would have a line for each method and budget.

    Training logs are read from the folders of the runs.

    Returns:
        The charts, and one message per file that could not be used.
    """
    looks = entry_looks(cell.summaries)
    if has_budgets(cell.summaries):
        with plain_text():
            chart = league_chart(cell.entries, looks)
        return [] if chart is None else [chart], []
    curves, problems = entry_curves(cell.entries)
    with plain_text():
        charts = [pareto_chart(cell.entries, looks), split_chart(cell.entries, looks), learning_curves(curves, looks)]
    return [chart for chart in charts if chart is not None], problems


def cell_plots(cell: Cell) -> tuple[dict[str, bytes], list[str]]:
    """The plots of a cell as PNG: its charts, accuracy differences by class and confusion matrices.

    Training logs and confusion matrices are read from the folders of the runs.

    Returns:
        PNG files by name, such as `pareto`, and one message per file that could not be used.
    """
    charts, bad_logs = cell_charts(cell)
    confusions, bad_matrices = entry_confusions(cell.entries)
    drawn = {
        "class-differences": class_differences_plot(confusions, cell.entries, cell.name),
        "confusions": confusion_plot(confusions, cell.name),
    }
    plots = {chart.name: chart.png() for chart in charts}
    plots |= {name: png(figure) for name, figure in drawn.items() if figure is not None}
    return plots, [*bad_logs, *bad_matrices]


def write_plots(plots: Mapping[str, Mapping[str, bytes]], out: Path) -> list[Path]:
    """Writes PNG files, given by cell and name, and returns their paths.

    Raises:
        NolaVisionError: the folder cannot be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NolaVisionError(f"{out} cannot be written to ({error.strerror}): give another folder") from error
    written = []
    for cell, of_cell in plots.items():
        stem = cell
        if len(encoded := cell.encode()) > 160:  # file names are limited to 255 bytes
            stem = f"{encoded[:140].decode(errors='ignore')}-{sha256(encoded)[:10]}"
        for name, content in of_cell.items():
            written.append(out / f"{stem}-{name}.png")
            write_file(written[-1], content)
    return written
