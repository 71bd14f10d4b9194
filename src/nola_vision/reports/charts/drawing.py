"""The parts of a chart: figure, axes and grid, lines, labels at the ends of lines; SVG and PNG.

Axes and ticks are lines and texts on the figure: matplotlib's own take most of the time of such a chart.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.scale import LogTransform
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D, Bbox, IdentityTransform, Transform, blended_transform_factory

from nola_vision.common.text import printable
from nola_vision.reports.charts.labels import along, place_at_points, spread, text_width
from nola_vision.reports.charts.looks import CSS_COLOURS, GRID, INK, MUTED, PAPER, Look
from nola_vision.reports.charts.svg import inline_svg

# Lengths in points, which are CSS pixels where the SVG is shown in its own size
WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 32, 46
TEXT, LINE = 13, 15  # size and height of a line
_LABEL_GAP = 14  # between the lines and their labels
MARKED = 12  # of a label with a marker, for it
_MARGIN = 12  # of a PNG file
MOST_LABELS = 14  # as many as fit under each other
_MOST_PIXELS = 20_000  # of a side of a plot of many entries

Point = tuple[float, float]


@dataclass(frozen=True)
class Chart:
    """One chart of a cell.

    Args:
        name: part of file names and ids, for example `pareto`.
        title: in words.
        alt: text alternative, with the numbers.
        caption: one sentence that explains what is not labelled in the chart; may be empty.
        figure: 420 x 300 points, on a transparent background.
    """

    name: str
    title: str
    alt: str
    caption: str
    figure: Figure

    @classmethod
    def of_entries(
        cls, name: str, title: str, parts: Sequence[str], keys: Sequence[tuple[str, bool]], figure: Figure
    ) -> Chart:
        """A chart with its alternative text and caption.

        Args:
            name: as above.
            title: as above.
            parts: one phrase per entry for the alternative text; at most 14 are used.
            keys: phrases for the caption, each with whether it applies.
            figure: as above.
        """
        more = [f"and {len(parts) - MOST_LABELS} more"] if len(parts) > MOST_LABELS else []
        alt = printable(f"{title}: {'; '.join([*parts[:MOST_LABELS], *more])}.")
        caption = "; ".join(phrase for phrase, applies in keys if applies)
        return cls(name, title, alt, f"{caption[0].upper()}{caption[1:]}." if caption else "", figure)

    def svg(self, prefix: str) -> str:
        """The chart as an `<svg>` element of an HTML page, as described at `inline_svg`.

        Args:
            prefix: of all ids, unique on the page; letters, digits and hyphens.
        """
        with plain_text():
            return inline_svg(self.figure, prefix, self.title, self.alt, CSS_COLOURS)

    def png(self) -> bytes:
        """The chart as a PNG file with its title, 925 x 718 pixels."""
        return png(self.figure, self.title)


@dataclass(frozen=True)
class Panel:
    """A figure with axes, and methods that draw on it.

    Args:
        figure: 420 x 300 points.
        xs, ys: ranges of the data.
        right: right edge of the data area in points.
        to_points: transform from data units to points.
        to_pixels: transform from data units to the pixels of the figure at any resolution.
    """

    figure: Figure
    xs: tuple[float, float]
    ys: tuple[float, float]
    right: float
    to_points: Transform
    to_pixels: Transform

    @classmethod
    def with_axes(
        cls,
        heading: str,
        x_label: str,
        margin: float,
        xs: tuple[float, float],
        ys: tuple[float, float],
        ticks: Mapping[float, str],
        log: bool = False,
    ) -> Panel:
        """An empty chart.

        Args:
            heading: label of the vertical axis, at the top.
            x_label: label of the horizontal axis.
            margin: space on the right, in points.
            xs, ys: ranges of the axes.
            ticks: labels of the horizontal axis; those outside its range are omitted.
            log: whether the horizontal axis is logarithmic.
        """
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, facecolor="none")
        width, height = WIDTH - LEFT - margin, HEIGHT - TOP - BOTTOM
        scaled: Transform = IdentityTransform()
        if log:
            scaled = blended_transform_factory(LogTransform(10), IdentityTransform())
        (left, low), (right, high) = scaled.transform([*zip(xs, ys, strict=True)])
        box = Affine2D().translate(-left, -low).scale(width / (right - left), height / (high - low))
        to_points = scaled + box.translate(LEFT, BOTTOM)
        to_pixels = to_points + Affine2D().scale(1 / WIDTH, 1 / HEIGHT) + figure.transFigure
        panel = cls(figure, xs, ys, LEFT + width, to_points, to_pixels)
        tolerance = 1e-9 * (ys[1] - ys[0])  # rounding of the locator: 100.00000000000001
        levels = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(*ys)
        levels = [level for level in levels if ys[0] - tolerance <= level <= ys[1] + tolerance]
        grid = [(x, level) for level in levels for x in (*xs, math.nan)]  # one line for all: quicker to draw
        panel.draw(*zip(*grid, strict=True), color=GRID, linewidth=1, zorder=1)
        for level in levels:
            panel.write(LEFT - 8, panel.points([(xs[0], level)])[0][1], f"{level:g}", MUTED, align="right")
        panel.draw(xs, [ys[0], ys[0]], color=MUTED, linewidth=1, zorder=1)
        for tick, text in ticks.items():
            if xs[0] <= tick <= xs[1]:
                panel.write(panel.points([(tick, ys[0])])[0][0], BOTTOM - 13, text, MUTED, align="center")
        panel.write(0, HEIGHT - 12, heading, MUTED)
        panel.write(LEFT + width / 2, 12, x_label, MUTED, align="center")
        return panel

    def points(self, places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Positions in points of places in data units."""
        return [(float(x), float(y)) for x, y in self.to_points.transform(places)]

    def draw(self, xs: Iterable[float], ys: Iterable[float], **style: Any) -> None:
        """Draws a line or markers, in data units."""
        self.figure.add_artist(Line2D([*xs], [*ys], transform=self.to_pixels, **style))

    def draw_entry(self, xs: Sequence[float], ys: Sequence[float], label: str, look: Look, marked: bool) -> None:
        """Draws the line of an entry, in data units, with markers if `marked`."""
        self.draw(
            xs, ys, linestyle=look.line, marker=(look.marker or ".") if marked else "", color=look.colour, label=label,
            markersize=6 if look.strong else 5, linewidth=2.4 if look.strong else 1.4,
        )  # fmt: skip

    def write(self, x: float, y: float, text: str, colour: str, align: str = "left", bold: bool = False) -> None:
        """Writes a text at a position in points, vertically centred on its small letters."""
        _write(self.figure, x, y, text, colour, align, bold)

    def connect(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draws a thin line from a labelled point to its label, in points."""
        xs, ys = zip(start, end, strict=True)
        line = Line2D([x / WIDTH for x in xs], [y / HEIGHT for y in ys], color=MUTED, linewidth=0.7)
        self.figure.add_artist(line)

    def label_ends(self, ends: Sequence[tuple[float, float, Look]], marked: bool = False) -> None:
        """Writes the labels of lines to the right of the data area, each connected to its line's end in data units.

        With `marked` a label begins with the marker of its line.
        """
        if not ends:
            return
        points = self.points([(x, y) for x, y, _ in ends])
        heights = spread([y for _, y in points], LINE, BOTTOM - 4, HEIGHT - TOP + 4)
        for (x, y), height, (_, _, look) in zip(points, heights, ends, strict=True):
            start = (max(x, self.right) + 2 if x >= self.right - 8 else x + 4, y)
            self.connect(start, (self.right + _LABEL_GAP - 2, height))
            left = self.right + _LABEL_GAP
            if marked and look.marker:
                place = [(left + 4) / WIDTH], [height / HEIGHT]
                self.figure.add_artist(Line2D(*place, color=look.colour, marker=look.marker, markersize=6))
                left += MARKED
            self.write(left, height, look.name, look.colour, bold=look.strong)

    def label_points(
        self,
        labelled: Sequence[tuple[Point, Look]],
        markers: Sequence[Point],
        lines: Iterable[Sequence[Point]],
        right: float,
    ) -> None:
        """Writes labels next to points, where there is room. All points are in data units.

        Args:
            labelled: the points, each with the look that names it, the most important first.
            markers: what labels do not cover.
            lines: by their corners; labels do not cover them if possible.
            right: edge of the area for labels, in points.
        """
        if not labelled:
            return
        places = self.points([point for point, _ in labelled])
        drawn = [pair for corners in lines if corners for pair in itertools.pairwise(self.points(corners))]
        labels = place_at_points(
            places,
            [(name_width(look), LINE - 1) for _, look in labelled],
            hidden=np.array([(x - 5, y - 5, x + 5, y + 5) for x, y in self.points(markers)]),
            crossed=np.concatenate([along(*pair) for pair in drawn] or [np.empty((0, 4))]),
            area=(LEFT - 4, BOTTOM + 1, right, HEIGHT - TOP + 8),
        )
        for place, (_, look), label in zip(places, labelled, labels, strict=True):
            if label is not None:
                if label.distance > 12:
                    self.connect(place, label.near)
                self.write(label.left, label.middle, look.name, look.colour, bold=look.strong)


@contextmanager
def plain_text() -> Iterator[None]:
    """Draws texts literally, independent of their characters and of the user's matplotlib settings."""
    # with `$` in a name mathtext would parse a formula, and TeX would run commands
    settings = {
        "text.parse_math": False,
        "text.usetex": False,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib, so that the widths of labels are known
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.simplefilter("ignore", UserWarning)  # missing glyphs, names too long for the layout
        yield


def label_margin(looks: Sequence[Look]) -> float:
    """The space in points that labels at the ends of lines need on the right."""
    return max((_LABEL_GAP + name_width(look) + 3 for look in looks), default=RIGHT)


def name_width(look: Look) -> float:
    """The width in points of an entry's label."""
    return text_width(look.name, TEXT, "bold" if look.strong else "normal")


def axis_range(values: Sequence[float], least: float, bound: float = math.inf) -> tuple[float, float]:
    """The range of an axis: all values with a margin, not under 0 or above `bound`, at least `least` wide."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), (least - (high - low)) / 2, 1e-6 * max(1.0, abs(high)))
    return low - room if low < 0 else max(0.0, low - room), min(bound, high + room)


@plain_text()
def png(figure: Figure, title: str = "") -> bytes:
    """A figure as a PNG file; a chart gets a margin and its title."""
    content = io.BytesIO()
    dpi = min(150, _MOST_PIXELS / max(figure.get_size_inches()))
    if not title:
        figure.savefig(content, dpi=dpi, format="png", facecolor=PAPER)
        return content.getvalue()
    _write(figure, 0, HEIGHT + 12, title, INK, bold=True)
    whole = Bbox([[-_MARGIN / 72, -_MARGIN / 72], [(WIDTH + _MARGIN) / 72, (HEIGHT + 21 + _MARGIN) / 72]])
    figure.savefig(content, dpi=dpi, format="png", facecolor=PAPER, bbox_inches=whole)
    figure.texts[-1].remove()
    return content.getvalue()


def _write(figure: Figure, x: float, y: float, text: str, colour: str, align: str = "left", bold: bool = False) -> None:
    figure.text(
        x / WIDTH, (y - 0.36 * TEXT) / HEIGHT, text, fontsize=TEXT, color=colour,
        horizontalalignment=align, verticalalignment="baseline", fontweight="bold" if bold else "normal",
    )  # fmt: skip
