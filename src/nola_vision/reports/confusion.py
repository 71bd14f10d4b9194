"""Confusion matrices of runs, read from `confusion.csv`, and what the sums over an entry's runs show."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nola_vision.common.errors import NolaVisionError
from nola_vision.evaluation.confusion import CONFUSION_FILE, csv_names
from nola_vision.evaluation.predictions import Predictions
from nola_vision.reports.entries import Entry
from nola_vision.reports.statistics import run_accuracy
from nola_vision.runs.record import Row
from nola_vision.runs.store import read_run_file

MOST_RUNS = 48  # per entry, the first ones, whose counts are summed
_HEADER = ["true", "predicted", "count"]
# A run writes a file for up to 1,000 classes: one line per pair of classes with an image
_MOST_BYTES, MOST_CLASSES = 2**26, 2000
_NUMBER = re.compile("[0-9]{1,12}")
_FIX = "delete it (plots then leave its run out)"
_Classes = TypeVar("_Classes", bound=Hashable)


def read_confusion(path: Path) -> pd.DataFrame:
    """The counts of a `confusion.csv`, indexed by true class, with a column per predicted class.

    Raises:
        NolaVisionError: it cannot be read or is not a confusion matrix.
    """
    content = read_run_file(path, _MOST_BYTES)
    try:
        lines = csv.reader(io.StringIO(content.decode(), newline=""), strict=True)
        if next(lines, None) != _HEADER:
            raise ValueError("another header")
        at: dict[str, int] = {}  # the place of a class, in the order of the file
        counts: dict[tuple[str, str], str] = {}
        for true, predicted, count in lines:
            at.setdefault(true, len(at))
            if (true, predicted) in counts or len(at) > MOST_CLASSES or not _NUMBER.fullmatch(count):
                raise ValueError("a pair that is there twice, too many classes, or a count that is not a number")
            counts[true, predicted] = count
        if not at:
            raise ValueError("no classes")
        square = np.zeros((len(at), len(at)), dtype=np.int64)
        places = [len(at) * at[true] + at[predicted] for true, predicted in counts]
        square.flat[places] = [int(count) for count in counts.values()]
        classes = pd.Index(list(at), dtype=object)
        return pd.DataFrame(square, index=classes.rename("true"), columns=classes.rename("predicted"))
    except (ValueError, KeyError, csv.Error) as error:  # KeyError: a predicted class that is not a true one
        raise NolaVisionError(f"{path} is not a confusion matrix: {_FIX}") from error


def count_predictions(found: Sequence[Predictions], classes: int) -> NDArray[np.int64]:
    """Images by true and predicted class, `[classes, classes]`, summed over runs; at least one."""
    places = np.concatenate([classes * one.label + one.predicted for one in found])
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def confused_pairs(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The confused pairs, the most frequent first, as `[pair, 3]`: the true class, the predicted one, and the count."""
    wrong = counts - np.diag(np.diag(counts))
    ranked = np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]
    return np.stack([*divmod(ranked, len(wrong)), wrong.flat[ranked]], axis=1)


def usual_classes(found: Iterable[tuple[Row, _Classes]]) -> _Classes | None:
    """The classes that most runs of an entry have; if several are equally frequent, those of the newest run."""
    started: dict[_Classes, list[str]] = defaultdict(list)
    for run, classes in found:
        started[classes].append(run.started)
    return max(started, key=lambda classes: (len(started[classes]), max(started[classes])), default=None)


def run_confusions(runs: Iterable[Row]) -> tuple[list[tuple[Row, pd.DataFrame]], list[str]]:
    """The matrices of the first `MOST_RUNS` completed runs of one entry that have one, all with the same classes.

    Returns:
        The runs with their matrices, and one message per file that could not be used, for example because it differs
        from its run's row or has other classes than most runs.
    """
    read: list[tuple[Row, pd.DataFrame]] = []
    problems = []
    for run in runs:
        if run.folder is None or run.status != "completed" or not os.path.lexists(run.folder / CONFUSION_FILE):
            continue
        try:
            read.append((run, _of_its_row(run, run.folder / CONFUSION_FILE)))
        except NolaVisionError as error:
            problems.append(str(error))
        if len(read) == MOST_RUNS:
            break
    usual = usual_classes((run, frozenset(counts.index)) for run, counts in read)
    found: list[tuple[Row, pd.DataFrame]] = []
    for run, counts in read:
        if usual == frozenset(counts.index):
            found.append((run, counts.reindex_like(found[0][1]) if found else counts))
        else:
            path = (run.folder or Path()) / CONFUSION_FILE
            problems.append(f"{path} has other classes than most runs of {run.method}: it is left out")
    return found, problems


def _of_its_row(run: Row, path: Path) -> pd.DataFrame:
    """The counts of a run's file; NolaVisionError if the row has other classes or another number of images."""
    counts, names, accuracy = read_confusion(path), run.data.get("class_names"), run_accuracy(run)
    if names and set(csv_names(names)) != set(counts.index):
        raise NolaVisionError(f"{path} has other classes than its run's row: {_FIX}")
    images = int(counts.to_numpy().sum())
    if accuracy is not None and accuracy.images != images:
        raise NolaVisionError(f"{path} counts {images:,} images, and its run's row {accuracy.images:,}: {_FIX}")
    return counts


def entry_confusions(found: Sequence[Entry]) -> tuple[dict[str, dict[int, pd.DataFrame]], list[str]]:
    """Sum the matrices of each entry's completed final runs, as `run_confusions` reads them.

    Args:
        found: of one cell; runs without a `confusion.csv` in their
            folder are left out.

    Returns:
        The sums by the entry's label and the split, and one message per file that could not be used.
    """
    sums: dict[str, dict[int, pd.DataFrame]] = {}
    problems = []
    for summary, runs in found:
        read, unusable = run_confusions(runs)
        problems += unusable
        of_splits: dict[int, pd.DataFrame] = {}
        for run, counts in read:
            of_splits[run.split] = of_splits[run.split] + counts if run.split in of_splits else counts
        if of_splits:
            sums[summary.label] = of_splits
    return sums, problems


def class_accuracy(confusion: pd.DataFrame) -> pd.Series[float]:
    """The accuracy on each class in per cent; nan for a class without images."""
    own = pd.Series(np.diag(confusion), index=confusion.index)
    return 100 * own / confusion.sum(axis=1).replace(0, np.nan)


def class_differences(
    confusions: Mapping[str, Mapping[int, pd.DataFrame]], than: str
) -> dict[str, tuple[int, pd.Series[float]]]:
    """The difference of each entry's accuracy on each class to that of the entry `than`, in points.

    Returns:
        By the entry's label, the number of splits that both have, and the mean difference on each class.
    """
    found = {}
    for label, of_splits in confusions.items():
        shared = sorted(of_splits.keys() & confusions[than].keys())
        if label != than and shared:
            pairs = [class_accuracy(of_splits[s]) - class_accuracy(confusions[than][s]) for s in shared]
            found[label] = len(shared), pd.concat(pairs, axis=1).mean(axis=1).reindex(pairs[0].index)
    return found
