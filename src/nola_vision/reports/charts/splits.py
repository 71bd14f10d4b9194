"""Top-1 accuracy by split, or by fold of a cross-validation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from nola_vision.reports.charts.drawing import MOST_LABELS, Chart, Panel, axis_range, label_margin
from nola_vision.reports.charts.looks import Look
from nola_vision.reports.entries import Entry, any_frozen
from nola_vision.reports.statistics import cross_validated, first_accuracies, is_measured


def split_chart(entries: Sequence[Entry], looks: Mapping[str, Look]) -> Chart | None:
    """Top-1 accuracy by split: a point per run, and a line per entry through its means over inits.

    If every entry has a single cross-validated run, the accuracy by fold of the first repeat, whose folds all methods
    share. None if no entry has two splits or folds.

    Args:
        entries: of one cell.
        looks: as `entry_looks` returns them.
    """
    place, accuracies = split_accuracies(entries)
    places = sorted({split for of_splits in accuracies.values() for split in of_splits})
    if max(map(len, accuracies.values()), default=0) < 2:
        return None
    at = {split: number for number, split in enumerate(places)}
    means = {label: {split: fmean(accuracies[label][split]) for split in sorted(accuracies[label])} for label in looks
             if label in accuracies}  # fmt: skip
    labelled = list(means)[:MOST_LABELS]
    inits = any(len(values) > 1 for of_splits in accuracies.values() for values in of_splits.values())
    heading = "top-1 accuracy, %" + ("; lines: mean over inits" if inits else "")
    every = [value for of_splits in accuracies.values() for values in of_splits.values() for value in values]
    heights = axis_range(every, least=2.0, bound=100.0)
    ticks = {float(at[split]): str(split) for split in places[:: math.ceil(len(places) / 12)]}
    margin = label_margin([looks[label] for label in labelled])
    panel = Panel.with_axes(heading, place, margin, (-0.2, len(places) - 0.8), heights, ticks)
    for label in reversed(means):  # draws the subject last
        look, of_splits = looks[label], means[label]
        if inits:
            pairs = [(at[split], value) for split, values in accuracies[label].items() for value in values]
            panel.draw(
                *zip(*pairs, strict=True),
                linestyle="",
                marker="o",
                markersize=4.5,
                markeredgewidth=0,
                color=look.colour,
                alpha=0.5,
                label=f"runs of {label}",
            )
        panel.draw_entry(
            [at[split] for split in of_splits], list(of_splits.values()), label, look, marked=len(places) <= 30
        )
    last = {label: max(of_splits) for label, of_splits in means.items()}
    panel.label_ends([(at[last[label]], means[label][last[label]], looks[label]) for label in labelled])
    parts = []
    for label, of_splits in means.items():
        least, most, mean = (of(of_splits.values()) for of in (min, max, fmean))
        parts.append(f"{label} {least:.1f} to {most:.1f} %, mean {mean:.1f} %")
    keys = [("dots: single runs", inits), ("broken lines: methods on frozen features", any_frozen(entries))]
    return Chart.of_entries("by-split", f"Top-1 accuracy by {place}, {len(places)} {place}s", parts, keys, panel.figure)


def split_accuracies(entries: Sequence[Entry]) -> tuple[str, dict[str, dict[int, list[float]]]]:
    """Whether accuracies are by "split" or "fold", and each entry's accuracies in per cent by split or fold."""
    by_split: dict[str, dict[int, list[float]]] = {}
    folds: dict[str, dict[int, list[float]]] = {}
    for item, runs in entries:
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
    same_folds = len({tuple(of_folds) for of_folds in folds.values()}) == 1
    one_split = len({split for splits in by_split.values() for split in splits}) == 1
    if single and same_folds and one_split and folds.keys() == by_split.keys():
        return "fold", folds
    return "split", by_split
