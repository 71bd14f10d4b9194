"""From the rows of many runs to one summary per entry, and to differences between entries.

The std is over runs with ddof 0, as in NOLA's released code; of cross-validated data it is over folds.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from statistics import fmean, pstdev, pvariance, stdev
from typing import Any, Literal, TypeVar

from nola_vision.common.text import shortened
from nola_vision.evaluation.estimates import Estimate, wilson
from nola_vision.runs.record import Row, count_once
from nola_vision.runs.run_id import FROZEN_METHODS, entry_settings

METRICS = ("balanced_accuracy", "macro_f1", "top5_accuracy", "test_nll")  # columns of a row, next to its accuracy
Number = TypeVar("Number", int, float)
_ROUNDING = 1e-4  # points: of an accuracy in float32
LEAST_SPLITS = 3  # for an interval of a difference: of two splits it is so wide that it says nothing
_SHOWN_SETTINGS = 2  # in a label
_MOST_VALUE = 24  # characters of a setting's value in a label
_DIGEST = re.compile(r"[0-9a-f]{64}")  # of a file, or of all images


@dataclass(frozen=True)
class Summary:
    """One entry of one cell over its runs.

    Args:
        label: the method's name; where one name was run with several settings, with those that differ, as in
            `nola (rank=8)`.
        completed: runs with an accuracy.
        untested: runs that ended well but have none.
        splits: of the completed runs.
        n: accuracies that `mean` and `std` (in per cent) are over: one per run, or one per fold of its estimate. One
            has no std.
        cross_validated: whether they are those of folds.
        interval: where there is one accuracy of one test set, its 95 % interval by Wilson, in per cent.
        split_std, init_std: the parts of `std` (`variance_parts`); None for folds, and with one split or one init.
        chance: the largest class's share of the tested images, in per cent.
        trainable_parameters: without the head.
        metrics: mean and std of the other metrics by their column (`METRICS`), in a row's units.
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
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict, compare=False)

    @property
    def under_chance(self) -> bool:
        """Whether always naming the largest class would be right more often."""
        return self.mean is not None and self.chance is not None and self.mean < self.chance - _ROUNDING


Entry = tuple[Summary, list[Row]]


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation with ddof 0 (divided by n, not n - 1) of at least one value."""
    return fmean(values), pstdev(values)


def variance_parts(accuracies: Mapping[int, Sequence[float]]) -> tuple[float | None, float | None]:
    """Split the variance of an entry's accuracies into that between its splits and that within them, by its inits.

    With n runs in all, n_s of them in split s with mean m_s and variance v_s (ddof 0), and m the mean of all,
    `split_std**2 = sum_s n_s (m_s - m)**2 / n` and `init_std**2 = sum_s n_s v_s / n`; their sum is the variance of all
    runs. The first holds, besides the splits' own, a share of the inits' variance: one part in the inits a split has.

    Args:
        accuracies: those of each split, at least one.

    Returns:
        `split_std` and `init_std`; the first is None with one split, the second where no split has two runs.
    """
    runs = [accuracy for group in accuracies.values() for accuracy in group]
    middle = fmean(runs)
    between = fsum(len(group) * (fmean(group) - middle) ** 2 for group in accuracies.values()) / len(runs)
    within = fsum(len(group) * pvariance(group) for group in accuracies.values()) / len(runs)
    return (
        math.sqrt(between) if len(accuracies) > 1 else None,
        math.sqrt(within) if len(runs) > len(accuracies) else None,
    )


@dataclass(frozen=True)
class Difference:
    """How much higher one entry's test accuracy is than another's, in points, over the splits that both have.

    Args:
        mean: over splits, of the difference of the two entries' means over the inits that both have in it.
        low, high: its 95 % interval, Student's t over splits: `mean ± t(0.975, n - 1) s / sqrt(n)`, with s the std
            (ddof 1) of the n differences. Runs of one split share their training images, so splits are the
            independent draws. None with fewer than `LEAST_SPLITS` splits or equal differences, which do not show
            the spread, and for cross-validated runs, whose splits divide the same images into folds.
        splits: how many.
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
        return self.low is not None and self.high is not None and (self.low > _ROUNDING or self.high < -_ROUNDING)


