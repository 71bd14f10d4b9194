"""Training loss over epochs, read from the `metrics.csv` of runs."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator

from nola_vision.common.errors import NolaVisionError
from nola_vision.reports.charts.drawing import MOST_LABELS, Chart, Panel, axis_range, label_margin
from nola_vision.reports.charts.looks import Look
from nola_vision.reports.entries import Entry
from nola_vision.runs.store import read_run_file

_MOST_LOG_BYTES = 2**23  # 1,000 epochs of 100 steps take under 5 MB
_MOST_LOGS = 100  # per run
_MOST_LOSS = 1e30  # larger losses, inf and nan are left out: training diverged
Curve = Mapping[int, float]


def learning_curves(curves: Mapping[str, Sequence[Curve]], looks: Mapping[str, Look]) -> Chart | None:
    """Training loss of each entry over epochs: the mean of its runs, with a band from their minimum to their maximum.

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
    labelled = shown[:MOST_LABELS]
    heading = "training loss" + ("; band: least to most of the runs" if several else "")
    epochs = {epoch for of_epochs in by_epoch.values() for epoch in of_epochs}
    first, last = min(epochs), max(max(epochs), min(epochs) + 1)
    losses = [loss for of_epochs in by_epoch.values() for values in of_epochs.values() for loss in values]
    ticks = {float(tick): f"{tick:g}" for tick in MaxNLocator(6, integer=True).tick_values(first, last)}
    margin = label_margin([looks[label] for label in labelled])
    panel = Panel.with_axes(heading, "epoch", margin, (first, last), axis_range(losses, least=0), ticks)
    ends: dict[str, tuple[float, float, Look]] = {}
    parts: list[str] = []
    for label in reversed(shown):
        look, order = looks[label], sorted(by_epoch[label])
        means = [fmean(by_epoch[label][epoch]) for epoch in order]
        if len(curves[label]) > 1:
            least, most = ([end(by_epoch[label][epoch]) for epoch in order] for end in (min, max))
            edge = [*zip(order, least, strict=True), *reversed([*zip(order, most, strict=True)])]
            band = Polygon(edge, color=look.colour, alpha=0.15, linewidth=0, label=f"runs of {label}")
            band.set_transform(panel.to_pixels)
            panel.figure.add_artist(band)
        panel.draw_entry(order, means, label, look, marked=len(order) == 1)
        ends[label] = order[-1], means[-1], look
        runs = f" (mean of {len(curves[label])} runs)" if len(curves[label]) > 1 else ""
        parts.insert(0, f"{label} {means[0]:.3g} to {means[-1]:.3g} after {order[-1]} epochs{runs}")
    panel.label_ends([ends[label] for label in labelled])
    keys = [("lines: means over runs", several)]
    return Chart.of_entries("learning-curves", "Training loss over epochs", parts, keys, panel.figure)


def entry_curves(entries: Sequence[Entry]) -> tuple[dict[str, list[Curve]], list[str]]:
    """The training losses of each entry's completed final runs.

    Args:
        entries: of one cell; runs without a log are left out.

    Returns:
        The mean loss by epoch of each run, by the entry's label; and one message per file that could not be used.
    """
    curves: dict[str, list[Curve]] = defaultdict(list)
    problems = []
    for summary, runs in entries:
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


def read_losses(path: Path) -> list[tuple[int, float]]:
    """The training losses in a `metrics.csv`: (epoch, loss) of each logged step.

    Raises:
        NolaVisionError: the file cannot be read, or is not a log of a run.
    """
    head, _, body = read_run_file(path, _MOST_LOG_BYTES).partition(b"\n")
    names = head.strip().split(b",", maxsplit=1000)
    if names == [b""] or (b"epoch" in names and b"train_loss" not in names):  # the log is empty, or without training
        return []
    steps = []
    try:
        if not {b"epoch", b"train_loss"} <= set(names) or len(names) > 1000:
            raise ValueError("another header")
        of_epoch, of_loss = names.index(b"epoch"), names.index(b"train_loss")
        for line in body.splitlines():
            values = line.split(b",")
            if len(values) <= max(of_epoch, of_loss) or not values[of_loss]:
                continue  # a line of validation metrics, or the incomplete line of a killed run
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


def _logs(folder: Path) -> list[Path]:
    """The logs of a run: `metrics-1.csv` and so on, one per resumed training, and the last one, `metrics.csv`."""
    numbered = (folder / f"metrics-{number}.csv" for number in range(1, _MOST_LOGS))
    return [path for path in [*itertools.takewhile(os.path.lexists, numbered), folder / "metrics.csv"]
            if os.path.lexists(path)]  # fmt: skip
