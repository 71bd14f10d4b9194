"""The predictions of a run for each tested image, in a file next to its row, so that two runs can be paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import write_whole
from nola_vision.common.local_files import read_file
from nola_vision.common.text import shortened

PREDICTIONS_FILE = "predictions.safetensors"
_MOST_BYTES = 2**30


@dataclass(frozen=True)
class Predictions:
    """The tested images of one run, in ascending order of their index.

    Args:
        index: int64 `[n]`, positions of the images in their source; two runs on one data set are paired by them.
        label: int64 `[n]`, true class indices.
        predicted: int64 `[n]`, predicted class indices.
        probability: float32 `[n]`, of the predicted class. In the file of a final run whose row has a temperature it is
            calibrated: softmax(logits / temperature).
        logits: float32 `[n, classes]`, not divided by a temperature; None in the file of a final run.
    """

    index: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    probability: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32] | None = None

    @classmethod
    def of(cls, index: npt.ArrayLike, label: npt.ArrayLike, logits: npt.ArrayLike) -> Predictions:
        """The predictions that logits `[n, classes]` give; the images may be in any order."""
        positions, scores = np.asarray(index, dtype=np.int64), np.asarray(logits, dtype=np.float32)
        order = np.argsort(positions, kind="stable")
        scores = scores[order]
        labels = np.asarray(label, dtype=np.int64)[order]
        return cls(positions[order], labels, scores.argmax(axis=1), _highest_probability(scores), scores)

    def calibrated(self, temperature: float | None) -> Predictions:
        """These predictions as a final run stores them: without logits, which the temperature (None: 1) divided."""
        assert self.logits is not None
        return replace(self, probability=_highest_probability(self.logits, temperature or 1.0), logits=None)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether each image's class was predicted, `[n]`."""
        return np.equal(self.predicted, self.label)

    def save(self, folder: Path) -> None:
        """Writes the file into a run's folder, whole or not at all."""
        tensors = {name: np.ascontiguousarray(array) for name, array in vars(self).items() if array is not None}
        write_whole(folder / PREDICTIONS_FILE, safetensors.numpy.save(tensors))


def _highest_probability(logits: npt.NDArray[np.float32], temperature: float = 1.0) -> npt.NDArray[np.float32]:
    """The probability of the class with the largest logit, by softmax(logits / temperature), `[n]`."""
    shifted = (logits.astype(np.float64) - logits.max(axis=1, keepdims=True)) / temperature
    return np.asarray(1 / np.exp(shifted).sum(axis=1), dtype=np.float32)


def pool(parts: Sequence[Predictions]) -> Predictions:
    """The predictions of several runs on different images as one, such as those of all folds."""
    names = ("index", "label", "predicted", "probability")
    order = np.argsort(np.concatenate([part.index for part in parts]), kind="stable")
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts])[order] for name in names}
    logits = [part.logits for part in parts if part.logits is not None]
    return Predictions(**columns, logits=np.concatenate(logits)[order] if len(logits) == len(parts) else None)


def load_predictions(
    folder: Path, classes: int | None = None, images: int | None = None, most_bytes: int = _MOST_BYTES
) -> Predictions | None:
    """The predictions in a run's folder; None if there is no such file.

    Args:
        folder: of the run.
        classes: the number of classes of the run's data, if known.
        images: the number of tested images by the run's row, if known.
        most_bytes: a larger file is refused.

    Raises:
        NolaVisionError: the file is damaged, not a regular file or too large, or not of its run: a class
            index is not below `classes`, or it has another number of images.
    """
    path = folder / PREDICTIONS_FILE
    try:
        predictions = Predictions(**safetensors.numpy.load(read_file(path, most_bytes)))
        if fault := _fault(predictions, classes, images):
            raise ValueError(fault)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        text = (isinstance(error, OSError) and error.strerror) or str(error)
        reason = shortened(" ".join(text.split()), 100)
        raise NolaVisionError(f"{path} is damaged: {reason}; delete the run's folder and run again") from error
    return predictions


def _fault(found: Predictions, classes: int | None, images: int | None) -> str | None:
    """What is wrong with predictions that were read, or None."""
    count = found.index.size
    for name, array in vars(found).items():
        kind = np.float32 if name in ("probability", "logits") else np.int64
        if array is None:
            continue
        if array.dtype != kind or array.ndim != (2 if name == "logits" else 1):
            return f"{name} is {array.dtype} of {array.ndim} dimensions"
        if len(array) != count:
            return f"{name} is of {len(array)} images, and index of {count}"
        if not np.isfinite(array).all():
            return f"{name} holds a number that is not finite"
    if not count:
        return "it is empty"
    if images not in (None, count):
        return f"it is of {count:,} images, and the row of {images:,}"
    if found.index[0] < 0 or (np.diff(found.index) <= 0).any():
        return "index is not in ascending order without repeats"
    if found.probability.min() < 0 or found.probability.max() > 1:
        return "a probability is not between 0 and 1"
    width = classes if found.logits is None else found.logits.shape[1]
    if classes not in (None, width):
        return f"logits are of {width} classes, and the data have {classes}"
    named = np.concatenate([found.label, found.predicted])
    lowest, highest = int(named.min()), int(named.max())
    if lowest < 0 or (width is not None and highest >= width):
        return f"a class has the index {lowest if lowest < 0 else highest}"
    return None
