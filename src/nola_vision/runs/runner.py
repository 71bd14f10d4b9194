"""One run: from its full config to its row. The command line and every sweep engine end here."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import shutil
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from nola_vision.adapters.serialization import open_adapter
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import need_checkpoint_file, write_whole
from nola_vision.common.interrupts import Interrupts
from nola_vision.data.sources import ImageSource
from nola_vision.evaluation.calibration import Calibration, cross_fitted
from nola_vision.evaluation.estimates import CrossValidated
from nola_vision.evaluation.predictions import PREDICTIONS_FILE, Predictions, load_predictions
from nola_vision.models import loading
from nola_vision.models.adapted_model import first_not_finite
from nola_vision.reports.confusion import CONFUSION_FILE, confusion_csv
from nola_vision.runs import record, run_id
from nola_vision.runs.parsing import RunCLI, build, open_data, quiet
from nola_vision.runs.record import Row
from nola_vision.runs.store import (
    LOCK_FILE,
    ROW_FILE,
    claim,
    drop_aside,
    find_completed,
    refuse_other_things,
    set_aside,
    write_row,
)
from nola_vision.runs.thumbnails import write_thumbnails
from nola_vision.training.classifier import Classifier
from nola_vision.training.frozen import FrozenClassifier
from nola_vision.training.frozen import evaluate as evaluate_frozen
from nola_vision.training.metrics import LOGGED, pooled_metrics
from nola_vision.training.trainer_settings import (
    CHECKPOINTS,
    LAST_CHECKPOINT,
    check_monitors,
    checkpoint_folder,
    close_loggers,
    current_path,
    monitoring,
)

ADAPTER_FILE = "adapter.safetensors"
_CHECKED_IMAGES = 4  # of the training set, to compare the saved adapter with the trained one

_log = logging.getLogger(__name__)


class CheckpointError(NolaVisionError):
    """A checkpoint that a run cannot be resumed from. The run is as it was."""


def checkpoint_path(given: str | None, folder: Path) -> str | None:
    """The checkpoint that `--ckpt_path` names; `last` is the run's own.

    Raises:
        NolaVisionError: it does not exist.
    """
    path = folder / LAST_CHECKPOINT if given == "last" else given and Path(given)
    if path:
        need_checkpoint_file(path)
    return str(path) if path else None


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint's content, read as plain data.

    Raises:
        CheckpointError: the file is damaged or not a checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that is not a checkpoint fails in any way
        raise CheckpointError(f"{path} is damaged or not a checkpoint: give one that `fit` wrote") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(f"{path} is not a Lightning checkpoint: give one that `fit` wrote")
    return checkpoint


def _refuse_other_run(checkpoint: dict[str, Any], run_hash: str) -> None:
    """A checkpoint holds the optimizer and the schedule of its run: only that run can resume from it."""
    if checkpoint.get("run_hash") != run_hash:
        raise CheckpointError(
            f"the checkpoint belongs to run {checkpoint.get('run_hash')} and these settings are run {run_hash}: a run "
            "is resumed with the very settings it was started with, --trainer.max_epochs included"
        )


def _refuse_damaged(checkpoint: dict[str, Any], path: str, trainer: L.Trainer) -> None:
    """Checks what Lightning restores without a check: a wrong counter would end a run that was never trained.

    Raises:
        CheckpointError: a part is missing, of another type or not finite, or the counters contradict each other.
    """
    wrong = _misfit(
        checkpoint,
        {
            "epoch": 0,
            "global_step": 0,
            "callbacks": {},
            "optimizer_states": [{"state": {}, "param_groups": []}],
            "lr_schedulers": [{}],
            "stopped": False,
            "adapter": {},
            "loops": {"fit_loop": trainer.fit_loop.state_dict()},
        },
    )
    if wrong is None:
        epoch, current = checkpoint["epoch"], checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
        steps = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        if any(value - epoch not in (0, 1) for value in current.values()) or epoch > (trainer.max_epochs or -1) > 0:
            wrong = "epoch"
        elif steps["total"]["completed"] != checkpoint["global_step"]:
            wrong = "global_step"
        elif not isinstance(checkpoint.get("train_loss"), float | None):
            wrong = "train_loss"
        elif not all(isinstance(tensor, torch.Tensor) for tensor in checkpoint["state_dict"].values()):
            wrong = "state_dict"
        else:
            wrong = first_not_finite(checkpoint["state_dict"])
    if wrong is not None:
        raise CheckpointError(
            f"the checkpoint {path} is damaged (its {wrong}): give another one, or leave --ckpt_path out to start from "
            "scratch"
        )


def _misfit(found: Any, example: Any, name: str = "content") -> str | None:
    """The name of the first part that lacks a key or an item of an example, or is of another type."""
    if type(found) is not type(example) or (type(found) is int and found < 0):
        return name
    if isinstance(example, dict):
        parts = ((str(key), found.get(key), value) for key, value in example.items())
    elif isinstance(example, list) and example:
        if len(found) != len(example):
            return name
        parts = ((name, one, other) for one, other in zip(found, example, strict=True))
    else:
        return None
    return next((wrong for key, one, other in parts if (wrong := _misfit(one, other, key)) is not None), None)


def run(
    run_config: run_id.Config,
    out: str | Path,
    stage: run_id.Stage = "final",
    ckpt_path: str | None = None,
    keep_going: bool = False,
    beat: Callable[[], None] | None = None,
    again: bool = False,
    held_out: Sequence[Row] = (),
) -> Row:
    """Trains, validates and (in the final stage) tests one run, and leaves its row whatever happens.

    A run that is completed is not repeated: its row is returned.

    Args:
        run_config: what `parse` returns.
        out: the folder of all runs; this one's own folder in it is `run_id.run_folder`.
        stage: `search` stops before the test set; `fold` is a training for an estimate, which keeps no adapter.
        ckpt_path: resume from this checkpoint of the run. `last` finishes the run whatever has interrupted it: it
            resumes from the run's own checkpoint, or starts from scratch if there is none yet.
        keep_going: a run that fails gives its row instead of raising; Ctrl-C raises all the same.
        beat: called after every batch: the run is alive.
        again: repeat a completed run. Its folder is moved aside (`store.set_aside`), and tables count its row until the
            repetition is completed.
        held_out: the rows of the folds that the estimate of a final run is made of. A completed run that has no
            estimate yet gets it without a second training.

    Raises:
        BusyError: another process is running it.
        NolaVisionError: a mistake that shows before training leaves nothing behind (with `keep_going` its row); any
            other error, and Ctrl-C, are raised after the row is written.
    """
    folder = run_id.run_folder(out, run_config, stage)
    last, trains = ckpt_path == "last", run_id.has_init(run_config)
    if ckpt_path is not None and not last:
        if not trains:
            raise NolaVisionError(
                f"{run_config['method']} trains nothing, so it has no checkpoint: leave --ckpt_path out"
            )
        ckpt_path = checkpoint_path(ckpt_path, folder)
    main = is_main_process(run_config)
    if again and main:
        set_aside(folder)
    # the processes of a distributed run share the first one's claim
    with claim(folder) if main else nullcontext():
        if not again and (row := completed_row(folder)) is not None:
            if held_out and row.estimate is None and main:
                row = _with_estimate(row, run_config, folder, held_out)
            return row
        if last:
            found = trains and (folder / LAST_CHECKPOINT).is_file()
            ckpt_path = str(folder / LAST_CHECKPOINT) if found else None
            if main and trains:
                _log.warning("this run %s", "resumes" if found else "has no checkpoint yet: it starts from scratch")
        row = _run(run_config, folder, Path(out), stage, ckpt_path, keep_going, beat, held_out)
        if main and row.status == "completed":
            drop_aside(folder)
            if stage == "fold":  # of five trainings, each as large as its adapter
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return row


def _run(
    run_config: run_id.Config,
    folder: Path,
    out: Path,
    stage: run_id.Stage,
    ckpt_path: str | None,
    keep_going: bool,
    beat: Callable[[], None] | None,
    held_out: Sequence[Row],
) -> Row:
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    measured: dict[str, Any] = {}
    status: record.Status = "failed"
    begun = keep_going
    with Interrupts() as interrupts:  # Ctrl-C never interrupts the writing of the row
        try:
            with interrupts.allowed(), quiet():
                measured |= {"versions": record.environment(), "git": record.git_state()}
                pooled = _pooled(held_out)
                built = _prepared(run_config, folder, stage, ckpt_path)
                begun = True
                if beat is not None:
                    built.trainer.callbacks.append(_Heartbeat(beat))  # type: ignore[attr-defined]
                try:
                    _measure(built, folder, stage, ckpt_path, pooled, measured)
                finally:
                    close_loggers(built.trainer)
                status = "completed"
        except (KeyboardInterrupt, SystemExit):
            if status != "completed":
                status, measured["error"] = "interrupted", "interrupted before it ended"
            raise KeyboardInterrupt from None
        except Exception as error:
            expected = isinstance(error, NolaVisionError)
            measured["error"] = " ".join(f"{'' if expected else f'{type(error).__name__}: '}{error}".split())
            begun = (begun or not expected) and (keep_going or not isinstance(error, CheckpointError))
            if not expected or (begun and error.__cause__ is not None):
                (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
            if not keep_going:
                raise
        finally:
            learning_rate = run_config["model"]["method"]["init_args"].get("lr")
            finished = Row.of(
                run_config,
                stage,
                status,
                started=started,
                seconds_total=round(time.perf_counter() - clock + _seconds(held_out), 3),
                **{"threads": torch.get_num_threads(), "learning_rate": learning_rate, **measured},
            )
            # the other processes of a distributed run have the same numbers
            if is_main_process(run_config):
                if begun:
                    write_row(folder, finished)
                else:
                    _remove_empty(folder, out)
    return dataclasses.replace(finished, folder=folder)


def _fold_predictions(of_fold: Row) -> Predictions | None:
    if of_fold.status != "completed" or of_fold.folder is None:
        return None
    return load_predictions(of_fold.folder)


def _pooled(held_out: Sequence[Row]) -> CrossValidated | None:
    """What the rows of all folds of a run found; None if there are none.

    Raises:
        NolaVisionError: a fold was not completed, or its predictions are gone.
    """
    if not held_out:
        return None
    parts = []
    for fold, of_fold in enumerate(held_out):
        found = _fold_predictions(of_fold)
        if found is None or found.logits is None:
            reason = of_fold.error or "its predictions are gone: delete its folder and run again"
            raise NolaVisionError(f"fold {fold + 1} of {len(held_out)}: {reason}")
        parts.append(found)
    index = np.concatenate([part.index for part in parts])
    if len(np.unique(index)) < len(index):
        raise NolaVisionError(
            f"two folds tested the same images, so a file {PREDICTIONS_FILE} was replaced by that of another run: "
            "repeat all by --again"
        )
    untested = held_out[0].data.get("untested_classes") or []
    return CrossValidated.of(parts, untested_classes=untested)


def _fold_calibration(pooled: CrossValidated) -> Calibration:
    """A temperature for the final model, fitted on what the folds held out."""
    assert pooled.predictions.logits is not None
    return cross_fitted(pooled.predictions.logits, pooled.predictions.label, pooled.folds)


def _seconds(held_out: Sequence[Row]) -> float:
    return sum(of_fold.seconds_total or 0 for of_fold in held_out)


def _write_estimate(
    pooled: CrossValidated, temperature: float | None, folder: Path, class_names: Sequence[str], source: ImageSource
) -> dict[str, Any]:
    """Writes what the folds predicted into a final run's folder; returns the columns of its row.

    Args:
        pooled: of all folds.
        temperature: for the probabilities; None where there is none.
        folder: of the final run.
        class_names: of the data.
        source: of the tested images.
    """
    columns, confusions = pooled_metrics(pooled.predictions, len(class_names))
    if is_main_process():
        _write_tested(pooled.predictions.calibrated(temperature), folder, source)
        _write_confusions(confusions, folder, class_names)
    return {"estimate": pooled.estimate.to_dict(), **columns}


def _write_confusions(confusions: torch.Tensor | None, folder: Path, class_names: Sequence[str]) -> None:
    if confusions is not None:
        write_whole(folder / CONFUSION_FILE, confusion_csv(confusions.numpy(), class_names).encode())


def _with_estimate(row: Row, run_config: run_id.Config, folder: Path, held_out: Sequence[Row]) -> Row:
    """A completed row with the estimate that was skipped when its run trained."""
    pooled = _pooled(held_out)
    assert pooled is not None
    source = open_data(run_config).tested_source
    found, path = _fold_calibration(pooled), folder / ADAPTER_FILE
    loading.set_temperature(path, found.temperature, "folds", found.images)
    columns = _write_estimate(pooled, found.temperature, folder, row.data["class_names"], source)
    columns |= {"calibrated_on": "folds", **found.columns()}
    seconds = round((row.seconds_total or 0) + _seconds(held_out), 3)
    row = dataclasses.replace(row, adapter_file_bytes=path.stat().st_size, seconds_total=seconds, **columns)
    write_row(folder, row)
    return row


def completed_row(folder: Path) -> Row | None:
    """The row of a completed run, if the folder has one that is of use.

    It is not if it cannot be read, or if a file that the run left is missing or damaged: a fold's predictions, or the
    adapter of a final run. Then the run is repeated, and a warning gives the reason, once in a process.

    Raises:
        NolaVisionError: as `store.refuse_other_things`.
    """
    refuse_other_things(folder)
    try:
        row = find_completed(folder)
    except NolaVisionError as error:
        _warn_once(f"the row of this run replaces one that cannot be read: {error}")
        return None
    problem = None if row is None else _unusable(row, folder)
    if problem is None:
        return row
    _warn_once(f"this run was completed, but it is repeated: {problem}")
    return None


@cache
def _warn_once(sentence: str) -> None:
    """A fit looks at each run several times."""
    _log.warning("%s", sentence)


def _unusable(row: Row, folder: Path) -> str | None:
    """What a completed run lacks of what its stage leaves for later, or None."""
    class_names, counts = row.data.get("class_names"), row.data.get("counts") or {}
    if row.stage != "search" and not class_names:
        return f"{folder / ROW_FILE} has no data.class_names"
    try:
        if row.stage == "fold":
            found = load_predictions(folder, len(class_names or ()), counts.get("test"))
            if found is None or found.logits is None:
                return f"{folder / PREDICTIONS_FILE} {'does not exist' if found is None else 'has no logits'}"
        elif row.stage == "final" and row.adapter_file_bytes is not None:
            open_adapter(folder / ADAPTER_FILE)
    except NolaVisionError as error:
        return str(error)
    return None


def _remove_empty(folder: Path, out: Path) -> None:
    """Removes a run's folder, those around it and `out`, as far as nothing is in them."""
    with suppress(OSError):
        (folder / LOCK_FILE).unlink(missing_ok=True)
        for place in (folder, *folder.parents[: len(folder.relative_to(out).parts)]):
            place.rmdir()


