"""Draws of training and validation images: pure functions of the labels, the shots and a seed.

NumPy only. Every choice is a rule or a keyed hash, never a random generator, so it is the same on any machine and under
any library version. All index arrays are int64 positions in the labels that were given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import keyed_hash

Indices = npt.NDArray[np.int64]

POOL_STEP = 5
POOL_MOST_PER_CLASS = 50
POOL_SMALLEST_CLASS = 20


def validation_pool(labels: npt.ArrayLike) -> Indices:
    """Validation indices. Independent of the seed and of the number of shots.

    Within each class, in the order of the data set: every fifth image, at most 50; no images of a class with fewer than
    20 (`classes_without_pool` returns those).

    Args:
        labels: `[n]` class indices.

    Returns:
        Sorted indices, disjoint from everything that `draw` returns.
    """
    chosen = [
        members[POOL_STEP - 1 :: POOL_STEP][:POOL_MOST_PER_CLASS]
        for members in _by_class(labels).values()
        if len(members) >= POOL_SMALLEST_CLASS
    ]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *chosen]))


def outside(pool: Indices, labels: npt.ArrayLike) -> Indices:
    """The images that are not in a pool: sorted indices.

    Args:
        pool: indices.
        labels: `[n]` class indices of all images.
    """
    return np.setdiff1d(np.arange(len(np.asarray(labels)), dtype=np.int64), pool)


def classes_without_pool(labels: npt.ArrayLike) -> list[int]:
    """The classes too small (fewer than 20 images) to give any to the validation pool."""
    return [label for label, members in _by_class(labels).items() if len(members) < POOL_SMALLEST_CLASS]


def check_shots(shots: object) -> None:
    """Raises NolaVisionError unless `shots` is a whole number from 1 up, or "all"."""
    if shots != "all" and (not isinstance(shots, int) or shots < 1):
        raise NolaVisionError(f"shots is {shots!r}, but it must be a whole number from 1 up, or 'all'")


def draw(
    labels: npt.ArrayLike,
    shots: int | Literal["all"],
    split_seed: int,
    class_names: Sequence[str] | None = None,
    among: Indices | None = None,
    at_most: bool = False,
) -> Indices:
    """Draws the k-shot training set.

    The images of a class are ranked by a hash of (split_seed, class index, rank within the class), and the first
    `shots` are taken. So the 5-shot set is the first five of each class's 10-shot set, and the draw of a class
    does not depend on the other classes.

    Args:
        labels: `[n]` class indices.
        shots: images per class, or "all".
        split_seed: which draw.
        class_names: names of all classes, by index: for the error message, and to detect a class without images.
        among: the images that may be drawn; by default those outside the validation pool.
        at_most: take all images of a class that has fewer than `shots`.

    Returns:
        `[classes * shots]` indices, class after class, each in the order of its ranking; for "all", sorted indices.

    Raises:
        NolaVisionError: `shots` is not a positive number, or a class has too few images.
    """
    check_shots(shots)
    by_class = _by_class(labels)
    names = [str(label) for label in range(max(by_class, default=-1) + 1)] if class_names is None else class_names
    allowed = set((outside(validation_pool(labels), labels) if among is None else among).tolist())
    ranked: dict[int, Indices] = {}
    for label in by_class if class_names is None else range(len(names)):
        members = by_class.get(label, np.empty(0, dtype=np.int64)).tolist()
        free = [(rank, index) for rank, index in enumerate(members) if index in allowed]
        if shots != "all":
            free = sorted((keyed_hash("draw", split_seed, label, rank), index) for rank, index in free)
        ranked[label] = np.array([index for _, index in free], dtype=np.int64)
    counts = [(names[label], len(indices)) for label, indices in ranked.items()]
    where = " outside the validation pool" if len(allowed) < sum(map(len, by_class.values())) else ""
    _check_counts(counts, 1 if shots == "all" or at_most else shots, where)
    if shots == "all":
        return np.sort(np.concatenate(list(ranked.values())))
    return np.concatenate([indices[:shots] for indices in ranked.values()])


def evenly_spaced(labels: npt.ArrayLike, limit: int) -> Indices:
    """A balanced subset by a fixed rule: `limit` images distributed over the classes, evenly spaced within each.

    Args:
        labels: `[n]` class indices.
        limit: how many images in all; the first classes get one more if it does not divide evenly, and all images of
            a class with fewer than its share are taken.

    Returns:
        Sorted indices, at most `limit`.

    Raises:
        NolaVisionError: `limit` is smaller than the number of classes.
    """
    by_class = _by_class(labels)
    if limit < len(by_class):
        raise NolaVisionError(
            f"a limit of {limit} images is too small for {len(by_class)} classes: use at least one image per class"
        )
    share, rest = divmod(limit, len(by_class))
    chosen = []
    for position, members in enumerate(by_class.values()):
        count = min(share + (position < rest), len(members))
        chosen.append(members[np.arange(count) * len(members) // count])
    return np.sort(np.concatenate(chosen))


def _by_class(labels: npt.ArrayLike) -> dict[int, Indices]:
    """Class index -> its images in the order of the data set, classes in ascending order."""
    array = np.asarray(labels, dtype=np.int64)
    classes, counts = np.unique(array, return_counts=True)
    members = np.split(np.argsort(array, kind="stable").astype(np.int64), np.cumsum(counts)[:-1])
    return dict(zip(classes.tolist(), members, strict=False))


def _check_counts(counts: Sequence[tuple[str, int]], needed: int, where: str) -> None:
    """Refuses a draw if a class, given as (name, images), is too small for it."""
    short = [f"{name!r} has {count}" for name, count in counts if count < needed]
    if not short:
        return
    listed = ", ".join(short[:5]) + (f" and {len(short) - 5} more classes have too few" if len(short) > 5 else "")
    most = min(count for _, count in counts)
    fix = (
        f"use {most} {'shots or fewer' if most > 1 else 'shot'}, or add images"
        if most
        else "add images, or remove the class"
    )
    raise NolaVisionError(f"{needed} shots need that many images in every class{where}, but {listed}: {fix}")
