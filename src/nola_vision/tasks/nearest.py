"""1-NN on the frozen backbone's features: nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from nola_vision.backbones import BackboneSpec, create_backbone, to_int8
from nola_vision.predictions import Predictions
from nola_vision.tasks.accuracy import accuracies, collect_predictions, count_confusions, log_accuracy


class NearestNeighborClassifier(L.LightningModule):
    """The label of the training image whose pre-logits features have the largest cosine with the image's.

    The training images come from the datamodule's `reference_dataloader`, without augmentation.

    Args:
        backbone: the pretrained model.
        class_names: the classes, in the order of the labels.
    """

    def __init__(self, backbone: BackboneSpec, class_names: Sequence[str]) -> None:
        super().__init__()
        self.backbone = create_backbone(backbone)
        if backbone.int8:
            to_int8(self.backbone)
        self.accuracy = accuracies(len(class_names))
        self.confusions: Tensor | None = None
        self.predictions: Predictions | None = None  # of the last test
        self._reference: tuple[Tensor, Tensor] | None = None
        self.beat: Callable[[], None] = lambda: None  # called after each batch of training images

    def forward(self, images: Tensor) -> Tensor:
        """Unit features `[batch, features]`."""
        return F.normalize(self.backbone(images).float(), dim=-1)

    @torch.no_grad()
    def _remember(self) -> None:
        precision, batches = self.trainer.precision_plugin, []
        for images, labels in self.trainer.datamodule.reference_dataloader():  # type: ignore[attr-defined]
            with precision.forward_context():
                batches.append((self(precision.convert_input(images.to(self.device))), labels.to(self.device)))
            self.beat()
        self._reference = (torch.cat([f for f, _ in batches]), torch.cat([y for _, y in batches]))

    on_validation_start = on_test_start = _remember

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, labels = batch
        assert self._reference is not None
        features, known = self._reference
        nearest = (self(images) @ features.t()).argmax(dim=1)
        log_accuracy(self, self.accuracy, stage, known[nearest], labels)

    def on_test_epoch_end(self) -> None:
        self.confusions = count_confusions(self.accuracy)
        self.predictions = collect_predictions(self, self.accuracy)

    def configure_optimizers(self) -> Any:
        return None