class _Heartbeat(L.Callback):
    """Calls a function after every batch."""

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat

    def on_train_batch_end(self, *_: Any) -> None:
        self._beat()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._beat()

    def on_test_batch_end(self, *_: Any) -> None:
        self._beat()

    def on_features_batch_end(self, *_: Any) -> None:
        self._beat()


def is_main_process(run_config: run_id.Config | None = None) -> bool:
    """False in all but the first process of a distributed run.

    Args:
        run_config: of the run; on several nodes it is needed before the trainer exists.
    """
    nodes = ((run_config or {}).get("trainer") or {}).get("num_nodes") or 1
    if nodes > 1 and int(os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or 0) > 0:
        return False  # the first process of another node, which Lightning has not given its rank yet
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


def _prepared(run_config: run_id.Config, folder: Path, stage: run_id.Stage, ckpt_path: str | None) -> RunCLI:
    """What a run is made of, with the training images open, and the checkpoint known to be this run's."""
    if run_config["model"].get("compile"):
        torch.compiler.reset()  # it counts the models that a process compiled before, and gives up after eight
    built = build(run_config, folder)
    if isinstance(built.model, Classifier):
        built.model.run_hash = run_id.run_hash(run_config, stage)
        if ckpt_path is not None:
            _refuse_other_run(checkpoint := read_checkpoint(ckpt_path), built.model.run_hash)
            _refuse_damaged(checkpoint, ckpt_path, built.trainer)
            try:
                built.model.refuse_other_checkpoint(checkpoint)
            except NolaVisionError as error:
                raise CheckpointError(str(error)) from error
    if built.trainer.world_size == 1:  # else one process of a machine downloads while the others wait, in `fit`
        built.datamodule.prepare_data()
        built.datamodule.setup("fit")
        if isinstance(built.model, Classifier):
            check_monitors(built.trainer, built.datamodule.describe()["counts"]["validation"] > 0)
    return built


