"""Cross-validation folds over labelled images: a pure function of labels, duplicates and a seed.

The splitter is scikit-learn's `StratifiedKFold` over the distinct images. Copies of an image are always on the
same side. All index arrays are int64 positions in the labels that were given.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from nola_vision.data.sampling import Indices

MOST_FOLDS = 5
MANY_CLASSES = ".*could represent a regression problem"  # scikit-learn's warning of about as many classes as images


def number_of_folds(labels: npt.ArrayLike, groups: npt.ArrayLike) -> int:
    """How many folds the images allow: the distinct images of the largest class, at most 5.

    A smaller class is tested in as many folds as it has images. If it determined the number of folds, one class of two
    images would leave half of all images to train on, and the estimate would be points too low
    (docs/decisions/0017).

    Args:
        labels: `[n]` class indices.
        groups: `[n]` numbers; equal ones are copies of one image. An image under two labels is never tested and does
            not count.

    Returns:
        2 to 5, or 0 if no class has two distinct images.
    """
    _, _, strata = _testable(np.asarray(labels, dtype=np.int64), np.asarray(groups))
    counts = np.unique(strata, return_counts=True)[1]
    return int(min(MOST_FOLDS, counts.max())) if (counts > 1).any() else 0


def folds(labels: npt.ArrayLike, groups: npt.ArrayLike, seed: int) -> list[tuple[Indices, Indices]]:
    """Stratified folds: each image of a class with two or more distinct images is tested once.

    Every training part has every class, so the only image of a class is always trained on and never tested. Neither is
    an image under two labels, since one of its labels is wrong. No test part is empty.

    Args:
        labels: `[n]` class indices.
        groups: `[n]` numbers; equal ones are copies of one image, which are on one side of every fold.
        seed: of the shuffle within the classes.

    Returns:
        Sorted training and test indices of each of `number_of_folds(labels, groups)` folds. The same on any machine for
        one version of scikit-learn.
    """
    from sklearn.model_selection import StratifiedKFold

    labels, groups = np.asarray(labels, dtype=np.int64), np.asarray(groups)
    if (count := number_of_folds(labels, groups)) == 0:
        return []
    image, testable, strata = _testable(labels, groups)
    splitter = StratifiedKFold(count, shuffle=True, random_state=seed % 2**32)
    made = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # it is not in every fold
        warnings.filterwarnings("ignore", MANY_CLASSES, UserWarning)
        split = list(splitter.split(testable, strata))
    for _, chosen in split:
        tested = np.isin(image, testable[chosen])
        made.append((np.flatnonzero(~tested).astype(np.int64), np.flatnonzero(tested).astype(np.int64)))
    return made


def hold_out(labels: npt.ArrayLike, groups: npt.ArrayLike, seed: int) -> tuple[Indices, Indices]:
    """Training and validation indices for choosing settings: the first of the `folds`.

    Returns:
        Sorted indices; validation is empty if no class has two distinct images.
    """
    everything = np.arange(len(np.asarray(labels)), dtype=np.int64)
    return next(iter(folds(labels, groups, seed)), (everything, everything[:0]))


def _testable(labels: npt.NDArray[np.int64], groups: npt.NDArray[Any]) -> tuple[Indices, Indices, Indices]:
    """Which distinct images can be tested: those of one label that are not the only one of their class.

    Returns:
        The number of each image's distinct image `[n]`, counted in the order of the data; the testable ones of these
        numbers `[m]`; and their classes `[m]`. A class in which only one is testable has other images under two labels.
    """
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    image = np.argsort(np.argsort(first))[inverse]
    pairs = np.unique(np.stack([image, labels]), axis=1)
    images = np.bincount(pairs[1])[pairs[1]]  # how many distinct images the class of a pair has
    testable = (np.bincount(pairs[0])[pairs[0]] == 1) & (images > 1)
    return image, pairs[0][testable], pairs[1][testable]
