"""The predictions of an entry's runs: counts by class, and misclassified images with thumbnails."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from nola_vision.common.errors import NolaVisionError
from nola_vision.evaluation.predictions import Predictions, load_predictions
from nola_vision.reports.confusion import MOST_CLASSES, MOST_RUNS, count_predictions, usual_classes
from nola_vision.reports.entries import Summary
from nola_vision.reports.statistics import run_accuracy
from nola_vision.runs.record import Row
from nola_vision.runs.thumbnails import Thumbnail, load_thumbnails

_MOST_FILE_BYTES = 2**27  # of a run's predictions, without logits
_MOST_IMAGES = 2**22  # over the runs of an entry, 28 bytes per image


@dataclass(frozen=True)
class EntryPredictions:
    """An entry with those of its runs whose predictions could be read, at least one; all have the same classes."""

    summary: Summary
    class_names: tuple[str, ...]
    runs: tuple[tuple[Row, Predictions], ...]

    @property
    def label(self) -> str:
        """The entry's label."""
        return self.summary.label

    @property
    def splits(self) -> Set[int]:
        """The splits of the runs."""
        return {row.split for row, _ in self.runs}

    def on(self, splits: Set[int]) -> EntryPredictions:
        """Only the runs on some splits."""
        return replace(self, runs=tuple(run for run in self.runs if run[0].split in splits))

    def first(self, count: int) -> EntryPredictions:
        """Only the first runs."""
        return replace(self, runs=self.runs[:count])

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """Images by true and predicted class, `[classes, classes]`, summed over the runs."""
        return count_predictions([found for _, found in self.runs], len(self.class_names))

    @cached_property
    def shares(self) -> npt.NDArray[np.float64]:
        """The counts in per cent of the true class's images; nan for a class without images."""
        totals = self.counts.sum(axis=1, keepdims=True)
        shares = np.full(self.counts.shape, np.nan)
        np.divide(100.0 * self.counts, totals, out=shares, where=totals > 0)
        return shares

    @property
    def calibrated(self) -> bool:
        """Whether the probabilities of every run are calibrated."""
        return all(row.temperature is not None for row, _ in self.runs)

    @property
    def misclassified(self) -> int:
        """The number of images that at least one run misclassified."""
        return len(np.unique(np.concatenate([found.index[~found.correct] for _, found in self.runs])))

    def times_wrong(self, index: int) -> tuple[int, int]:
        """The number of runs that misclassified an image, and the number that tested it."""
        correct = np.concatenate([found.correct[found.index == index] for _, found in self.runs])
        return int((~correct).sum()), correct.size


def load_run_predictions(row: Row) -> Predictions | None:
    """The predictions in a run's folder; None if there is no such file.

    Raises:
        NolaVisionError: the file cannot be used, or its classes or number of images differ from the row's.
    """
    if row.folder is None:
        return None
    names, accuracy = row.data.get("class_names"), run_accuracy(row)
    images = None if accuracy is None else accuracy.images
    return load_predictions(row.folder, len(names) if names else None, images, _MOST_FILE_BYTES)


def read_entry_predictions(summary: Summary, runs: Sequence[Row], problems: list[str]) -> EntryPredictions | None:
    """The first runs of an entry that have predictions; None if no run has.

    Args:
        summary: of the entry.
        runs: of the entry.
        problems: one message is added per run that cannot be used.
    """
    completed = [row for row in runs if row.status == "completed" and row.folder and row.data.get("class_names")]
    named = [(row, tuple(row.data["class_names"])) for row in completed]
    names = usual_classes(named) or ()
    found: list[tuple[Row, Predictions]] = []
    images = 0
    for row, own_names in named:
        if len(own_names) > MOST_CLASSES:
            problems.append(f"{row.folder} has {len(own_names):,} classes: more than {MOST_CLASSES:,} are not shown")
            continue
        if own_names != names:
            problems.append(f"{row.folder} has other classes than most runs of {summary.label}: it is left out")
            continue
        try:
            predictions = load_run_predictions(row)
        except NolaVisionError as error:
            problems.append(str(error))
            continue
        if predictions is None:
            continue
        images += len(predictions.index)
        if images > _MOST_IMAGES:
            break
        found.append((row, replace(predictions, logits=None)))
        if len(found) == MOST_RUNS:
            break
    return EntryPredictions(summary, names, tuple(found)) if found else None


@dataclass(frozen=True)
class Mistake:
    """A misclassified image: thumbnail, class indices, and the probability of the predicted class."""

    thumbnail: Thumbnail
    true: int
    predicted: int
    probability: float


def mistakes(entry: EntryPredictions, problems: list[str]) -> list[Mistake]:
    """The misclassified images with a thumbnail, each once, the highest probability first.

    Args:
        entry: whose runs' thumbnails are read.
        problems: one message is added per file that cannot be used.
    """
    best: dict[int, Mistake] = {}
    for row, found in entry.runs:
        assert row.folder is not None
        try:
            thumbnails = load_thumbnails(row.folder)
        except NolaVisionError as error:
            problems.append(str(error))
            continue
        for place in np.flatnonzero(~found.correct & np.isin(found.index, list(thumbnails))).tolist():
            index, probability = int(found.index[place]), float(found.probability[place])
            if index not in best or best[index].probability < probability:
                labels = int(found.label[place]), int(found.predicted[place])
                best[index] = Mistake(thumbnails[index], *labels, probability)
    return sorted(best.values(), key=lambda mistake: (-mistake.probability, mistake.thumbnail.index))
