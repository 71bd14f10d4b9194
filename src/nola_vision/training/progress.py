"""Progress of features, training and testing: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from nola_vision.common.progress import PlainCount, PlainLines, duration, say, time_left


class LiveProgress(RichProgressBar):
    """Lightning's bar, and one for the features that methods on a frozen backbone use."""

    def on_features_start(self, trainer: L.Trainer, total: int) -> None:
        self._init_progress(trainer)
        self._features = self._add_task(total, "Features") if self.is_enabled else None

    def on_features_batch_end(self, trainer: L.Trainer, done: int, total: int) -> None:
        self._update(self._features, done)

    def on_features_end(self, trainer: L.Trainer) -> None:
        self._stop_progress()

    def on_features_loaded(self, trainer: L.Trainer, total: int) -> None:
        self._init_progress(trainer)
        self._update(self._add_task(total, "Cached features") if self.is_enabled else None, total)
        self._stop_progress()


class PlainProgress(ProgressBar):
    """A line when training starts, at most one every ten seconds, and one when it ends; also for validation, testing
    and the features of a frozen backbone.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._enabled = clock, True

    def disable(self) -> None:  # Lightning calls it in all processes but the first
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began, self._first = self._clock(), trainer.global_step
        self._lines = PlainLines(self._clock)
        self._steps = int(trainer.estimated_stepping_batches)
        if self._enabled:
            resumed = f", resumed after step {self._first:,}" if self._first else ""
            say(f"training starts: {self._epochs(trainer)}{self._steps:,} steps{resumed}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._enabled:
            self._lines.say(lambda: self._line(trainer, outputs))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._enabled:
            say(f"training ended: {trainer.global_step:,} steps, {duration(self._clock() - self._began)}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count = PlainCount("validating", "batches", self._clock)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._enabled:
            self._count.show(batch_idx + 1, int(sum(trainer.num_val_batches)))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count = PlainCount("testing", "batches", self._clock)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._enabled:
            self._count.show(batch_idx + 1, int(sum(trainer.num_test_batches)))

    def on_features_start(self, trainer: L.Trainer, total: int) -> None:
        self._features = PlainCount("features", "images", self._clock)

    def on_features_batch_end(self, trainer: L.Trainer, done: int, total: int) -> None:
        if self._enabled:
            self._features.show(done, total)

    def on_features_loaded(self, trainer: L.Trainer, total: int) -> None:
        if self._enabled:
            say(f"features of {total:,} images: from the cache")

    def _epochs(self, trainer: L.Trainer) -> str:
        epochs = trainer.max_epochs
        return f"{epochs:,} epochs, " if epochs is not None and epochs > 0 else ""

    def _line(self, trainer: L.Trainer, outputs: Any) -> str:
        done, steps = trainer.global_step - self._first, self._steps
        epochs = trainer.max_epochs
        of_epochs = f" of {epochs:,}" if epochs is not None and epochs > 0 else ""
        line = f"epoch {trainer.current_epoch + 1:,}{of_epochs}, step {trainer.global_step:,} of {steps:,}"
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            line += f", loss {float(loss):.4g}"
        if 0 < done < steps - self._first:
            seconds = (self._clock() - self._began) * (steps - self._first - done) / done
            line += f", {time_left(seconds)}"
        return line
