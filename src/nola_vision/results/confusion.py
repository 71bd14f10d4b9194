"""Which classes a run took for which, on the test set: its `confusion.csv`, and what many of them say of an entry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nola_vision.errors import NolaVisionError
from nola_vision.results.row import Row
from nola_vision.results.statistics import entries

CONFUSION_FILE = "confusion.csv"


def confusion_csv(counts: NDArray[np.int64], class_names: Sequence[str]) -> str:
    """Test images by true and predicted class as text: a line a pair that has any, and one for each class with itself.

    Args:
        counts: `[true, predicted]`.
        class_names: in the order of the labels, which the text keeps.
    """
    true, predicted = np.nonzero(counts + np.eye(len(class_names), dtype=np.int64))
    names = np.array(class_names, dtype=object)
    lines = {"true": names[true], "predicted": names[predicted], "count": counts[true, predicted]}
    return pd.DataFrame(lines).to_csv(index=False)


def read_confusion(path: Path) -> pd.DataFrame:
    """The counts of a `confusion.csv`: an index line a true class, a column a predicted one.

    Raises:
        NolaVisionError: it cannot be read, or holds something else.
    """
    try:
        lines = pd.read_csv(path, dtype={"true": "str", "predicted": "str"}, keep_default_na=False)
        classes = lines["true"].drop_duplicates()
        square = lines.pivot(index="true", columns="predicted", values="count")
        return square.reindex(index=classes, columns=classes).fillna(0).astype("int64")
    except (OSError, ValueError, KeyError) as error:
        raise NolaVisionError(f"{path} holds no confusion matrix: delete it and run again") from error


def entry_confusions(rows: Iterable[Row], cell: str, folders: Mapping[str, Path]) -> dict[str, pd.DataFrame]:
    """The sum of the matrices of each entry's completed final runs, by the entry's label.

    Args:
        rows: of any runs.
        cell: which.
        folders: of runs, by `Row.run_hash`; runs without a `confusion.csv` are left out.
    """
    sums = {}
    for summary, runs in entries(rows):
        completed = [run.run_hash for run in runs if run.status == "completed" and run.run_hash in folders]
        paths = [folders[run_hash] / CONFUSION_FILE for run_hash in completed]
        if summary.cell == cell and (kept := [path for path in paths if path.exists()]):
            first, *others = map(read_confusion, kept)
            sums[summary.label] = sum((other.reindex_like(first) for other in others), first)
    return sums


def class_accuracy(confusion: pd.DataFrame) -> pd.Series[float]:
    """The share of each class's images that were taken for it, in per cent; none where a class has no image."""
    own = pd.Series(np.diag(confusion), index=confusion.index)
    return 100 * own / confusion.sum(axis=1).replace(0, np.nan)


def class_differences(confusions: Mapping[str, pd.DataFrame], than: str) -> pd.DataFrame:
    """By how many points each entry's accuracy on each class is above that of the entry `than`: a line an entry."""
    accuracies = pd.DataFrame({label: class_accuracy(confusion) for label, confusion in confusions.items()}).T
    return (accuracies - accuracies.loc[than]).drop(index=than)
