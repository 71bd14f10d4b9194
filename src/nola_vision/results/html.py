"""The report page: each cell's verdict, tables, charts and misclassified images in one HTML file that loads nothing.

Everything that the page shows is computed here as plain values (the views); `templates/report.html.j2` arranges them.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from scipy.special import softmax

from nola_vision import __version__
from nola_vision.errors import NolaVisionError
from nola_vision.predictions import Predictions, load_predictions
from nola_vision.results import tables
from nola_vision.results.confusion import MOST_RUNS, confused_pairs, count_predictions
from nola_vision.results.description import (
    NOT_MEASURED,
    bytes_text,
    cell_facts,
    cell_title,
    how_measured,
    plural,
    points,
    short_printable,
    signed,
)
from nola_vision.results.plots import CSS_COLOURS, DARK_COLOURS, cell_charts, entry_looks
from nola_vision.results.row import Row
from nola_vision.results.statistics import Summary, entries, kind, rivals, run_accuracy, subject
from nola_vision.results.tables import Sheet
from nola_vision.results.verdict import cell_verdict
from nola_vision.text import excerpt, printable
from nola_vision.thumbnails import Thumbnail, load_thumbnails

MOST_IMAGE_BYTES = 2**21  # of the user's images in one page, as text
_MOST_PHOTOS = 24  # of one cell
_MOST_RUNS_WITH_PHOTOS = 4  # whose thumbnails are read on a page of one cell
_MOST_CLASSES = 40  # in a table without a fold; of more, the worst are shown
_WORST_CLASSES = 20
_MOST_PAIRS = 10
_MATRIX_CLASSES = 20
_HEATS = 5  # steps of colour in the confusion matrix
_UPRIGHT = 3  # characters of a name that fit above a column of the matrix
_TINY = 48  # pixels of an image that is enlarged without smoothing
_DARK = "@media screen and (prefers-color-scheme: dark)"


@dataclass(frozen=True)
class Page:
    """The page's text, and how many of the user's images it holds."""

    text: str
    images: int


@dataclass(frozen=True)
class KeyFigure:
    """A number of the first screen."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class ChartView:
    """A chart as SVG, which may stand in the page as it is."""

    title: str
    svg: str


@dataclass(frozen=True)
class ClassLine:
    """One class: both methods' accuracy as text, and as positions from 0 to 100."""

    name: str
    images: str
    accuracy: str
    other: str
    difference: str
    at: float
    other_at: float | None


@dataclass(frozen=True)
class ClassesView:
    """Accuracy by class of the subject and of the best frozen-feature method, the worst class first."""

    subject: str
    colour: str  # class of the style sheet
    other: str | None
    note: str
    shown: Sequence[ClassLine]
    rest: Sequence[ClassLine]


@dataclass(frozen=True)
class Pair:
    """Images of one class that were predicted as another."""

    true: str
    predicted: str
    images: str
    share: str


@dataclass(frozen=True)
class Heat:
    """A cell of the confusion matrix; `level` from 0 to `_HEATS` is its colour's depth."""

    text: str
    level: int
    right: bool


@dataclass(frozen=True)
class MatrixLine:
    """A true class."""

    name: str
    cells: Sequence[Heat]


@dataclass(frozen=True)
class ConfusionView:
    """The most confused pairs, and the matrix of the classes in them."""

    note: str
    pairs: Sequence[Pair]
    more_pairs: str
    caption: str
    names: Sequence[str]
    upright: bool  # names so short that they need not be turned
    lines: Sequence[MatrixLine]


@dataclass(frozen=True)
class Photo:
    """A misclassified image."""

    source: str
    width: int
    height: int
    tiny: bool
    name: str
    true: str
    predicted: str
    probability: str
    runs: str


@dataclass(frozen=True)
class GalleryView:
    """Misclassified images, the highest probability first."""

    note: str
    photos: Sequence[Photo]


@dataclass(frozen=True)
class RunColumn:
    """A column of the table of runs; `kind` is the class of its cells: number, long or nothing."""

    name: str
    kind: str = ""


@dataclass(frozen=True)
class RunLine:
    """A run."""

    status: str
    texts: Sequence[str]


