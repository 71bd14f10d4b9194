"""The charts of a cell, drawn by matplotlib: as SVG for the page and as PNG for files and notebooks."""

from __future__ import annotations

import io
import itertools
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from matplotlib.scale import LogTransform
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D, Bbox, IdentityTransform, Transform, blended_transform_factory

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import write_file
from nola_vision.common.hashing import sha256
from nola_vision.common.text import printable
from nola_vision.reports.confusion import class_differences, entry_confusions
from nola_vision.reports.description import bytes_text
from nola_vision.reports.labels import along, place_at_points, short_name, short_names, spread, text_width
from nola_vision.reports.statistics import (
    Entry,
    Summary,
    cross_validated,
    first_accuracies,
    is_measured,
    kind,
    subject,
)
from nola_vision.reports.svg import inline_svg
from nola_vision.runs.published import published_result
from nola_vision.runs.store import read_run_file

# The subject of the page has the first colour; text in any of them can be read on PAPER (a contrast of 4.5 or more)
PALETTE = ("#0072b2", "#b84a00", "#007a5a", "#8f4b8f", "#8a5a00", "#c2285c", "#0a7c91", "#5f6b00")
INK, MUTED, GRID, PAPER = "#1f2328", "#595f69", "#e1e4e8", "#ffffff"  # of names, axes, grid lines, background
# The CSS variable that takes each colour's place in an SVG; without it the colour stays
CSS_COLOURS: Mapping[str, str] = {
    **{colour: f"--c{number}" for number, colour in enumerate(PALETTE)},
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
}
# What these variables are on a dark page
DARK_COLOURS: Mapping[str, str] = {
    "--c0": "#58b5f0",
    "--c1": "#ff9a57",
    "--c2": "#3fcf9d",
    "--c3": "#d79ad7",
    "--c4": "#dba945",
    "--c5": "#ff86a5",
    "--c6": "#4fc4d6",
    "--c7": "#b9c540",
    "--ink": "#e6e9ee",
    "--muted": "#a6aebb",
    "--grid": "#333a45",
    "--paper": "#14181f",
}

# Lengths in points, which are CSS pixels where the SVG is shown in its own size
_WIDTH, _HEIGHT = 420, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 32, 46
_TEXT, _LINE = 13, 15  # size and height of a line
_LABEL_GAP = 14  # between the lines and their labels
_MARGIN = 12  # of a PNG file
_TICK = 56  # between two sizes
_MOST_LABELS = 14  # as many as fit under each other
_MOST_MARKS = 24  # with a label next to them
_MOST_CHARACTERS = 18  # of a label
_MARKERS = "os^DvPX*"
_DASHES = ("--", ":", "-.")

_FEW_CLASSES = 20  # whose names and figures can be read
_MOST_CLASSES = 40
_MOST_LOG_BYTES = 2**23  # 1,000 epochs of 100 steps take under 5 MB
_MOST_LOGS = 100  # of a run
_MOST_LOSS = 1e30  # a larger one, infinity and nan are left out: training diverged
_MOST_PIXELS = 20_000  # of a side of a plot of many entries

Entries = Sequence[Entry]
Curve = Mapping[int, float]


@dataclass(frozen=True)
class Chart:
    """One chart of a cell.

    Args:
        name: of its file, and for ids: `pareto`.
        title: in words.
        alt: what it shows, with the figures.
        caption: one sentence on what is not labelled in it; may be empty.
        figure: 420 x 300 points, on a transparent background.
    """

    name: str
    title: str
    alt: str
    caption: str
    figure: Figure

    def svg(self, prefix: str) -> str:
        """The chart as an `<svg>` element of an HTML page, as described at `inline_svg`.

        Args:
            prefix: of its ids, unique in the page; letters, digits and hyphens.
        """
        with _drawing():
            return inline_svg(self.figure, prefix, self.title, self.alt, CSS_COLOURS)

    def png(self) -> bytes:
        """The chart as a PNG file with its title, 925 x 718 pixels."""
        return _png(self.figure, self.title)


