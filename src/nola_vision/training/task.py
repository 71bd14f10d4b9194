"""The LightningModule of a method: one that trains, or one for methods on frozen features."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable

from nola_vision.adapters.methods.base import Method
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.training.classifier import Classifier, ClassWeights
from nola_vision.training.frozen import FrozenClassifier


def make_task(
    backbone: BackboneSpec,
    method: Method,
    class_names: Sequence[str],
    run_seed: int = 0,
    basis_seed: int | None = None,
    optimizer: OptimizerCallable = torch.optim.Adam,
    label_smoothing: float = 0.1,
    class_weights: ClassWeights = "none",
    stop_early: int | None = None,
    warmup_epochs: int = 5,
    min_lr: float = 1e-6,
    grad_checkpointing: bool = False,
    compile: bool = False,
) -> L.LightningModule:
    """The LightningModule of a method.

    Args:
        backbone: the pretrained model.
        method: what to train, a value of `nola_vision.adapters.methods`.
        class_names: the classes, in the order of the labels; set from the data by the command line.
        run_seed: seeds the head, LoRA's A, the order of the images and their augmentation.
        basis_seed: seeds the basis (default: `run_seed`).
        optimizer: an optimizer class; the method sets its learning rates.
        label_smoothing: of the training cross-entropy, from 0 to 1.
        class_weights: "balanced" weights the training loss of an image by n / (classes * n_c), with n training images
            of which n_c are of its class (scikit-learn's `compute_class_weight`); for `data.shots: all`; otherwise
            all classes have equally many.
        stop_early: stop after this many validations in a row without a lower `val_loss`, and keep the weights of the
            epoch with the lowest. It needs a validation pool. By default the last epoch is kept.
        warmup_epochs: epochs over which the learning rate rises linearly.
        min_lr: where the cosine ends.
        grad_checkpointing: recompute the backbone's activations in the backward pass to save memory.
        compile: run the adapted model through `torch.compile`.
    """
    if len(class_names) < 2:
        raise NolaVisionError(f"there is one class only, {', '.join(class_names)}: give images of two or more")
    if method.on_frozen_features:
        return FrozenClassifier(backbone, method, class_names)
    return Classifier(
        backbone,
        method,
        class_names,
        run_seed,
        basis_seed,
        optimizer,
        label_smoothing,
        class_weights,
        warmup_epochs,
        min_lr,
        grad_checkpointing,
        compile,
    )