@dataclass(frozen=True)
class RunsView:
    """Every run of a cell."""

    title: str
    columns: Sequence[RunColumn]
    lines: Sequence[RunLine]


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
    colours: Mapping[str, str]  # class of the style sheet by the label of an entry, as in its charts
    facts: Sequence[tuple[str, str]]
    sheets: Sequence[Sheet]
    charts: Sequence[ChartView]
    classes: ClassesView | None
    confusion: ConfusionView | None
    gallery: GalleryView | None
    measured: Sequence[str]
    runs: RunsView


@dataclass(frozen=True)
class PageView:
    """The page."""

    title: str
    cells: Sequence[CellView]
    untested: Sequence[str]
    problems: Sequence[str]
    footer: str


def html_page(
    rows: Sequence[Row], problems: Sequence[str] = (), columns: Sequence[str] = (), images: bool = True
) -> Page:
    """The page of some rows. Of files it opens only those with fixed names in the folders that the rows were read from.

    Args:
        rows: of any runs.
        problems: a sentence for each file that could not be read.
        columns: further metrics, as in `tables.cell_sheets`.
        images: whether misclassified images may be in it.
    """
    tested, others = tables.tested_cells(rows)
    of_cells: dict[str, list[Row]] = {cell: [] for cell in tested}
    for row in rows:
        if row.cell in of_cells:
            of_cells[row.cell].append(row)
    budget = MOST_IMAGE_BYTES // max(1, len(tested)) if images else 0
    found = list(problems)
    titles = _titles(of_cells)
    cells = [
        _cell(of_cells[cell], titles[cell], columns, f"cell{number}", budget, found)
        for number, cell in enumerate(tested, start=1)
    ]
    view = PageView(
        title=cells[0].title if len(cells) == 1 else f"{plural('cell', len(cells))}, {plural('run', len(rows))}",
        cells=cells,
        untested=[printable(f"{cell}: {reason or 'no error was recorded'}") for cell, reason in others.items()],
        problems=[printable(problem) for problem in dict.fromkeys(found)],
        footer=f"Made by nola-vision {__version__} from {plural('row', len(rows))}. This file loads nothing.",
    )
    return Page(_render(view), sum(len(cell.gallery.photos) for cell in cells if cell.gallery))


