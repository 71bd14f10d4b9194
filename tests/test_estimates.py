"""Intervals against scipy and published examples, estimates from strangers' rows, and the sentences of a verdict."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from nola_vision.common.errors import NolaVisionError
from nola_vision.evaluation.estimates import CrossValidated, Estimate, clopper_pearson, compare, wilson
from nola_vision.evaluation.predictions import PREDICTIONS_FILE, Predictions, load_predictions
from nola_vision.reports.verdict import verdict
from nola_vision.runs.record import Row

CONFIG = {"model": {"backbone": {"tag": "b"}, "method": {"class_path": "NOLA"}}, "data": {"dataset": "folder"}}
COLUMNS = {"index": np.int64, "label": np.int64, "predicted": np.int64, "probability": np.float32, "logits": np.float32}
NAMES = ["cat", "dog", "owl", "fox"]


def predictions(predicted: list[int], label: list[int], index: list[int] | None = None) -> Predictions:
    count = len(label)
    return Predictions(
        np.array(range(count) if index is None else index),
        np.array(label),
        np.array(predicted),
        np.full(count, 0.5, np.float32),
    )


def run(
    method: str,
    predicted: list[int],
    label: list[int],
    folds: int | None = None,
    untested: tuple[str, ...] = (),
    **data: Any,
) -> tuple[Row, Predictions]:
    """A completed run: of a test set, or with `folds` of a cross-validation."""
    found = predictions(predicted, label)
    estimate = None
    if folds:
        parts = np.array_split(found.correct, folds)
        estimate = Estimate.of([(int(part.sum()), len(part)) for part in parts], 1, untested).to_dict()
    data = {"class_names": NAMES, **data}
    row = make_row(method, test_accuracy=None if folds else float(found.correct.mean()), estimate=estimate, data=data)
    return row, found


def make_row(method: str, **columns: Any) -> Row:
    fixed = {"stage": "final", "cell": "c", "method_class": "NOLA", "run_hash": method, "entry_hash": "e", "init": 0}
    seeds = {"split": 0, "split_seed": 0, "run_seed": 0, "basis_seed": 0, "config": CONFIG, "status": "completed"}
    return Row(**fixed | seeds | columns, method=method)


def right_of(count: int, correct: int, label: int = 0, instead: int = 1) -> tuple[list[int], list[int]]:
    """`correct` of `count` images of one class, the others taken for another."""
    return [label] * correct + [instead] * (count - correct), [label] * count


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_scipys(confidence: float) -> None:
    for images in (1, 2, 7, 50, 1000):
        for correct in {0, 1, images // 3, images - 1, images}:
            ours = wilson(correct, images, confidence)
            theirs = binomtest(correct, images).proportion_ci(confidence, method="wilson")
            assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-12)
            assert 0 <= ours[0] <= correct / images <= ours[1] <= 1


def test_clopper_pearson_leaves_a_fortieth_in_each_tail() -> None:
    for correct, images in ((0, 9), (1, 2), (34, 40), (198, 200), (50, 50)):
        low, high = clopper_pearson(correct, images)
        if correct:
            assert binom.sf(correct - 1, images, low) == pytest.approx(0.025)
        if correct < images:
            assert binom.cdf(correct, images, high) == pytest.approx(0.025)
        assert (low == 0) == (correct == 0) and (high == 1) == (correct == images)


@pytest.mark.parametrize("interval", [wilson, clopper_pearson])
@pytest.mark.parametrize(("correct", "images"), [(0, 0), (3, 2), (-1, 2)])
def test_an_interval_refuses_what_is_not_a_proportion(interval: Any, correct: int, images: int) -> None:
    with pytest.raises(ValueError, match="not a proportion"):
        interval(correct, images)


def table(both: int, only_a: int, only_b: int, neither: int) -> tuple[Predictions, Predictions]:
    """Predictions of two methods with these counts of images; those of the second in another order."""
    a = [1] * (both + only_a) + [0] * (only_b + neither)
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    count = len(a)
    order = np.random.default_rng(0).permutation(count)
    return predictions(a, [1] * count), predictions(
        np.array(b)[order].tolist(), [1] * count, index=np.arange(count)[order].tolist()
    )


def test_compare_gives_published_intervals() -> None:
    """The examples of Fagerland, Lydersen and Laake ("Recommended tests and confidence intervals for paired binomial
    proportions", 2014); the limits of the second as the R package contingencytables prints them."""
    found = compare(*table(1, 1, 7, 12))
    assert (found.low, found.high) == pytest.approx((-50.8, -1.3), abs=0.05)
    found = compare(*table(59, 6, 16, 80))
    assert found.images == 161 and found.shown
    assert (found.difference, found.low, found.high) == pytest.approx((-6.21, -11.95, -0.32), abs=0.005)


def test_compare_takes_the_images_that_both_tested() -> None:
    a, b = predictions([1, 1, 0], [1, 1, 1], [4, 9, 2]), predictions([0, 1, 1], [1, 1, 1], [9, 2, 7])
    found = compare(a, b)
    assert found.images == 2 and found.difference == 0 and not found.shown  # 9: only a; 2: only b
    assert compare(b, a).low == -found.high
    with pytest.raises(ValueError, match="no image"):
        compare(a, predictions([1], [1], [5]))
    with pytest.raises(ValueError, match="another label"):
        compare(a, predictions([1], [2], [4]))


def test_compare_of_equal_predictions_has_a_width_and_stays_in_range() -> None:
    same = predictions([1, 0], [1, 1])
    assert compare(same, same).low == -compare(same, same).high < 0
    for n in (1, 2, 30):
        found = compare(predictions([1] * n, [1] * n), predictions([0] * n, [1] * n))
        assert found.difference == 100 and found.low < found.high == 100


def test_the_interval_of_a_comparison_covers() -> None:
    """95 % is nominal: over tables of chance, at least 94 % contain the true difference."""
    rng, shares = np.random.default_rng(0), np.array([0.72, 0.09, 0.03, 0.16])
    covered = []
    for counts in rng.multinomial(50, shares, 1000):
        found = compare(*table(*counts))
        covered.append(found.low <= 6 <= found.high)
    assert 0.94 <= np.mean(covered) <= 0.995


def test_an_estimate_pools_the_first_repeat_and_averages_all() -> None:
    found = Estimate.of([(3, 4), (2, 3), (1, 4), (3, 3)], repeats=2, untested_classes=["x"])
    assert (found.correct, found.images, found.accuracy, found.number_of_folds) == (5, 7, 5 / 7, 2)
    assert (found.low, found.high) == clopper_pearson(0.8 * 5, 0.8 * 7)
    whole = Estimate.of([(5, 10), (10, 10)])  # 12 of 16
    assert binom.sf(11, 16, whole.low) == pytest.approx(0.025) == binom.cdf(12, 16, whole.high)
    assert found.mean == pytest.approx((3 / 4 + 2 / 3 + 1 / 4 + 1) / 4)
    assert found.std == pytest.approx(np.std([3 / 4, 2 / 3, 1 / 4, 1]))
    assert Estimate.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert Estimate.from_dict(found.to_dict() | {"later": 1}) == found
    for results, repeats in (([], 1), ([(1, 2)] * 3, 2), ([(1, 2), (0, 0)], 1), ([(3, 2)], 1)):
        with pytest.raises(ValueError):
            Estimate.of(results, repeats)


@pytest.mark.parametrize(
    "changed",
    [
        {"folds": []},
        {"folds": [0.5, 1.5]},
        {"folds": [0.5, float("nan")]},
        {"folds": [0.5, True]},
        {"folds": [0.5, "0.5"]},
        {"folds": {"0": 0.5}},
        {"folds": [0.5, [0.5]]},
        {"folds": None},
        {"folds": [0.5] * 3},
        {"repeats": 0},
        {"repeats": -2},
        {"repeats": True},
        {"repeats": 2.0},
        {"images": 0},
        {"images": 10**30},
        {"correct": -1},
        {"correct": 8},
        {"low": None},
        {"low": 0.9},
        {"high": 0.1},
        {"high": float("inf")},
        {"untested_classes": "x"},
        {"untested_classes": [1]},
    ],
)
def test_an_estimate_of_a_strangers_row_is_checked(changed: dict[str, Any]) -> None:
    values = Estimate.of([(3, 4), (2, 3), (1, 4), (3, 3)], repeats=2).to_dict()
    with pytest.raises(ValueError, match="estimate"):
        Estimate.from_dict(values | changed)
    for name in changed:
        with pytest.raises(ValueError, match=f"must have {name}"):
            Estimate.from_dict({key: value for key, value in values.items() if key != name})


@pytest.mark.parametrize("values", [None, [], "x", 3])
def test_an_estimate_is_a_mapping(values: Any) -> None:
    with pytest.raises(ValueError, match="mapping"):
        Estimate.from_dict(values)


# --- sentences --------------------------------------------------------------------------------------------------------


def test_a_verdict_of_folds() -> None:
    label = [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
    nola = [0] * 8 + [1] * 2 + [0] * 3 + [1] * 7 + [2] * 9 + [3] + [3] * 10  # 34; cat-dog 5, owl-fox 1
    logistic = [1] * 10 + [1] * 10 + [2] * 10 + [0] * 10  # 20
    lines = verdict(
        run("nola", nola, label, folds=5, majority_share=0.25, untested=("emu",)),
        [run("1nn", [0] * 40, label, folds=5), run("logistic", logistic, label, folds=5)],
    )
    assert lines == [
        "nola: top-1 accuracy 85.0 % (95 % interval 68.0 to 95.1; 34 of 40 images, 5-fold cross-validation).",
        "Best of 2 frozen-feature methods (an optimistic choice): logistic, 50.0 % (31.9 to 68.1).",
        "nola against logistic, image by image: 35.0 points better (+12.8 to +53.9).",
        "The intervals leave out the variation of training sets; each fold trained on fewer images.",
        "Most often misclassified: 'dog' as 'cat' (3 images), 'cat' as 'dog' (2 images).",
        "No estimate for 'emu': it has a single image, which is always trained on.",
    ]


@pytest.mark.parametrize(
    ("adapter", "frozen", "sentence"),
    [
        (90, 90, "no difference shown (0.0 points, -2.7 to +2.7)."),
        (92, 90, "no difference shown (+2.0 points, -1.9 to +5.8)."),
        (80, 98, "18.0 points worse (-25.5 to -9.8)."),
        (98, 80, "18.0 points better (+9.8 to +25.5)."),
    ],
)
def test_a_verdict_on_a_test_set(adapter: int, frozen: int, sentence: str) -> None:
    lines = verdict(run("nola", *right_of(100, adapter), test_name="validation"), [run("1nn", *right_of(100, frozen))])
    assert lines[0].endswith(f"; {adapter} of 100 validation images).")
    assert lines[1].startswith(f"Frozen features: 1nn, {frozen}.0 % (") and "optimistic" not in lines[1]
    assert lines[2:] == [
        f"nola against 1nn, image by image: {sentence}",
        f"Most often misclassified: 'cat' as 'dog' ({100 - adapter} images).",
    ]


@pytest.mark.parametrize(
    ("correct", "share", "sentence"),
    [
        (1, 0.7, ["nola is under chance: always predicting the largest class is right for 70.0 %."]),
        (2, 0.5, ["nola is not shown to be above chance: always predicting the largest class is right for 50.0 %."]),
        (6, 0.5, ["nola is not shown to be above chance: always predicting the largest class is right for 50.0 %."]),
        (10, 0.5, []),
        (2, None, []),
    ],
)
def test_a_verdict_says_where_the_accuracy_is_not_above_chance(
    correct: int, share: float | None, sentence: list[str]
) -> None:
    lines = verdict(run("nola", *right_of(10, correct), majority_share=share), [])
    assert [line for line in lines if "chance" in line] == sentence


def test_a_verdict_without_an_estimate_of_the_adapter() -> None:
    frozen = run("nearest-mean", *right_of(10, 9, label=2, instead=0), folds=2)
    skipped = verdict((make_row("nola", data={"folds": 5}), None), [frozen])
    assert skipped[0] == "There is no accuracy estimate for nola: its folds were not run."
    assert verdict((make_row("nola"), None), []) == ["There is no accuracy estimate for nola: it was not tested."]
    assert skipped[1].startswith("Frozen features: nearest-mean, 90.0 % (")
    assert skipped[3] == "Most often misclassified by nearest-mean: 'owl' as 'cat' (1 image)."
    assert not any("image by image" in line for line in skipped)
    failed = verdict((make_row("nola", status="failed", test_accuracy=0.5), frozen[1]), [frozen])
    assert failed[0] == "There is no accuracy estimate for nola: its run failed."
    assert not any("image by image" in line for line in failed)
    assert verdict(None, [frozen]) == skipped[1:]
    without_file = make_row("nola", test_accuracy=0.75, data={"counts": {"test": 8}})
    assert verdict((without_file, None), []) == [
        "nola: top-1 accuracy 75.0 % (95 % interval 40.9 to 92.9; 6 of 8 test images)."
    ]
    unknown = make_row("nola", test_accuracy=0.75)
    assert verdict((unknown, None), []) == ["nola: top-1 accuracy 75.0 %, of an unknown number of images."]


@pytest.mark.parametrize(
    ("errors", "sentence"),
    [
        ([], "No image was misclassified."),
        ([(0, 1)], "Most often misclassified: 'cat' as 'dog' (1 image)."),
        ([(0, 1), (2, 3), (2, 3)], "Most often misclassified: 'owl' as 'fox' (2 images), 'cat' as 'dog' (1 image)."),
        (
            [(0, 1), (2, 3), (3, 0), (1, 2)],
            "Most often misclassified: 'cat' as 'dog' (1 image), 'dog' as 'owl' (1 image), and 2 more pairs with 1.",
        ),
        (
            [(0, 1), (0, 1), (2, 3), (1, 3)],
            "Most often misclassified: 'cat' as 'dog' (2 images), 'dog' as 'fox' (1 image), and 1 more pair with 1.",
        ),
    ],
)
def test_a_verdict_names_two_pairs(errors: list[tuple[int, int]], sentence: str) -> None:
    label, predicted = [pair[0] for pair in errors] + [0], [pair[1] for pair in errors] + [0]
    assert sentence in verdict(run("nola", predicted, label), [])


def test_a_verdict_escapes_and_shortens_names() -> None:
    hostile = ["a\x1b[31m\nb", "x" * 300]
    lines = verdict(run("no\x07la", [1, 0], [0, 0], folds=2, untested=tuple(hostile) * 3, class_names=hostile), [])
    text = "\n".join(lines)
    assert "\x1b" not in text and "\x07" not in text and r"a\x1b[31m\nb" in text and "x" * 41 not in text
    assert "and 3 more classes: they have a single image each" in text and all(len(line) < 240 for line in lines)


def test_the_best_of_several_is_the_most_accurate_and_then_by_all_repeats() -> None:
    label = [0] * 4
    one, other = run("a", [0, 0, 1, 1], label, folds=2), run("b", [1, 1, 0, 0], label, folds=2)
    better = (make_row("b", estimate=Estimate.of([(0, 2), (2, 2), (2, 2), (2, 2)], 2).to_dict()), other[1])
    for frozen in itertools.permutations([one, better]):
        assert verdict(None, list(frozen))[0].endswith(": b, 50.0 % (4.5 to 95.5).")


def test_the_folds_of_a_repeat_are_pooled_in_the_order_of_their_images() -> None:
    logits = np.eye(2, dtype=np.float32)[[0, 0, 1, 1, 1]]
    first = [Predictions.of([4, 0], [0, 1], logits[:2]), Predictions.of([2, 1, 3], [1, 0, 1], logits[2:])]
    found = CrossValidated.of([*first, *first[::-1]], 2, ["c"])
    assert found.predictions.index.tolist() == [0, 1, 2, 3, 4] and found.folds.tolist() == [0, 1, 1, 1, 0]
    assert found.predictions.label.tolist() == [1, 0, 1, 1, 0]
    assert found.predictions.predicted.tolist() == [0, 1, 1, 1, 0]
    estimate = found.estimate
    assert estimate.folds == [1 / 2, 2 / 3, 2 / 3, 1 / 2] and (estimate.correct, estimate.images) == (3, 5)
    assert estimate.untested_classes == ["c"]


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"index": np.array([0, 2, 2])}, "index is not in ascending order"),
        ({"index": np.array([-1, 1, 2])}, "index is not in ascending order"),
        ({"index": np.array([0.0, 1, 2])}, "index is float64 of 1 dimensions"),
        ({"label": np.zeros((3, 1), int)}, "label is int64 of 2 dimensions"),
        ({"label": np.array([0, 1])}, "label is of 2 images, and index of 3"),
        ({"label": np.array([0, -1, 0])}, "a class has the index -1"),
        ({"predicted": np.array([0, 3, 0])}, "a class has the index 3"),
        ({"predicted": np.array([0, 3, 0]), "logits": None}, "a class has the index 3"),
        ({"probability": np.array([0, 1, np.nan], np.float32)}, "probability holds a number that is not finite"),
        ({"probability": np.array([0, 1, 1.5], np.float32)}, "a probability is not between 0 and 1"),
        ({"logits": np.full((3, 3), np.inf, np.float32)}, "logits holds a number that is not finite"),
        ({"logits": np.zeros((3, 2), np.float32)}, "logits are of 2 classes, and the data have 3"),
        ({"logits": np.zeros(3, np.float32)}, "logits is float32 of 1 dimensions"),
        ({name: np.empty((0, 3)[: 1 + (name == "logits")], kind) for name, kind in COLUMNS.items()}, "it is empty"),
    ],
)
def test_a_damaged_file_is_named(changes: dict[str, Any], fault: str, tmp_path: Path) -> None:
    good = Predictions.of([2, 0, 1], [0, 1, 2], np.eye(3))
    good.save(tmp_path)
    found = load_predictions(tmp_path, 3)
    assert found is not None and found.index.tolist() == [0, 1, 2] and load_predictions(tmp_path) is not None
    dataclasses.replace(good, **changes).save(tmp_path)
    with pytest.raises(NolaVisionError, match=rf"predictions\.safetensors is damaged: {fault}.*; delete the run's"):
        load_predictions(tmp_path, 3)


def test_what_is_not_a_file_of_predictions_is_not_read(tmp_path: Path) -> None:
    assert load_predictions(tmp_path) is None and load_predictions(tmp_path / "absent") is None
    Predictions.of([2, 0, 1], [0, 1, 2], np.eye(3)).save(tmp_path)
    with pytest.raises(NolaVisionError, match="is damaged: it is larger than"):
        load_predictions(tmp_path, most_bytes=99)
    (tmp_path / PREDICTIONS_FILE).unlink()
    os.mkfifo(tmp_path / PREDICTIONS_FILE)
    with pytest.raises(NolaVisionError, match="is damaged: it is a FIFO"):
        load_predictions(tmp_path)
