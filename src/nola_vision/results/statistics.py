"""From the rows of many runs to one summary an entry, and to differences between entries.

The std is over runs with ddof 0, as in NOLA's released code.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from statistics import fmean, pstdev, pvariance
from typing import Any

import numpy as np

from nola_vision.results.row import Row


@dataclass(frozen=True)
class Summary:
    """One entry of one cell over its runs.

    `completed` counts the runs that `mean` and `std` (of test accuracy, in per cent) are over; `untested` those that
    ended well but have no test accuracy. `split_std` and `init_std` are the parts of `std` (`variance_parts`). `label`
    is the method's name, with the start of the entry's hash where one name was run with several settings.
    `trainable_parameters` leaves the head out.
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
    split_std: float | None
    init_std: float | None
    trainable_parameters: int | None
    adapter_file_bytes: int | None
    learning_rate: float | None


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation with ddof 0 (divided by n, not n - 1) of at least one value."""
    return fmean(values), pstdev(values)


def variance_parts(accuracies: Mapping[int, Sequence[float]]) -> tuple[float, float | None]:
    """Split the variance of an entry's accuracies into that between its splits and that within them, by its inits.

    With n runs in all, n_s of them in split s with mean m_s and variance v_s (ddof 0), and m the mean of all,
    `split_std**2 = sum_s n_s (m_s - m)**2 / n` and `init_std**2 = sum_s n_s v_s / n`; their sum is the variance of all
    runs. The first holds, besides the splits' own, a share of the inits' variance: one part in the inits a split has.

    Args:
        accuracies: those of each split, at least one.

    Returns:
        `split_std` and `init_std`; the second is None where no split has two runs.
    """
    runs = [accuracy for group in accuracies.values() for accuracy in group]
    middle = fmean(runs)
    between = fsum(len(group) * (fmean(group) - middle) ** 2 for group in accuracies.values()) / len(runs)
    if all(len(group) == 1 for group in accuracies.values()):
        return math.sqrt(between), None
    within = fsum(len(group) * pvariance(group) for group in accuracies.values()) / len(runs)
    return math.sqrt(between), math.sqrt(within)


@dataclass(frozen=True)
class Difference:
    """How much higher one entry's test accuracy is than another's, in points, over the splits that both have.

    Args:
        mean: over splits, of the difference of the two entries' means over the inits that both have in it.
        low, high: a 95 % interval: the percentile bootstrap of that mean, splits drawn with replacement, since runs of
            one split share their training images. None where there is one split only. Of few splits it is too narrow.
        splits: how many.
    """

    mean: float
    low: float | None
    high: float | None
    splits: int


def paired_difference(rows: Iterable[Row], others: Iterable[Row]) -> Difference | None:
    """Compare two entries by their completed final runs; None where no split has runs of both.

    An entry without inits (1-NN) is compared with every init of the other's.
    """
    one, other = _by_place(rows), _by_place(others)
    differences = []
    for split in sorted(one.keys() & other.keys()):
        first, second = one[split], other[split]
        if None not in first and None not in second:
            shared = first.keys() & second.keys()
            first, second = ({init: found[init] for init in shared} for found in (first, second))
        if first and second:
            differences.append(fmean(first.values()) - fmean(second.values()))
    if not differences:
        return None
    low = high = None
    if len(differences) > 1:
        from scipy.stats import bootstrap  # takes a while to import

        options: dict[str, Any] = {"n_resamples": 9999, "method": "percentile", "rng": np.random.default_rng(0)}
        interval = bootstrap((differences,), np.mean, **options).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return Difference(fmean(differences), low, high, len(differences))


def _by_place(rows: Iterable[Row]) -> dict[int, dict[int | None, float]]:
    """Test accuracies in per cent by split and init."""
    places: dict[int, dict[int | None, float]] = defaultdict(dict)
    for row in count_once(rows):
        if row.stage == "final" and row.status == "completed" and row.test_accuracy is not None:
            places[row.split][row.init] = 100 * row.test_accuracy
    return places


def count_once(rows: Iterable[Row]) -> list[Row]:
    """Keep one row of each run, the newest completed one: the same run in two folders counts once."""
    kept: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.precedence):
        kept[row.cell, row.method, row.run_hash] = row
    return list(kept.values())


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Summarise the final runs, one summary for each (cell, method, entry hash), in that order."""
    return [summary for summary, _ in entries(rows)]


def entries(rows: Iterable[Row]) -> list[tuple[Summary, list[Row]]]:
    """The entries that final runs are of, in the order of (cell, method, entry hash), each with its runs."""
    found: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in count_once(rows):
        if row.stage == "final":
            found[row.cell, row.method, row.entry_hash].append(row)
    spellings: dict[tuple[str, str], int] = defaultdict(int)
    for cell, method, _ in found:
        spellings[cell, method] += 1
    return [
        (_summary(runs, label=f"{method} ({digest[:4]})" if spellings[cell, method] > 1 else method), runs)
        for (cell, method, digest), runs in sorted(found.items())
    ]


def _summary(runs: list[Row], label: str) -> Summary:
    statuses = [row.status for row in runs]
    ended_well = [row for row in runs if row.status == "completed"]
    accuracies = [100 * row.test_accuracy for row in ended_well if row.test_accuracy is not None]
    mean, std = mean_std(accuracies) if accuracies else (None, None)
    places = {split: list(inits.values()) for split, inits in _by_place(runs).items()}
    split_std, init_std = variance_parts(places) if places else (None, None)
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
        split_std=split_std,
        init_std=init_std,
        trainable_parameters=max((n for n in map(_trainable, runs) if n is not None), default=None),
        adapter_file_bytes=max((n for n in (row.adapter_file_bytes for row in runs) if n is not None), default=None),
        learning_rate=max((rate for rate in (row.learning_rate for row in runs) if rate is not None), default=None),
    )


def _trainable(row: Row) -> int | None:
    """Count a run's trained numbers without the head: the adapter's and the others (such as batch norm)."""
    counts = [n for n in (row.adapter_parameters, row.other_parameters) if n is not None]
    return sum(counts) if counts else None