def _titles(of_cells: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """The title of each cell, with its id where several have the same."""
    titles = {cell: cell_title(rows) for cell, rows in of_cells.items()}
    count = Counter(titles.values())
    return {cell: title if count[title] == 1 else f"{title} ({printable(cell)})" for cell, title in titles.items()}


def _render(view: PageView) -> str:
    style, script = _style(), _asset("report.js")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    template = _environment().get_template("report.html.j2")
    # both are files of this package, and no value of a row is in them
    return template.render(page=view, style=Markup(style), script=Markup(script), policy=policy)


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("nola_vision.results"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _style() -> str:
    """The style sheet, after the colours of both themes."""
    light = "".join(f"{name}: {colour}; " for colour, name in CSS_COLOURS.items())
    dark = "".join(f"{name}: {colour}; " for name, colour in DARK_COLOURS.items())
    return f":root {{ {light}}}\n{_DARK} {{ :root {{ {dark}}} }}\n{_asset('report.css')}"


def _asset(name: str) -> str:
    return resources.files("nola_vision.results").joinpath("templates", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _cell(
    rows: Sequence[Row], title: str, columns: Sequence[str], anchor: str, image_bytes: int, problems: list[str]
) -> CellView:
    """The section of the rows of one cell; sentences on files that could not be used are added to `problems`."""
    cell = rows[0].cell
    found = entries(rows)
    runs = dict(found)
    own = subject(runs)
    frozen = next((one for one, _ in rivals("frozen", own, found)), None) if own else None
    other = frozen if own and kind(own) != "frozen" else None
    tested = _tested(own, runs[own], problems) if own else None
    of_other = _tested(other, runs[other], problems) if other and tested else None
    looks = entry_looks(list(runs))
    colours = {printable(label): CSS_COLOURS[look.colour].lstrip("-") for label, look in looks.items()}
    charts, unusable = cell_charts(rows, cell)
    verdict, not_compared = cell_verdict(rows, cell)
    problems += [*unusable, *not_compared]
    return CellView(
        anchor=anchor,
        title=title,
        index=IndexLine(
            method=short_printable(own.label) if own else "",
            accuracy=_accuracy(own, runs[own])[0] if own else "",
            frozen=_accuracy(frozen, runs[frozen])[0] if frozen else "",
            runs=f"{len(rows):,}",
        ),
        verdict=verdict,
        figures=_key_figures(own, other, runs),
        colours=colours,
        facts=cell_facts(rows),
        sheets=tables.cell_sheets(rows, cell, columns),
        charts=[ChartView(chart.title, chart.svg(f"{anchor}-{chart.name}")) for chart in charts],
        classes=_classes(tested, of_other, colours[printable(tested.summary.label)]) if tested else None,
        confusion=_confusion(tested) if tested else None,
        gallery=_gallery(tested, image_bytes, problems) if tested and image_bytes else None,
        measured=how_measured(rows),
        runs=_runs(rows),
    )


def _key_figures(own: Summary | None, other: Summary | None, runs: Mapping[Summary, Sequence[Row]]) -> list[KeyFigure]:
    """The accuracies of the subject and of the best method on frozen features, chance, and the size of the file."""
    figures = []
    for one, what in ((own, "top-1 accuracy"), (other, "best on frozen features")):
        if one is not None:
            accuracy, spread = _accuracy(one, runs[one])
            figures.append(KeyFigure(f"{short_printable(one.label)}, {what}", f"{accuracy} %", spread))
    if own is not None and own.chance is not None:
        figures.append(KeyFigure("chance", f"{_per_cent(own.chance)} %", "always answering the largest class"))
    if own is not None and own.adapter_file_bytes:
        size = own.adapter_file_bytes
        label = f"{short_printable(own.label)}, adapter file"
        figures.append(KeyFigure(label, bytes_text(size), f"{size:,} bytes, head included"))
    return figures


def _accuracy(one: Summary, runs: Sequence[Row]) -> tuple[str, str]:
    """An entry's accuracy in per cent as in the verdict, and what its uncertainty is."""
    if one.completed == 1:
        found = next((found for row in runs if (found := run_accuracy(row))), None)
        if found is not None:
            low, high = found.interval
            return points(100 * found.value), f"95 % interval {points(low)} to {points(high)}"
    counted = plural("fold" if one.cross_validated else "run", one.n)
    return _per_cent(one.mean), counted if one.std is None else f"mean of {counted}, std {points(one.std)}"


@dataclass(frozen=True)
class _Tested:
    """An entry, and those of its runs whose predictions could be read, at least one; all have the same classes."""

    summary: Summary
    class_names: tuple[str, ...]
    runs: tuple[tuple[Row, Predictions], ...]

    @property
    def label(self) -> str:
        return short_printable(self.summary.label)

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """Images by true and predicted class, `[classes, classes]`, summed over the runs."""
        return count_predictions([found for _, found in self.runs], len(self.class_names))

    @cached_property
    def shares(self) -> npt.NDArray[np.float64]:
        """The counts in per cent of the true class's images; not a number where a class has none."""
        totals = self.counts.sum(axis=1, keepdims=True)
        shares = np.full(self.counts.shape, np.nan)
        np.divide(100.0 * self.counts, totals, out=shares, where=totals > 0)
        return shares

    @property
    def what(self) -> str:
        """Which images and runs the counts are of, as a sentence."""
        completed, read = self.summary.completed, len(self.runs)
        if completed == read == 1:
            return "Each image was tested once, in one fold." if self.summary.cross_validated else "Of the test images."
        which = f"the {read}" if completed == read else f"{read} of the {completed:,}"
        return f"Over {which} runs of {self.label}."


def _tested(summary: Summary, runs: Sequence[Row], problems: list[str]) -> _Tested | None:
    """The first runs of an entry that left predictions; None if there are none."""
    names: tuple[str, ...] = ()
    found: list[tuple[Row, Predictions]] = []
    for row in runs:
        own_names = tuple(row.data.get("class_names") or ())
        if row.status != "completed" or row.folder is None or not own_names:
            continue
        names = names or own_names
        if own_names != names:
            problems.append(f"{row.folder} has other classes than other runs of {summary.label}: it is left out")
            continue
        try:
            predictions = load_predictions(row.folder, len(names))
        except NolaVisionError as error:
            problems.append(str(error))
            continue
        found += [] if predictions is None else [(row, predictions)]
        if len(found) == MOST_RUNS:
            break
    return _Tested(summary, names, tuple(found)) if found else None


def _classes(own: _Tested, other: _Tested | None, colour: str) -> ClassesView:
    """Accuracy by class, the class with the lowest first; classes without a tested image are left out."""
    names = own.class_names
    if other is not None and other.class_names != names:
        other = None
    accuracies = np.diag(own.shares)
    others = np.full(len(names), np.nan) if other is None else np.diag(other.shares)
    images = own.counts.sum(axis=1) / len(own.runs)
    lines = [
        ClassLine(
            name=short_printable(names[i]),
            images=f"{images[i]:,.0f}",
            accuracy=_per_cent(accuracies[i]),
            other=_per_cent(others[i]),
            difference=signed(accuracies[i] - others[i]) if np.isfinite(others[i]) else NOT_MEASURED,
            at=round(float(accuracies[i]), 1),
            other_at=round(float(others[i]), 1) if np.isfinite(others[i]) else None,
        )
        for i in np.argsort(accuracies, kind="stable").tolist()
        if images[i]
    ]
    shown = len(lines) if len(lines) <= _MOST_CLASSES else _WORST_CLASSES
    part = "" if shown == len(lines) else f" The {shown} classes of {len(lines)} with the lowest accuracy."
    return ClassesView(own.label, colour, other.label if other else None, own.what + part, lines[:shown], lines[shown:])


def _confusion(own: _Tested) -> ConfusionView | None:
    """The pairs of classes that were confused most often; None if no image was misclassified."""
    names = [short_printable(name) for name in own.class_names]
    pairs = confused_pairs(own.counts)
    if not pairs:
        return None
    kept = list(range(len(names)))
    if len(names) > _MATRIX_CLASSES:
        kept = sorted(list(dict.fromkeys(label for *pair, _ in pairs for label in pair))[:_MATRIX_CLASSES])
    several = len(own.runs) > 1
    part = "" if len(kept) == len(names) else f" of the {len(kept)} classes in the most confused pairs"
    unit = "% of the true class's images" if several else "images"
    rest = len(pairs) - _MOST_PAIRS
    return ConfusionView(
        note=f"{own.what} An image counts once in each run." if several else own.what,
        pairs=[
            Pair(names[true], names[predicted], f"{count:,}", _per_cent(own.shares[true, predicted]))
            for true, predicted, count in pairs[:_MOST_PAIRS]
        ],
        more_pairs=f"and {plural('more pair', rest)}" if rest > 0 else "",
        caption=f"Confusion matrix{part}: {unit}; true class by row, predicted class by column",
        names=[names[i] for i in kept],
        upright=max(len(names[i]) for i in kept) <= _UPRIGHT,
        lines=[MatrixLine(names[i], [_heat(own, i, j) for j in kept]) for i in kept],
    )


def _heat(own: _Tested, true: int, predicted: int) -> Heat:
    count, share = int(own.counts[true, predicted]), float(own.shares[true, predicted])
    if not count:
        return Heat("", 0, true == predicted)
    in_per_cent = f"{share:.0f}" if share >= 0.5 else "<1"
    text = in_per_cent if len(own.runs) > 1 else f"{count:,}"
    return Heat(text, max(1, math.ceil(share / 100 * _HEATS)), true == predicted)


@dataclass(frozen=True)
class _Mistake:
    """A misclassified image of one run, with its thumbnail."""

    thumbnail: Thumbnail
    true: int
    predicted: int
    probability: float


def _gallery(own: _Tested, most_bytes: int, problems: list[str]) -> GalleryView | None:
    """The misclassified images with the highest probabilities, each once; None if no run has a thumbnail."""
    # each costs 24 images to decode, and the first alone fills a gallery
    runs = own.runs[: max(1, _MOST_RUNS_WITH_PHOTOS * most_bytes // MOST_IMAGE_BYTES)]
    calibrated = all(row.temperature is not None and found.logits is not None for row, found in runs)
    found = [mistake for row, of_run in runs for mistake in _mistakes(row, of_run, calibrated, problems)]
    found.sort(key=lambda mistake: (-mistake.probability, mistake.thumbnail.index))
    photos: dict[int, Photo] = {}
    for mistake in found:
        if mistake.thumbnail.index in photos:
            continue
        photo = _photo(mistake, own)
        most_bytes -= len(photo.source)
        if len(photos) == _MOST_PHOTOS or most_bytes < 0:
            break
        photos[mistake.thumbnail.index] = photo
    if not photos:
        return None
    wrong = len(np.unique(np.concatenate([of_run.index[~of_run.correct] for _, of_run in runs])))
    which = "All" if len(photos) == wrong else f"{len(photos)} of the"
    of_runs = "" if own.summary.completed == 1 else f" in {plural('run', len(runs))} of {own.label}"
    probabilities = "calibrated by the run's temperature" if calibrated else "not calibrated"
    return GalleryView(
        f"{which} {plural('image', wrong)} that {'was' if wrong == 1 else 'were'} misclassified{of_runs}, those "
        f"predicted with the highest probability first. Probabilities are {probabilities}.",
        list(photos.values()),
    )


def _mistakes(row: Row, predictions: Predictions, calibrated: bool, problems: list[str]) -> list[_Mistake]:
    """A run's misclassified images that it left a thumbnail of."""
    assert row.folder is not None
    try:
        thumbnails = load_thumbnails(row.folder)
    except NolaVisionError as error:
        problems.append(str(error))
        return []
    probability: npt.NDArray[Any] = predictions.probability
    if calibrated and predictions.logits is not None and row.temperature:
        probabilities = softmax(predictions.logits.astype(np.float64) / row.temperature, axis=1)
        probability = probabilities[np.arange(len(probabilities)), predictions.predicted]
    return [
        _Mistake(
            thumbnails[index],
            true=int(predictions.label[place]),
            predicted=int(predictions.predicted[place]),
            probability=float(probability[place]),
        )
        for place, index in enumerate(predictions.index.tolist())
        if index in thumbnails and not predictions.correct[place]
    ]


def _photo(mistake: _Mistake, own: _Tested) -> Photo:
    thumbnail = mistake.thumbnail
    correct = [found.correct[found.index == thumbnail.index] for _, found in own.runs]
    tested = np.concatenate(correct)
    runs = f"misclassified in {(~tested).sum()} of {plural('run', tested.size)}" if len(own.runs) > 1 else ""
    return Photo(
        source=f"data:image/jpeg;base64,{base64.b64encode(thumbnail.jpeg).decode()}",
        width=thumbnail.width,
        height=thumbnail.height,
        tiny=max(thumbnail.width, thumbnail.height) < _TINY,
        name=printable(thumbnail.name),
        true=short_printable(own.class_names[mistake.true]),
        predicted=short_printable(own.class_names[mistake.predicted]),
        probability=f"{100 * mistake.probability:.0f} %",
        runs=runs,
    )


_RUN_COLUMNS = (
    RunColumn("status"),
    RunColumn("stage"),
    RunColumn("method"),
    RunColumn("split", "number"),
    RunColumn("init", "number"),
    RunColumn("accuracy %", "number"),
    RunColumn("file bytes", "number"),
    RunColumn("seconds", "number"),
    RunColumn("device"),
    RunColumn("started"),
    RunColumn("hash"),
    RunColumn("error", "long"),
)


def _runs(rows: Sequence[Row]) -> RunsView:
    stages = {"final": 0, "search": 1, "fold": 2}
    ordered = sorted(rows, key=lambda row: (stages[row.stage], row.method, row.entry_hash, row.split, row.init or 0))
    ended = Counter(row.status for row in ordered)
    title = f"{plural('run', len(rows))}: {', '.join(f'{number:,} {status}' for status, number in ended.items())}"
    return RunsView(title, _RUN_COLUMNS, [RunLine(row.status, _run_texts(row)) for row in ordered])


def _run_texts(row: Row) -> tuple[str, ...]:
    found = run_accuracy(row)
    accuracy = row.test_accuracy if found is None else found.value
    if accuracy is None and row.stage == "search":
        accuracy = row.val_accuracy
    texts = (
        row.status,
        row.stage,
        row.method,
        str(row.split),
        "" if row.init is None else str(row.init),
        "" if accuracy is None else f"{100 * accuracy:.1f}",
        "" if row.adapter_file_bytes is None else f"{row.adapter_file_bytes:,}",
        "" if row.seconds_total is None else f"{row.seconds_total:,.1f}",
        row.device or "",
        row.started.removesuffix("+00:00").replace("T", " "),
        row.run_hash,
        excerpt(row.error) if row.error else "",
    )
    return tuple(map(printable, texts))


def _per_cent(accuracy: float | None) -> str:
    return NOT_MEASURED if accuracy is None or not np.isfinite(accuracy) else points(float(accuracy))
