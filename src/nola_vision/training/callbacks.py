"""The callbacks of a run, and the checkpoints that they write."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger

from nola_vision.common import stopwatch
from nola_vision.common.errors import NolaVisionError

CHECKPOINTS = "checkpoints"
LAST_CHECKPOINT = Path(CHECKPOINTS) / "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Saves the run at the end of each epoch, with or without validation, to one file that is replaced atomically.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        part = self.path.with_suffix(".part")
        # Lightning copies the file from the system's temporary folder, which takes a while on another disk
        try:
            trainer.save_checkpoint(part, weights_only=False)
            if trainer.is_global_zero:
                os.replace(part, self.path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            part.unlink(missing_ok=True)
            raise NolaVisionError(
                f"the checkpoint {self.path} cannot be written ({textwrap.shorten(str(error), 150)}): make room, or "
                "give another folder by --out"
            ) from error


class Heartbeat(L.Callback):
    """Calls a function after every batch."""

    def __init__(self, heartbeat: Callable[[], None]) -> None:
        self._heartbeat = heartbeat

    def on_train_batch_end(self, *_: Any) -> None:
        self._heartbeat()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._heartbeat()

    def on_test_batch_end(self, *_: Any) -> None:
        self._heartbeat()

    def on_features_batch_end(self, *_: Any) -> None:
        self._heartbeat()


class ValidationTime(L.Callback):
    """Counts validation, in training and after it, as the part "validation" of the process's time."""

    def on_validation_start(self, *_: Any) -> None:
        stopwatch.begin("validation")

    def on_validation_end(self, *_: Any) -> None:
        stopwatch.end()


def is_known(callback: L.Callback) -> bool:
    """Whether a callback is Lightning's or this package's; what others do with images and weights is not known."""
    return type(callback).__module__.startswith(("lightning.", "nola_vision."))


def monitoring(callbacks: Sequence[L.Callback]) -> ModelCheckpoint | None:
    """The first ModelCheckpoint that keeps the best epoch by a metric; its epoch is the run's result."""
    kept = (c for c in callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None and c.save_top_k != 0)
    return next(kept, None)


def early_stopping(patience: int) -> list[L.Callback]:
    """The callbacks of `model.stop_early`: they stop the training and keep the best epoch's weights.

    They monitor the validation loss: on a small pool many epochs have the same accuracy.
    """
    return [EarlyStopping("val_loss", patience=patience), ModelCheckpoint(monitor="val_loss")]


def close_loggers(trainer: L.Trainer) -> None:
    """Closes the loggers of a run: W&B would log the next run of this process into it."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.finish()


def checkpoint_folder(folder: Path, callback: ModelCheckpoint) -> Path:
    """Where the run in `folder` stores the files of a ModelCheckpoint without a `dirpath`."""
    return folder / CHECKPOINTS / (callback.monitor or "unmonitored")


def current_path(stored: str, stored_folder: Any, folder: str | Path) -> str:
    """The path of a ModelCheckpoint's file after its folder was moved, or is spelled differently.

    Args:
        stored: the path that the checkpoint holds.
        stored_folder: the ModelCheckpoint's `dirpath` that the checkpoint holds.
        folder: its `dirpath` now.

    Returns:
        The same file name in `folder`; `stored` if the file exists only there.
    """
    try:
        inner = Path(stored).relative_to(stored_folder)
    except (TypeError, ValueError):
        inner = Path(Path(stored).name)
    here = Path(folder) / inner
    return stored if not here.exists() and Path(stored).exists() else str(here)


def update_paths(state: dict[str, Any], folder: str) -> None:
    """Updates the paths in a ModelCheckpoint's state; Lightning drops the best score if `dirpath` is another string."""
    stored_folder, state["dirpath"] = state.get("dirpath"), folder
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if state.get(key):
            state[key] = current_path(state[key], stored_folder, folder)
    state["best_k_models"] = {
        current_path(path, stored_folder, folder): score for path, score in state.get("best_k_models", {}).items()
    }
