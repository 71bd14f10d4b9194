"""Accuracies of runs, and what many of them show: mean and std, parts of the variance, paired differences."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from statistics import fmean, pstdev, pvariance, stdev
from typing import Any

from nola_vision.evaluation.estimates import Estimate, wilson
from nola_vision.runs.record import Row, count_once

LEAST_SPLITS = 3  # for an interval of a difference: that of two splits is too wide to be useful
ROUNDING = 1e-4  # points; rounding error of an accuracy in float32


def student_half_width(values: Sequence[float]) -> float:
    """Half of Student's t 95 % interval of a mean: `t(0.975, n - 1) s / sqrt(n)`, with s the std (ddof 1)."""
    from scipy.special import stdtrit  # takes a while to import

    return float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / math.sqrt(len(values))


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (ddof 0: divided by n, not n - 1) of at least one value."""
    return fmean(values), pstdev(values)


def variance_parts(accuracies: Mapping[int, Sequence[float]]) -> tuple[float | None, float | None]:
    """Splits the variance of an entry's accuracies into the part between splits and the part within them, by init.

    With n runs in all, n_s of them in split s with mean m_s and variance v_s (ddof 0), and m the mean of all,
    `split_std**2 = sum_s n_s (m_s - m)**2 / n` and `init_std**2 = sum_s n_s v_s / n`; their sum is the variance of all
    runs. The first includes a share of the inits' variance: 1 / (inits per split).

    Args:
        accuracies: the accuracies of each split, at least one.

    Returns:
        `split_std` and `init_std`; the first is None with one split, the second if no split has two runs.
    """
    runs = [accuracy for group in accuracies.values() for accuracy in group]
    middle = fmean(runs)
    between = fsum(len(group) * (fmean(group) - middle) ** 2 for group in accuracies.values()) / len(runs)
    within = fsum(len(group) * pvariance(group) for group in accuracies.values()) / len(runs)
    return (
        math.sqrt(between) if len(accuracies) > 1 else None,
        math.sqrt(within) if len(runs) > len(accuracies) else None,
    )


def cross_validated(row: Row) -> bool:
    """Whether a run's accuracy was estimated by cross-validation instead of on a test set."""
    return row.test_accuracy is None and row.estimate is not None


def run_accuracies(row: Row) -> list[float]:
    """A run's accuracies in per cent: one on its test set, or one per fold; empty if it was not tested."""
    if row.test_accuracy is not None:
        return [100 * row.test_accuracy]
    return [] if row.estimate is None else [100 * accuracy for accuracy in row.estimate["folds"]]


