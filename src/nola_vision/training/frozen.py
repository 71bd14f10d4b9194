"""Methods on frozen features: 1-NN, nearest class mean and logistic regression, fitted without an optimizer.

`docs/frozen-features.md` has the formulas and the reasons for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor

from nola_vision.adapters.methods.base import Method
from nola_vision.common.hashing import keyed_hash
from nola_vision.common.progress import count_aside
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.data.folds import MANY_CLASSES, folds
from nola_vision.data.loaders import ImageSubset
from nola_vision.data.sampling import Indices
from nola_vision.evaluation.calibration import fit_temperature, nll
from nola_vision.evaluation.estimates import CrossValidated
from nola_vision.evaluation.predictions import Predictions
from nola_vision.models.assembly import adapt
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.training.base import ClassificationTask
from nola_vision.training.features import features_of, use_features

Array = npt.NDArray[np.float64]

CS = tuple(10.0**power for power in range(-3, 3))  # the inverse penalties that logistic regression chooses from
DEFAULT_C = 1.0  # where no class has two training images
DEFAULT_SCALE = 10.0  # of cosines as logits, likewise
_MOST_ITERATIONS = 1000  # of L-BFGS
_MOST_WORK = 10**8  # images x features x classes; beyond it C is chosen on one inner fold, with all threads of the run
MOST_REPEATS = 10
MOST_LOGISTIC_REPEATS = 3
_REPEATED_WORK = 4 * 10**6  # images x features x classes of all repeats of a cross-validation: about 10 s on one core
_INNER_SEED = 0  # of the folds in which C is chosen


class FrozenClassifier(ClassificationTask):
    """1-NN, nearest class mean or logistic regression on the features of a frozen backbone.

    While the trainer runs it, the datamodule's batches hold features instead of images (`features.use_features`). It
    fits the images of the datamodule's `reference_dataloader`, without augmentation, before it evaluates.

    Args:
        backbone: the pretrained model.
        method: `NearestNeighbor`, `NearestMean` or `LogisticRegression`.
        class_names: the classes, in the order of the labels.
    """

    def __init__(self, backbone: BackboneSpec, method: Method, class_names: Sequence[str]) -> None:
        super().__init__(len(class_names))
        self.model = adapt(backbone, method, class_names).eval()
        self.method = self.model.metadata.method
        self.has_probabilities = self.savable  # cosines with single images only rank the classes
        self.chosen_c: float | None = None  # of logistic regression
        self._known: tuple[Tensor, Tensor] | None = None  # what 1-NN compares with: unit features and labels
        self._fitted = False

    @property
    def savable(self) -> bool:
        """Whether the method is a plain head, which an adapter file can hold; 1-NN keeps every training image."""
        return self.method.savable

    def forward(self, features: Tensor) -> Tensor:
        """Features `[batch, features]` to logits `[batch, classes]`."""
        if self._known is None:
            return self.model.classified(features)
        known, labels = (tensor.to(features.device) for tensor in self._known)
        cosines = F.normalize(features.float(), dim=1) @ known.t()
        best = cosines.new_full((len(features), len(self.model.metadata.class_names)), -2.0)
        return DEFAULT_SCALE * best.scatter_reduce(1, labels.expand_as(cosines), cosines, "amax")

    def fit(self, features: Tensor, labels: Tensor, groups: Indices | None = None) -> None:
        """Fits the method to features `[n, width]` with class indices `[n]`.

        Args:
            features: of the training images.
            labels: of the training images.
            groups: `[n]` numbers; images of equal ones are copies, and share a fold in the choice of C.
        """
        self._fitted = True
        if not self.method.savable:
            self._known = F.normalize(features.float(), dim=1), labels
            return
        x, num_classes = features.double().numpy(), self.model.bank.num_classes
        present, y = np.unique(labels.numpy(), return_inverse=True)
        # on few images several threads are slower than one, especially on busy cores
        with threadpool_limits(torch.get_num_threads() if x.size * num_classes > _MOST_WORK else 1):
            if self.method.regularised:
                copies = np.arange(len(y)) if groups is None else groups
                weight, bias, self.chosen_c = logistic_regression(x, y, copies)
            else:
                weight, bias = nearest_mean(x, y, len(present))
        if len(present) < num_classes:
            weight, bias = with_absent(weight, bias, present, num_classes)
        # probabilities do not depend on what all classes have in common, which would use up the levels of few bits
        weight, bias = weight - weight.mean(0), bias - bias.mean()
        bank = self.model.bank
        with torch.no_grad():
            bank.head_weight.copy_(torch.from_numpy(weight))
            bank.head_bias.copy_(torch.from_numpy(bias))
        self.model.round_to_stored_bits(mean_features=features.double().mean(0))

    def fit_to(self, data: KShotDataModule, trainer: L.Trainer) -> None:
        """Fits the method to the training images of a datamodule, if that has not been done."""
        if not self._fitted:
            self.prepare(trainer)
            use_features(data, None, trainer)  # the stage has its loaders already
            loader = data.reference_dataloader()
            images = loader.dataset
            assert isinstance(images, ImageSubset)
            groups = data.train_groups if self.method.regularised else None
            self.fit(features_of(self.model, trainer, loader), torch.from_numpy(images.labels), groups)

    def prepare(self, trainer: L.Trainer) -> None:
        """Moves the backbone to the trainer's device and precision, as Lightning does at the start of a stage."""
        trainer.precision_plugin.convert_module(self)
        self.to(trainer.strategy.root_device)

    # --- evaluation by Lightning ---------------------------------------------------------------------------------

    def needs_only_features(self) -> bool:
        return True

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self.on_test_start()

    def on_test_start(self) -> None:
        self.fit_to(self.trainer.datamodule, self.trainer)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        return None


