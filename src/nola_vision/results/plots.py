"""Plots of a cell's runs, from their rows and logs; needs matplotlib (`pip install 'nola-vision[plots]'`)."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from nola_vision.errors import NolaVisionError
from nola_vision.files import write_file
from nola_vision.results.confusion import class_differences, entry_confusions
from nola_vision.results.row import Row
from nola_vision.results.statistics import entries, summarise
from nola_vision.results.store import read_run_file
from nola_vision.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEW_CLASSES = 20  # whose names and figures can be read
_MOST_CLASSES = 40
_MOST_LOG_BYTES = 2**26
_MOST_PIXELS = 20_000  # of a side of a plot of many entries

Size = Literal["trainable_parameters", "adapter_file_bytes"]
_AXES: dict[Size, str] = {
    "trainable_parameters": "trainable parameters, without the head",
    "adapter_file_bytes": "adapter file, bytes (head included)",
}


@contextmanager
def _drawing() -> Iterator[None]:
    """Draws every text as it is, whatever it contains and whatever the user's matplotlib settings are.

    Raises:
        NolaVisionError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise NolaVisionError("plots need matplotlib: pip install 'nola-vision[plots]'") from error
    # in a name with `$` mathtext finds a formula, which may not parse; TeX would run a name's commands
    settings = {"text.parse_math": False, "text.usetex": False}
    with matplotlib.rc_context(settings), warnings.catch_warnings():  # type: ignore[arg-type]
        warnings.simplefilter("ignore", UserWarning)  # a font without a name's letters, names too long for the layout
        yield


