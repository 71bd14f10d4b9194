"""Accuracies with their uncertainty: intervals, the estimate by cross-validation, two methods image by image.

`docs/estimates.md` states what the intervals cover, as measured by `scripts/measure_estimates.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, pstdev
from typing import Any

import numpy as np
import numpy.typing as npt

from nola_vision.evaluation.predictions import Predictions, pool


def wilson(correct: int, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, as fractions from 0 to 1.

    With p = correct / images and z the normal quantile, it is
    `(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)`. Unlike p ± z sqrt(p(1-p)/n), it has a width at 0 % and at
    100 %, and keeps its coverage for few images.

    Raises:
        ValueError: there are no images, or not between 0 and `images` are correct.
    """
    if images < 1 or not 0 <= correct <= images:
        raise ValueError(f"{correct} of {images} images correct is not a proportion")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = correct / images, z**2 / images
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / images + spread / (4 * images)) / (1 + spread)
    # Exact at the ends, where rounding would leave 1e-17 or miss the share itself
    return 0.0 if correct == 0 else middle - half, 1.0 if correct == images else middle + half


# The errors of cross-validation are correlated, so n images count as fewer independent ones. With this share the
# interval covered the truth in 88 % of the draws or more in each cell of `docs/estimates.md`, with all of them in 83 %.
INDEPENDENT_SHARE = 0.8


def clopper_pearson(correct: float, images: float, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's "exact" interval of a proportion, as fractions from 0 to 1.

    With a = (1 - confidence) / 2 it is from the a-quantile of Beta(k, n - k + 1) to the (1 - a)-quantile of
    Beta(k + 1, n - k), for k = `correct` of n = `images`, which need not be whole. Over binomial counts its coverage is
    never under `confidence`, Wilson's on average only.

    Raises:
        ValueError: there are no images, or not between 0 and `images` are correct.
    """
    from scipy.special import betaincinv  # takes a while to import

    if images <= 0 or not 0 <= correct <= images:
        raise ValueError(f"{correct} of {images} images correct is not a proportion")
    tail = (1 - confidence) / 2
    low = float(betaincinv(correct, images - correct + 1, tail)) if correct > 0 else 0.0
    high = float(betaincinv(correct + 1, images - correct, 1 - tail)) if correct < images else 1.0
    return low, high


@dataclass(frozen=True)
class Estimate:
    """The accuracy that cross-validation estimates for a data set without a test split; fractions from 0 to 1.

    Args:
        folds: accuracy of every fold, repeat after repeat.
        repeats: how many times all images were divided into folds.
        images: how many images the first repeat tested.
        correct: how many of them were classified correctly.
        low, high: Clopper and Pearson's 95 % interval of `correct` out of `images`, as wide as `INDEPENDENT_SHARE` of
            the images make it. It leaves out the variation of training sets, and the folds' models were trained on
            fewer images than the final one.
        untested_classes: names of classes with a single image, which is always trained on.
    """

    folds: list[float]
    repeats: int
    images: int
    correct: int
    low: float
    high: float
    untested_classes: list[str]

    @classmethod
    def of(
        cls, fold_results: Sequence[tuple[int, int]], repeats: int = 1, untested_classes: Sequence[str] = ()
    ) -> Estimate:
        """Computes the estimate from the results of folds.

        Args:
            fold_results: (correct, images) of every fold, repeat after repeat.
            repeats: how many; each has equally many folds.
            untested_classes: names of classes that no fold tests.

        Raises:
            ValueError: there are no folds, the repeats differ in their number of folds, or a fold is empty.
        """
        if repeats < 1 or not fold_results or len(fold_results) % repeats:
            raise ValueError(f"{len(fold_results)} folds are not {repeats} repeats of equally many")
        first = fold_results[: len(fold_results) // repeats]
        correct, images = (int(sum(column)) for column in zip(*first, strict=True))
        if images < 1:
            raise ValueError("the folds of an estimate have no images")
        low, high = clopper_pearson(INDEPENDENT_SHARE * correct, INDEPENDENT_SHARE * images)
        accuracies = [float(right / count) if count else math.nan for right, count in fold_results]
        return cls.from_dict(
            {
                "folds": accuracies,
                "repeats": repeats,
                "images": images,
                "correct": correct,
                "low": low,
                "high": high,
                "untested_classes": list(untested_classes),
            }
        )

    @property
    def mean(self) -> float:
        """Mean accuracy of all folds of all repeats."""
        return fmean(self.folds)

    @property
    def std(self) -> float:
        """Standard deviation of the folds' accuracies, ddof 0."""
        return pstdev(self.folds)

    @property
    def accuracy(self) -> float:
        """The share of images classified correctly in the first repeat: what `low` and `high` belong to."""
        return self.correct / self.images

    @property
    def number_of_folds(self) -> int:
        """Folds per repeat."""
        return len(self.folds) // self.repeats

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a run's row."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Estimate:
        """The estimate of a row; unknown keys are ignored.

        Raises:
            ValueError: a value is missing, of the wrong kind, or does not fit the others.
        """
        if not isinstance(values, Mapping):
            raise ValueError("an estimate must be a mapping")
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"an estimate must have {missing[0]}")
        found = {name: values[name] for name in names}
        folds, classes = found["folds"], found["untested_classes"]
        repeats, images, correct = (found[name] for name in ("repeats", "images", "correct"))
        if any(type(count) is not int for count in (repeats, images, correct)):
            raise ValueError("repeats, images and correct of an estimate must be whole numbers")
        if not isinstance(folds, list) or not all(map(_is_fraction, [*folds, found["low"], found["high"]])):
            raise ValueError("folds, low and high of an estimate must be numbers from 0 to 1")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("untested_classes of an estimate must be a list of names")
        if repeats < 1 or not folds or len(folds) % repeats:
            raise ValueError(f"the {len(folds)} folds of an estimate are not {repeats} repeats of equally many")
        if images < 1 or not 0 <= correct <= images or not found["low"] <= correct / images <= found["high"]:
            raise ValueError("correct, images, low and high of an estimate contradict each other")
        return cls(**found)