def first_accuracies(row: Row) -> list[float]:
    """`run_accuracies`, for cross-validation only those of the first repeat, whose folds all methods share."""
    values = run_accuracies(row)
    repeats = row.estimate["repeats"] if row.estimate is not None and cross_validated(row) else 1
    return values[: len(values) // repeats]


def is_measured(row: Row) -> bool:
    """Whether a run was completed and has an accuracy."""
    return row.status == "completed" and bool(run_accuracies(row))


@dataclass(frozen=True)
class RunAccuracy:
    """The accuracy of one run and its 95 % interval, as fractions.

    Args:
        correct, images: correctly classified and tested images; for cross-validation in the first repeat.
        low, high: Wilson's interval of `correct` out of `images`, or that of the estimate. It covers the choice of
            test images only: other training images and another init would also change the accuracy.
        estimate: the estimate by cross-validation; None for a test set.
    """

    correct: int
    images: int
    low: float
    high: float
    estimate: Estimate | None

    @property
    def value(self) -> float:
        """The share of correctly classified images."""
        return self.correct / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """`low` and `high` in per cent."""
        return 100 * self.low, 100 * self.high


def run_accuracy(row: Row, images: int | None = None) -> RunAccuracy | None:
    """The accuracy of a completed run; None if it was not tested or the number of test images is unknown.

    Args:
        row: the run.
        images: number of images in its predictions; by default the number that the row states.
    """
    if row.status != "completed":
        return None
    if row.estimate is not None and cross_validated(row):
        found = Estimate.from_dict(row.estimate)
        return RunAccuracy(found.correct, found.images, found.low, found.high, found)
    part = (row.config.get("trainer") or {}).get("limit_test_batches")
    if images is None and part in (None, 1.0):
        images = (row.data.get("counts") or {}).get("test")
    if row.test_accuracy is None or not images:
        return None
    correct = round(row.test_accuracy * images)
    return RunAccuracy(correct, images, *wilson(correct, images), None)


@dataclass(frozen=True)
class Difference:
    """The difference of two entries' test accuracies in points, over the splits that both have.

    Args:
        mean: over splits; the difference of a split is that of the means over the inits that both entries have.
        low, high: 95 % interval, Student's t over splits: `mean ± t(0.975, n - 1) s / sqrt(n)`, with s the std
            (ddof 1) of the n differences. Runs of one split share their training images, so splits are the
            independent draws. None for fewer than `LEAST_SPLITS` splits, for equal differences, whose spread is
            unknown, and for cross-validated runs, whose splits divide the same images into folds.
        splits: number of splits.
        cross_validated: whether the accuracies are estimates by cross-validation.
    """

    mean: float
    low: float | None
    high: float | None
    splits: int
    cross_validated: bool

    @property
    def shown(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > ROUNDING or self.high < -ROUNDING)


def paired_difference(rows: Iterable[Row], others: Iterable[Row]) -> Difference | None:
    """Compares two entries by their completed final runs; None if no split has runs of both.

    An entry without inits (a method on frozen features) is compared with every init of the other's.
    """
    rows, others = list(rows), list(others)
    one, other = accuracies_by_split(rows), accuracies_by_split(others)
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
    folds = any(map(cross_validated, (*rows, *others)))
    if not folds and len(differences) >= LEAST_SPLITS and stdev(differences) > ROUNDING:
        half = student_half_width(differences)
        low, high = fmean(differences) - half, fmean(differences) + half
    return Difference(fmean(differences), low, high, len(differences), folds)


def split_interval(rows: Iterable[Row]) -> tuple[float, float] | None:
    """Student's t 95 % interval of an entry's mean accuracy over splits, in per cent.

    None for fewer than `LEAST_SPLITS` splits, and for cross-validated runs, whose splits divide the same images.
    """
    rows = list(rows)
    means = [fmean(inits.values()) for inits in accuracies_by_split(rows).values()]
    if len(means) < LEAST_SPLITS or any(map(cross_validated, rows)):
        return None
    half = student_half_width(means)
    return fmean(means) - half, fmean(means) + half


def first_pair(rows: Iterable[Row], others: Iterable[Row]) -> tuple[Row, Row]:
    """The runs of two entries in the first split and init that both have; at least one is required.

    A run without an init (a method on frozen features) is paired with every init.
    """
    pairs = itertools.product(filter(is_measured, count_once(rows)), filter(is_measured, count_once(others)))
    same = ((one, other) for one, other in pairs if one.split == other.split)
    shared = ((one, other) for one, other in same if one.init == other.init or None in (one.init, other.init))
    return min(shared, key=lambda pair: (pair[0].split, pair[0].init or 0, pair[1].init or 0))


def accuracies_by_split(rows: Iterable[Row]) -> dict[int, dict[int | None, float]]:
    """Accuracies in per cent by split and init; for cross-validation the mean of the first repeat."""
    places: dict[int, dict[int | None, float]] = defaultdict(dict)
    for row in count_once(rows):
        if row.stage == "final" and is_measured(row):
            places[row.split][row.init] = fmean(first_accuracies(row))
    return places


def on_the_same_images(rows: Sequence[Row], like: Row | None = None) -> tuple[list[Row], list[str]]:
    """Keeps the rows of one version of each cell's images: old runs remain when a folder's images change.

    Args:
        rows: of any runs.
        like: its version is kept in its cell; other cells keep that of the newest completed final run.

    Returns:
        The rows that are kept, in order, and one message per cell with rows that are left out.
    """
    newest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row.stage == "final" and row.status == "completed", row.started)):
        newest[row.cell] = row
    if like is not None:
        newest[like.cell] = like
    kept = [row for row in rows if _images(row) == _images(newest[row.cell])]
    left_out = Counter(row.cell for row in rows) - Counter(row.cell for row in kept)
    return kept, [
        f"{cell}: {count} {'run' if count == 1 else 'runs'} on other versions of the images left out; "
        "`report --format csv` lists them"
        for cell, count in left_out.items()
    ]


def _images(row: Row) -> Any:
    """The digest of the images in a user's folder; None for other data sets."""
    content = row.config.get("content")
    return content.get("data") if isinstance(content, dict) else None
