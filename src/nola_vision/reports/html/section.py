"""The section of one cell on the report page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nola_vision.common.text import excerpt, last_part, plural, printable
from nola_vision.reports.cell import Cell
from nola_vision.reports.charts.looks import CSS_COLOURS, entry_looks
from nola_vision.reports.description import cell_facts, how_measured
from nola_vision.reports.entries import Entry, kind, of_method
from nola_vision.reports.entry_predictions import read_entry_predictions
from nola_vision.reports.formatting import bytes_text, points, short_printable
from nola_vision.reports.html.classes import ClassesView, classes_view
from nola_vision.reports.html.confusions import ConfusionView, confusion_view
from nola_vision.reports.html.gallery import GalleryView, gallery_view
from nola_vision.reports.html.runs import RunsView, runs_view
from nola_vision.reports.league import has_budgets
from nola_vision.reports.plots import cell_charts
from nola_vision.reports.statistics import run_accuracy
from nola_vision.reports.tables import Table
from nola_vision.runs.record import Row

_MOST_WARNINGS = 5  # per cell


@dataclass(frozen=True)
class KeyFigure:
    """A number at the top of a section."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class ChartView:
    """A chart as SVG, which is inserted without escaping."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class IndexLine:
    """A cell in the list at the top of a page of several."""

    method: str
    accuracy: str
    frozen: str
    runs: str


@dataclass(frozen=True)
class CellView:
    """One cell's section."""

    anchor: str
    title: str
    index: IndexLine
    verdict: Sequence[str]
    figures: Sequence[KeyFigure]
    colours: Mapping[str, str]  # CSS class by label of an entry, as in its charts
    facts: Sequence[tuple[str, str]]
    tables: Sequence[Table]
    charts: Sequence[ChartView]
    by_budget: bool  # the first table has the accuracies by budget, and the chart shows them
    classes: ClassesView | None
    confusion: ConfusionView | None
    gallery: GalleryView | None
    measured: Sequence[str]
    runs: RunsView


def cell_view(cell: Cell, title: str, anchor: str, image_bytes: int, problems: list[str]) -> CellView:
    """The section of one cell.

    Args:
        cell: the cell.
        title: its heading.
        anchor: its id on the page.
        image_bytes: maximum size of its images, as text.
        problems: one message is added per file that could not be used.
    """
    rows, own = cell.rows, cell.subject
    frozen = next(iter(cell.rivals["frozen"]), None)
    other = frozen if own and kind(own.summary) != "frozen" else None
    tested = read_entry_predictions(*own, problems) if own else None
    of_other = read_entry_predictions(*other, problems) if other and tested else None
    looks = entry_looks(cell.summaries)
    colours = {printable(label): CSS_COLOURS[look.colour].lstrip("-") for label, look in looks.items()}
    colours |= {printable(of_method(item)): colours[printable(item.label)] for item in cell.summaries}
    charts, unusable = cell_charts(cell)
    verdict, not_compared = cell.verdict
    problems += [*unusable, *not_compared]
    return CellView(
        anchor=anchor,
        title=title,
        index=IndexLine(
            method=short_printable(own.summary.label) if own else "",
            accuracy=_accuracy(own)[0] if own else "",
            frozen=_accuracy(frozen)[0] if frozen else "",
            runs=f"{len(rows):,}",
        ),
        verdict=verdict,
        figures=_key_figures(own, other),
        colours=colours,
        facts=[*cell_facts(rows), *(("note", text) for text in _warnings(own.runs if own else ()))],
        tables=cell.tables,
        charts=[ChartView(chart.title, chart.svg(f"{anchor}-{chart.name}"), chart.caption) for chart in charts],
        by_budget=has_budgets(cell.summaries),
        classes=classes_view(tested, of_other, colours[printable(tested.label)]) if tested else None,
        confusion=confusion_view(tested) if tested else None,
        gallery=gallery_view(tested, image_bytes, problems) if tested and image_bytes else None,
        measured=how_measured(rows),
        runs=runs_view(rows),
    )


def _key_figures(own: Entry | None, other: Entry | None) -> list[KeyFigure]:
    """The accuracies of the subject and of the best method on frozen features, chance, and the size of the file."""
    if own is None:
        return []
    figures = []
    for entry, what in ((own, "top-1 accuracy"), (other, "best on frozen features")):
        if entry is not None:
            label = f"{short_printable(entry.summary.label)}, {what}"
            accuracy, spread = _accuracy(entry)
            figures.append(KeyFigure(label, f"{accuracy} %", spread))
    if own.summary.chance is not None:
        figures.append(KeyFigure("chance", f"{points(own.summary.chance)} %", "always predicting the largest class"))
    if size := own.summary.adapter_file_bytes:
        label = f"{short_printable(own.summary.label)}, adapter file"
        figures.append(KeyFigure(label, bytes_text(size), f"{size:,} bytes, including the head"))
    return figures


def _accuracy(entry: Entry) -> tuple[str, str]:
    """An entry's accuracy in per cent as in the verdict, and its uncertainty."""
    one, runs = entry
    if one.completed == 1:
        found = next((found for row in runs if (found := run_accuracy(row))), None)
        if found is not None:
            low, high = found.interval
            return points(100 * found.value), f"95 % interval {points(low)} to {points(high)}"
    counted = plural("fold" if one.cross_validated else "run", one.n)
    return points(one.mean), counted if one.std is None else f"mean of {counted}, std {points(one.std)}"


def _warnings(runs: Sequence[Row]) -> list[str]:
    """The warnings of runs, each once, with paths relative to the parent of the data's folder."""
    found = []
    for row in runs:
        root = str(row.config["data"].get("root") or "").rstrip("/\\")
        found += [text.replace(root, last_part(root)) if root else text for text in row.warnings]
    return [excerpt(printable(text), 300) for text in dict.fromkeys(found)][:_MOST_WARNINGS]
