"""Accuracy over the size of the whole adapter file, of methods at byte budgets, with the Pareto front."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from nola_vision.reports.charts.drawing import (
    LEFT,
    MARKED,
    MOST_LABELS,
    WIDTH,
    Chart,
    Panel,
    Point,
    axis_range,
    label_margin,
)
from nola_vision.reports.charts.looks import INK, MUTED, Look
from nola_vision.reports.charts.pareto import pareto_front, size_ticks
from nola_vision.reports.entries import Entry, any_frozen, of_method
from nola_vision.reports.formatting import bytes_text
from nola_vision.reports.statistics import split_interval
from nola_vision.runs.budget_names import split_budget

_ROOM = 10**0.1  # factor between the smallest or largest file and the end of the axis


def league_chart(entries: Sequence[Entry], looks: Mapping[str, Look]) -> Chart | None:
    """Mean accuracy over the size of the file, a colour and a marker per method; None if no entry has both.

    The heavy line is the Pareto front. Bars are Student's t 95 % intervals over splits, of its points and of the cell's
    subject: those of ten methods at one size would cover each other. Methods without a file are horizontal lines.

    Args:
        entries: of one cell.
        looks: as `entry_looks` returns them.
    """
    measured = [entry for entry in entries if entry.summary.mean is not None]
    sized = [entry for entry in measured if entry.summary.adapter_file_bytes]
    if not sized:
        return None
    lines = [entry for entry in measured if not entry.summary.adapter_file_bytes]
    methods: dict[str, list[Entry]] = {}
    for label in looks:
        for entry in sized:
            if entry.summary.label == label:
                methods.setdefault(of_method(entry.summary), []).append(entry)
    for points in methods.values():
        points.sort(key=_point)
    front = pareto_front([item for item, _ in sized])
    bars = {}
    for item, runs in sized:
        if (looks[item.label].strong or item in front) and (interval := split_interval(runs)):
            bars[item.label] = [min(100.0, max(0.0, end)) for end in interval]
    heights = [item.mean or 0.0 for item, _ in measured] + [end for bar in bars.values() for end in bar]
    ends = {method: _point(points[-1]) for method, points in methods.items()}
    widest = max(size for size, _ in ends.values())
    at_end = [method for method, (size, _) in ends.items() if size > widest / 1.5]
    margin = label_margin([looks[methods[method][0].summary.label] for method in at_end]) + MARKED
    margin = max(margin, label_margin([looks[item.label] for item, _ in lines][:MOST_LABELS]))
    sizes = min(_point(entry)[0] for entry in sized) / _ROOM, widest * _ROOM
    budgets = {float(budget) for item, _ in sized if (budget := split_budget(item.method)[1])}
    ticks = budgets if len(budgets) > 2 else size_ticks(*sizes, WIDTH - LEFT - margin)
    heading = "top-1 accuracy, %" + ("; bars: 95 % interval over splits" if bars else "")
    panel = Panel.with_axes(
        heading, "adapter file, head included", margin, sizes, axis_range(heights, 2.0, 100.0),
        {tick: bytes_text(int(tick)) for tick in ticks}, log=True,
    )  # fmt: skip
    for item, _ in lines:
        look, mean = looks[item.label], item.mean or 0.0
        panel.draw(sizes, [mean, mean], color=MUTED, linewidth=1.2, linestyle=look.line, label=item.label)
    xs, ys = [float(item.adapter_file_bytes or 0) for item in front], [item.mean or 0.0 for item in front]
    panel.draw(xs, ys, color=INK, linewidth=2.2, label="Pareto front")
    for method, points in reversed(methods.items()):  # draws the subject last
        look = looks[points[0].summary.label]
        panel.draw(*zip(*map(_point, points), strict=True), color=look.colour, linewidth=1, label=f"line of {method}")
        for entry in points:
            (size, mean), label = _point(entry), entry.summary.label
            if bar := bars.get(label):
                panel.draw([size, size], bar, color=look.colour, linewidth=1.4, label=f"bar of {label}")
            panel.draw(
                [size], [mean], color=look.colour, marker=look.marker or "o", markersize=8 if look.strong else 6,
                label=label,
            )  # fmt: skip
    labelled = [(*ends[method], looks[methods[method][-1].summary.label]) for method in at_end]
    labelled += [(sizes[1], item.mean or 0.0, looks[item.label]) for item, _ in lines]
    panel.label_ends(labelled[:MOST_LABELS], marked=True)
    small = [(end, looks[methods[method][0].summary.label]) for method, end in ends.items() if method not in at_end]
    crossed = [[(size, mean) for size in sizes] for mean in (item.mean or 0.0 for item, _ in lines)]
    crossed.append([*zip(xs, ys, strict=True)])
    crossed += [[(_point(entry)[0], end) for end in bars.get(entry.summary.label, ())] for entry in sized]
    crossed += (drawn := [list(map(_point, points)) for points in methods.values()])
    panel.label_points(small, [*itertools.chain(*drawn)], crossed, panel.right)
    parts = []
    for method, points in methods.items():
        shown = [f"{mean:.1f} % at {bytes_text(int(size))}" for size, mean in map(_point, points)]
        parts.append(f"{method} {', '.join(shown)}")
    parts += [f"{item.label} {item.mean:.1f} % without a file" for item, _ in lines]
    keys = [
        (
            "heavy line: Pareto front, the points that no smaller file reaches, of entries with enough splits",
            len(front) > 1,
        ),
        ("broken lines: methods without a file", any_frozen(lines)),
    ]
    return Chart.of_entries("pareto", "Top-1 accuracy at equal sizes of the adapter file", parts, keys, panel.figure)


def _point(entry: Entry) -> Point:
    """Bytes of the file, and mean accuracy in per cent."""
    return float(entry.summary.adapter_file_bytes or 0), entry.summary.mean or 0.0
