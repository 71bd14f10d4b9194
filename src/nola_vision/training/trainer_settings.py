"""Checks of the trainer settings of a run: which callbacks, strategies, precisions and limits are supported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from nola_vision.adapters.methods.base import Method
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.imports import resolve
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.training.callbacks import is_known

METRICS = ("train_loss", "val_loss", "val_accuracy")

# Callbacks that are not supported, subclasses included, and what to use instead.
_REFUSED = {
    "BatchSizeFinder": "the batch size is part of what a run is: set data.batch_size",
    "LearningRateFinder": "the learning rate is the method's: set its lr, or let `nola-vision sweep` choose it",
    "GradientAccumulationScheduler": "the cosine schedule counts equal epochs: set trainer.accumulate_grad_batches",
    "StochasticWeightAveraging": "the averaged copy of the model would not be in the adapter file: leave it out",
    "WeightAveraging": "the averaged copy of the model would not be in the adapter file: leave it out",
    "BaseFinetuning": "the method decides what is trained: choose FullFinetune, or an adapter's targets",
    "ModelPruning": "it replaces weights that the adapter belongs to: leave it out",
}
_NO_IMAGES = "there are no validation images (they need 20 images of a class, and a data set with a test set)"
_DDP = ("ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")


def check_stop_early(patience: int | None, callbacks: Any) -> None:
    """Refuses a `model.stop_early` below 1, or next to a callback that chooses the epoch too.

    Raises:
        NolaVisionError: as above.
    """
    if patience is None:
        return
    if patience < 1:
        raise NolaVisionError(f"model.stop_early is {patience}: give the number of validations to wait, 1 or more")
    for callback in _mappings(callbacks):
        made = resolve(callback["class_path"])
        monitored = (callback.get("init_args") or {}).get("monitor") is not None
        if issubclass(made, EarlyStopping) or (issubclass(made, ModelCheckpoint) and monitored):
            raise NolaVisionError(
                f"model.stop_early and the callback {made.__name__} both choose the epoch: leave one of them out"
            )


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Refuses unsupported trainer settings before anything is loaded or trained.

    Args:
        settings: the full config's `trainer`, as plain values.

    Raises:
        NolaVisionError: a callback or strategy that is not supported, a metric that is not logged, or a limit of 0.
    """
    _check_callbacks(_mappings(settings.get("callbacks")))
    _check_strategy(settings.get("strategy") or "auto")
    if settings.get("fast_dev_run"):
        raise NolaVisionError(
            "trainer.fast_dev_run leaves no checkpoint and no result: for a quick trial set trainer.max_epochs 1 and "
            "data.test_limit"
        )
    if settings.get("overfit_batches"):
        raise NolaVisionError(
            f"trainer.overfit_batches is {settings['overfit_batches']}: it would validate on training images; for a "
            "small training set, set data.shots"
        )
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if (value := settings.get(name)) == 0:
            raise NolaVisionError(f"trainer.{name} is {value}, so there would be no training: use a larger value")
    if (value := settings.get("limit_test_batches")) == 0:
        raise NolaVisionError(f"trainer.limit_test_batches is {value}, so there would be no test: use a larger value")
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if (value := settings.get(name)) is not None and value < 1:
            raise NolaVisionError(f"trainer.{name} is {value}: it must be at least 1")
    epochs, steps = settings.get("max_epochs"), settings.get("max_steps")
    for name, value in (("max_epochs", epochs), ("max_steps", steps)):
        if value is not None and value < -1:
            raise NolaVisionError(f"trainer.{name} is {value}: give a number above zero, or -1 for no limit")
    if epochs == -1 and (steps is None or steps == -1):
        raise NolaVisionError(
            "trainer.max_epochs is -1 without trainer.max_steps: the cosine schedule needs an end, so give one of them"
        )