class _Panel(NamedTuple):
    """The figure of a chart, and the rectangle that its data is drawn in.

    Args:
        figure: 420 x 300 points.
        xs, ys: the ranges of the data.
        right: the right edge of the rectangle in points.
        place: from data units to points.
        transform: from data units to the pixels of the figure, of any resolution.
    """

    figure: Figure
    xs: tuple[float, float]
    ys: tuple[float, float]
    right: float
    place: Transform
    transform: Transform

    def points(self, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Where some data is, in points."""
        return [(float(x), float(y)) for x, y in self.place.transform(points)]


class Look(NamedTuple):
    """How an entry is drawn in every chart of its cell, and its label in them."""

    name: str
    colour: str
    marker: str
    line: str
    strong: bool


@contextmanager
def _drawing() -> Iterator[None]:
    """Draws every text as it is, whatever it contains and whatever the user's matplotlib settings are."""
    # in a name with `$` mathtext finds a formula, which may not parse; TeX would run a name's commands
    settings = {
        "text.parse_math": False,
        "text.usetex": False,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # which comes with matplotlib, so that labels have the width they are given
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.simplefilter("ignore", UserWarning)  # a font without a name's letters, names too long for the layout
        yield


def cell_charts(found: Entries) -> tuple[list[Chart], list[str]]:
    """The charts of a cell that its runs have left the numbers for.

    Args:
        found: the entries of one cell, as `statistics.entries` returns them; the logs of training are read from the
            folders of their runs.

    Returns:
        The charts `pareto`, `by-split` and `learning-curves`, and a sentence for each file that could not be used.
    """
    looks = entry_looks([item for item, _ in found])
    curves, problems = entry_curves(found)
    with _drawing():
        charts = [pareto_chart(found, looks), split_chart(found, looks), learning_curves(curves, looks)]
    return [chart for chart in charts if chart is not None], problems


def entry_looks(summaries: Sequence[Summary]) -> dict[str, Look]:
    """How each entry of a cell is drawn, by its label; in the order of their importance, the subject first.

    What trains has a colour and a marker; methods on frozen features, the yardstick, are grey broken lines.
    """
    first = subject(summaries)
    ranked = sorted(summaries, key=lambda item: (item is not first, -(item.mean or 0), item.label))
    names = short_names([item.label for item in ranked], _MOST_CHARACTERS)
    looks: dict[str, Look] = {}
    trained = frozen = 0
    for item in ranked:
        if kind(item) == "frozen":
            look = Look(names[item.label], MUTED, "", _DASHES[frozen % len(_DASHES)], item is first)
            frozen += 1
        else:
            around = trained // len(PALETTE)  # the same colour comes with another marker
            marker = _MARKERS[(trained + around) % len(_MARKERS)]
            look = Look(names[item.label], PALETTE[trained % len(PALETTE)], marker, "-", item is first)
            trained += 1
        looks[item.label] = look
    return looks


def pareto_front(summaries: Iterable[Summary]) -> list[Summary]:
    """The entries that are more accurate than every entry with a smaller adapter file, by their means alone."""
    sized = [item for item in summaries if item.mean is not None and item.adapter_file_bytes]
    front: list[Summary] = []
    best = -math.inf
    for item in sorted(sized, key=lambda item: (item.adapter_file_bytes or 0, -(item.mean or 0))):
        mean = round(item.mean or 0, 4)  # equal accuracies may differ in their seventh digit
        if mean > best:
            front.append(item)
            best = mean
    return front


class _Mark(NamedTuple):
    """A marker with its bar and its label, in data units."""

    label: str
    size: int
    mean: float
    bar: tuple[float, float]
    look: Look
    text: str


def pareto_chart(found: Entries, looks: Mapping[str, Look]) -> Chart | None:
    """Top-1 accuracy over the size of the adapter file; None where no entry that trains has both.

    Bars are the std over runs (ddof 0), of a single run on a test set its 95 % interval. A method on frozen
    features is a line across, as is an entry without a file. Hollow markers are what the paper prints for an entry, at
    the size of our file. The thin line joins the Pareto front of the other entries.

    Args:
        found: the entries of one cell, as `statistics.entries` returns them.
        looks: as `entry_looks` returns them.
    """
    rank = list(looks)
    found = sorted((one for one in found if one[0].mean is not None), key=lambda one: rank.index(one[0].label))
    own, papers, lines = [], [], []
    for item, runs in found:
        assert item.mean is not None
        look = looks[item.label]
        if not (size := item.adapter_file_bytes) or kind(item) == "frozen":
            lines.append((item, item.mean, look))
            continue
        own.append(_Mark(item.label, size, item.mean, _bar(item), look, look.name))
        if printed := published_result(runs[0]):
            mean, std = float(printed["mean"]), float(printed.get("std", 0))
            plain = look._replace(strong=False)
            papers.append(_Mark(f"paper: {item.label}", size, mean, _around(mean, std), plain, "paper"))
    if not own:
        return None

    sized = [item for item, _ in found if item.label in {mark.label for mark in own}]
    bars = ["std"] * any(item.n > 1 for item in sized) + ["95 % interval"] * any(item.interval for item in sized)
    heading = "top-1 accuracy, %" + (f"; bars: {' or '.join(bars)}" if bars else "")
    column = _column([look for _, _, look in lines[:_MOST_LABELS]])
    sizes = _size_range([mark.size for mark in own])
    ticks = {tick: bytes_text(tick) for tick in _size_ticks(*sizes, _WIDTH - _LEFT - column)}
    means = [mean for _, mean, _ in lines]
    heights = _range([*(height for mark in [*own, *papers] for height in mark.bar), *means], least=2.0, bound=100.0)
    panel = _panel(heading, "adapter file, head included", column, sizes, heights, ticks, log=True)

    front = [(float(item.adapter_file_bytes or 0), item.mean or 0.0) for item in pareto_front(sized)]
    path = front[:1]
    for (_, before), corner in itertools.pairwise(front):
        path += [(corner[0], before), corner]
    _draw(panel, *zip(*path, strict=True), color=MUTED, linewidth=1, label="Pareto front")
    for item, mean, look in lines:
        _draw(panel, sizes, [mean, mean], color=MUTED, linewidth=1.2, linestyle=look.line, label=item.label)
    marks = [*papers, *reversed(own)]  # the subject on top
    for mark in marks:
        _draw(panel, [mark.size] * 2, mark.bar, color=mark.look.colour, linewidth=1.4, label=f"bar of {mark.label}")
    for mark in marks:
        look = mark.look
        _draw(
            panel, [mark.size], [mark.mean], color=look.colour, marker=look.marker, markersize=9 if look.strong else 7,
            markerfacecolor=PAPER if mark in papers else look.colour, markeredgewidth=1.5, label=mark.label,
        )  # fmt: skip
    _label_points(panel, [*own, *papers], means, path)
    _label_ends(panel, [(sizes[1], mean, look) for _, mean, look in lines[:_MOST_LABELS]])

    parts = []
    for item, _ in found:
        where = f"at {bytes_text(item.adapter_file_bytes)}" if item.adapter_file_bytes else "without a file"
        parts.append(f"{item.label} {item.mean:.1f} %{_bar_text(item)} {where}")
    parts += [f"{mark.label} {mark.mean:.1f} %" for mark in papers]
    keys = [
        ("thin line: Pareto front", len(front) > 1),
        ("broken lines: methods on frozen features", _any_frozen(found)),
        ("hollow markers: the paper's accuracy, at the size of our file", bool(papers)),
    ]
    return _chart("pareto", "Top-1 accuracy over the size of the adapter file", parts, _caption(keys), panel.figure)


def split_chart(found: Entries, looks: Mapping[str, Look]) -> Chart | None:
    """Top-1 accuracy by split: a point for each run, and a line for each entry through its means over inits.

    Where every entry has a single cross-validated run, by fold of its first repeat, whose folds all methods share.
    None where no entry has two splits or folds.

    Args:
        found: the entries of one cell, as `statistics.entries` returns them.
        looks: as `entry_looks` returns them.
    """
    place, accuracies = split_accuracies(found)
    places = sorted({split for of_splits in accuracies.values() for split in of_splits})
    if max(map(len, accuracies.values()), default=0) < 2:
        return None
    at = {split: number for number, split in enumerate(places)}
    means = {label: {split: fmean(accuracies[label][split]) for split in sorted(accuracies[label])} for label in looks
             if label in accuracies}  # fmt: skip
    labelled = list(means)[:_MOST_LABELS]
    inits = any(len(values) > 1 for of_splits in accuracies.values() for values in of_splits.values())
    heading = "top-1 accuracy, %" + ("; lines: mean over inits" if inits else "")
    every = [value for of_splits in accuracies.values() for values in of_splits.values() for value in values]
    heights = _range(every, least=2.0, bound=100.0)
    ticks = {float(at[split]): str(split) for split in places[:: math.ceil(len(places) / 12)]}
    column = _column([looks[label] for label in labelled])
    panel = _panel(heading, place, column, (-0.2, len(places) - 0.8), heights, ticks)
    for label in reversed(means):  # the subject on top
        look, of_splits = looks[label], means[label]
        if inits:
            pairs = [(at[split], value) for split, values in accuracies[label].items() for value in values]
            _draw(
                panel, *zip(*pairs, strict=True), linestyle="", marker="o", markersize=4.5, markeredgewidth=0,
                color=look.colour, alpha=0.5, label=f"runs of {label}",
            )  # fmt: skip
        _line(
            panel, [at[split] for split in of_splits], list(of_splits.values()), label, look, marked=len(places) <= 30
        )
    last = {label: max(of_splits) for label, of_splits in means.items()}
    _label_ends(panel, [(at[last[label]], means[label][last[label]], looks[label]) for label in labelled])
    parts = []
    for label, of_splits in means.items():
        least, most, mean = (of(of_splits.values()) for of in (min, max, fmean))
        parts.append(f"{label} {least:.1f} to {most:.1f} %, mean {mean:.1f} %")
    keys = [("dots: single runs", inits), ("broken lines: methods on frozen features", _any_frozen(found))]
    return _chart("by-split", f"Top-1 accuracy by {place}, {len(places)} {place}s", parts, _caption(keys), panel.figure)


def split_accuracies(found: Entries) -> tuple[str, dict[str, dict[int, list[float]]]]:
    """What the columns are, "split" or "fold", and each entry's accuracies in per cent by split or by fold."""
    by_split: dict[str, dict[int, list[float]]] = {}
    folds: dict[str, dict[int, list[float]]] = {}
    for item, runs in found:
        splits: dict[int, list[float]] = defaultdict(list)
        for row in runs:
            if not is_measured(row):
                continue
            values = first_accuracies(row)
            if cross_validated(row):
                folds[item.label] = {number: [value] for number, value in enumerate(values, start=1)}
            splits[row.split].append(fmean(values))
        if splits:
            by_split[item.label] = splits
    single = all(len(values) == 1 for splits in by_split.values() for values in splits.values())
    alike = len({tuple(of_folds) for of_folds in folds.values()}) == 1
    one_split = len({split for splits in by_split.values() for split in splits}) == 1
    if single and alike and one_split and folds.keys() == by_split.keys():
        return "fold", folds
    return "split", by_split


def read_losses(path: Path) -> list[tuple[int, float]]:
    """The training losses in a `metrics.csv`: (epoch, loss) of each logged step.

    Raises:
        NolaVisionError: the file cannot be read, or is not a log of a run.
    """
    head, _, body = read_run_file(path, _MOST_LOG_BYTES).partition(b"\n")
    names = head.strip().split(b",", maxsplit=1000)
    if names == [b""] or (b"epoch" in names and b"train_loss" not in names):  # nothing logged, nothing trained
        return []
    steps = []
    try:
        if not {b"epoch", b"train_loss"} <= set(names) or len(names) > 1000:
            raise ValueError("another header")
        of_epoch, of_loss = names.index(b"epoch"), names.index(b"train_loss")
        for line in body.splitlines():
            values = line.split(b",")
            if len(values) <= max(of_epoch, of_loss) or not values[of_loss]:
                continue  # a line of validation, or the half line of a killed run
            epoch, loss = float(values[of_epoch]), float(values[of_loss])
            if not abs(loss) < _MOST_LOSS:
                continue
            if not (0 <= epoch <= 1e9 and epoch.is_integer()):
                raise ValueError("an epoch that is not a whole number")
            steps.append((int(epoch), loss))
    except (ValueError, OverflowError) as error:
        raise NolaVisionError(
            f"{path} is not a log of a run: delete it (the learning curves then leave it out)"
        ) from error
    return steps


def entry_curves(found: Entries) -> tuple[dict[str, list[Curve]], list[str]]:
    """The training losses of each entry's completed final runs.

    Args:
        found: the entries of one cell, as `statistics.entries` returns them; runs without a log are left out.

    Returns:
        By the entry's label, the mean loss by epoch of each run; and a sentence for each file that could not be used.
    """
    curves: dict[str, list[Curve]] = defaultdict(list)
    problems = []
    for summary, runs in found:
        for run in runs:
            if run.folder is None or run.status != "completed":
                continue
            losses: dict[int, list[float]] = defaultdict(list)
            for path in _logs(run.folder):
                try:
                    for epoch, loss in read_losses(path):
                        losses[epoch].append(loss)
                except NolaVisionError as error:
                    problems.append(str(error))
            if losses:
                curves[summary.label].append({epoch: fmean(losses[epoch]) for epoch in sorted(losses)})
    return curves, problems


def _logs(folder: Path) -> list[Path]:
    """The logs of a run: `metrics-1.csv` and so on, one for each time it was resumed, and the last, `metrics.csv`."""
    numbered = (folder / f"metrics-{number}.csv" for number in range(1, _MOST_LOGS))
    return [path for path in [*itertools.takewhile(os.path.lexists, numbered), folder / "metrics.csv"]
            if os.path.lexists(path)]  # fmt: skip


def learning_curves(curves: Mapping[str, Sequence[Curve]], looks: Mapping[str, Look]) -> Chart | None:
    """Training loss of each entry over epochs: the mean of its runs, and from the least to the most of them.

    Args:
        curves: the losses, as `entry_curves` returns them.
        looks: as `entry_looks` returns them.
    """
    if not curves:
        return None
    shown = [label for label in looks if label in curves]
    by_epoch: dict[str, dict[int, list[float]]] = {}
    for label in shown:
        by_epoch[label] = defaultdict(list)
        for curve in curves[label]:
            for epoch, loss in curve.items():
                by_epoch[label][epoch + 1].append(loss)
    several = any(len(curves[label]) > 1 for label in shown)
    labelled = shown[:_MOST_LABELS]
    heading = "training loss" + ("; band: least to most of the runs" if several else "")
    epochs = {epoch for of_epochs in by_epoch.values() for epoch in of_epochs}
    first, last = min(epochs), max(max(epochs), min(epochs) + 1)
    losses = [loss for of_epochs in by_epoch.values() for values in of_epochs.values() for loss in values]
    ticks = {float(tick): f"{tick:g}" for tick in MaxNLocator(6, integer=True).tick_values(first, last)}
    column = _column([looks[label] for label in labelled])
    panel = _panel(heading, "epoch", column, (first, last), _range(losses, least=0), ticks)
    ends: dict[str, tuple[float, float, Look]] = {}
    parts: list[str] = []
    for label in reversed(shown):
        look, order = looks[label], sorted(by_epoch[label])
        means = [fmean(by_epoch[label][epoch]) for epoch in order]
        if len(curves[label]) > 1:
            least, most = ([end(by_epoch[label][epoch]) for epoch in order] for end in (min, max))
            edge = [*zip(order, least, strict=True), *reversed([*zip(order, most, strict=True)])]
            band = Polygon(edge, color=look.colour, alpha=0.15, linewidth=0, label=f"runs of {label}")
            band.set_transform(panel.transform)
            panel.figure.add_artist(band)
        _line(panel, order, means, label, look, marked=len(order) == 1)
        ends[label] = order[-1], means[-1], look
        runs = f" (mean of {len(curves[label])} runs)" if len(curves[label]) > 1 else ""
        parts.insert(0, f"{label} {means[0]:.3g} to {means[-1]:.3g} after {order[-1]} epochs{runs}")
    _label_ends(panel, [ends[label] for label in labelled])
    keys = [("lines: means over runs", several)]
    return _chart("learning-curves", "Training loss over epochs", parts, _caption(keys), panel.figure)


def _chart(name: str, title: str, parts: Sequence[str], caption: str, figure: Figure) -> Chart:
    """A chart whose text says what `parts` do, one for each entry, of many the first ones."""
    more = [f"and {len(parts) - _MOST_LABELS} more"] if len(parts) > _MOST_LABELS else []
    return Chart(name, title, printable(f"{title}: {'; '.join([*parts[:_MOST_LABELS], *more])}."), caption, figure)


def _caption(keys: Sequence[tuple[str, bool]]) -> str:
    """A sentence of those phrases that apply."""
    text = "; ".join(words for words, applies in keys if applies)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _any_frozen(found: Entries) -> bool:
    return any(kind(item) == "frozen" for item, _ in found)


def _panel(
    heading: str,
    under: str,
    column: float,
    xs: tuple[float, float],
    ys: tuple[float, float],
    ticks: Mapping[float, str],
    log: bool = False,
) -> _Panel:
    """A chart without its contents.

    It is a few lines and texts on a figure: matplotlib's own axes and ticks take most of the time of such a chart.

    Args:
        heading: above it, of the vertical axis.
        under: under it, of the horizontal axis.
        column: the width to its right.
        xs, ys: the ranges shown.
        ticks: labels under the horizontal axis; those outside of its range are left out.
        log: whether the horizontal axis is logarithmic.
    """
    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72, facecolor="none")
    width, height = _WIDTH - _LEFT - column, _HEIGHT - _TOP - _BOTTOM
    scaled: Transform = blended_transform_factory(LogTransform(10), IdentityTransform()) if log else IdentityTransform()
    (left, low), (right, high) = scaled.transform([*zip(xs, ys, strict=True)])
    box = Affine2D().translate(-left, -low).scale(width / (right - left), height / (high - low))
    place = scaled + box.translate(_LEFT, _BOTTOM)
    transform = place + Affine2D().scale(1 / _WIDTH, 1 / _HEIGHT) + figure.transFigure
    panel = _Panel(figure, xs, ys, _LEFT + width, place, transform)
    tolerance = 1e-9 * (ys[1] - ys[0])  # of the locator's rounding: 100.00000000000001
    for level in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(*ys):
        if not ys[0] - tolerance <= level <= ys[1] + tolerance:
            continue
        _draw(panel, xs, [level, level], color=GRID, linewidth=1, zorder=1)
        _write(figure, _LEFT - 8, panel.points([(xs[0], level)])[0][1], f"{level:g}", MUTED, align="right")
    _draw(panel, xs, [ys[0], ys[0]], color=MUTED, linewidth=1, zorder=1)
    for tick, text in ticks.items():
        if xs[0] <= tick <= xs[1]:
            _write(figure, panel.points([(tick, ys[0])])[0][0], _BOTTOM - 13, text, MUTED, align="center")
    _write(figure, 0, _HEIGHT - 12, heading, MUTED)
    _write(figure, _LEFT + width / 2, 12, under, MUTED, align="center")
    return panel


def _draw(panel: _Panel, xs: Iterable[float], ys: Iterable[float], **style: Any) -> None:
    """A line or markers, in data units."""
    panel.figure.add_artist(Line2D([*xs], [*ys], transform=panel.transform, **style))


def _write(figure: Figure, x: float, y: float, text: str, colour: str, align: str = "left", bold: bool = False) -> None:
    """A text, the middle of its small letters at a height."""
    figure.text(
        x / _WIDTH, (y - 0.36 * _TEXT) / _HEIGHT, text, fontsize=_TEXT, color=colour,
        horizontalalignment=align, verticalalignment="baseline", fontweight="bold" if bold else "normal",
    )  # fmt: skip


def _join(figure: Figure, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A thin line from what is labelled to its label, in points."""
    xs, ys = zip(start, end, strict=True)
    line = Line2D([x / _WIDTH for x in xs], [y / _HEIGHT for y in ys], color=MUTED, linewidth=0.7)
    figure.add_artist(line)


def _line(panel: _Panel, xs: Sequence[float], ys: Sequence[float], label: str, look: Look, marked: bool) -> None:
    marker = (look.marker or ".") if marked else ""
    _draw(
        panel, xs, ys, linestyle=look.line, marker=marker, color=look.colour, label=label,
        markersize=6 if look.strong else 5, linewidth=2.4 if look.strong else 1.4,
    )  # fmt: skip


def _column(looks: Sequence[Look]) -> float:
    """The width that labels at the ends of lines need."""
    return max((_LABEL_GAP + _name_width(look) + 3 for look in looks), default=_RIGHT)


def _name_width(look: Look) -> float:
    return text_width(look.name, _TEXT, "bold" if look.strong else "normal")


def _label_ends(panel: _Panel, ends: Sequence[tuple[float, float, Look]]) -> None:
    """Write the labels of lines to the right of the panel, each joined to its line's end, a point in data units."""
    if not ends:
        return
    figure, edge = panel.figure, panel.right
    points = panel.points([(x, y) for x, y, _ in ends])
    heights = spread([y for _, y in points], _LINE, _BOTTOM - 4, _HEIGHT - _TOP + 4)
    for (x, y), height, (_, _, look) in zip(points, heights, ends, strict=True):
        start = (max(x, edge) + 2 if x >= edge - 8 else x + 4, y)
        _join(figure, start, (edge + _LABEL_GAP - 2, height))
        _write(figure, edge + _LABEL_GAP, height, look.name, look.colour, bold=look.strong)


def _label_points(
    panel: _Panel, marks: Sequence[_Mark], lines: Sequence[float], path: Sequence[tuple[float, float]]
) -> None:
    """Write the labels of a Pareto chart next to its markers.

    Args:
        panel: of the chart.
        marks: the most important first; of many the first ones have a label.
        lines: heights of the lines across.
        path: the line of the Pareto front.
    """
    figure, (left, right) = panel.figure, panel.xs
    places = panel.points([(mark.size, mark.mean) for mark in marks])
    drawn = [*itertools.pairwise(path), *(((left, mean), (right, mean)) for mean in lines)]
    drawn += [((mark.size, mark.bar[0]), (mark.size, mark.bar[1])) for mark in marks]
    crossed = [along(start, end) for start, end in map(panel.points, drawn)]
    widths = [text_width(mark.text, _TEXT, "bold" if mark.look.strong else "normal") for mark in marks[:_MOST_MARKS]]
    labels = place_at_points(
        places[:_MOST_MARKS],
        [(width, _LINE - 1) for width in widths],
        hidden=np.array([(x - 5, y - 5, x + 5, y + 5) for x, y in places]),
        crossed=np.concatenate(crossed),
        area=(_LEFT - 4, _BOTTOM + 1, panel.right if lines else _WIDTH - 2, _HEIGHT - _TOP + 8),
    )
    for mark, place, label in zip(marks, places, labels, strict=False):
        if label is not None:
            if label.distance > 12:
                _join(figure, place, label.near)
            _write(figure, label.left, label.middle, mark.text, mark.look.colour, bold=mark.look.strong)


def _bar(item: Summary) -> tuple[float, float]:
    """From where to where an entry's bar goes, in per cent."""
    assert item.mean is not None
    return item.interval or _around(item.mean, item.std or 0.0)


def _around(mean: float, std: float) -> tuple[float, float]:
    """One std to both sides, as far as an accuracy can be."""
    return max(0.0, mean - std), min(100.0, mean + std)


def _bar_text(item: Summary) -> str:
    if item.interval:
        return f" (95 % interval {item.interval[0]:.1f} to {item.interval[1]:.1f})"
    return "" if item.std is None else f" (std {item.std:.1f})"


def _range(values: Sequence[float], least: float, bound: float = math.inf) -> tuple[float, float]:
    """The range of an axis: all values with some room, nothing under 0 or above `bound`, and `least` wide."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), (least - (high - low)) / 2, 1e-6 * max(1.0, abs(high)))
    return low - room if low < 0 else max(0.0, low - room), min(bound, high + room)


def _size_range(sizes: Sequence[float]) -> tuple[float, float]:
    """The range of a logarithmic axis of sizes, with room for labels."""
    room = max(0.3, 0.12 * (math.log10(max(sizes)) - math.log10(min(sizes))))
    return min(sizes) / 10**room, max(sizes) * 10**room


def _size_ticks(low: float, high: float, width: float) -> list[float]:
    """Round sizes on a logarithmic axis of a width in points, as many as have room."""
    decade = width / math.log10(high / low)
    choices: list[tuple[tuple[int, ...], float]] = [((1, 2, 5), 0.3 * decade), ((1, 3), 0.47 * decade), ((1,), decade)]
    steps, apart = next((choice for choice in choices if choice[1] >= _TICK), choices[-1])
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    return ticks[:: max(1, math.ceil(_TICK / apart))]


@_drawing()
def class_differences_plot(
    confusions: Mapping[str, Mapping[int, pd.DataFrame]], found: Entries, cell: str
) -> Figure | None:
    """By how many points each entry is above the best one, class by class; None where no two share a split.

    Of many classes those are drawn in which the entries differ most.

    Args:
        confusions: the sums, as `entry_confusions` returns them.
        found: the entries of the cell, for their means.
        cell: for the title.
    """
    means = {item.label: item.mean for item, _ in found if item.mean is not None}
    if len(confusions) < 2:
        return None
    best = max(confusions, key=lambda label: means.get(label, 0.0))
    differences = class_differences(confusions, best)
    if not differences:
        return None
    points = pd.DataFrame({f"{label} ({n} splits)": series for label, (n, series) in differences.items()}).T
    largest = points.abs().max().sort_values(ascending=False)
    shown = points[[name for name in points if name in set(largest.index[:_MOST_CLASSES])]]
    figure, (axes,) = _grid(1, 1, width=8, height=1.8 + 0.35 * len(shown))
    most = max(1.0, float(largest.iloc[0]))
    picture = axes.imshow(shown, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(shown.shape[1]), [short_name(name, 20) for name in shown.columns], rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), [short_name(name, 40) for name in shown.index], fontsize=8)
    if shown.shape[1] <= _FEW_CLASSES:
        for (line, column), value in np.ndenumerate(shown.to_numpy()):
            colour = "white" if abs(value) > 0.6 * most else "black"
            axes.text(column, line, f"{value:+.1f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(picture, label=f"points above {short_name(best, 30)}")
    part = f", the {shown.shape[1]} of {points.shape[1]} that differ most" if shown.shape[1] < points.shape[1] else ""
    axes.set_title(f"{short_name(cell, 60)}: accuracy by class{part}", fontsize=9)
    return figure


@_drawing()
def confusion_plot(by_split: Mapping[str, Mapping[int, pd.DataFrame]], cell: str) -> Figure | None:
    """Each entry's confusion matrix, in per cent of a true class's images; None where no run has one.

    Args:
        by_split: the sums, as `entry_confusions` returns them.
        cell: for the title.
    """
    confusions = {label: reduce(pd.DataFrame.add, of_splits.values()) for label, of_splits in by_split.items()}
    if not confusions:
        return None
    columns = min(3, len(confusions))
    figure, grid = _grid(math.ceil(len(confusions) / columns), columns)
    for axes in grid[len(confusions) :]:
        axes.set_axis_off()
    for axes, (label, counts) in zip(grid, confusions.items(), strict=False):
        shares = 100 * counts.div(counts.sum(axis=1).replace(0, np.nan), axis=0)
        picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        ticks = range(len(counts)) if len(counts) <= _FEW_CLASSES else []
        axes.set_xticks(ticks, [short_name(counts.columns[tick], 20) for tick in ticks], rotation=90, fontsize=7)
        axes.set_yticks(ticks, [short_name(counts.index[tick], 20) for tick in ticks], fontsize=7)
        axes.set_title(short_name(label, 30), fontsize=9)
    grid[0].set_ylabel("true class")
    grid[0].set_xlabel("predicted class")
    figure.colorbar(picture, ax=list(grid), label="% of the true class's images")
    figure.suptitle(f"{short_name(cell, 60)}: confusions, over runs", fontsize=9)
    return figure


def cell_plots(found: Entries, cell: str) -> tuple[dict[str, bytes], list[str]]:
    """Every plot of a cell that its runs have left the numbers for: its charts, differences by class and confusions.

    Args:
        found: the entries of the cell, as `statistics.entries` returns them; logs and confusion matrices are read from
            the folders of their runs.
        cell: for the titles.

    Returns:
        PNG files by what they show, and a sentence for each file that could not be used.
    """
    charts, bad_logs = cell_charts(found)
    confusions, bad_matrices = entry_confusions(found)
    drawn = {
        "class-differences": class_differences_plot(confusions, found, cell),
        "confusions": confusion_plot(confusions, cell),
    }
    plots = {chart.name: chart.png() for chart in charts}
    plots |= {name: _png(figure) for name, figure in drawn.items() if figure is not None}
    return plots, [*bad_logs, *bad_matrices]


def write_plots(plots: Mapping[str, Mapping[str, bytes]], out: Path) -> list[Path]:
    """Writes PNG files, given by cell and by what they show, and returns their paths.

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
        if len(encoded := cell.encode()) > 160:  # a file's name has 255 bytes
            stem = f"{encoded[:140].decode(errors='ignore')}-{sha256(encoded)[:10]}"
        for name, content in of_cell.items():
            written.append(out / f"{stem}-{name}.png")
            write_file(written[-1], content)
    return written


@_drawing()
def _png(figure: Figure, title: str = "") -> bytes:
    """A figure as a PNG file; a chart with a margin, and its title above it, which a page has as text."""
    content = io.BytesIO()
    dpi = min(150, _MOST_PIXELS / max(figure.get_size_inches()))
    if not title:
        figure.savefig(content, dpi=dpi, format="png", facecolor=PAPER)
        return content.getvalue()
    _write(figure, 0, _HEIGHT + 12, title, INK, bold=True)
    whole = Bbox([[-_MARGIN / 72, -_MARGIN / 72], [(_WIDTH + _MARGIN) / 72, (_HEIGHT + 21 + _MARGIN) / 72]])
    figure.savefig(content, dpi=dpi, format="png", facecolor=PAPER, bbox_inches=whole)
    figure.texts[-1].remove()
    return content.getvalue()


def _grid(lines: int, columns: int, width: float = 3.2, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure of so many axes, each of a size in inches, line by line."""
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)