def paired_difference(rows: Iterable[Row], others: Iterable[Row]) -> Difference | None:
    """Compare two entries by their completed final runs; None where no split has runs of both.

    An entry without inits (a method on frozen features) is compared with every init of the other's.
    """
    rows, others = list(rows), list(others)
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
    folds = any(map(cross_validated, (*rows, *others)))
    if not folds and (count := len(differences)) >= LEAST_SPLITS and stdev(differences) > _ROUNDING:
        from scipy.special import stdtrit  # takes a while to import

        half = float(stdtrit(count - 1, 0.975)) * stdev(differences) / math.sqrt(count)
        low, high = fmean(differences) - half, fmean(differences) + half
    return Difference(fmean(differences), low, high, len(differences), folds)


def first_pair(rows: Iterable[Row], others: Iterable[Row]) -> tuple[Row, Row]:
    """The runs of two entries in the first split and init that both have; there must be one.

    A run without an init (a method on frozen features) is paired with every init.
    """
    pairs = itertools.product(filter(is_measured, count_once(rows)), filter(is_measured, count_once(others)))
    same = ((one, other) for one, other in pairs if one.split == other.split)
    shared = ((one, other) for one, other in same if one.init == other.init or None in (one.init, other.init))
    return min(shared, key=lambda pair: (pair[0].split, pair[0].init or 0, pair[1].init or 0))


def _by_place(rows: Iterable[Row]) -> dict[int, dict[int | None, float]]:
    """Accuracies in per cent by split and init; of a run without a test set the mean over its first folds."""
    places: dict[int, dict[int | None, float]] = defaultdict(dict)
    for row in count_once(rows):
        if row.stage == "final" and is_measured(row):
            places[row.split][row.init] = fmean(first_accuracies(row))
    return places


def cross_validated(row: Row) -> bool:
    """Whether a run's accuracy is an estimate by cross-validation, not that of a test set."""
    return row.test_accuracy is None and row.estimate is not None


def run_accuracies(row: Row) -> list[float]:
    """A run's accuracies in per cent: that on its test set, those of its estimate's folds, or none."""
    if row.test_accuracy is not None:
        return [100 * row.test_accuracy]
    return [] if row.estimate is None else [100 * accuracy for accuracy in row.estimate["folds"]]


def first_accuracies(row: Row) -> list[float]:
    """`run_accuracies`; of an estimate those of the first repeat alone, whose folds all methods share."""
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
        correct, images: how many of the tested images were classified correctly; of an estimate, in its first repeat.
        low, high: Wilson's interval of `correct` out of `images`, or that of the estimate. It is that of the tested
            images alone: other training images and another init would change the accuracy too.
        estimate: the estimate by cross-validation; None with a test set.
    """

    correct: int
    images: int
    low: float
    high: float
    estimate: Estimate | None

    @property
    def value(self) -> float:
        """The share of correct images."""
        return self.correct / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """`low` and `high` in per cent."""
        return 100 * self.low, 100 * self.high


def run_accuracy(row: Row, images: int | None = None) -> RunAccuracy | None:
    """The accuracy of a completed run; None where it was not tested, or the number of its test images is not known.

    Args:
        row: of the run.
        images: the number of images in its predictions; without it the one that the row states.
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


