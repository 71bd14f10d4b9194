"""The report page: each cell's verdict, tables, charts and misclassified images in one HTML file that loads nothing.

Everything that the page shows is computed here as plain values (the views); `templates/report.html.j2` arranges them.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from nola_vision import __version__
from nola_vision.common.text import excerpt, last_part, printable
from nola_vision.reports import tables
from nola_vision.reports.confusion import confused_pairs
from nola_vision.reports.description import (
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
from nola_vision.reports.labels import short_names
from nola_vision.reports.plots import CSS_COLOURS, DARK_COLOURS, cell_charts, entry_looks
from nola_vision.reports.statistics import Summary, entries, kind, rivals, run_accuracy, subject
from nola_vision.reports.tables import Sheet
from nola_vision.reports.tested import Mistake, Tested, mistakes, read_tested
from nola_vision.reports.verdict import cell_verdict
from nola_vision.runs.record import Row, count_once

MOST_IMAGE_BYTES = 2**21  # of the user's images in one page, as text
_MOST_WARNINGS = 5  # of the runs of one cell
_MOST_PHOTOS = 24  # of one cell
_MOST_RUNS_WITH_PHOTOS = 4  # whose thumbnails are read on a page of one cell
_MOST_CLASSES = 40  # in a table without a fold; of more, the worst are shown
_WORST_CLASSES = 20
_MOST_PAIRS = 10
_MATRIX_CLASSES = 20
_LETTERS = "[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]+"
_RIGHT_TO_LEFT = re.compile(f"{_LETTERS}(?:[ _-]+{_LETTERS})*")
_HEATS = 5  # steps of colour in the confusion matrix
_LABEL = 18  # characters of a name in the matrix
_UPRIGHT = 3  # characters of a name that fit above a column of the matrix
_TINY = 48  # pixels of an image that is enlarged without smoothing
_DARK = "@media screen and (prefers-color-scheme: dark)"


@dataclass(frozen=True)
class Page:
    """The page's text, and how many cells, runs and images of the data are in it."""

    text: str
    cells: int
    runs: int
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
    caption: str


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
    """A true class; its label is short, and no other class's."""

    label: str
    name: str
    cells: Sequence[Heat]


@dataclass(frozen=True)
class ConfusionView:
    """The most confused pairs, and the matrix of the classes in them."""

    note: str
    pairs: Sequence[Pair]
    more_pairs: str
    caption: str
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
    """A column of the table of runs; `kind` is the class of its cells: number, name, long or nothing."""

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
    rows: Sequence[Row],
    problems: Sequence[str] = (),
    columns: Sequence[str] = (),
    images: bool = True,
    folders: Sequence[str | Path] = (),
) -> Page:
    """The page of some rows. Of files it opens only those with fixed names in the folders that the rows were read from.

    Args:
        rows: of any runs.
        problems: a sentence for each file that could not be read.
        columns: further metrics, as in `tables.cell_sheets`.
        images: whether misclassified images may be in it.
        folders: that the rows were read from. Paths on the page are under these: where they are is not shown.
    """
    read, rows = len(rows), count_once(rows)
    tested, others = tables.tested_cells(rows)
    of_cells: dict[str, list[Row]] = {cell: [] for cell in tested}
    for row in rows:
        if row.cell in of_cells:
            of_cells[row.cell].append(row)
    budget = MOST_IMAGE_BYTES if images else 0
    found = list(problems)
    titles = _titles(of_cells)
    cells: list[CellView] = []
    for number, cell in enumerate(tested):
        share = budget // (len(tested) - number)  # what a cell does not use is for those after it
        cells.append(_cell(of_cells[cell], titles[cell], columns, f"cell{number + 1}", share, found))
        budget -= sum(len(photo.source) for photo in cells[-1].gallery.photos) if cells[-1].gallery else 0
    shown = _below(folders)
    cells = [replace(cell, verdict=[shown(line) for line in cell.verdict]) for cell in cells]
    view = PageView(
        title=cells[0].title if len(cells) == 1 else _page_title(len(cells), rows),
        cells=cells,
        untested=[printable(f"{cell}: {reason or 'no error was recorded'}") for cell, reason in others.items()],
        problems=[printable(shown(problem)) for problem in dict.fromkeys(found)],
        footer=f"Generated by nola-vision {__version__} from {plural('row', read)}. It loads no external resources.",
    )
    return Page(_render(view), len(cells), len(rows), sum(len(cell.gallery.photos) for cell in cells if cell.gallery))


