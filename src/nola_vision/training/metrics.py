"""Metrics of a stage over the images of all processes, and the predictions for the tested images."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassStatScores,
)
from torchmetrics.utilities import dim_zero_cat

from nola_vision.evaluation.predictions import Predictions

# Names that the test stage logs, by column of a row; a column without a logged value is None
LOGGED = {
    "test_accuracy": "test_accuracy",
    "balanced_accuracy": "test_balanced_accuracy",
    "macro_f1": "test_macro_f1",
    "top5_accuracy": "test_top5_accuracy",
    "test_nll": "test_loss",
}
TOP5_CLASSES = 10  # with fewer, top-5 is not informative
_MOST_CLASSES = 1000  # of a confusion matrix; it takes 8 MB


class BalancedAccuracy(MulticlassStatScores):
    """Mean recall over the classes that have images, as scikit-learn's `balanced_accuracy_score`.

    torchmetrics' macro accuracy counts a class without images as 0 if it was predicted.
    """

    higher_is_better = True

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average=None)

    def compute(self) -> Tensor:
        right, _, _, missed = self._final_state()
        images = right + missed
        return (right[images > 0] / images[images > 0]).mean()


class MacroF1(MulticlassStatScores):
    """Mean F1 over the classes that have images or were predicted, as scikit-learn's `f1_score`.

    torchmetrics' weights add up to more than 1 in float32: ten classes without errors would have 1.0000001.
    """

    higher_is_better = True

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average=None)

    def compute(self) -> Tensor:
        right, wrong, _, missed = self._final_state()
        images = 2 * right + wrong + missed
        return (2 * right[images > 0] / images[images > 0]).mean()


class TestedImages(Metric):
    """Position, label and logits of every tested image, gathered from all processes."""

    __test__ = False  # not a test case of pytest
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("positions", "labels", "logits"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, positions: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Adds a batch: positions in the order of the test loader `[batch]`, labels, and logits."""
        for state, values in ((self.positions, positions), (self.labels, labels), (self.logits, logits)):
            cast("list[Tensor]", state).append(values)

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, labels and logits of all images."""
        states = (self.positions, self.labels, self.logits)
        positions, labels, logits = (dim_zero_cat(cast("list[Tensor]", state)).cpu() for state in states)
        return positions, labels, logits


def accuracies(num_classes: int) -> nn.ModuleDict:
    """The metrics of validation and test, by stage; those of the test stage also by the names that they are logged as.

    `val` and `test` are top-1 accuracy over all images (torchmetrics' default averages over classes). Averages over
    classes leave out those that have no images: `test_balanced_accuracy` the classes without test images,
    `test_macro_f1` those that have none and were not predicted; both as scikit-learn.
    """
    metrics = nn.ModuleDict({stage: MulticlassAccuracy(num_classes, average="micro") for stage in ("val", "test")})
    metrics["test_balanced_accuracy"] = BalancedAccuracy(num_classes)
    metrics["test_macro_f1"] = MacroF1(num_classes)
    if num_classes >= TOP5_CLASSES:
        metrics["test_top5_accuracy"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
    if num_classes <= _MOST_CLASSES:
        metrics["confusion"] = MulticlassConfusionMatrix(num_classes)
    metrics["tested"] = TestedImages()
    return metrics


def log_accuracy(task: L.LightningModule, metrics: nn.ModuleDict, stage: str, logits: Tensor, labels: Tensor) -> None:
    """Adds a batch to `<stage>_accuracy` and, in the test stage, to its other metrics and the predictions.

    Args:
        task: logs them.
        metrics: what `accuracies` returns.
        stage: "val" or "test".
        logits: `[batch, classes]`.
        labels: class indices `[batch]`.
    """
    logged = {f"{stage}_accuracy": stage}
    if stage == "test":
        if "confusion" in metrics:
            cast(Metric, metrics["confusion"]).update(logits, labels)
        tested = cast(Metric, metrics["tested"])
        first = sum(map(len, cast("list[Tensor]", tested.labels)))
        own = torch.arange(first, first + len(labels), device=labels.device)
        # the loader's images go to the processes in turn
        tested.update(task.trainer.global_rank + task.trainer.world_size * own, labels, logits)
        names = ["test_balanced_accuracy", "test_macro_f1"]
        names += ["test_top5_accuracy"] if "test_top5_accuracy" in metrics else []
        logged |= {name: name for name in names}
    for name, key in logged.items():
        metric = cast(Metric, metrics[key])
        metric.update(logits, labels)
        options: dict[str, Any] = {"batch_size": len(labels), "prog_bar": name == f"{stage}_accuracy"}
        task.log(name, metric, on_step=False, on_epoch=True, **options)


def count_confusions(metrics: nn.ModuleDict) -> Tensor | None:
    """Tested images `[true, predicted]` of all processes, computed at the end of a test while they can communicate.

    None if there are too many classes.
    """
    return cast(Metric, metrics["confusion"]).compute().cpu() if "confusion" in metrics else None


def pooled_metrics(predictions: Predictions, num_classes: int) -> tuple[dict[str, float], Tensor | None]:
    """The metrics of the pooled predictions of folds, which no test stage logs.

    Args:
        predictions: of all folds, with logits.
        num_classes: number of classes.

    Returns:
        The columns of a row by name, without `test_accuracy`, which is in the estimate; and the confusion matrix.
    """
    logits, labels = torch.from_numpy(predictions.logits), torch.from_numpy(predictions.label)
    metrics = accuracies(num_classes)
    columns = {"test_nll": float(F.cross_entropy(logits, labels))}
    for column, name in LOGGED.items():
        if name in metrics:
            metric = cast(Metric, metrics[name])
            metric.update(logits, labels)
            columns[column] = float(metric.compute())
    if "confusion" in metrics:
        cast(Metric, metrics["confusion"]).update(logits, labels)
    return columns, count_confusions(metrics)


def collect_predictions(task: L.LightningModule, metrics: nn.ModuleDict) -> Predictions:
    """The predictions for the tested images of all processes, at a test's end, with their logits in float32.

    An image's index is its position in the source, by the datamodule's `test_indices`; of another datamodule, its
    position in the test loader.
    """
    tested = cast(Metric, metrics["tested"])
    positions, labels, logits = tested.compute()
    tested.reset()
    index, indices = positions.numpy(), getattr(getattr(task.trainer, "datamodule", None), "test_indices", None)
    if indices is not None:
        index = np.asarray(indices)[index]
    return Predictions.of(index, labels.numpy(), logits.float().numpy())
