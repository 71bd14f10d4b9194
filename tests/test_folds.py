"""Cross-validation folds: what holds for every labelling, and scikit-learn's own folds where no image is repeated."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedKFold

from nola_vision.data.folds import MOST_FOLDS, folds, hold_out, number_of_folds


def distinct(labels: np.ndarray, groups: np.ndarray) -> dict[int, set[int]]:
    return {label: set(groups[labels == label].tolist()) for label in set(labels.tolist())}


@st.composite
def labelings(draw: st.DrawFn, contradictory: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Labels in any order, with copies of images, of one class each unless `contradictory`."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    labels = np.array(draw(st.permutations(np.repeat(np.arange(len(sizes)) * 2, sizes).tolist())))
    groups = np.array([draw(st.integers(0, 9 if contradictory else 4 + 2 * len(labels))) for _ in labels])
    return labels, groups if contradictory else groups * 100 + labels


@settings(max_examples=150, deadline=None)
@given(labelings(), st.integers(0, 2**40))
def test_what_holds_for_every_labelling(labeling: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    labels, groups = labeling
    images = distinct(labels, groups)
    several = [len(found) for found in images.values() if len(found) > 1]
    assert number_of_folds(labels, groups) == (min(MOST_FOLDS, max(several)) if several else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scikit-learn warns of classes that it cannot stratify
        made = folds(labels, groups, seed)
    assert len(made) == number_of_folds(labels, groups)
    for train, test in made:
        assert train.dtype == test.dtype == np.int64 and len(test) > 0
        assert sorted([*train, *test]) == [*range(len(labels))] and (np.diff(train) > 0).all()
        assert not set(groups[train]) & set(groups[test])
        assert set(labels[train]) == set(labels)
    times = np.bincount(np.concatenate([test for _, test in made]), minlength=len(labels)) if made else 0 * labels
    assert times.tolist() == [int(len(images[label]) > 1) for label in labels.tolist()]
    tested = [[len(distinct(labels[test], groups[test]).get(label, ())) for label in images] for _, test in made]
    if made:  # in distinct images, per class and in all
        assert (np.ptp(tested, axis=0) <= 1).all() and np.ptp(np.sum(tested, axis=1)) <= 1


@settings(max_examples=150, deadline=None)
@given(labelings(contradictory=True), st.integers(0, 2**40))
def test_what_holds_with_images_under_several_labels(labeling: tuple[np.ndarray, np.ndarray], seed: int) -> None:
    labels, groups = labeling
    made = folds(labels, groups, seed)
    assert len(made) == number_of_folds(labels, groups)
    for train, test in made:
        assert len(test) > 0 and sorted([*train, *test]) == [*range(len(labels))]
        assert not set(groups[train]) & set(groups[test])
        assert set(labels[train]) == set(labels)
    times = np.bincount(np.concatenate([np.empty(0, np.int64), *(test for _, test in made)]), minlength=len(labels))
    images = distinct(labels, groups)
    consistent = [sum(group in found for found in images.values()) == 1 for group in groups.tolist()]
    several = [len(images[label]) > 1 for label in labels.tolist()]
    assert times.tolist() == [int(bool(made) and one and other) for one, other in zip(consistent, several, strict=True)]


def test_without_copies_they_are_scikit_learns() -> None:
    labels = np.random.default_rng(0).integers(0, 7, 100)
    theirs = list(StratifiedKFold(5, shuffle=True, random_state=3).split(labels, labels))
    ours = folds(labels, np.random.default_rng(1).permutation(100), 3)
    for (train, test), (train_, test_) in zip(ours, theirs, strict=True):
        assert train.tolist() == train_.tolist() and test.tolist() == test_.tolist()
    train, validation = hold_out(labels, np.arange(100), 3)
    assert (train.tolist(), validation.tolist()) == tuple(part.tolist() for part in theirs[0])


def test_many_classes_of_two_images_are_no_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [len(test) for _, test in folds(np.arange(600) // 2, np.arange(600), 0)] == [300, 300]


def test_seeds_shuffle_and_repeat() -> None:
    labels, groups = np.arange(60) % 3, np.arange(60) // 2 * 3 + np.arange(60) % 3
    made = {str([test.tolist() for _, test in folds(labels, groups, seed)]) for seed in range(10)}
    assert len(made) == 10
    assert str([test.tolist() for _, test in folds(labels, groups, 4)]) in made


@pytest.mark.parametrize("labels", [[], [0, 1], [0, 0, 1]])
def test_without_two_distinct_images_of_a_class_there_is_no_fold(labels: list[int]) -> None:
    groups = labels  # both images of class 0 are one
    assert number_of_folds(labels, groups) == 0 and folds(labels, groups, 0) == []
    train, validation = hold_out(labels, groups, 0)
    assert train.tolist() == [*range(len(labels))] and validation.tolist() == []
