"""The entries of a cell (a method with its settings) summarised over their runs, and how they are compared.

The std is over runs with ddof 0, as in NOLA's released code; for cross-validated data it is over folds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, NamedTuple, TypeVar

from nola_vision.common.mappings import value_at
from nola_vision.common.text import setting_text
from nola_vision.reports.statistics import (
    ROUNDING,
    accuracies_by_split,
    cross_validated,
    is_measured,
    mean_std,
    run_accuracies,
    run_accuracy,
    variance_parts,
)
from nola_vision.runs.budget_names import split_budget
from nola_vision.runs.record import Row, count_once
from nola_vision.runs.run_id import FROZEN_METHODS, entry_settings

METRICS = ("balanced_accuracy", "macro_f1", "top5_accuracy", "test_nll")  # columns of a row, next to its accuracy
_SHOWN_SETTINGS = 2  # in a label
Kind = Literal["NOLA", "trained", "frozen"]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Summary:
    """Statistics of one entry of one cell over its runs.

    Args:
        label: the method's name; if it was run with several settings, followed by those that differ, as in
            `nola (rank=8)`. A version with more splits than every other one has the name alone.
        completed: number of runs with an accuracy.
        untested: number of completed runs without an accuracy.
        splits: number of splits of the completed runs.
        n: number of accuracies in `mean` and `std` (in per cent): one per run, or one per fold of its estimate. `std`
            is None for a single one.
        cross_validated: whether the accuracies are those of folds.
        interval: Wilson's 95 % interval in per cent, if there is a single accuracy, on a test set.
        split_std, init_std: the parts of `std` (`variance_parts`); None for folds, one split or one init.
        chance: the largest class's share of the tested images, in per cent.
        trainable_parameters: without the head.
        scale: c of the method, None if it has none.
        metrics: mean and std of the other metrics by column (`METRICS`), in the row's units.
    """

    cell: str
    method: str
    label: str
    method_class: str
    entry_hash: str
    completed: int
    failed: int
    interrupted: int
    untested: int
    splits: int
    n: int
    cross_validated: bool
    mean: float | None
    std: float | None
    interval: tuple[float, float] | None
    split_std: float | None
    init_std: float | None
    chance: float | None
    trainable_parameters: int | None
    head_parameters: int | None
    adapter_file_bytes: int | None
    learning_rate: float | None
    scale: float | None
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict, compare=False)

    @property
    def under_chance(self) -> bool:
        """Whether always predicting the largest class would be more accurate."""
        return self.mean is not None and self.chance is not None and self.mean < self.chance - ROUNDING


class Entry(NamedTuple):
    """One entry and its final runs."""

    summary: Summary
    runs: list[Row]


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Summaries of the final runs, one per (cell, method, entry hash), in that order."""
    return [entry.summary for entry in entries(rows)]


def entries(rows: Iterable[Row]) -> list[Entry]:
    """The entries of the final runs, in the order of (cell, method, entry hash)."""
    found: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in count_once(rows):
        if row.stage == "final":
            found[row.cell, row.method, row.entry_hash].append(row)
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for cell, method, digest in sorted(found):
        names[cell, method].append(digest)
    labels = {
        (cell, method, digest): label
        for (cell, method), digests in names.items()
        for digest, label in zip(
            digests, _labels(method, [(digest, found[cell, method, digest]) for digest in digests]), strict=True
        )
    }
    return [Entry(_summary(runs, labels[key]), runs) for key, runs in sorted(found.items(), key=lambda item: item[0])]


def of_method(summary: Summary) -> str:
    """The label of an entry without its byte budget: `nola` for `nola@2KB`."""
    return split_budget(summary.method)[0] + summary.label.removeprefix(summary.method)


def kind(summary: Summary) -> Kind:
    """The kind of an entry: NOLA, another method that trains, or a method on frozen features."""
    if summary.method_class in FROZEN_METHODS.values():
        return "frozen"
    return "NOLA" if summary.method_class == "NOLA" else "trained"


def any_frozen(entries: Iterable[Entry]) -> bool:
    """Whether any entry is a method on frozen features."""
    return any(kind(entry.summary) == "frozen" for entry in entries)


def subject(summaries: Iterable[Summary]) -> Summary | None:
    """The entry that a cell's report is about; None if no entry has an accuracy.

    A NOLA entry, else another method that trains, else one on frozen features. Of several, the one with the most
    splits, then the most runs, so that one lucky run is not chosen; then the best mean; then the first by label.
    """

    def rank(item: Summary) -> tuple[int, int, int, float, str]:
        kinds = ("NOLA", "trained", "frozen")
        return kinds.index(kind(item)), -item.splits, -item.completed, -(item.mean or 0), item.label

    return min((item for item in summaries if item.mean is not None), key=rank, default=None)


