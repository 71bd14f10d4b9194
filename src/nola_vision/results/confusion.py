"""Which classes a run took for which, on the test set: its `confusion.csv`, and what many of them say of an entry."""

from __future__ import annotations

from collections import Counter
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
        class_names: in the order of the labels, which the text keeps; the label goes behind one that is there twice.
    """
    true, predicted = np.nonzero(counts + np.eye(len(class_names), dtype=np.int64))
    twice = {name for name, count in Counter(class_names).items() if count > 1}
    names = np.array([f"{name} ({i})" if name in twice else name for i, name in enumerate(class_names)], dtype=object)
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
        mend = "delete it (pictures then leave its run out)"
        raise NolaVisionError(f"{path} holds no confusion matrix: {mend}") from error


def entry_confusions(rows: Iterable[Row], cell: str, folders: Mapping[str, Path]) -> dict[str, dict[int, pd.DataFrame]]:
    """The sums of the matrices of each entry's completed final runs, by the entry's label and the split.

    Args:
        rows: of any runs.
        cell: which.
        folders: of runs, by `Row.run_hash`; runs without a `confusion.csv` are left out.
    """
    sums: dict[str, dict[int, pd.DataFrame]] = {}
    for summary, runs in entries(rows):
        for run in runs:
            path = folders.get(run.run_hash, Path()) / CONFUSION_FILE
            if run.cell == cell and run.status == "completed" and path.is_file():
                counts = read_confusion(path)
                of_splits = sums.setdefault(summary.label, {})
                known = of_splits.get(run.split)
                of_splits[run.split] = counts if known is None else known + counts.reindex_like(known)
    return sums


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
