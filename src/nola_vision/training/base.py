"""The base class of the LightningModules: validation and test with their loss, metrics and predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import lightning as L
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric

from nola_vision.evaluation.predictions import Predictions
from nola_vision.models.adapted_model import AdaptedModel
from nola_vision.training.features import use_features
from nola_vision.training.metrics import accuracies, collect_predictions, count_confusions, log_accuracy


@dataclass(frozen=True)
class Validated:
    """A validation: logits `[n, classes]` and labels `[n]` of the pool's images in all processes, and their metrics.

    `loss` is the mean cross-entropy, None without probabilities.
    """

    logits: Tensor
    labels: Tensor
    loss: float | None
    accuracy: float


class ClassificationTask(L.LightningModule):
    """A LightningModule whose forward pass gives logits `[batch, classes]`; subclasses set `model`.

    Args:
        num_classes: number of classes.

    Attributes:
        confusions: tested images `[true, predicted]`, after a test; None where the classes are too many.
        predictions: for the tested images, after a test.
        validated: the validation of the model's current weights; None if they were not validated.
        on_features: whether the batches hold features of the backbone instead of images.
    """

    has_probabilities = True  # as the softmax of the logits; without probabilities there is no loss
    model: AdaptedModel

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.accuracy = accuracies(num_classes)
        self.on_features = False
        self.confusions: Tensor | None = None
        self.predictions: Predictions | None = None
        self.validated: Validated | None = None
        self.held_out = nn.ModuleDict({name: CatMetric(nan_strategy="disable") for name in ("logits", "labels")})
        # a metric weights each process by its images; `sync_dist` would average over processes
        self.loss = nn.ModuleDict({stage: MeanMetric(nan_strategy="disable") for stage in ("val", "test")})

    def needs_only_features(self) -> bool:
        """Whether the batches of a stage should hold features of the backbone instead of images."""
        return False

    def setup(self, stage: str) -> None:
        self.on_features = self.needs_only_features()
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        use_features(data, self.model if self.on_features else None, self.trainer)

    def teardown(self, stage: str) -> None:
        self.on_features = False
        use_features(self.trainer.datamodule, None, self.trainer)  # type: ignore[attr-defined]

    def on_validation_start(self) -> None:
        for metric in self.held_out.values():
            cast(CatMetric, metric).reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        inputs, labels = batch
        logits = self(inputs)
        if self.has_probabilities:
            metric = cast(MeanMetric, self.loss[stage])
            # one value per image: with this `nan_strategy` torchmetrics 1.9 ignores the weight of a batch
            metric(F.cross_entropy(logits, labels, reduction="none"))
            self.log(f"{stage}_loss", metric, on_epoch=True, batch_size=len(labels))
        log_accuracy(self, self.accuracy, stage, logits, labels)
        if stage == "val":
            for name, values in (("logits", logits.float()), ("labels", labels)):
                cast(CatMetric, self.held_out[name]).update(values)

    def on_validation_epoch_end(self) -> None:
        logits, labels = (cast(CatMetric, self.held_out[name]).compute().cpu() for name in ("logits", "labels"))
        loss = cast(MeanMetric, self.loss["val"]).compute() if self.has_probabilities else None
        accuracy = cast(Metric, self.accuracy["val"]).compute()
        if not self.trainer.sanity_checking:
            self.validated = Validated(logits, labels.long(), None if loss is None else float(loss), float(accuracy))

    def on_test_epoch_end(self) -> None:
        self.confusions = count_confusions(self.accuracy)
        self.predictions = collect_predictions(self, self.accuracy)
