"""Top-1 accuracy of both tasks, over the images of a whole stage as the paper has it, and the test's confusions."""

from __future__ import annotations

from typing import cast

import lightning as L
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

_MOST_CLASSES = 1000  # whose confusion matrix, of 8 MB, is kept


def accuracies(num_classes: int) -> nn.ModuleDict:
    """A metric for each stage that evaluates, since torchmetrics' default averages over classes; and `confusion`."""
    metrics = nn.ModuleDict({stage: MulticlassAccuracy(num_classes, average="micro") for stage in ("val", "test")})
    if num_classes <= _MOST_CLASSES:
        metrics["confusion"] = MulticlassConfusionMatrix(num_classes)
    return metrics


def log_accuracy(
    task: L.LightningModule, metrics: nn.ModuleDict, stage: str, predicted: Tensor, labels: Tensor
) -> None:
    """Adds a batch to `<stage>_accuracy`; `predicted` are class indices `[batch]` or logits `[batch, classes]`."""
    if stage == "test" and "confusion" in metrics:
        cast(Metric, metrics["confusion"]).update(predicted, labels)
    metric = cast(Metric, metrics[stage])
    metric(predicted, labels)
    task.log(f"{stage}_accuracy", metric, on_epoch=True, batch_size=len(labels), prog_bar=True)


def count_confusions(metrics: nn.ModuleDict) -> Tensor | None:
    """Tested images `[true, predicted]` of all processes, at a test's end, while these can still talk to each other.

    None where the classes are too many to keep it.
    """
    return cast(Metric, metrics["confusion"]).compute().cpu() if "confusion" in metrics else None