@_drawing()
def accuracy_over(rows: Iterable[Row], cell: str, size: Size) -> Figure:
    """Mean and std (ddof 0) of each entry's test accuracy over what it costs; a line where it costs nothing."""
    from matplotlib.ticker import LogFormatter

    summaries = [item for item in summarise(rows) if item.cell == cell and item.mean is not None]
    figure, axes = _axes()
    free = "no file" if size == "adapter_file_bytes" else "none trained"
    for item in summaries:
        cost = getattr(item, size)
        assert item.mean is not None
        if cost:
            axes.errorbar(cost, item.mean, yerr=item.std, fmt="o", capsize=3, label=_entry(item.label, item.completed))
        else:
            across = axes.get_yaxis_transform()  # from the left to the right, whatever the costs
            label = f"{_entry(item.label, item.completed)}, {free}"
            axes.plot([0, 1], [item.mean] * 2, "--", transform=across, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(LogFormatter())  # the default one writes mathtext
    axes.xaxis.set_minor_formatter(LogFormatter())
    axes.margins(x=0.15)
    if not any(getattr(item, size) for item in summaries):
        axes.set_xlim(1, 10)  # lines alone ask for no range
    axes.set_xlabel(_AXES[size])
    axes.set_ylabel("top-1 accuracy, %")
    axes.set_title(f"{_short(cell, 60)}: mean and std over runs", fontsize=9)
    axes.grid(alpha=0.3)
    _legend(figure)
    return figure


def read_losses(path: Path) -> pd.DataFrame:
    """The training losses in a `metrics.csv`: columns `epoch` and `train_loss`, one line per logged step.

    Raises:
        NolaVisionError: the file cannot be read, or is not a log of a run.
    """
    content = read_run_file(path, _MOST_LOG_BYTES)
    names = content.partition(b"\n")[0].strip().split(b",", maxsplit=1000)
    columns = ["epoch", "train_loss"]
    if not content or (b"epoch" in names and b"train_loss" not in names):  # nothing logged, nothing trained
        return pd.DataFrame({name: [] for name in columns})
    try:
        if not {b"epoch", b"train_loss"} <= set(names) or len(names) > 1000:
            raise ValueError("another header")
        types: dict[str, type] = dict.fromkeys(columns, float)
        steps: pd.DataFrame = pd.read_csv(io.BytesIO(content), usecols=columns, dtype=types, quoting=csv.QUOTE_NONE)
        steps = steps.loc[np.isfinite(steps["train_loss"])]
        if not (steps["epoch"].between(0, 1e9) & (steps["epoch"] % 1 == 0)).all():
            raise ValueError("an epoch that is not a whole number")
    except (ValueError, OverflowError) as error:
        raise NolaVisionError(
            f"{path} is not a log of a run: delete it (the learning curves then leave it out)"
        ) from error
    return steps


def entry_curves(rows: Iterable[Row], cell: str) -> tuple[dict[str, list[pd.Series[float]]], list[str]]:
    """The training losses of each entry's completed final runs.

    Args:
        rows: of any runs; those without a log in their folder are left out.
        cell: which.

    Returns:
        By the entry's label, the mean loss by epoch of each run; and a sentence for each file that could not be used.
    """
    curves: dict[str, list[pd.Series[float]]] = defaultdict(list)
    problems = []
    for summary, runs in entries(row for row in rows if row.cell == cell):
        for run in runs:
            if run.folder is None or run.status != "completed":
                continue
            logs = []
            for path in sorted(run.folder.glob("metrics*.csv")):  # one for each time it was resumed, and the last
                try:
                    logs.append(read_losses(path))
                except NolaVisionError as error:
                    problems.append(str(error))
            if logs and len(steps := pd.concat(logs)):
                curves[summary.label].append(steps.groupby("epoch")["train_loss"].mean())
    return curves, problems


@_drawing()
def learning_curves(curves: Mapping[str, Sequence[pd.Series[float]]], cell: str) -> Figure:
    """Training loss of each entry over epochs: the mean of its runs, and from the least to the most of them.

    Args:
        curves: the losses, as `entry_curves` returns them.
        cell: for the title.
    """
    figure, axes = _axes()
    for label, losses in curves.items():
        together = pd.concat(losses, axis=1)
        (line,) = axes.plot(together.index + 1, together.mean(axis=1), label=_entry(label, len(losses)))
        least, most = together.min(axis=1), together.max(axis=1)
        axes.fill_between(together.index + 1, least, most, alpha=0.15, color=line.get_color())
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    axes.set_title(f"{_short(cell, 60)}: mean over runs, least to most", fontsize=9)
    axes.grid(alpha=0.3)
    _legend(figure)
    return figure


@_drawing()
def class_differences_plot(
    confusions: Mapping[str, Mapping[int, pd.DataFrame]], rows: Iterable[Row], cell: str
) -> Figure | None:
    """By how many points each entry is above the best one, class by class; None where no two share a split.

    Of many classes those are drawn in which the entries differ most.

    Args:
        confusions: the sums, as `entry_confusions` returns them.
        rows: of any runs, for the entries' means.
        cell: which.
    """
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
    axes.set_xticks(range(shown.shape[1]), [_short(name) for name in shown.columns], rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), [_short(name, 40) for name in shown.index], fontsize=8)
    if shown.shape[1] <= _FEW_CLASSES:
        for (line, column), value in np.ndenumerate(shown.to_numpy()):
            colour = "white" if abs(value) > 0.6 * most else "black"
            axes.text(column, line, f"{value:+.1f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(picture, label=f"points above {_short(best, 30)}")
    part = f", the {shown.shape[1]} of {points.shape[1]} that differ most" if shown.shape[1] < points.shape[1] else ""
    axes.set_title(f"{_short(cell, 60)}: accuracy by class{part}", fontsize=9)
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
        axes.set_xticks(ticks, [_short(counts.columns[tick]) for tick in ticks], rotation=90, fontsize=7)
        axes.set_yticks(ticks, [_short(counts.index[tick]) for tick in ticks], fontsize=7)
        axes.set_title(_short(label, 30), fontsize=9)
    grid[0].set_ylabel("true class")
    grid[0].set_xlabel("predicted class")
    figure.colorbar(picture, ax=list(grid), label="% of the true class's images")
    figure.suptitle(f"{_short(cell, 60)}: confusions, over runs", fontsize=9)
    return figure


def cell_plots(rows: Iterable[Row], cell: str) -> tuple[dict[str, bytes], list[str]]:
    """Every plot of a cell that its runs have left the numbers for.

    Args:
        rows: of any runs; their logs and confusion matrices are read from the rows' folders.
        cell: which.

    Returns:
        PNG files by what they show, and a sentence for each file that could not be used.

    Raises:
        NolaVisionError: matplotlib is not installed.
    """
    rows = [row for row in rows if row.cell == cell]
    curves, bad_logs = entry_curves(rows, cell)
    confusions, bad_matrices = entry_confusions(rows, cell)
    drawn = {
        "accuracy-over-parameters": accuracy_over(rows, cell, "trainable_parameters"),
        "accuracy-over-bytes": accuracy_over(rows, cell, "adapter_file_bytes"),
        "learning-curves": learning_curves(curves, cell),
        "class-differences": class_differences_plot(confusions, rows, cell),
        "confusions": confusion_plot(confusions, cell),
    }
    plots = {name: _png(figure) for name, figure in drawn.items() if figure is not None}
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
            stem = f"{encoded[:140].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:10]}"
        for name, content in of_cell.items():
            written.append(out / f"{stem}-{name}.png")
            write_file(written[-1], content)
    return written


@_drawing()
def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=min(150, _MOST_PIXELS / max(figure.get_size_inches())), format="png")
    return content.getvalue()


def _short(name: str, most: int = 20) -> str:
    """A name as a label: on one line, and without its middle if it is long."""
    text = printable(name)
    return text if len(text) <= most else f"{text[: most * 2 // 3]}…{text[-(most // 3 - 1) :]}"


def _entry(label: str, runs: int) -> str:
    """An entry in a legend, which leaves out labels that begin with an underscore."""
    text = f"{_short(label, 30)} ({runs})"
    return f" {text}" if text.startswith("_") else text


def _axes(height: float = 3.6) -> tuple[Figure, Axes]:
    figure, (axes,) = _grid(1, 1, 8, height)
    return figure, axes


def _grid(lines: int, columns: int, width: float = 3.2, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure of so many axes, each of a size in inches, line by line."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

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