def rivals(name: Kind, chosen: Summary, found: Sequence[Entry]) -> list[Entry]:
    """The entries of a kind (including `chosen`) that were measured on some of the splits of `chosen`, the best first.

    They are sorted by their mean accuracy on these splits, then by label.
    """
    splits = {row.split for item, runs in found if item is chosen for row in runs if is_measured(row)}
    ranked = []
    for item, runs in found:
        shared = [row for row in runs if row.split in splits and is_measured(row)]
        if kind(item) == name and shared:
            mean = fmean(accuracy for row in shared for accuracy in run_accuracies(row))
            ranked.append((-mean, item.label, Entry(item, runs)))
    return [entry for *_, entry in sorted(ranked, key=lambda one: one[:2])]


def _labels(method: str, versions: Sequence[tuple[str, Sequence[Row]]]) -> list[str]:
    """One label per entry of one name, given each entry's hash and its rows."""
    if len(versions) == 1:
        return [method]
    settings = [entry_settings(runs[0].config) for _, runs in versions]
    splits = [len({row.split for row in runs if is_measured(row)}) for _, runs in versions]
    leads = [count == max(splits) and splits.count(count) == 1 for count in splits]
    names = list(dict.fromkeys(name for one in settings for name in one))
    differing = [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]
    short = [name.rpartition(".")[2] for name in differing]
    labels = []
    for one in settings:
        shown = [
            f"{key if short.count(key) == 1 else name}={setting_text(one.get(name))}"
            for name, key in zip(differing, short, strict=True)
        ]
        more = ", ..." if len(shown) > _SHOWN_SETTINGS else ""
        labels.append(", ".join(shown[:_SHOWN_SETTINGS]) + more)
    count = Counter(labels)
    hashed = [
        f"{label}, {digest[:4]}".removeprefix(", ") if not label or count[label] > 1 else label
        for label, (digest, _) in zip(labels, versions, strict=True)
    ]
    return [method if first else f"{method} ({label})" for first, label in zip(leads, hashed, strict=True)]


def common_splits(summaries: Iterable[Summary]) -> int:
    """The most splits that at least two entries have, or those of a single one: what means are compared over.

    An entry with fewer is not compared fairly; one with more does not make the others unfair.
    """
    counts = sorted((item.splits for item in summaries if item.mean is not None), reverse=True)
    return counts[min(1, len(counts) - 1)] if counts else 0


def _summary(runs: list[Row], label: str) -> Summary:
    statuses = [row.status for row in runs]
    measured = [row for row in runs if is_measured(row)]
    accuracies = [accuracy for row in measured for accuracy in run_accuracies(row)]
    folds = any(map(cross_validated, measured))
    mean, std = mean_std(accuracies) if accuracies else (None, None)
    places = {split: list(inits.values()) for split, inits in accuracies_by_split(runs).items()}
    split_std, init_std = variance_parts(places) if places and not folds else (None, None)
    first = runs[0]
    metrics = {}
    for name in METRICS:
        if values := [value for row in measured if (value := getattr(row, name)) is not None]:
            metrics[name] = mean_std(values)
    return Summary(
        cell=first.cell,
        method=first.method,
        label=label,
        method_class=first.method_class,
        entry_hash=first.entry_hash,
        completed=len(measured),
        failed=statuses.count("failed"),
        interrupted=statuses.count("interrupted"),
        untested=statuses.count("completed") - len(measured),
        splits=len(places),
        n=len(accuracies),
        cross_validated=folds,
        mean=mean,
        std=std if len(accuracies) > 1 else None,
        interval=_interval(measured),
        split_std=split_std,
        init_std=init_std,
        chance=_largest(100 * share for row in measured if (share := row.data.get("majority_share")) is not None),
        trainable_parameters=_largest(map(_trainable, runs)),
        head_parameters=_largest(row.head_parameters for row in runs),
        adapter_file_bytes=_largest(row.adapter_file_bytes for row in runs),
        learning_rate=_largest(row.learning_rate for row in runs),
        scale=_largest(map(scale_of, runs)),
        metrics=metrics,
    )


def _interval(measured: Sequence[Row]) -> tuple[float, float] | None:
    """The 95 % interval of a single run on a test set, in per cent."""
    found = run_accuracy(measured[0]) if len(measured) == 1 else None
    return found.interval if found is not None and found.estimate is None else None


def _largest(values: Iterable[Number | None]) -> Number | None:
    return max((value for value in values if value is not None), default=None)


def scale_of(row: Row) -> float | None:
    """A run's c, None if its method has none."""
    found = value_at(row.config, "model", "method", "init_args", "c")
    return float(found) if type(found) in (int, float) else None


def _trainable(row: Row) -> int | None:
    """A run's trainable parameters without the head: the adapter's and others (such as batch norm)."""
    counts = [n for n in (row.adapter_parameters, row.other_parameters) if n is not None]
    return sum(counts) if counts else None
