"""Which classes runs took for which: the file `confusion.csv`, and what the counts of many runs show of an entry."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nola_vision.errors import NolaVisionError
from nola_vision.predictions import Predictions
from nola_vision.results.row import Row
from nola_vision.results.statistics import entries
from nola_vision.results.store import read_run_file
from nola_vision.text import csv_cell

CONFUSION_FILE = "confusion.csv"
MOST_RUNS = 48  # of an entry, whose counts are summed: the first
_HEADER = b"true,predicted,count"
# A run writes a file for up to 1,000 classes: one line per pair of classes with an image
_MOST_BYTES, MOST_CLASSES = 2**26, 2000
_NUMBER = re.compile("[0-9]{1,12}")


def confusion_csv(counts: NDArray[np.int64], class_names: Sequence[str]) -> str:
    """Test images by true and predicted class as text: a line a pair that has any, and one for each class with itself.

    Args:
        counts: `[true, predicted]`.
        class_names: in the order of the labels, which the text keeps. A name that a spreadsheet would compute is
            escaped, and a duplicate gets its label.
    """
    true, predicted = np.nonzero(counts + np.eye(len(class_names), dtype=np.int64))
    cells = [csv_cell(name) for name in class_names]
    twice = {name for name, count in Counter(cells).items() if count > 1}
    unique = [f"{name} ({i})" if name in twice else name for i, name in enumerate(cells)]
    if len(set(unique)) < len(unique):  # "crane" twice and "crane (0)"
        unique = [f"{name} ({i})" for i, name in enumerate(cells)]
    names = np.array(unique, dtype=object)
    lines = {"true": names[true], "predicted": names[predicted], "count": counts[true, predicted]}
    return pd.DataFrame(lines).to_csv(index=False)


def read_confusion(path: Path) -> pd.DataFrame:
    """The counts of a `confusion.csv`: an index line a true class, a column a predicted one.

    Raises:
        NolaVisionError: it cannot be read, or holds something else.
    """
    content = read_run_file(path, _MOST_BYTES)
    try:
        if content.partition(b"\n")[0].strip() != _HEADER:
            raise ValueError("another header")
        reader = csv.reader(io.StringIO(content.decode(), newline=""))
        next(reader)
        classes: dict[str, int] = {}
        predicted_classes: set[str] = set()
        counts: dict[tuple[str, str], int] = {}
        for true, predicted, count in filter(None, reader):
            if (true, predicted) in counts or not _NUMBER.fullmatch(count):
                raise ValueError("a pair that is there twice, or a count that is not a number of images")
            counts[true, predicted] = int(count)
            classes.setdefault(true, len(classes))
            predicted_classes.add(predicted)
            if max(len(classes), len(predicted_classes)) > MOST_CLASSES:
                raise ValueError("too many classes")
        square = np.zeros((len(classes), len(classes)), dtype=np.int64)
        for (true, predicted), images in counts.items():
            square[classes[true], classes[predicted]] = images
        names = pd.Index(classes, dtype="object")
        return pd.DataFrame(square, index=names.rename("true"), columns=names.rename("predicted"))
    except (ValueError, KeyError, csv.Error) as error:
        fix = "delete it (plots then leave its run out)"
        raise NolaVisionError(f"{path} holds no confusion matrix: {fix}") from error


def count_predictions(found: Sequence[Predictions], classes: int) -> NDArray[np.int64]:
    """Images by true and predicted class, `[classes, classes]`, summed over runs; at least one."""
    places = np.concatenate([classes * one.label + one.predicted for one in found])
    return np.bincount(places, minlength=classes**2).reshape(classes, classes)


def confused_pairs(counts: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """The pairs of a true class and another that was predicted, with their count, the most frequent first."""
    wrong = counts - np.diag(np.diag(counts))
    ranked = np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]
    return [(*divmod(place, len(wrong)), int(wrong.flat[place])) for place in ranked.tolist()]


def run_confusions(runs: Iterable[Row]) -> tuple[list[tuple[Row, pd.DataFrame]], list[str]]:
    """The matrices of the first `MOST_RUNS` completed runs of one entry that left one, all with the same classes.

    Returns:
        The runs with their matrices, and a sentence for each file that could not be used.
    """
    found: list[tuple[Row, pd.DataFrame]] = []
    problems = []
    for run in runs:
        if run.folder is None or run.status != "completed" or not os.path.lexists(run.folder / CONFUSION_FILE):
            continue
        path = run.folder / CONFUSION_FILE
        try:
            counts = read_confusion(path)
            if found and not found[0][1].index.equals(counts.index):
                if set(found[0][1].index) != set(counts.index):
                    raise NolaVisionError(f"{path} has other classes than {run.method}'s other runs: delete it")
                counts = counts.reindex_like(found[0][1])
            found.append((run, counts))
        except NolaVisionError as error:
            problems.append(str(error))
        if len(found) == MOST_RUNS:
            break
    return found, problems


def entry_confusions(rows: Iterable[Row], cell: str) -> tuple[dict[str, dict[int, pd.DataFrame]], list[str]]:
    """Sum the matrices of each entry's completed final runs, as `run_confusions` reads them.

    Args:
        rows: of any runs; those without a `confusion.csv` in their folder are left out.
        cell: which.

    Returns:
        The sums by the entry's label and the split, and a sentence for each file that could not be used.
    """
    sums: dict[str, dict[int, pd.DataFrame]] = {}
    problems = []
    for summary, runs in entries(row for row in rows if row.cell == cell):
        found, unusable = run_confusions(runs)
        problems += unusable
        of_splits: dict[int, pd.DataFrame] = {}
        for run, counts in found:
            of_splits[run.split] = of_splits[run.split] + counts if run.split in of_splits else counts
        if of_splits:
            sums[summary.label] = of_splits
    return sums, problems


def class_accuracy(confusion: pd.DataFrame) -> pd.Series[float]:
    """The share of each class's images that were taken for it, in per cent; none where a class has no image."""
    own = pd.Series(np.diag(confusion), index=confusion.index)
    return 100 * own / confusion.sum(axis=1).replace(0, np.nan)


def class_differences(
    confusions: Mapping[str, Mapping[int, pd.DataFrame]], than: str
) -> dict[str, tuple[int, pd.Series[float]]]:
    """By how many points each entry's accuracy on each class is above that of the entry `than`.

    Returns:
        By the entry's label, over how many splits, those that both have, and the mean of the differences on each class.
    """
    found = {}
    for label, of_splits in confusions.items():
        shared = sorted(of_splits.keys() & confusions[than].keys())
        if label != than and shared:
            pairs = [class_accuracy(of_splits[s]) - class_accuracy(confusions[than][s]) for s in shared]
            found[label] = len(shared), pd.concat(pairs, axis=1).mean(axis=1).reindex(pairs[0].index)
    return found
