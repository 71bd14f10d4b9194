"""Pictures of a cell's runs, from their rows and logs; needs matplotlib (`pip install 'nola-vision[plots]'`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from nola_vision.errors import NolaVisionError
from nola_vision.results.confusion import class_differences, entry_confusions
from nola_vision.results.row import Row
from nola_vision.results.statistics import entries, summarise
from nola_vision.results.store import find_run_folders

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEW_CLASSES = 20  # whose names and figures can be read
_MOST_CLASSES = 40

Size = Literal["trainable_parameters", "adapter_file_bytes"]
_AXES: dict[Size, str] = {
    "trainable_parameters": "trainable parameters, without the head",
    "adapter_file_bytes": "adapter file, bytes (head included)",
}


def accuracy_over(rows: Iterable[Row], cell: str, size: Size) -> Figure:
    """Mean and std (ddof 0) of each entry's test accuracy over what it costs; a line where it costs nothing."""
    summaries = [item for item in summarise(rows) if item.cell == cell and item.mean is not None]
    figure, axes = _axes()
    free = "no file" if size == "adapter_file_bytes" else "none trained"
    for item in summaries:
        cost = getattr(item, size)
        assert item.mean is not None
        if cost:
            axes.errorbar(cost, item.mean, yerr=item.std, fmt="o", capsize=3, label=f"{item.label} ({item.completed})")
        else:
            across = axes.get_yaxis_transform()  # from the left to the right, whatever the costs
            axes.plot([0, 1], [item.mean] * 2, "--", transform=across, label=f"{item.label} ({item.completed}), {free}")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    if not any(getattr(item, size) for item in summaries):
        axes.set_xlim(1, 10)  # lines alone ask for no range
    axes.set_xlabel(_AXES[size])
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(f"{cell}: mean and std over runs", fontsize=9)
    axes.grid(alpha=0.3)
    _legend(figure)
    return figure


def learning_curves(rows: Iterable[Row], cell: str, folders: Mapping[str, Path]) -> Figure:
    """Training loss of each entry over epochs: the mean of its runs, and from the least to the most of them.

    Args:
        rows: of any runs; the cell's completed final ones are drawn.
        cell: which.
        folders: of runs, by `Row.run_hash`; runs without a log are left out.
    """
    curves: dict[str, list[pd.Series[float]]] = defaultdict(list)
    for summary, runs in entries(rows):
        completed = [run for run in runs if run.status == "completed" and run.cell == cell and run.run_hash in folders]
        for run in completed:
            logs = sorted(folders[run.run_hash].glob("metrics*.csv"))  # one for each time it was resumed, and the last
            steps = pd.concat([pd.read_csv(log) for log in logs if log.stat().st_size] or [pd.DataFrame()])
            if "train_loss" in steps:
                steps = steps.dropna(subset="train_loss")
                curves[summary.label].append(steps.groupby("epoch")["train_loss"].mean())
    figure, axes = _axes()
    for label, losses in curves.items():
        together = pd.concat(losses, axis=1)
        (line,) = axes.plot(together.index + 1, together.mean(axis=1), label=f"{label} ({len(losses)})")
        least, most = together.min(axis=1), together.max(axis=1)
        axes.fill_between(together.index + 1, least, most, alpha=0.15, color=line.get_color())
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    axes.set_title(f"{cell}: mean over runs, least to most", fontsize=9)
    axes.grid(alpha=0.3)
    _legend(figure)
    return figure