def _is_fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # nan is neither


@dataclass(frozen=True)
class CrossValidated:
    """The result of cross-validation.

    Args:
        estimate: of all repeats.
        predictions: for the held-out images of the first repeat, logits included.
        folds: the fold of each of these images, in the order of `predictions`.
    """

    estimate: Estimate
    predictions: Predictions
    folds: npt.NDArray[np.int64]

    @classmethod
    def of(cls, folds: Sequence[Predictions], repeats: int = 1, untested_classes: Sequence[str] = ()) -> CrossValidated:
        """Pools the predictions of folds.

        Args:
            folds: of every fold for its held-out images, repeat after repeat.
            repeats: how many; each has equally many folds.
            untested_classes: names of classes that no fold tests.

        Raises:
            ValueError: as `Estimate.of`.
        """
        results = [(int(fold.correct.sum()), len(fold.index)) for fold in folds]
        estimate = Estimate.of(results, repeats, untested_classes)
        first = folds[: estimate.number_of_folds]
        numbers = np.repeat(np.arange(len(first)), [len(fold.index) for fold in first])
        order = np.argsort(np.concatenate([fold.index for fold in first]), kind="stable")  # as `pool`
        return cls(estimate, pool(first), numbers[order])


@dataclass(frozen=True)
class Comparison:
    """By how many points one method's accuracy is above another's on the same images.

    Args:
        difference: in points.
        low, high: its 95 % interval, in points.
        images: how many both tested.
    """

    difference: float
    low: float
    high: float
    images: int

    @property
    def shown(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def compare(a: Predictions, b: Predictions) -> Comparison:
    """Compares two methods on the images that both tested, image by image; positive where `a` is better.

    The interval is Bonett and Price's (2012, "Adjusted Wald confidence interval for a difference of binomial
    proportions based on paired data"): with b01 and b10 the counts of images that only one of the two got right,
    `p = (b10 + 1) / (n + 2)`, `q = (b01 + 1) / (n + 2)`, it is `p - q ± 1.96 sqrt((p + q - (p - q)²) / (n + 2))`.
    Of the closed forms (Wald's, Newcombe's, Agresti and Min's) it is the one whose coverage never fell under 94 % in
    simulations of 20 to 400 images, and it is at most as wide as Newcombe's. It does not include the variation between
    training sets.

    Raises:
        ValueError: no image was tested by both, or an image has two labels.
    """
    shared, of_a, of_b = np.intersect1d(a.index, b.index, return_indices=True)
    if not len(shared):
        raise ValueError("no image was tested by both methods")
    if (a.label[of_a] != b.label[of_b]).any():
        raise ValueError("an image has another label in the other method's predictions")
    right_a, right_b = a.correct[of_a], b.correct[of_b]
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    total = len(shared) + 2
    p, q = (only_a + 1) / total, (only_b + 1) / total
    half = NormalDist().inv_cdf(0.975) * math.sqrt((p + q - (p - q) ** 2) / total)
    low, high = max(-1.0, p - q - half), min(1.0, p - q + half)
    return Comparison(100 * (only_a - only_b) / len(shared), 100 * low, 100 * high, len(shared))