# --- the methods: float64 features `[n, d]` and labels `[n]` to a head `[classes, d]` and `[classes]` ---------------


def nearest_mean(x: Array, y: Indices, num_classes: int) -> tuple[Array, Array]:
    """The head of nearest class mean by cosine.

    With u = x / |x| and m_c the mean of class c's u, the class of the largest cosine is that of the largest
    `x . m_c / |m_c|`, since |x| is the same for all classes: a head without a bias. Its scale does not affect the
    predicted class. It is s / (mean |x|), where s maximises the likelihood of the training images, each left out of its
    class mean.
    """
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    u = x / np.maximum(norms, 1e-12)
    sums = np.zeros((num_classes, x.shape[1]))
    np.add.at(sums, y, u)
    means = _unit(sums)
    several = np.bincount(y, minlength=num_classes)[y] > 1
    scale = DEFAULT_SCALE
    if several.any():
        cosines = u @ means.T
        cosines[np.arange(len(y)), y] = (_unit(sums[y] - u) * u).sum(1)  # without the image itself
        held_out, labels = cosines[several], y[several]
        scale = 1 / fit_temperature(held_out, labels)
    return means * scale / max(float(norms.mean()), 1e-12), np.zeros(num_classes)


def logistic_regression(x: Array, y: Indices, groups: Indices) -> tuple[Array, Array, float]:
    """The head of multinomial logistic regression with an L2 penalty, and the C of it (scikit-learn's).

    The features are centred and divided by the root of their mean variance, so that C has the same meaning for every
    backbone; the returned head takes unscaled features. C is the one of `CS` with the least
    cross-entropy over stratified folds of the training images, the smallest such; `DEFAULT_C` where no class has two
    distinct images.
    """
    c = choose_c(x, y, groups)
    model, middle, scale = _fitted(x, y, c)
    weight, bias = np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)
    if len(weight) == 1:  # two classes: one logit, that of the second against the first
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scale
    return weight, bias - weight @ middle, c


def with_absent(weight: Array, bias: Array, present: Indices, num_classes: int) -> tuple[Array, Array]:
    """Adds classes without a training image to a head: they get the mean logit, so they are never predicted.

    Args:
        weight, bias: of the classes that are present, in their order.
        present: their class indices.
        num_classes: of the whole head.
    """
    whole, offset = np.tile(weight.mean(axis=0), (num_classes, 1)), np.full(num_classes, bias.mean())
    whole[present], offset[present] = weight, bias
    return whole, offset


