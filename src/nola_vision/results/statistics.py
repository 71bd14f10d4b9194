"""From the rows of many runs to one summary an entry. The std is over runs with ddof 0, as in NOLA's released code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from nola_vision.results.row import Row


@dataclass(frozen=True)
class Summary:
    """One entry of one cell over its runs.

    `completed` counts the runs that `mean` and `std` (of test accuracy, in per cent) are over; `untested` those that
    ended well but have no test accuracy. `label` is the method's name, with the start of the entry's hash where one
    name was run with several settings. `trainable_parameters` leaves the head out.
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
    mean: float | None
    std: float | None
    trainable_parameters: int | None
    adapter_file_bytes: int | None
    learning_rate: float | None


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation with ddof 0 (divided by n, not n - 1) of at least one value."""
    return fmean(values), pstdev(values)


def count_once(rows: Iterable[Row]) -> list[Row]:
    """Keep one row of each run, the newest completed one: the same run in two folders counts once."""
    kept: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: (row.status == "completed", row.started)):
        kept[row.cell, row.method, row.run_hash] = row
    return list(kept.values())


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Summarise the final runs, one summary for each (cell, method, entry hash), in that order."""
    entries: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in count_once(rows):
        if row.stage == "final":
            entries[row.cell, row.method, row.entry_hash].append(row)
    spellings: dict[tuple[str, str], int] = defaultdict(int)
    for cell, method, _ in entries:
        spellings[cell, method] += 1
    return [
        _summary(runs, label=f"{method} ({digest[:4]})" if spellings[cell, method] > 1 else method)
        for (cell, method, digest), runs in sorted(entries.items())
    ]


def _summary(runs: list[Row], label: str) -> Summary:
    statuses = [row.status for row in runs]
    ended_well = [row for row in runs if row.status == "completed"]
    accuracies = [100 * row.test_accuracy for row in ended_well if row.test_accuracy is not None]
    mean, std = mean_std(accuracies) if accuracies else (None, None)
    first = runs[0]
    return Summary(
        cell=first.cell,
        method=first.method,
        label=label,
        method_class=first.method_class,
        entry_hash=first.entry_hash,
        completed=len(accuracies),
        failed=statuses.count("failed"),
        interrupted=statuses.count("interrupted"),
        untested=len(ended_well) - len(accuracies),
        mean=mean,
        std=std,
        trainable_parameters=max((n for n in map(_trainable, runs) if n is not None), default=None),
        adapter_file_bytes=max((n for n in (row.adapter_file_bytes for row in runs) if n is not None), default=None),
        learning_rate=max((rate for rate in (row.learning_rate for row in runs) if rate is not None), default=None),
    )


def _trainable(row: Row) -> int | None:
    """Count a run's trained numbers without the head: the adapter's and the others (such as batch norm)."""
    counts = [n for n in (row.adapter_parameters, row.other_parameters) if n is not None]
    return sum(counts) if counts else None
