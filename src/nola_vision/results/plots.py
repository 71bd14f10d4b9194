"""Pictures of a cell's runs, from their rows and logs; needs matplotlib (`pip install 'nola-vision[plots]'`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from nola_vision.errors import NolaVisionError
from nola_vision.results.row import Row
from nola_vision.results.statistics import count_once, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
        if not cost:
            axes.axhline(item.mean, color="0.6", linestyle="--", linewidth=1)
            axes.annotate(f"{item.label} ({free})", (1, item.mean), xycoords=("axes fraction", "data"),
                          textcoords="offset points", xytext=(-4, 4), ha="right", fontsize=9, color="0.4")  # fmt: skip
            continue
        axes.errorbar(cost, item.mean, yerr=item.std, fmt="o", capsize=3)
        axes.annotate(item.label, (cost, item.mean), textcoords="offset points", xytext=(7, 5), fontsize=9)
    if any(getattr(item, size) for item in summaries):
        axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel(_AXES[size])
    axes.set_ylabel("top-1 accuracy, %")
    runs = max((item.completed for item in summaries), default=0)
    axes.set_title(f"{cell}: mean and std of {runs} runs", fontsize=9)
    axes.grid(alpha=0.3)
    return figure


def learning_curves(rows: Iterable[Row], cell: str, logs: Mapping[str, Path]) -> Figure:
    """Training loss of each entry over epochs: the mean of its runs, and from the least to the most of them.

    Args:
        rows: of any runs; the cell's completed final ones are drawn.
        cell: which.
        logs: the `metrics.csv` of runs by `Row.run_hash`; runs without one are left out.
    """
    curves: dict[str, list[pd.Series[float]]] = defaultdict(list)
    for row in count_once(rows):
        if row.cell == cell and row.stage == "final" and row.status == "completed" and row.run_hash in logs:
            log = pd.read_csv(logs[row.run_hash])
            if "train_loss" in log:
                curves[row.method].append(log.dropna(subset="train_loss").groupby("epoch")["train_loss"].mean())
    figure, axes = _axes()
    for method, runs in sorted(curves.items()):
        together = pd.concat(runs, axis=1)
        (line,) = axes.plot(together.index + 1, together.mean(axis=1), label=f"{method} ({len(runs)})")
        least, most = together.min(axis=1), together.max(axis=1)
        axes.fill_between(together.index + 1, least, most, alpha=0.15, color=line.get_color())
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    axes.set_title(f"{cell}: mean over runs, least to most", fontsize=9)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(fontsize=9)
    return figure


def find_logs(folders: Sequence[str | Path]) -> dict[str, Path]:
    """The logs that lie beneath some folders, by the hash that a run's folder ends in."""
    logs = (log for folder in folders for log in Path(folder).rglob("metrics.csv"))
    return {log.parent.name.rpartition("-")[2]: log for log in logs}


def pictures(rows: Sequence[Row], cell: str, logs: Mapping[str, Path]) -> dict[str, Figure]:
    """Every picture of a cell, by what it shows."""
    return {
        "accuracy-over-parameters": accuracy_over(rows, cell, "trainable_parameters"),
        "accuracy-over-bytes": accuracy_over(rows, cell, "adapter_file_bytes"),
        "learning-curves": learning_curves(rows, cell, logs),
    }


def write_plots(rows: Sequence[Row], cells: Iterable[str], folders: Sequence[str | Path], out: Path) -> list[Path]:
    """Writes every picture of some cells as PNG files.

    Returns:
        Their paths.

    Raises:
        NolaVisionError: matplotlib is not installed, or the folder cannot be written to.
    """
    written = []
    logs = find_logs(folders)
    for cell in cells:
        for name, figure in pictures(rows, cell, logs).items():
            path = out / f"{cell}-{name}.png"
            try:
                out.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=150)
            except OSError as error:
                raise NolaVisionError(f"{path} cannot be written ({error.strerror}): give another folder") from error
            written.append(path)
    return written


def _axes() -> tuple[Figure, Axes]:
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NolaVisionError("plots need matplotlib: pip install 'nola-vision[plots]'") from error
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    strong, pale = colormaps["tab20"].colors[::2], colormaps["tab20"].colors[1::2]  # type: ignore[attr-defined]
    axes.set_prop_cycle(color=[*strong, *pale])
    return figure, axes