def class_differences_plot(rows: Iterable[Row], cell: str, folders: Mapping[str, Path]) -> Figure | None:
    """By how many points each entry is above the best one, class by class; None where no two share a split.

    Of many classes those are drawn in which the entries differ most.
    """
    rows = list(rows)
    confusions = entry_confusions(rows, cell, folders)
    means = {item.label: item.mean for item in summarise(rows) if item.cell == cell and item.mean is not None}
    if len(confusions) < 2:
        return None
    best = max(confusions, key=lambda label: means.get(label, 0.0))
    differences = class_differences(confusions, best)
    if not differences:
        return None
    points = pd.DataFrame({f"{label} ({n} splits)": series for label, (n, series) in differences.items()}).T
    spread = points.abs().max().sort_values(ascending=False)
    shown = points[[name for name in points if name in set(spread.index[:_MOST_CLASSES])]]
    figure, axes = _axes(height=1.8 + 0.35 * len(shown))
    most = max(1.0, float(spread.iloc[0]))
    picture = axes.imshow(shown, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(shown.shape[1]), list(shown.columns), rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), list(shown.index), fontsize=8)
    if shown.shape[1] <= _FEW_CLASSES:
        for (line, column), value in np.ndenumerate(shown.to_numpy()):
            colour = "white" if abs(value) > 0.6 * most else "black"
            axes.text(column, line, f"{value:+.1f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(picture, label=f"points above {best}")
    part = f", the {shown.shape[1]} of {points.shape[1]} that differ most" if shown.shape[1] < points.shape[1] else ""
    axes.set_title(f"{cell}: accuracy by class{part}", fontsize=9)
    return figure


def confusion_plot(rows: Iterable[Row], cell: str, folders: Mapping[str, Path]) -> Figure | None:
    """Each entry's confusion matrix, in per cent of a true class's images; None where no run has one."""
    by_split = entry_confusions(rows, cell, folders)
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
        axes.set_xticks(ticks, [counts.columns[tick] for tick in ticks], rotation=90, fontsize=7)
        axes.set_yticks(ticks, [counts.index[tick] for tick in ticks], fontsize=7)
        axes.set_title(label, fontsize=9)
    grid[0].set_ylabel("true class")
    grid[0].set_xlabel("predicted class")
    figure.colorbar(picture, ax=list(grid), label="% of the true class's images")
    figure.suptitle(f"{cell}: confusions, over runs", fontsize=9)
    return figure


def pictures(rows: Sequence[Row], cell: str, folders: Mapping[str, Path]) -> dict[str, Figure]:
    """Every picture of a cell that its runs have left the numbers for, by what it shows.

    Args:
        rows: of any runs.
        cell: which.
        folders: of runs, by `Row.run_hash`, for their logs and confusion matrices.
    """
    drawn = {
        "accuracy-over-parameters": accuracy_over(rows, cell, "trainable_parameters"),
        "accuracy-over-bytes": accuracy_over(rows, cell, "adapter_file_bytes"),
        "learning-curves": learning_curves(rows, cell, folders),
        "class-differences": class_differences_plot(rows, cell, folders),
        "confusions": confusion_plot(rows, cell, folders),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def write_plots(rows: Sequence[Row], cells: Iterable[str], folders: Sequence[str | Path], out: Path) -> list[Path]:
    """Writes every picture of some cells as PNG files.

    Returns:
        Their paths.

    Raises:
        NolaVisionError: matplotlib is not installed, or the folder cannot be written to.
    """
    written = []
    of_runs = find_run_folders(folders)
    for cell in cells:
        for name, figure in pictures(rows, cell, of_runs).items():
            path = out / f"{cell}-{name}.png"
            try:
                out.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=150)
            except OSError as error:
                raise NolaVisionError(f"{path} cannot be written ({error.strerror}): give another folder") from error
            written.append(path)
    return written


def _axes(height: float = 3.6) -> tuple[Figure, Axes]:
    figure, (axes,) = _grid(1, 1, 8, height)
    return figure, axes


def _grid(lines: int, columns: int, width: float = 3.2, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure of so many axes, each of a size in inches, line by line."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NolaVisionError("plots need matplotlib: pip install 'nola-vision[plots]'") from error
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    strong, pale = colormaps["tab20"].colors[::2], colormaps["tab20"].colors[1::2]  # type: ignore[attr-defined]
    for axes in grid:
        axes.set_prop_cycle(color=[*strong, *pale])
    return figure, grid


def _legend(figure: Figure) -> None:
    """Beside the axes: entries may lie close to each other."""
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=8)