def check(run_config: run_id.Config, ckpt_path: str | None) -> None:
    """Sets a run up and drops it, so that a mistake shows before anything is computed.

    Raises:
        NolaVisionError: as `run` before training.
    """
    with TemporaryDirectory() as scratch, quiet():
        _prepared(run_config, Path(scratch), "final", None if ckpt_path == "last" else ckpt_path)


def _measure(
    built: RunCLI,
    folder: Path,
    stage: run_id.Stage,
    ckpt_path: str | None,
    pooled: CrossValidated | None,
    measured: dict[str, Any],
) -> None:
    """Fills in `measured` as the run goes on, so that a failed run keeps what was known."""
    trainer, task, data = built.trainer, built.model, built.datamodule
    device = trainer.strategy.root_device
    measured["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    _reset_peak_memory(device)
    measured |= {**_counts(task), "warnings": data.warnings}
    peak = None

    if isinstance(task, Classifier):
        if is_main_process():
            _keep_old_log(folder)
        clock = time.perf_counter()
        _fit(built, ckpt_path)
        measured["seconds_fit"] = round(time.perf_counter() - clock, 3)
        measured |= {"epoch": task.epoch, "monitor": task.monitor}
        measured["train_loss"] = _number(task.train_loss)
        if measured["train_loss"] is None:
            raise NolaVisionError("training ended with a loss that is not finite: try a smaller learning rate or scale")
        if trainer.is_global_zero and stage != "fold":
            measured["adapter_file_bytes"] = task.model.save(folder / ADAPTER_FILE)
            if stage == "final":  # the check loads a second backbone: too slow for every run of a search
                peak = _peak_memory_mib(device)
                known = data.reference_dataloader().dataset
                images = torch.stack([known[i][0] for i in range(min(_CHECKED_IMAGES, len(known)))])
                loading.check_saved(task.model, folder / ADAPTER_FILE, images.to(task.device))
                if device.type == "cpu":
                    _reset_peak_memory(device)
    elif isinstance(task, FrozenClassifier):
        clock = time.perf_counter()
        if stage == "final" and not data.has_test and data.fold is None:
            pooled = evaluate_frozen(task, data, trainer)
        else:
            task.fit_to(data, trainer)
        measured["seconds_fit"] = round(time.perf_counter() - clock, 3)
        if trainer.is_global_zero and task.savable:
            measured["adapter_file_bytes"] = task.model.save(folder / ADAPTER_FILE)
    quiet = {"datamodule": data, "verbose": False}
    trainer.validate(task, **quiet)
    measured["val_accuracy"] = _number(trainer.callback_metrics.get("val_accuracy"))
    measured["val_loss"] = _number(trainer.callback_metrics.get("val_loss"))
    if stage == "final" and (isinstance(task, Classifier) or task.savable):
        measured |= _calibrate(task, pooled)
        if trainer.is_global_zero and task.model.calibrated_on is not None:
            path, model = folder / ADAPTER_FILE, task.model
            loading.set_temperature(path, model.temperature, model.calibrated_on, model.calibration_images)
            measured["adapter_file_bytes"] = path.stat().st_size
    if pooled is not None:
        temperature = measured.get("temperature")
        measured |= _write_estimate(pooled, temperature, folder, data.class_names, data.tested_source)
    if stage != "search" and data.test_name is not None:
        clock = time.perf_counter()
        trainer.test(task, **quiet)
        measured["seconds_test"] = round(time.perf_counter() - clock, 3)
        measured |= {column: _number(trainer.callback_metrics.get(name)) for column, name in LOGGED.items()}
        if task.predictions is not None and trainer.is_global_zero:
            if stage == "final":
                _write_tested(task.predictions.calibrated(measured.get("temperature")), folder, data.tested_source)
            else:  # of a fold, with its logits, for the temperature of the final run
                task.predictions.save(folder)
        if trainer.is_global_zero:
            _write_confusions(task.confusions, folder, data.class_names)
        if sum(trainer.num_test_batches) < len(data.test_dataloader()):
            part = f"tested on {sum(trainer.num_test_batches)} of {len(data.test_dataloader())} batches"
            data.warnings.append(f"{part} (trainer.limit_test_batches): data.test_limit takes a part of every class")
    later = _peak_memory_mib(device)
    measured["peak_memory_mib"] = max(peak, later) if peak is not None and later is not None else later
    if isinstance(task, FrozenClassifier) and not task.savable:
        measured["test_nll"] = None  # 1-NN's logits are cosines on a scale of no meaning
    measured["data"] = data.describe()


def _write_tested(predictions: Predictions, folder: Path, source: ImageSource) -> None:
    """Writes what a final run predicted, and thumbnails of its mistakes."""
    predictions.save(folder)
    write_thumbnails(folder, predictions, source)


def _calibrate(task: Classifier | FrozenClassifier, pooled: CrossValidated | None) -> dict[str, Any]:
    """Fits the model's temperature on what the folds held out or on the validation pool; the columns of the row."""
    if pooled is not None:
        found, source = _fold_calibration(pooled), "folds"
    elif task.validated is not None and all(bool(values.isfinite().all()) for values in task.validated):
        logits, labels = task.validated
        found, source = cross_fitted(logits.numpy(), labels.numpy()), "validation"
    else:
        return {}
    model = task.model
    model.temperature, model.calibrated_on, model.calibration_images = found.temperature, source, found.images
    return found.columns() | {"calibrated_on": source}


def _fit(built: RunCLI, ckpt_path: str | None) -> None:
    """Trains; a run that is at its end already is only restored from its checkpoint."""
    trainer, task = built.trainer, built.model
    try:
        trainer.fit(task, datamodule=built.datamodule, ckpt_path=ckpt_path, weights_only=True)
    except NolaVisionError:
        raise
    except MisconfigurationException as error:
        raise NolaVisionError(f"Lightning cannot train with these settings: {_one_line(error)}") from error
    except Exception as error:
        if ckpt_path is None or task.began:
            raise
        raise CheckpointError(
            f"the run cannot resume from {ckpt_path} ({type(error).__name__}: {_one_line(error)}): give another "
            "checkpoint, or leave --ckpt_path out to start from scratch"
        ) from error
    if trainer.interrupted:
        raise KeyboardInterrupt


def _one_line(error: BaseException) -> str:
    return textwrap.shorten(str(error), 200)


def _keep_old_log(folder: Path) -> None:
    """A resumed run starts a log of its own, and Lightning would delete the one that is there."""
    log = folder / "metrics.csv"
    if log.exists():
        number = 1
        while (kept := folder / f"metrics-{number}.csv").exists():
            number += 1
        log.rename(kept)


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the process's high-water mark starts anew


def _peak_memory_mib(device: torch.device) -> float | None:
    """On a GPU what torch had allocated at most, else the most the process had resident; None where nobody tells."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return round(int(found[1]) / 1024, 1) if found else None
    return None


def _counts(task: L.LightningModule) -> dict[str, int]:
    """Trainable numbers: the adapter's (Full-FT: the backbone's), the head's, and any others."""
    if isinstance(task, FrozenClassifier):
        head = task.model.bank.head_parameters() if task.savable else []
        return {"adapter_parameters": 0, "head_parameters": sum(p.numel() for p in head), "other_parameters": 0}
    assert isinstance(task, Classifier)
    groups = {group["name"]: sum(p.numel() for p in group["params"]) for group in task.parameter_groups()}
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    adapter, head = groups.get("adapter", 0), groups.get("head", 0)
    return {"adapter_parameters": adapter, "head_parameters": head, "other_parameters": trained - adapter - head}


