"""Top-1 accuracy of both tasks, over the images of a whole stage as the paper has it."""

from __future__ import annotations

from typing import cast

import lightning as L
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy


def accuracies(num_classes: int) -> nn.ModuleDict:
    """A metric for each stage that evaluates; torchmetrics' own default would average over classes."""
    return nn.ModuleDict({stage: MulticlassAccuracy(num_classes, average="micro") for stage in ("val", "test")})


def log_accuracy(
    task: L.LightningModule, metrics: nn.ModuleDict, stage: str, predicted: Tensor, labels: Tensor
) -> None:
    """Adds a batch to `<stage>_accuracy`; `predicted` are class indices `[batch]` or logits `[batch, classes]`."""
    metric = cast(Metric, metrics[stage])
    metric(predicted, labels)
    task.log(f"{stage}_accuracy", metric, on_epoch=True, batch_size=len(labels), prog_bar=True)
