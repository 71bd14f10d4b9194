"""The work of one run: train, save, validate, calibrate and test; fills in the columns of its row."""

from __future__ import annotations

import math
import re
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.stopwatch import timed
from nola_vision.evaluation.calibration import cross_fitted
from nola_vision.evaluation.estimates import CrossValidated
from nola_vision.models.loading import check_saved, set_temperature
from nola_vision.runs import run_id
from nola_vision.runs.checkpoints import CheckpointError
from nola_vision.runs.fold_results import fold_calibration, write_estimate
from nola_vision.runs.outputs import write_confusions, write_tested
from nola_vision.runs.parsing import RunCLI
from nola_vision.runs.store import ADAPTER_FILE
from nola_vision.training.classifier import Classifier
from nola_vision.training.distributed import is_main_process
from nola_vision.training.frozen import FrozenClassifier
from nola_vision.training.frozen import evaluate as evaluate_frozen
from nola_vision.training.metrics import LOGGED

_CHECKED_IMAGES = 4  # of the training set, to compare the saved adapter with the trained one


def measure(
    built: RunCLI,
    folder: Path,
    stage: run_id.Stage,
    ckpt_path: str | None,
    pooled: CrossValidated | None,
    measured: dict[str, Any],
) -> None:
    """Trains, saves, validates, calibrates and tests a run.

    Args:
        built: what `parsing.build` returns.
        folder: of the run.
        stage: of the run.
        ckpt_path: the checkpoint to resume from.
        pooled: the predictions of the run's folds.
        measured: filled with columns of the row as they become known, so that a failed run keeps them.
    """
    trainer, task, data = built.trainer, built.model, built.datamodule
    device = trainer.strategy.root_device
    _reset_peak_memory(device)
    measured |= {**_counts(task), "warnings": data.warnings}
    peak = None

    if isinstance(task, Classifier):
        if is_main_process():
            _keep_old_log(folder)
        clock = time.perf_counter()
        with timed("training"):
            _fit(built, ckpt_path)
        measured["seconds_fit"] = round(time.perf_counter() - clock, 3)
        measured |= {"epoch": task.epoch, "monitor": task.monitor}
        measured["train_loss"] = _number(task.train_loss)
        if measured["train_loss"] is None:
            raise NolaVisionError("training ended with a loss that is not finite: try a smaller learning rate or scale")
        if trainer.is_global_zero and stage != "fold":
            measured["adapter_file_bytes"] = task.model.save(folder / ADAPTER_FILE)
            if stage == "final":  # it loads a second backbone: too slow for every run of a search
                peak = _peak_memory_mib(device)
                known = data.reference_dataloader().dataset
                images = torch.stack([known[i][0] for i in range(min(_CHECKED_IMAGES, len(known)))])
                check_saved(task.model, folder / ADAPTER_FILE, images.to(task.device))
                if device.type == "cpu":
                    _reset_peak_memory(device)
    elif isinstance(task, FrozenClassifier):
        clock = time.perf_counter()
        with timed("training"):
            if stage == "final" and not data.has_test and data.fold is None:
                pooled = evaluate_frozen(task, data, trainer)
            else:
                task.fit_to(data, trainer)
        measured["seconds_fit"] = round(time.perf_counter() - clock, 3)
        if trainer.is_global_zero and task.savable:
            measured["adapter_file_bytes"] = task.model.save(folder / ADAPTER_FILE)
    quiet = {"datamodule": data, "verbose": False}
    if task.validated is None and "validate" in data.evaluations:
        with timed("validation"):
            trainer.validate(task, **quiet)
    if (validated := task.validated) is not None:
        measured |= {"val_accuracy": _number(validated.accuracy), "val_loss": _number(validated.loss)}
    if stage == "final" and (isinstance(task, Classifier) or task.savable):
        measured |= _calibrate(task, pooled)
        if trainer.is_global_zero and task.model.calibrated_on is not None:
            path, model = folder / ADAPTER_FILE, task.model
            set_temperature(path, model.temperature, model.calibrated_on, model.calibration_images)
            measured["adapter_file_bytes"] = path.stat().st_size
    if pooled is not None:
        temperature = measured.get("temperature")
        measured |= write_estimate(pooled, temperature, folder, data.class_names, data.tested_source)
    if stage != "search" and data.test_name is not None:
        clock = time.perf_counter()
        with timed("test"):
            trainer.test(task, **quiet)
        measured["seconds_test"] = round(time.perf_counter() - clock, 3)
        measured |= {column: _number(trainer.callback_metrics.get(name)) for column, name in LOGGED.items()}
        if task.predictions is not None and trainer.is_global_zero:
            if stage == "final":
                write_tested(task.predictions.calibrated(measured.get("temperature")), folder, data.tested_source)
            else:  # a fold keeps its logits, for the temperature of the final run
                task.predictions.save(folder)
        if trainer.is_global_zero:
            write_confusions(task.confusions, folder, data.class_names)
        if sum(trainer.num_test_batches) < len(data.test_dataloader()):
            part = f"tested on {sum(trainer.num_test_batches)} of {len(data.test_dataloader())} batches"
            data.warnings.append(f"{part} (trainer.limit_test_batches): data.test_limit takes a part of every class")
    later = _peak_memory_mib(device)
    measured["peak_memory_mib"] = max(peak, later) if peak is not None and later is not None else later
    if isinstance(task, FrozenClassifier) and not task.savable:
        measured["test_nll"] = None  # 1-NN's logits are cosines on an arbitrary scale
    measured["data"] = data.describe()


def device_name(trainer: L.Trainer, in_tf32: bool) -> str:
    """The device of a run as its row states it, `NVIDIA H100 (TF32)` where float32 products use TF32."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name} (TF32)" if in_tf32 else name


def _calibrate(task: Classifier | FrozenClassifier, pooled: CrossValidated | None) -> dict[str, Any]:
    """Fits the model's temperature on the folds' predictions or on the validation pool; returns columns of the row."""
    if pooled is not None:
        found, source = fold_calibration(pooled), "folds"
    elif (held := task.validated) is not None and bool(held.logits.isfinite().all()):
        found, source = cross_fitted(held.logits.numpy(), held.labels.numpy()), "validation"
    else:
        return {}
    model = task.model
    model.temperature, model.calibrated_on, model.calibration_images = found.temperature, source, found.images
    return found.columns() | {"calibrated_on": source}


def _fit(built: RunCLI, ckpt_path: str | None) -> None:
    """Trains; a run that had finished training is only restored from its checkpoint."""
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
    """Renames an existing log: a resumed run starts a new one, and Lightning would delete the old one."""
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
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the process's peak resident memory


def _peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory allocated by torch on a GPU, else the process's peak resident memory; None if unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return round(int(found[1]) / 1024, 1) if found else None
    return None


def _counts(task: L.LightningModule) -> dict[str, int]:
    """Trainable parameters: the adapter's (Full-FT: the backbone's), the head's, and any others."""
    if isinstance(task, FrozenClassifier):
        head = task.model.bank.head_parameters() if task.savable else []
        return {"adapter_parameters": 0, "head_parameters": sum(p.numel() for p in head), "other_parameters": 0}
    assert isinstance(task, Classifier)
    groups = {group["name"]: sum(p.numel() for p in group["params"]) for group in task.parameter_groups()}
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    adapter, head = groups.get("adapter", 0), groups.get("head", 0)
    return {"adapter_parameters": adapter, "head_parameters": head, "other_parameters": trained - adapter - head}


def _number(value: torch.Tensor | float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
