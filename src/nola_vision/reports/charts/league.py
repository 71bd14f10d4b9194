"""Accuracy over the size of the whole adapter file, of methods at byte budgets, with the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nola_vision.reports.charts.drawing import LEFT, MOST_LABELS, WIDTH, Chart, Panel, axis_range, label_margin
from nola_vision.reports.charts.looks import INK, MUTED, Look
from nola_vision.reports.charts.pareto import pareto_front, size_range, size_ticks
from nola_vision.reports.entries import Entry, any_frozen, of_method
from nola_vision.reports.formatting import bytes_text
from nola_vision.reports.statistics import split_interval


def league_chart(entries: Sequence[Entry], looks: Mapping[str, Look]) -> Chart | None:
    """Mean accuracy over the size of the file, a colour and a marker per method; None if no entry has both.

    Bars are Student's t 95 % intervals over splits. The dark line joins the points that no smaller file reaches.
    Methods without a file are horizontal lines.

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
        points.sort(key=_size)
    bars = {entry.summary.label: split_interval(entry.runs) for entry in sized}
    heights = [mean for entry in measured if (mean := entry.summary.mean) is not None]
    heights += [min(100.0, max(0.0, end)) for bar in bars.values() if bar for end in bar]
    named = [looks[points[-1].summary.label] for points in methods.values()]
    line_looks = [looks[item.label] for item, _ in lines]
    margin = label_margin([*named, *line_looks][:MOST_LABELS])
    sizes = size_range([_size(entry) for entry in sized])
    ticks = {tick: bytes_text(tick) for tick in size_ticks(*sizes, WIDTH - LEFT - margin)}
    heading = "top-1 accuracy, %" + ("; bars: 95 % interval over splits" if any(bars.values()) else "")
    panel = Panel.with_axes(
        heading, "adapter file, head included", margin, sizes, axis_range(heights, 2.0, 100.0), ticks, log=True
    )
    for item, _ in lines:
        look, mean = looks[item.label], item.mean or 0.0
        panel.draw(sizes, [mean, mean], color=MUTED, linewidth=1.2, linestyle=look.line, label=item.label)
    front = pareto_front([item for item, _ in sized])
    xs, ys = [float(item.adapter_file_bytes or 0) for item in front], [item.mean or 0.0 for item in front]
    panel.draw(xs, ys, color=INK, linewidth=2.2, label="Pareto front")
    for method, points in reversed(methods.items()):  # draws the subject last
        look = looks[points[0].summary.label]
        panel.draw(
            [_size(entry) for entry in points], [entry.summary.mean or 0.0 for entry in points],
            color=look.colour, linewidth=0.8, alpha=0.6, label=f"line of {method}",
        )  # fmt: skip
        for entry in points:
            size, label = _size(entry), entry.summary.label
            if bar := bars[label]:
                ends = [min(100.0, max(0.0, end)) for end in bar]
                panel.draw([size, size], ends, color=look.colour, linewidth=1.1, alpha=0.6, label=f"bar of {label}")
            panel.draw(
                [size], [entry.summary.mean or 0.0],
                color=look.colour, marker=look.marker or "o", markersize=7 if look.strong else 5, label=label,
            )  # fmt: skip
    labelled = [(_size(points[-1]), points[-1].summary.mean or 0.0, looks[points[-1].summary.label])
                for points in methods.values()]  # fmt: skip
    labelled += [(sizes[1], item.mean or 0.0, looks[item.label]) for item, _ in lines]
    panel.label_ends(labelled[:MOST_LABELS])
    parts = []
    for method, points in methods.items():
        shown = [f"{entry.summary.mean or 0:.1f} % at {bytes_text(_size(entry))}" for entry in points]
        parts.append(f"{method} {', '.join(shown)}")
    parts += [f"{item.label} {item.mean:.1f} % without a file" for item, _ in lines]
    keys = [
        ("dark line: Pareto front, the points that no smaller file reaches", len(front) > 1),
        ("broken lines: methods without a file", any_frozen(lines)),
    ]
    return Chart.of_entries("pareto", "Top-1 accuracy at equal sizes of the adapter file", parts, keys, panel.figure)


def _size(entry: Entry) -> float:
    return float(entry.summary.adapter_file_bytes or 0)