def choose_c(x: Array, y: Indices, groups: Indices) -> float:
    """The C of `CS` with the least cross-entropy of held-out images, see `logistic_regression`."""
    splits = folds(y, groups, _INNER_SEED)
    if not splits:
        return DEFAULT_C
    if x.size * len(np.unique(y)) > _MOST_WORK:
        splits = splits[:1]
    losses = np.zeros(len(CS))
    for train, test in splits:
        for place, c in enumerate(CS):
            model, middle, scale = _fitted(x[train], y[train], c)
            losses[place] += len(test) * nll(_logits(model, (x[test] - middle) / scale), y[test])
    return CS[int(losses.argmin())]


def _fitted(x: Array, y: Indices, c: float) -> tuple[Any, Array, float]:
    """scikit-learn's model on scaled features; and the scaling's mean and divisor."""
    from sklearn import linear_model
    from sklearn.exceptions import ConvergenceWarning

    middle = x.mean(axis=0)
    scale = float(np.sqrt(np.square(x - middle).mean())) or 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 1,000 steps are enough
        warnings.filterwarnings("ignore", MANY_CLASSES, UserWarning)
        model = linear_model.LogisticRegression(C=c, max_iter=_MOST_ITERATIONS).fit((x - middle) / scale, y)
    return model, middle, scale


def _logits(model: Any, x: Array) -> Array:
    scores: Array = model.decision_function(x)
    return scores if scores.ndim == 2 else np.stack([-scores, scores], axis=1) / 2


def _unit(x: Array) -> Array:
    unit: Array = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return unit


# --- data without a test split ---------------------------------------------------------------------------------------


def evaluate(task: FrozenClassifier, data: KShotDataModule, trainer: L.Trainer) -> CrossValidated | None:
    """Cross-validates a method on a data set without a test split, then fits it to the images of the final run.

    The features of all images are computed once. The first repeat has the folds of the datamodule, so that its
    predictions and those of an adapter's fold runs are for the same images from the same training images.

    Args:
        task: of the method; it is fitted as the final run's is when this returns.
        data: without a test split.
        trainer: of the run.

    Returns:
        None if no class has two distinct images.
    """
    task.prepare(trainer)
    use_features(data, None, trainer)
    loader = data.cross_validation_dataloader()
    images = loader.dataset
    assert isinstance(images, ImageSubset)
    known, labels, groups = features_of(task.model, trainer, loader), torch.from_numpy(images.labels), data.groups
    found = cross_validate(task, known, labels, groups, data.split_seed, data.draw_of_fold, data.untested_classes)
    drawn = data.train_indices
    task.fit(known[drawn], labels[drawn], groups[drawn])
    return found


def cross_validate(
    task: FrozenClassifier,
    features: Tensor,
    labels: Tensor,
    groups: Indices,
    seed: int,
    draw: Callable[[Indices], Indices],
    untested_classes: Sequence[str],
) -> CrossValidated | None:
    """Repeated stratified cross-validation of a method on features, every choice made inside a fold.

    Args:
        task: of the method; it is fitted to the last fold when this returns.
        features: of all images, `[n, width]`.
        labels: of all images, `[n]`.
        groups: `[n]` numbers; equal ones are copies of one image, which share a fold.
        seed: of the first repeat's folds.
        draw: the images to train on out of a fold's training part, both as positions among all images.
        untested_classes: names of classes that no fold tests.

    Returns:
        None if no class has two distinct images.
    """
    y = labels.numpy()
    repeats = number_of_repeats(features, y, task.method)
    parts, count = [], count_aside(f"{type(task.method).__name__} on frozen features", "repeats")
    for repeat in range(repeats):
        count.show(repeat, repeats)
        for train, test in folds(y, groups, seed if repeat == 0 else keyed_hash("repeat", seed, repeat)):
            drawn = draw(train)
            task.fit(features[drawn], labels[drawn], groups[drawn])
            with torch.no_grad():
                logits = task(features[test].to(task.device)).float().cpu()
            parts.append(Predictions.of(test, y[test], logits.numpy()))
    return CrossValidated.of(parts, repeats, untested_classes) if parts else None


def number_of_repeats(features: Tensor, labels: Indices, method: Method) -> int:
    """The number of repeats: 10, or 3 for logistic regression, which is fitted 31 times per fold.

    Fewer for many images, features and classes, so that all repeats together take seconds.
    """
    work = features.numel() * len(np.unique(labels))
    most = MOST_LOGISTIC_REPEATS if method.regularised else MOST_REPEATS
    return int(np.clip(_REPEATED_WORK // work, 1, most))
