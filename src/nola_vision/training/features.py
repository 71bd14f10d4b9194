"""Features of a frozen backbone: computed once for the same images, and shared by runs and, on disk, by processes.

Methods that only need features (1-NN, nearest mean, logistic regression, a linear probe without augmentation) run on
them instead of on images: their task calls `use_features` at the start of a stage, and the datamodule's loaders then
give features.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import nola_vision
from nola_vision.common import process_cache
from nola_vision.common.devices import processor_name
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import sha256_of_tensors
from nola_vision.common.local_files import file_digest
from nola_vision.common.stopwatch import timed
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.data.loaders import ImageSubset
from nola_vision.models.adapted_model import AdaptedModel
from nola_vision.models.backbones.properties import position_digest, probe_batch
from nola_vision.models.backbones.sources import local_files
from nola_vision.training import feature_cache
from nola_vision.training.precision import FLOAT32

_MOST_KEPT = 512 * 2**20  # bytes: 10,000 images with 1,024 features take 40 MB
_PACKAGES = ("nola-vision", "torch", "torchvision", "timm", "numpy", "pillow", "pi-heif", "torchao")  # that compute
_KNOWN_CODE = ("timm.", "torch.", "torchvision.", "torchao.", "nola_vision.")
_ARITHMETIC = ("ATEN_", "CUBLAS_", "DNNL_", "MKL_", "NVIDIA_TF32_", "ONEDNN_")  # variables that change last digits
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
    return FeatureSet(features_of(model, trainer, loader), torch.from_numpy(loader.dataset.labels))


def features_of(model: AdaptedModel, trainer: L.Trainer, loader: DataLoader[Any]) -> Tensor:
    """The features of a loader's images in its order: `[n, width]`, on the CPU, in the dtype that the backbone gives.

    They are those of the model's forward pass on the same batches in eval mode, with the trainer's device and
    precision, to the last digit. For the same backbone, images, device, precision, batch size and number of threads
    they are computed once: a `process_cache` stores up to 512 MB, and `feature_cache` stores them on disk.

    Args:
        model: its backbone must be frozen and on the trainer's device.
        trainer: of the run. While features are computed, its callbacks' methods `on_features_start(trainer, total)`,
            `on_features_batch_end(trainer, done, total)` and `on_features_end(trainer)` are called, with numbers of
            images, or `on_features_loaded(trainer, total)` if they come from the disk; those that a callback lacks are
            skipped.
        loader: of an `ImageSubset` with the evaluation transform.
    """
    images = loader.dataset
    assert isinstance(images, ImageSubset)
    description = _description(model, trainer, loader)
    key = (feature_cache.key_of(description), images.key)
    make = partial(_stored_or_computed, model, trainer, loader, description)
    return process_cache.recent("features", key, make, lambda tensor: tensor.nbytes, _MOST_KEPT)


def _description(model: AdaptedModel, trainer: L.Trainer, loader: DataLoader[Any]) -> dict[str, Any]:
    """Everything that decides the features to their last digits, except the images."""
    spec, device = model.metadata.backbone, trainer.strategy.root_device
    backends: Any = torch.backends
    return {
        "backbone": dataclasses.asdict(dataclasses.replace(spec, file=None)),
        # the fingerprint leaves position tables out
        "weights": [model.current_fingerprint(), position_digest(model.backbone)],
        "modules": _modules(model.backbone),
        "files": {name: file_digest(path) for name, path in local_files(spec.tag, spec.file).items()},
        "basis_seed": model.metadata.basis_seed if spec.base == "random" else None,
        "input": dataclasses.asdict(model.metadata.input),
        "device": [device.type, torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()],
        "instructions": backends.cpu.get_cpu_capability(),
        "precision": str(trainer.precision),
        # the older names of these settings raise an error in a process that has used the newer ones
        "float32": [
            one.fp32_precision
            for one in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        ],
        "kernels": [
            backends.cudnn.version(),
            backends.cudnn.benchmark,
            backends.cudnn.deterministic,
            torch.are_deterministic_algorithms_enabled(),
        ],
        "threads": torch.get_num_threads(),
        "batch_size": loader.batch_size,
        "versions": _versions(),
        "source": _source_digest(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_ARITHMETIC)},
    }


def _modules(backbone: nn.Module) -> str:
    """SHA-256 over what a state dict leaves out: the modules' classes and plain settings, and other buffers."""
    settings = {
        name: [type(one).__qualname__, {k: v for k, v in vars(one).items() if k != "training" and _is_plain(v)}]
        for name, one in backbone.named_modules()
    }
    plain = json.dumps(settings, sort_keys=True)
    stored = backbone.state_dict(keep_vars=True)  # torchao's tensors cannot be detached in inference mode
    return sha256_of_tensors({name: one for name, one in backbone.named_buffers() if name not in stored}, plain)


def _is_plain(value: object) -> bool:
    """Whether an attribute is a setting; others are parts of the module, hooks, or what a forward pass stores.

    What is empty may be filled by these.
    """
    if isinstance(value, tuple | list):
        return bool(value) and all(map(_is_plain, value))
    if isinstance(value, dict):
        return bool(value) and all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    return value is None or isinstance(value, bool | int | float | str)


@functools.cache
def _versions() -> dict[str, str]:
    installed = {}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


@functools.cache
def _source_digest() -> str:
    """SHA-256 over this package's source, which changes between two versions where somebody works on it."""
    hashed, package = hashlib.sha256(), Path(nola_vision.__file__).parent
    for path in sorted(package.rglob("*.py")):
        hashed.update(f"\n{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return hashed.hexdigest()


@timed("features")
def _stored_or_computed(
    model: AdaptedModel, trainer: L.Trainer, loader: DataLoader[Any], description: Mapping[str, Any]
) -> Tensor:
    images = loader.dataset
    assert isinstance(images, ImageSubset)
    # the code of another package may change without a trace in the key
    if not feature_cache.most_bytes() or any(not _is_known(one) for one in model.backbone.modules()):
        return compute_features(model, trainer, loader)
    contents = images.contents()
    key = feature_cache.key_of({**description, "images": contents})
    stored = feature_cache.load(key, (len(images), model.bank.num_features))
    if stored is not None:
        _notify(trainer, "on_features_loaded", len(images))
        return stored
    computed = compute_features(model, trainer, loader)
    # a file may have changed after it was read into memory, or meanwhile
    if images.read_as(contents) and images.contents() == contents:
        feature_cache.store(key, computed)
    return computed


def compute_features(model: AdaptedModel, trainer: L.Trainer, loader: DataLoader[Any]) -> Tensor:
    """Computes what `features_of` returns, without reading or writing a cache."""
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
    computed = torch.cat(parts)
    if not computed.isfinite().all():
        raise NolaVisionError(
            "the frozen backbone gives features that are not finite: use another weights file, or trainer.precision "
            f"{FLOAT32} if it is not"
        )
    return computed


def _is_known(module: nn.Module) -> bool:
    return type(module).__module__.startswith(_KNOWN_CODE)


def _notify(trainer: L.Trainer, hook: str, *counts: int) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (method := getattr(callback, hook, None)) is not None:
            method(trainer, *counts)


def drops_nothing(model: AdaptedModel) -> bool:
    """Whether the backbone gives the same features in training mode as in eval mode: no dropout, no jitter.

    With a `process_cache` it is tried once per backbone.
    """
    key = (model.metadata.backbone, model.fingerprint)
    return process_cache.last("drops nothing", key, partial(_drops_nothing, model))


def _drops_nothing(model: AdaptedModel) -> bool:
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