def _mappings(callbacks: Any) -> list[Mapping[str, Any]]:
    """A config's callbacks as a list."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    return [callback for callback in listed if isinstance(callback, Mapping)]


def _check_callbacks(callbacks: Sequence[Mapping[str, Any]]) -> None:
    classes = [resolve(callback["class_path"]) for callback in callbacks]
    for made in classes:
        for name, reason in _REFUSED.items():
            if issubclass(made, getattr(lightning_callbacks, name, ())):
                raise NolaVisionError(f"the callback {made.__name__} is not supported: {reason}")
    if not all(made.__module__.startswith("lightning.") for made in classes):
        return  # another package's callback may log metrics
    rates = any(issubclass(made, LearningRateMonitor) for made in classes)
    for made, callback in zip(classes, callbacks, strict=True):
        monitor = (callback.get("init_args") or {}).get("monitor")
        if issubclass(made, EarlyStopping | ModelCheckpoint) and monitor is not None:
            if monitor not in METRICS and not (rates and str(monitor).startswith("lr-")):
                raise NolaVisionError(
                    f"{made.__name__} monitors {monitor!r}, which is not logged: use one of {', '.join(METRICS)}"
                )


def check_precision(precision: Any, method: Method) -> None:
    """Refuses 16-bit weights for methods that train weights of the backbone: most updates would be rounded away.

    Args:
        precision: the config's `trainer.precision`.
        method: the entry's.

    Raises:
        NolaVisionError: this method needs float32 weights.
    """
    trains_weights = method.train_norms or method.trains_backbone or method.edits_backbone
    if precision in ("bf16-true", "16-true") and trains_weights:
        what = "train_norms" if method.train_norms else type(method).__name__
        raise NolaVisionError(
            f"trainer.precision is {precision}, but {what} trains weights of the backbone, and most steps would be "
            f"rounded away in 16 bits: use {precision.replace('true', 'mixed')}"
        )


def use_validation(callbacks: Sequence[L.Callback]) -> bool:
    """Whether a callback monitors a validation metric or, one of another package, does something in a validation."""
    foreign = [type(one) for one in callbacks if not is_known(one)]
    hooks = [name for name in vars(L.Callback) if name.startswith("on_validation")]
    return any(_monitored(callback).startswith("val_") for callback in callbacks) or any(
        getattr(made, hook) is not getattr(L.Callback, hook) for made in foreign for hook in hooks
    )


def _monitored(callback: L.Callback) -> str:
    return str(getattr(callback, "monitor", None)) if isinstance(callback, EarlyStopping | ModelCheckpoint) else ""


def check_monitors(trainer: L.Trainer, has_validation: bool) -> None:
    """Refuses callbacks that monitor a validation metric in a run without validation.

    Args:
        trainer: of the run.
        has_validation: whether there are validation images.

    Raises:
        NolaVisionError: a callback monitors such a metric.
    """
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    reason = None
    if not has_validation:
        reason = f"{_NO_IMAGES}: leave model.stop_early out, or monitor train_loss"
    elif not trainer.limit_val_batches:
        reason = "trainer.limit_val_batches is 0: leave it out"
    elif every is not None and every > 1 and epochs is not None and 0 < epochs < 2 * every:  # at most one validation
        reason = (
            f"trainer.check_val_every_n_epoch is {every} and trainer.max_epochs {epochs}: validate more often "
            "(--trainer.check_val_every_n_epoch 1)"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = _monitored(callback)
        if reason and monitor.startswith("val_"):
            raise NolaVisionError(f"{type(callback).__name__} monitors {monitor!r}, but {reason}")


def check_limits(trainer: L.Trainer, data: KShotDataModule) -> None:
    """Refuses a share of the evaluated batches that is less than one batch, which Lightning refuses after training.

    Args:
        trainer: of the run.
        data: its data, with `evaluations`.

    Raises:
        NolaVisionError: as above.
    """
    # the test of a search run too: the final runs have the same limit
    for name in ("test", "val") if {"fit", "validate"} & {*(data.evaluations or ())} else ("test",):
        limit = getattr(trainer, f"limit_{name}_batches")
        if not isinstance(limit, float) or not 0 < limit < 1:
            continue
        images = len(data.test_indices) if name == "test" else data.describe()["counts"]["validation"]
        batches = math.ceil(images / data.eval_batch_size)
        if batches and int(limit * batches) == 0:
            raise NolaVisionError(
                f"trainer.limit_{name}_batches is {limit}, less than one of the {batches:,} batches: give a number of "
                "batches, such as 1, or a larger share"
            )


def no_validations(trainer: L.Trainer) -> str | None:
    """What to warn of in a run that is to validate and has no validation images.

    None where the validation would be the one after training, which configs ask for to calibrate the adapter if they
    can.
    """
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if every is not None and epochs is not None and 0 < epochs <= every:
        return None
    return f"nothing is validated in training: {_NO_IMAGES}"


def _check_strategy(strategy: str | Mapping[str, Any]) -> None:
    """Accepts one device, or DDP with one process per device: every process then has the whole adapter."""
    if isinstance(strategy, str):
        name, known = strategy, strategy == "auto" or strategy in _DDP
    else:
        made, start = resolve(strategy["class_path"]), (strategy.get("init_args") or {}).get("start_method")
        name, known = made.__name__, made in (SingleDeviceStrategy, DDPStrategy) and start in (None, "popen")
    if not known:
        raise NolaVisionError(
            f"trainer.strategy {name} is not supported: use ddp for several devices, or leave it out (others split the "
            "model, or start processes in their own way)"
        )
