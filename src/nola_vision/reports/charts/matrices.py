"""Plots of matrices: accuracy differences by class, and confusion matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nola_vision.reports.charts.drawing import plain_text
from nola_vision.reports.charts.labels import short_name
from nola_vision.reports.confusion import class_differences
from nola_vision.reports.entries import Entry

_FEW_CLASSES = 20  # with readable names and numbers
_MOST_CLASSES = 40


@plain_text()
def class_differences_plot(
    confusions: Mapping[str, Mapping[int, pd.DataFrame]], entries: Sequence[Entry], cell: str
) -> Figure | None:
    """Differences in accuracy to the best entry by class, in points; None if no two entries share a split.

    With more than 40 classes, those with the largest differences are drawn.

    Args:
        confusions: sums, as `entry_confusions` returns them.
        entries: of the cell, for their means.
        cell: for the title.
    """
    means = {item.label: item.mean for item, _ in entries if item.mean is not None}
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
    image = axes.imshow(shown, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(shown.shape[1]), [short_name(name, 20) for name in shown.columns], rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), [short_name(name, 40) for name in shown.index], fontsize=8)
    if shown.shape[1] <= _FEW_CLASSES:
        for (line, column), value in np.ndenumerate(shown.to_numpy()):
            colour = "white" if abs(value) > 0.6 * most else "black"
            axes.text(column, line, f"{value:+.1f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, label=f"points above {short_name(best, 30)}")
    part = f", the {shown.shape[1]} of {points.shape[1]} that differ most" if shown.shape[1] < points.shape[1] else ""
    axes.set_title(f"{short_name(cell, 60)}: accuracy by class{part}", fontsize=9)
    return figure


@plain_text()
def confusion_plot(by_split: Mapping[str, Mapping[int, pd.DataFrame]], cell: str) -> Figure | None:
    """Each entry's confusion matrix in per cent of the true class's images; None if no run has one.

    Args:
        by_split: sums, as `entry_confusions` returns them.
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
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        ticks = range(len(counts)) if len(counts) <= _FEW_CLASSES else []
        axes.set_xticks(ticks, [short_name(counts.columns[tick], 20) for tick in ticks], rotation=90, fontsize=7)
        axes.set_yticks(ticks, [short_name(counts.index[tick], 20) for tick in ticks], fontsize=7)
        axes.set_title(short_name(label, 30), fontsize=9)
    grid[0].set_ylabel("true class")
    grid[0].set_xlabel("predicted class")
    figure.colorbar(image, ax=list(grid), label="% of the true class's images")
    figure.suptitle(f"{short_name(cell, 60)}: confusions, over runs", fontsize=9)
    return figure


def _grid(lines: int, columns: int, width: float = 3.2, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of axes, listed row by row; width and height in inches per axes."""
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)
