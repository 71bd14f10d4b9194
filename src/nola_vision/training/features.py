"""Features of a frozen backbone: computed once per process for the same images, and shared by its runs.

Methods that only need features (1-NN, nearest mean, logistic regression, a linear probe without augmentation) run on
them instead of on images: their task calls `use_features` at the start of a stage, and the datamodule's loaders then
give features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nola_vision.common import process_cache
from nola_vision.common.local_files import file_digest
from nola_vision.common.stopwatch import timed
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.data.loaders import ImageSubset
from nola_vision.models.adapted_model import AdaptedModel
from nola_vision.models.backbones.properties import probe_batch
from nola_vision.models.backbones.sources import local_files

_MOST_KEPT = 512 * 2**20  # bytes: 10,000 images with 1,024 features take 40 MB
_RANDOM = ("p", "prob", "drop_prob", "drop_rate", "dropout")  # attributes of modules that drop values at random


class FeatureSet(Dataset[tuple[Tensor, Tensor]]):
    """Features instead of images, with the interface of `ImageSubset`.

    Args:
        features: `[n, width]`.
        labels: `[n]` class indices.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.features)

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The batch of some positions, or of (position, seed) pairs; features are not random, so seeds are ignored."""
        positions = [key[0] if isinstance(key, tuple) else key for key in keys]
        return self.features[positions], self.labels[positions]


def use_features(data: Any, model: AdaptedModel | None, trainer: L.Trainer) -> None:
    """Makes the loaders of a datamodule give features of `model` instead of images, or images again (None)."""
    if isinstance(data, KShotDataModule):
        data.as_features = None if model is None else partial(_feature_set, model, trainer)


def _feature_set(model: AdaptedModel, trainer: L.Trainer, loader: DataLoader[Any]) -> FeatureSet:
    assert isinstance(loader.dataset, ImageSubset)
    return FeatureSet(features(model, trainer, loader), torch.from_numpy(loader.dataset.labels))


def features(model: AdaptedModel, trainer: L.Trainer, loader: DataLoader[Any]) -> Tensor:
    """The features of a loader's images in its order: `[n, width]`, on the CPU, in the dtype that the backbone gives.

    They are those of the model's forward pass on the same batches in eval mode, with the trainer's device and
    precision. With a `process_cache` they are computed once per process for the same backbone, images, device,
    precision, batch size and number of threads; it stores up to 512 MB.

    Args:
        model: its backbone must be frozen and on the trainer's device.
        trainer: of the run. While features are computed, its callbacks' methods `on_features_start(trainer, total)`,
            `on_features_batch_end(trainer, done, total)` and `on_features_end(trainer)` are called, with numbers of
            images; those that a callback lacks are skipped.
        loader: of an `ImageSubset` with the evaluation transform.
    """
    images = loader.dataset
    assert isinstance(images, ImageSubset)
    spec = model.metadata.backbone
    weights = tuple(file_digest(path) for path in local_files(spec.tag, spec.file).values())
    # the fingerprint leaves position tables out
    backbone = (spec, model.metadata.basis_seed, model.fingerprint, weights)
    machine = (str(trainer.strategy.root_device), trainer.precision, torch.get_num_threads())
    key = (backbone, machine, model.metadata.input, images.key, loader.batch_size)
    make = partial(_computed, model, trainer, loader)
    return process_cache.latest("features", key, make, lambda tensor: tensor.nbytes, _MOST_KEPT)


@timed("features")
def _computed(model: AdaptedModel, trainer: L.Trainer, loader: DataLoader[Any]) -> Tensor:
    device, precision = trainer.strategy.root_device, trainer.precision_plugin
    total, done, parts = len(loader.dataset), 0, []  # type: ignore[arg-type]
    training = model.training
    model.eval()
    _notify(trainer, "on_features_start", total)
    try:
        # Lightning tests in inference mode, and a later run cannot train on tensors made in it
        with torch.inference_mode(False), torch.no_grad():
            for images, _ in loader:
                with precision.forward_context():
                    parts.append(model.features(precision.convert_input(images.to(device))).cpu())
                done += len(images)
                _notify(trainer, "on_features_batch_end", done, total)
    finally:
        _notify(trainer, "on_features_end")
        model.train(training)
    return torch.cat(parts)


def _notify(trainer: L.Trainer, hook: str, *counts: int) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (method := getattr(callback, hook, None)) is not None:
            method(trainer, *counts)


def drops_nothing(model: AdaptedModel) -> bool:
    """Whether the backbone gives the same features in training mode as in eval mode: no dropout, no jitter."""
    backbone = model.backbone
    for module in backbone.modules():
        rates = (getattr(module, name, None) for name in _RANDOM)
        if any(isinstance(rate, int | float) and rate > 0 for rate in rates):
            return False
    images, training = probe_batch(backbone), model.training
    try:
        with torch.no_grad():
            return torch.equal(model.train().backbone(images), model.eval().backbone(images))
    finally:
        model.train(training)
