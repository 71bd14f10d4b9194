"""Top-1 accuracy over the size of the adapter file, with the Pareto front."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from nola_vision.reports.charts.drawing import LEFT, MOST_LABELS, WIDTH, Chart, Panel, axis_range, label_margin
from nola_vision.reports.charts.looks import MUTED, PAPER, Look
from nola_vision.reports.entries import Entry, Summary, any_frozen, common_splits, kind
from nola_vision.reports.formatting import bytes_text
from nola_vision.reports.published import published_result

_TICK = 56  # points between two ticks
_MOST_MARKS = 24  # with a label


def pareto_front(summaries: Iterable[Summary]) -> list[Summary]:
    """The entries whose mean accuracy is higher than that of every entry with a smaller adapter file.

    Entries with fewer splits than `common_splits` are left out: a lucky mean over few is not evidence against others.
    """
    sized = [item for item in summaries if item.mean is not None and item.adapter_file_bytes]
    most = common_splits(sized)
    sized = [item for item in sized if item.splits >= most]
    front: list[Summary] = []
    best = -math.inf
    for item in sorted(sized, key=lambda item: (item.adapter_file_bytes or 0, -(item.mean or 0))):
        mean = round(item.mean or 0, 4)  # equal accuracies may differ in the seventh digit
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


def pareto_chart(entries: Sequence[Entry], looks: Mapping[str, Look]) -> Chart | None:
    """Top-1 accuracy over the size of the adapter file; None if no entry that trains has both.

    Bars are the std over runs (ddof 0), or the 95 % interval of a single run on a test set. Methods on frozen features
    and entries without a file are horizontal lines. Hollow markers are the paper's accuracies, at the size of our file.
    The thin line is the Pareto front of the other entries.

    Args:
        entries: of one cell.
        looks: as `entry_looks` returns them.
    """
    rank = list(looks)
    measured = [entry for entry in entries if entry.summary.mean is not None]
    entries = sorted(measured, key=lambda entry: rank.index(entry.summary.label))
    own, papers, lines = [], [], []
    for item, runs in entries:
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

    sized = [item for item, _ in entries if item.label in {mark.label for mark in own}]
    bars = ["std"] * any(item.n > 1 for item in sized) + ["95 % interval"] * any(item.interval for item in sized)
    heading = "top-1 accuracy, %" + (f"; bars: {' or '.join(bars)}" if bars else "")
    margin = label_margin([look for _, _, look in lines[:MOST_LABELS]])
    sizes = size_range([mark.size for mark in own])
    ticks = {tick: bytes_text(tick) for tick in size_ticks(*sizes, WIDTH - LEFT - margin)}
    means = [mean for _, mean, _ in lines]
    heights = axis_range([*(height for mark in [*own, *papers] for height in mark.bar), *means], least=2.0, bound=100.0)
    panel = Panel.with_axes(heading, "adapter file, head included", margin, sizes, heights, ticks, log=True)

    front = [(float(item.adapter_file_bytes or 0), item.mean or 0.0) for item in pareto_front(sized)]
    path = front[:1]
    for (_, before), corner in itertools.pairwise(front):
        path += [(corner[0], before), corner]
    panel.draw(*zip(*path, strict=True), color=MUTED, linewidth=1, label="Pareto front")
    for item, mean, look in lines:
        panel.draw(sizes, [mean, mean], color=MUTED, linewidth=1.2, linestyle=look.line, label=item.label)
    marks = [*papers, *reversed(own)]  # draws the subject last
    for mark in marks:
        panel.draw([mark.size] * 2, mark.bar, color=mark.look.colour, linewidth=1.4, label=f"bar of {mark.label}")
    for mark in marks:
        look = mark.look
        panel.draw(
            [mark.size],
            [mark.mean],
            color=look.colour,
            marker=look.marker,
            markersize=9 if look.strong else 7,
            markerfacecolor=PAPER if mark in papers else look.colour,
            markeredgewidth=1.5,
            label=mark.label,
        )
    marks = [*own, *papers]
    drawn = [path, *([(sizes[0], mean), (sizes[1], mean)] for mean in means)]
    drawn += ([(mark.size, end) for end in mark.bar] for mark in marks)
    panel.label_points(
        [((mark.size, mark.mean), mark.look._replace(name=mark.text)) for mark in marks[:_MOST_MARKS]],
        [(mark.size, mark.mean) for mark in marks],
        drawn,
        panel.right if lines else WIDTH - 2,
    )
    panel.label_ends([(sizes[1], mean, look) for _, mean, look in lines[:MOST_LABELS]])

    parts = []
    for item, _ in entries:
        where = f"at {bytes_text(item.adapter_file_bytes)}" if item.adapter_file_bytes else "without a file"
        parts.append(f"{item.label} {item.mean:.1f} %{_bar_text(item)} {where}")
    parts += [f"{mark.label} {mark.mean:.1f} %" for mark in papers]
    keys = [
        ("thin line: Pareto front", len(front) > 1),
        ("broken lines: methods on frozen features", any_frozen(entries)),
        ("hollow markers: the paper's accuracy, at the size of our file", bool(papers)),
    ]
    return Chart.of_entries("pareto", "Top-1 accuracy over the size of the adapter file", parts, keys, panel.figure)


def _bar(item: Summary) -> tuple[float, float]:
    """The ends of an entry's bar, in per cent."""
    assert item.mean is not None
    return item.interval or _around(item.mean, item.std or 0.0)


def _around(mean: float, std: float) -> tuple[float, float]:
    """One std to both sides, limited to 0 to 100 %."""
    return max(0.0, mean - std), min(100.0, mean + std)


def _bar_text(item: Summary) -> str:
    if item.interval:
        return f" (95 % interval {item.interval[0]:.1f} to {item.interval[1]:.1f})"
    return "" if item.std is None else f" (std {item.std:.1f})"


def size_range(sizes: Sequence[float]) -> tuple[float, float]:
    """The range of a logarithmic axis of sizes, with a margin for labels."""
    room = max(0.3, 0.12 * (math.log10(max(sizes)) - math.log10(min(sizes))))
    return min(sizes) / 10**room, max(sizes) * 10**room


def size_ticks(low: float, high: float, width: float) -> list[float]:
    """Round sizes for a logarithmic axis of a width in points, as many as fit."""
    decade = width / math.log10(high / low)
    choices: list[tuple[tuple[int, ...], float]] = [((1, 2, 5), 0.3 * decade), ((1, 3), 0.47 * decade), ((1,), decade)]
    steps, distance = next((choice for choice in choices if choice[1] >= _TICK), choices[-1])
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
    return ticks[:: max(1, math.ceil(_TICK / distance))]
