"""The held-out predictions of all folds of a run: its estimate and its temperature."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nola_vision.common.errors import NolaVisionError
from nola_vision.data.sources import ImageSource
from nola_vision.evaluation.calibration import Calibration, cross_fitted
from nola_vision.evaluation.estimates import CrossValidated
from nola_vision.evaluation.predictions import PREDICTIONS_FILE, Predictions, load_predictions
from nola_vision.models.loading import set_temperature
from nola_vision.runs.outputs import write_confusions, write_tested
from nola_vision.runs.parsing import open_data
from nola_vision.runs.record import Row
from nola_vision.runs.run_id import Config
from nola_vision.runs.store import ADAPTER_FILE, write_row
from nola_vision.training.distributed import is_main_process
from nola_vision.training.metrics import pooled_metrics


def pool_folds(held_out: Sequence[Row]) -> CrossValidated | None:
    """The pooled predictions of all folds of a run; None without folds.

    Args:
        held_out: the rows of the folds.

    Raises:
        NolaVisionError: a fold was not completed, or its predictions are missing.
    """
    if not held_out:
        return None
    parts = []
    for fold, of_fold in enumerate(held_out):
        found = _fold_predictions(of_fold)
        if found is None or found.logits is None:
            reason = of_fold.error or "its predictions are missing: delete its folder and run again"
            raise NolaVisionError(f"fold {fold + 1} of {len(held_out)}: {reason}")
        parts.append(found)
    index = np.concatenate([part.index for part in parts])
    if len(np.unique(index)) < len(index):
        raise NolaVisionError(
            f"two folds tested the same images, so a file {PREDICTIONS_FILE} was replaced by that of another run: "
            "repeat all with --again"
        )
    untested = held_out[0].data.get("untested_classes") or []
    return CrossValidated.of(parts, untested_classes=untested)


def _fold_predictions(of_fold: Row) -> Predictions | None:
    if of_fold.status != "completed" or of_fold.folder is None:
        return None
    return load_predictions(of_fold.folder)


def fold_calibration(pooled: CrossValidated) -> Calibration:
    """A temperature for the final model, fitted on the held-out predictions."""
    assert pooled.predictions.logits is not None
    return cross_fitted(pooled.predictions.logits, pooled.predictions.label, pooled.folds)


def total_seconds(held_out: Sequence[Row]) -> float:
    """The seconds of all folds together."""
    return sum(of_fold.seconds_total or 0 for of_fold in held_out)


def write_estimate(
    pooled: CrossValidated, temperature: float | None, folder: Path, class_names: Sequence[str], source: ImageSource
) -> dict[str, Any]:
    """Writes the predictions of the folds into a final run's folder; returns the columns of its row.

    Args:
        pooled: of all folds.
        temperature: for the probabilities; None if it was not fitted.
        folder: of the final run.
        class_names: of the data.
        source: of the tested images.
    """
    columns, confusions = pooled_metrics(pooled.predictions, len(class_names))
    if is_main_process():
        write_tested(pooled.predictions.calibrated(temperature), folder, source)
        write_confusions(confusions, folder, class_names)
    return {"estimate": pooled.estimate.to_dict(), **columns}


def add_estimate(row: Row, run_config: Config, folder: Path, held_out: Sequence[Row]) -> Row:
    """Adds the estimate, which was skipped when the run trained, to a completed row and returns it."""
    pooled = pool_folds(held_out)
    assert pooled is not None
    source = open_data(run_config).tested_source
    found, path = fold_calibration(pooled), folder / ADAPTER_FILE
    set_temperature(path, found.temperature, "folds", found.images)
    columns = write_estimate(pooled, found.temperature, folder, row.data["class_names"], source)
    columns |= {"calibrated_on": "folds", **found.columns()}
    seconds = round((row.seconds_total or 0) + total_seconds(held_out), 3)
    row = dataclasses.replace(row, adapter_file_bytes=path.stat().st_size, seconds_total=seconds, **columns)
    write_row(folder, row)
    return row