def _number(value: torch.Tensor | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def evaluate(run_config: run_id.Config, out: str | Path, verb: str, ckpt_path: str | None) -> None:
    """Prints a checkpoint's accuracy on the validation pool (`validate`) or the test set (`test`); leaves no row.

    Without a checkpoint, or with `last`, it evaluates the weights that the run's row is of.

    Raises:
        NolaVisionError: a method that trains was given no checkpoint, or one that is damaged or of another run.
    """
    folder = run_id.run_folder(out, run_config, "final")
    own = ckpt_path in (None, "last")
    ckpt_path = checkpoint_path(ckpt_path or "last", folder) if run_id.has_init(run_config) else None
    with quiet():
        built = build(run_config, folder / verb)
        if ckpt_path is not None:
            checkpoint = read_checkpoint(ckpt_path)
            best = monitoring(built.trainer.callbacks)  # type: ignore[attr-defined]
            states = checkpoint.get("callbacks")
            state = states.get(best.state_key) if own and best is not None and isinstance(states, dict) else None
            if best is not None and isinstance(state, dict) and (path := state.get("best_model_path")):
                place = checkpoint_folder(folder, best)  # `best.dirpath` is in the verb's own folder
                ckpt_path = current_path(str(path), state.get("dirpath"), place)
                built.model.load_best(ckpt_path)
            else:
                built.model.load_weights(checkpoint)
            if is_main_process():
                print(f"checkpoint: {ckpt_path}")
        if verb == "test" and built.datamodule.test_name is None:
            raise NolaVisionError("the data set has no test images: `nola-vision fit` prints the estimate of its folds")
        step = built.trainer.validate if verb == "validate" else built.trainer.test
        try:
            step(built.model, datamodule=built.datamodule)
        except SystemExit:  # how Lightning ends on Ctrl-C
            raise KeyboardInterrupt from None