def _below(folders: Sequence[str | Path]) -> Callable[[str], str]:
    """Takes the way to the folders out of sentences: `/home/me/runs/a/row.json` becomes `a/row.json`."""
    roots = {str(path) for folder in folders for path in (Path(folder).resolve(), Path(folder).absolute())}
    starts = {f"{text}{os.sep}" for root in roots if root != os.sep for text in (root, printable(root))}
    if not starts:
        return str
    pattern = re.compile("|".join(re.escape(start) for start in sorted(starts, key=len, reverse=True)))
    return lambda sentence: pattern.sub("", sentence)


def _page_title(cells: int, rows: Sequence[Row]) -> str:
    """The title of a page of no cell, which states what runs there are, or of several."""
    if cells:
        return f"{plural('cell', cells)}, {plural('run', len(rows))}"
    ended = Counter((row.stage, row.status) for row in rows)
    return "No completed final run: " + ", ".join(
        f"{plural(f'{stage} run', number)} {status}" for (stage, status), number in ended.items()
    )


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
    environment = Environment(
        loader=PackageLoader("nola_vision.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["isolated"] = _isolated
    return environment


def _isolated(text: str) -> Markup:
    """Text whose words of right-to-left scripts do not change the order of the figures next to them."""
    return Markup(_RIGHT_TO_LEFT.sub(r"<bdi>\g<0></bdi>", str(escape(text))))


def _style() -> str:
    """The style sheet, after the colours of both themes."""
    light = "".join(f"{name}: {colour}; " for colour, name in CSS_COLOURS.items())
    dark = "".join(f"{name}: {colour}; " for name, colour in DARK_COLOURS.items())
    return f":root {{ {light}}}\n{_DARK} {{ :root {{ {dark}}} }}\n{_asset('report.css')}"


def _asset(name: str) -> str:
    return resources.files("nola_vision.reports").joinpath("templates", name).read_text(encoding="utf-8")


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
    tested = read_tested(own, runs[own], problems) if own else None
    of_other = read_tested(other, runs[other], problems) if other and tested else None
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
        facts=[*cell_facts(rows), *(("note", text) for text in _warnings(runs[own] if own else ()))],
        sheets=tables.cell_sheets(rows, cell, columns),
        charts=[ChartView(chart.title, chart.svg(f"{anchor}-{chart.name}"), chart.caption) for chart in charts],
        classes=_classes(tested, of_other, colours[printable(tested.label)]) if tested else None,
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


def _classes(own: Tested, other: Tested | None, colour: str) -> ClassesView:
    """Accuracy by class, the class with the lowest first; classes without a tested image are left out.

    Two methods are compared on the splits that both have, since the images of a split may be harder than another's.
    """
    names, what = own.class_names, _what(own)
    if other is not None and other.class_names == names and (shared := own.splits & other.splits):
        own, other = own.on(shared), other.on(shared)
        if max(own.summary.completed, other.summary.completed) > 1:
            splits = "" if len(shared) == 1 else ", on the splits of both"
            what = f"Over {_runs_text(own)} and {_runs_text(other)}{splits}."
    else:
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
    labels = short_printable(own.label), short_printable(other.label) if other else None
    return ClassesView(labels[0], colour, labels[1], what + part, lines[:shown], lines[shown:])


def _what(tested: Tested) -> str:
    """Which images and runs the counts are of, as a sentence."""
    if tested.summary.completed > 1:
        return f"Over {_runs_text(tested)}."
    if tested.summary.cross_validated:
        return "Each image was tested once, in one fold."
    return "Counts of one run on its test images."


def _runs_text(tested: Tested) -> str:
    completed, read = tested.summary.completed, len(tested.runs)
    which = f"{read} of the {completed:,} runs" if read < completed else "the run" if read == 1 else f"the {read} runs"
    return f"{which} of {short_printable(tested.label)}"


def _confusion(own: Tested) -> ConfusionView | None:
    """The pairs of classes that were confused most often; None if no image was misclassified."""
    names = [short_printable(name) for name in own.class_names]
    pairs = confused_pairs(own.counts)
    if not len(pairs):
        return None
    kept = list(range(len(names)))
    if len(names) > _MATRIX_CLASSES:
        found = pairs[: _MATRIX_CLASSES**2, :2].ravel().tolist()  # n pairs have at least sqrt(n) classes
        kept = sorted(list(dict.fromkeys(found))[:_MATRIX_CLASSES])
    labels = short_names([own.class_names[i] for i in kept], _LABEL)
    several = len(own.runs) > 1
    part = "" if len(kept) == len(names) else f" of the {len(kept)} classes in the most confused pairs"
    unit = "% of the true class's images" if several else "images"
    rest = len(pairs) - _MOST_PAIRS
    return ConfusionView(
        note=f"{_what(own)} An image counts once in each run." if several else _what(own),
        pairs=[
            Pair(names[true], names[predicted], f"{count:,}", _per_cent(own.shares[true, predicted]))
            for true, predicted, count in pairs[:_MOST_PAIRS].tolist()
        ],
        more_pairs=f"and {plural('more pair', rest)}" if rest > 0 else "",
        caption=f"Confusion matrix{part}: {unit}; true class by row, predicted class by column",
        upright=max(map(len, labels.values())) <= _UPRIGHT,
        lines=[
            MatrixLine(
                labels[own.class_names[i]], excerpt(printable(own.class_names[i])), [_heat(own, i, j) for j in kept]
            )
            for i in kept
        ],
    )


def _heat(own: Tested, true: int, predicted: int) -> Heat:
    count, share = int(own.counts[true, predicted]), float(own.shares[true, predicted])
    if not count:
        return Heat("", 0, true == predicted)
    in_per_cent = f"{share:.0f}" if share >= 0.5 else "<1"
    text = in_per_cent if len(own.runs) > 1 else f"{count:,}"
    return Heat(text, max(1, math.ceil(share / 100 * _HEATS)), true == predicted)


def _gallery(own: Tested, most_bytes: int, problems: list[str]) -> GalleryView | None:
    """The misclassified images with the highest probabilities, each once; None if no run has a thumbnail."""
    # each costs 24 images to decode, and the first alone fills a gallery
    shown = own.first(max(1, _MOST_RUNS_WITH_PHOTOS * most_bytes // MOST_IMAGE_BYTES))
    photos: list[Photo] = []
    for mistake in mistakes(shown, problems):
        photo = _photo(mistake, own)
        most_bytes -= len(photo.source)
        if len(photos) == _MOST_PHOTOS or most_bytes < 0:
            break
        photos.append(photo)
    if not photos:
        return None
    wrong = shown.misclassified
    which = "All" if len(photos) == wrong else f"{len(photos)} of the"
    label = short_printable(own.label)
    of_runs = "" if own.summary.completed == 1 else f" in {plural('run', len(shown.runs))} of {label}"
    probabilities = "calibrated" if shown.calibrated else "not calibrated"
    return GalleryView(
        f"{which} {plural('image', wrong)} that {'was' if wrong == 1 else 'were'} misclassified{of_runs}, those "
        f"predicted with the highest probability first. Probabilities are {probabilities}.",
        photos,
    )


def _photo(mistake: Mistake, own: Tested) -> Photo:
    thumbnail = mistake.thumbnail
    wrong, tested = own.times_wrong(thumbnail.index)
    return Photo(
        source=f"data:image/jpeg;base64,{base64.b64encode(thumbnail.jpeg).decode()}",
        width=thumbnail.width,
        height=thumbnail.height,
        tiny=max(thumbnail.width, thumbnail.height) < _TINY,
        name=printable(thumbnail.name),
        true=short_printable(own.class_names[mistake.true]),
        predicted=short_printable(own.class_names[mistake.predicted]),
        probability=f"{100 * mistake.probability:.0f} %",
        runs=f"misclassified in {wrong} of {plural('run', tested)}" if len(own.runs) > 1 else "",
    )


_RUN_COLUMNS = (
    RunColumn("status"),
    RunColumn("stage"),
    RunColumn("method", "name"),
    RunColumn("split", "number"),
    RunColumn("init", "number"),
    RunColumn("accuracy %", "number"),
    RunColumn("validation %", "number"),
    RunColumn("file bytes", "number"),
    RunColumn("seconds", "number"),
    RunColumn("device", "name"),
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


def _warnings(runs: Sequence[Row]) -> list[str]:
    """What the runs warned of, each once, with file names below the data's folder instead of whole paths."""
    found = []
    for row in runs:
        root = str(row.config["data"].get("root") or "").rstrip("/\\")
        found += [text.replace(root, last_part(root)) if root else text for text in row.warnings]
    return [excerpt(printable(text), 300) for text in dict.fromkeys(found)][:_MOST_WARNINGS]


def _run_texts(row: Row) -> tuple[str, ...]:
    found = run_accuracy(row)
    accuracy = row.test_accuracy if found is None else found.value
    fold = row.config["data"].get("fold") if row.stage == "fold" else None
    fold = fold if type(fold) is int else None
    texts = (
        row.status,
        row.stage if fold is None else f"fold {fold + 1}",
        row.method,
        str(row.split),
        "" if row.init is None else str(row.init),
        "" if accuracy is None else f"{100 * accuracy:.1f}",
        "" if row.val_accuracy is None else f"{100 * row.val_accuracy:.1f}",
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