def on_the_same_images(rows: Sequence[Row], like: Row | None = None) -> tuple[list[Row], list[str]]:
    """The rows of one version of each cell's images: after an image of a folder is added or removed, old runs stay.

    Args:
        rows: of any runs.
        like: a row whose version is kept in its cell; in the others, it is that of the newest completed final run.

    Returns:
        The rows that are kept, in their order, and a sentence for each cell of which rows are left out.
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
    """The digest of the images that a person put into a folder; None for a data set that others made."""
    content = row.config.get("content")
    return content.get("data") if isinstance(content, dict) else None


def summarise(rows: Iterable[Row]) -> list[Summary]:
    """Summarise the final runs, one summary for each (cell, method, entry hash), in that order."""
    return [summary for summary, _ in entries(rows)]


def entries(rows: Iterable[Row]) -> list[Entry]:
    """The entries that final runs are of, in the order of (cell, method, entry hash), each with its runs."""
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
            digests, _labels(method, [(digest, found[cell, method, digest][0]) for digest in digests]), strict=True
        )
    }
    return [(_summary(runs, labels[entry]), runs) for entry, runs in sorted(found.items(), key=lambda item: item[0])]


def kind(summary: Summary) -> Literal["NOLA", "trained", "frozen"]:
    """What an entry is: NOLA, another method that trains, or a method on frozen features."""
    if summary.method_class in FROZEN_METHODS.values():
        return "frozen"
    return "NOLA" if summary.method_class == "NOLA" else "trained"


def subject(summaries: Iterable[Summary]) -> Summary | None:
    """The entry that a cell's report is about; None where no entry has an accuracy.

    It is a NOLA entry, else another method that trains, else one on frozen features. Of several the one with the most
    splits, then the most runs, so that one lucky run is not it; then the best mean; of equal ones the first by label.
    """

    def rank(item: Summary) -> tuple[int, int, int, float, str]:
        kinds = ("NOLA", "trained", "frozen")
        return kinds.index(kind(item)), -item.splits, -item.completed, -(item.mean or 0), item.label

    return min((item for item in summaries if item.mean is not None), key=rank, default=None)


def rivals(name: str, chosen: Summary, found: Sequence[Entry]) -> list[Entry]:
    """The entries of a kind (`chosen` may be one) that were measured on some of the splits of `chosen`, the best first.

    The best has the highest mean accuracy on these splits; of equal ones it is the first by label.
    """
    splits = {row.split for item, runs in found if item is chosen for row in runs if is_measured(row)}
    ranked = []
    for item, runs in found:
        shared = [row for row in runs if row.split in splits and is_measured(row)]
        if kind(item) == name and shared:
            mean = fmean(accuracy for row in shared for accuracy in run_accuracies(row))
            ranked.append((-mean, item.label, (item, runs)))
    return [entry for *_, entry in sorted(ranked, key=lambda one: one[:2])]


def _labels(method: str, versions: Sequence[tuple[str, Row]]) -> list[str]:
    """One label for each entry of one name, given the entry's hash and one of its rows."""
    if len(versions) == 1:
        return [method]
    settings = [entry_settings(row.config) for _, row in versions]
    names = list(dict.fromkeys(name for one in settings for name in one))
    differing = [name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]
    short = [name.rpartition(".")[2] for name in differing]
    labels = []
    for one in settings:
        shown = [
            f"{key if short.count(key) == 1 else name}={_shown(one.get(name))}"
            for name, key in zip(differing, short, strict=True)
        ]
        more = ", ..." if len(shown) > _SHOWN_SETTINGS else ""
        labels.append(", ".join(shown[:_SHOWN_SETTINGS]) + more)
    count = Counter(labels)
    hashed = [
        f"{label}, {digest[:4]}".removeprefix(", ") if not label or count[label] > 1 else label
        for label, (digest, _) in zip(labels, versions, strict=True)
    ]
    return [f"{method} ({label})" for label in hashed]


def _shown(value: Any) -> str:
    """A setting's value in a label: `8`, `0.001`, `qkv+mlp`, `null`."""
    if isinstance(value, list):
        text = "+".join(map(_shown, value))
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    if _DIGEST.fullmatch(text):
        return text[:6]
    return shortened(text, _MOST_VALUE)


def _summary(runs: list[Row], label: str) -> Summary:
    statuses = [row.status for row in runs]
    measured = [row for row in runs if is_measured(row)]
    accuracies = [accuracy for row in measured for accuracy in run_accuracies(row)]
    folds = any(map(cross_validated, measured))
    mean, std = mean_std(accuracies) if accuracies else (None, None)
    places = {split: list(inits.values()) for split, inits in _by_place(runs).items()}
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
        metrics=metrics,
    )


def _interval(measured: Sequence[Row]) -> tuple[float, float] | None:
    """The 95 % interval of a single run on a test set, in per cent."""
    found = run_accuracy(measured[0]) if len(measured) == 1 else None
    return found.interval if found is not None and found.estimate is None else None


def _largest(values: Iterable[Number | None]) -> Number | None:
    return max((value for value in values if value is not None), default=None)


def _trainable(row: Row) -> int | None:
    """Count a run's trainable parameters without the head: the adapter's and the others (such as batch norm)."""
    counts = [n for n in (row.adapter_parameters, row.other_parameters) if n is not None]
    return sum(counts) if counts else None
