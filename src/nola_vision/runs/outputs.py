"""The files that a tested run leaves next to its row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from nola_vision.common.files import write_whole
from nola_vision.data.sources import ImageSource
from nola_vision.evaluation.confusion import CONFUSION_FILE, confusion_csv
from nola_vision.evaluation.predictions import Predictions
from nola_vision.runs.thumbnails import write_thumbnails


def write_tested(predictions: Predictions, folder: Path, source: ImageSource) -> None:
    """Writes the predictions of a final run, and thumbnails of its mistakes."""
    predictions.save(folder)
    write_thumbnails(folder, predictions, source)


def write_confusions(confusions: Tensor | None, folder: Path, class_names: Sequence[str]) -> None:
    """Writes `confusion.csv`, unless there are too many classes for it (None)."""
    if confusions is not None:
        write_whole(folder / CONFUSION_FILE, confusion_csv(confusions.numpy(), class_names).encode())
