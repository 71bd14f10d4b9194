"""Temperature scaling: one number that calibrates probabilities, fitted on images that were not trained on.

Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017. The class probabilities are
softmax(logits / T); the order of the classes, and so the accuracy, does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax, softmax

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.validation import plain_number, quoted

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4  # what a file may state
ECE_BINS = 15
ECE_FROM = 500  # predictions: with fewer, most of the error that bins show is noise
_FOLDS = 5
_DIGITS = 6  # significant; more would only make files longer

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """A temperature and its effect on held-out predictions.

    Args:
        temperature: fitted on all of them; 1 if the temperatures of `nll_after` did not lower the NLL, and `nll_after`
            and `ece_after` are then as before.
        nll_before: mean negative log-likelihood in nats, uncalibrated.
        nll_after: the same with each image's temperature fitted on other images; None if all images are one group.
        ece_before: expected calibration error of the predicted class, in 15 bins of equal width; None under 500 images.
        ece_after: the same with the temperatures of `nll_after`.
        images: how many predictions.
    """

    temperature: float
    nll_before: float
    nll_after: float | None
    ece_before: float | None
    ece_after: float | None
    images: int

    def columns(self) -> dict[str, Any]:
        """The columns of a run's row, without `calibrated_on`."""
        return {
            "temperature": self.temperature,
            "held_out_nll": self.nll_before,
            "held_out_nll_calibrated": self.nll_after,
            "held_out_ece": self.ece_before,
            "held_out_ece_calibrated": self.ece_after,
        }


def check_temperature(temperature: Any) -> float:
    """A temperature as a float.

    Raises:
        NolaVisionError: it is not a number from `MIN_TEMPERATURE` to `MAX_TEMPERATURE`.
    """
    number = plain_number(temperature)
    if type(number) not in (int, float) or not MIN_TEMPERATURE <= number <= MAX_TEMPERATURE:  # not a number fails too
        raise NolaVisionError(
            f"the temperature is {quoted(temperature)}: it must be a number from {MIN_TEMPERATURE:g} to "
            f"{MAX_TEMPERATURE:,.0f}"
        )
    return float(number)


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """The temperature T > 0 with the lowest negative log-likelihood of softmax(logits / T), to 6 digits.

    n correct predictions are not evidence of an error rate under 1 / (n + 2) (Laplace's rule of succession), so T is
    not taken below the one at which the mean probability of the predicted classes is (n + 1) / (n + 2). This decides if
    (nearly) all images are correct: the likelihood alone would take T to 0. The upper bound, where all classes are
    about equally probable, decides if logits are not better than chance. Equal logits give 1. If 1 is not below the
    first bound, the likelihood on these images is never lower than at 1.

    Args:
        logits: `[n, classes]`, finite, of images that were not trained on.
        labels: `[n]` class indices.

    Raises:
        ValueError: there are no images, or logits and labels differ in length.
    """
    from scipy.optimize import brentq, minimize_scalar  # takes a while to import

    scores, true = _checked(logits, labels)
    spreads = scores.max(axis=1) - scores.mean(axis=1)
    if not spreads.any():
        return 1.0
    spread = float(np.median(spreads[spreads > 0]))  # robust to one extreme logit
    low, high = np.log(np.clip(spread * np.array([1e-3, 1e2]), MIN_TEMPERATURE, MAX_TEMPERATURE))
    highest = (len(true) + 1) / (len(true) + 2)

    def too_sure(log_temperature: float) -> float:
        return float(softmax(scores / np.exp(log_temperature), axis=1).max(axis=1).mean()) - highest

    def loss(log_temperature: float) -> float:
        return nll(scores / np.exp(log_temperature), true)

    if too_sure(low) > 0:
        low = brentq(too_sure, low, high) if too_sure(high) < 0 else high  # type: ignore[no-untyped-call]
    best = low
    if low < high:  # they are equal for logits of extreme size
        options = {"xatol": 1e-7}
        best = minimize_scalar(loss, bounds=(low, high), method="bounded", options=options).x  # type: ignore[no-untyped-call]
    found = float(np.clip(float(f"{np.exp(best):.{_DIGITS}g}"), MIN_TEMPERATURE, MAX_TEMPERATURE))
    return 1.0 if too_sure(0) <= 0 and nll(scores, true) < nll(scores / found, true) else found


def cross_fitted(logits: npt.ArrayLike, labels: npt.ArrayLike, groups: npt.ArrayLike | None = None) -> Calibration:
    """Fits a temperature and measures it on predictions that it was not fitted on; 1 if that does not lower the NLL.

    With few images calibration may degrade the probabilities. The same holds for methods that fit the scale of their
    logits, such as nearest class mean, since the scale differs between folds.

    Args:
        logits: `[n, classes]`, of images that were not trained on.
        labels: `[n]` class indices.
        groups: `[n]`, images that stay together, such as the fold whose model predicted them; by default each
            image is a group. Up to five parts are left out in turn.

    Raises:
        ValueError: as `fit_temperature`.
    """
    from sklearn.model_selection import GroupKFold  # takes a while to import

    scores, true = _checked(logits, labels)
    temperature = fit_temperature(scores, true)
    members = np.arange(len(true)) if groups is None else np.asarray(groups)
    parts = min(_FOLDS, len(np.unique(members)))
    after = None
    if parts > 1:
        after = np.empty_like(scores)
        for kept, left_out in GroupKFold(parts, shuffle=True, random_state=0).split(scores, true, members):
            after[left_out] = scores[left_out] / fit_temperature(scores[kept], true[kept])
        if nll(after, true) >= nll(scores, true):
            temperature, after = 1.0, scores
    enough = len(true) >= ECE_FROM
    return Calibration(
        temperature,
        nll_before=nll(scores, true),
        nll_after=None if after is None else nll(after, true),
        ece_before=expected_calibration_error(scores, true) if enough else None,
        ece_after=expected_calibration_error(after, true) if enough and after is not None else None,
        images=len(true),
    )


def expected_calibration_error(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """|accuracy - mean probability| of the predicted classes, in 15 equal bins of it, weighted by their images."""
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    scores, true = _checked(logits, labels)
    probabilities, targets = torch.from_numpy(softmax(scores, axis=1)), torch.from_numpy(true)
    return float(multiclass_calibration_error(probabilities, targets, scores.shape[1], n_bins=ECE_BINS, norm="l1"))


def _checked(logits: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.int64]]:
    scores, true = np.asarray(logits, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if scores.ndim != 2 or true.shape != scores.shape[:1] or not len(true) or not np.isfinite(scores).all():
        raise ValueError(f"logits {list(scores.shape)} and labels {list(true.shape)} give no temperature")
    return scores, true


def nll(scores: Floats, true: npt.NDArray[np.int64]) -> float:
    """Mean negative log-likelihood of class indices `[n]` under softmax of scores `[n, classes]`, in nats."""
    return float(-log_softmax(scores, axis=1)[np.arange(len(true)), true].mean())
