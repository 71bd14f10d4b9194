"""What runs showed, in plain sentences: the accuracy, against frozen features and other methods, and what is confused.

`run_verdict` is that of one run, which `fit` prints; `cell_verdict` that of all runs of a cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import numpy as np

from nola_vision.errors import NolaVisionError
from nola_vision.predictions import Predictions, load_predictions
from nola_vision.results.confusion import entry_confusions
from nola_vision.results.description import accuracy_text, grid_text, name_text, plural, points, signed
from nola_vision.results.estimates import compare
from nola_vision.results.row import Row
from nola_vision.results.statistics import (
    Difference,
    RunAccuracy,
    Summary,
    entries,
    kind,
    paired_difference,
    run_accuracy,
    subject,
)
from nola_vision.text import printable

Tested = tuple[Row, Predictions | None]
Entry = tuple[Summary, list[Row]]
_MOST_NAMES = 3  # in one sentence
_MOST_CHARACTERS = 40  # of a name
_RIVALS = {  # kinds of entries that the subject is compared with: how one and how several are introduced
    "frozen": ("Frozen features", "frozen-feature methods"),
    "trained": ("The other method that trains", "other methods that train"),
}


class _Found(NamedTuple):
    """A run with what it was tested on."""

    row: Row
    predictions: Predictions | None
    accuracy: RunAccuracy


def cell_verdict(rows: Iterable[Row], cell: str) -> list[str]:
    """The sentences on all runs of a cell, most important first; about the entry that `statistics.subject` chooses.

    Of a single run of it they are those of `run_verdict`. Of several: its mean, the best of the other methods with the
    paired difference over splits, and what is confused.

    Args:
        rows: of any runs. Predictions and `confusion.csv` are read from the folders where they were found.
        cell: which.
    """
    found = entries(row for row in rows if row.cell == cell)
    chosen = subject(summary for summary, _ in found)
    if chosen is None:
        return ["No run of this cell has an accuracy yet.", *_lost_line(found)]
    runs = next(runs for summary, runs in found if summary is chosen)
    if chosen.completed > 1:
        return [*_several(chosen, runs, found), *_lost_line(found)]
    (run,) = [row for row in runs if row.status == "completed" and _has_accuracy(row)]
    run = replace(run, method=chosen.label)
    frozen, trained = (_rivals(name, chosen, run, found) for name in ("frozen", "trained"))
    names = run.data.get("class_names")
    if kind(chosen) != "frozen":
        lines, problems = run_verdict(run, frozen, names, trained)
    else:  # whatever trains has no accuracy
        adapter = next((others[-1] for summary, others in found if kind(summary) != "frozen"), None)
        lines, problems = run_verdict(adapter, [run, *frozen], names)
    if choice := _choice(chosen, found):
        lines.insert(1, f"{_name(chosen.label)} is {choice}.")
    return [*lines, *_lost_line(found), *problems]


def _rivals(name: str, chosen: Summary, run: Row, found: Sequence[Entry]) -> list[Row]:
    """The runs of the other entries of a kind on the split of a run, each with its entry's label as its method."""
    rows = []
    for summary, runs in found:
        if kind(summary) == name and summary is not chosen and (name == "frozen" or kind(chosen) != name):
            same = [row for row in runs if row.status == "completed" and row.split == run.split]
            one = min(same, key=lambda row: (row.init != run.init, row.init or 0), default=None)
            rows += [] if one is None else [replace(one, method=summary.label)]
    return rows


def _choice(chosen: Summary, found: Sequence[Entry]) -> str:
    """`the best of 3 NOLA entries`, where one of several that train was chosen; else empty."""
    same = [summary for summary, _ in found if kind(summary) == kind(chosen) and summary.mean is not None]
    if len(same) == 1 or kind(chosen) == "frozen":
        return ""
    words = "NOLA entries" if kind(chosen) == "NOLA" else "methods that train"
    return f"the best of {len(same)} {words} (an optimistic choice)"


def run_verdict(
    adapter: Row | None,
    frozen: Sequence[Row],
    class_names: Sequence[str] | None,
    others: Sequence[Row] = (),
) -> tuple[list[str], list[str]]:
    """The sentences of `verdict` for runs whose predictions are read from their folders.

    Args:
        adapter: of the adapter's final run; None if there is none.
        frozen: of the methods on frozen features.
        class_names: in the order of the labels; None if they are not known.
        others: of other methods that train.

    Returns:
        The sentences, and a sentence for each file that could not be used.
    """
    problems = []

    def tested(row: Row) -> Tested:
        try:
            classes = len(class_names) if class_names else None
            return row, load_predictions(row.folder, classes) if row.folder else None
        except NolaVisionError as error:
            problems.append(printable(f"{row.method} is not compared: {error}"))
            return row, None

    own = None if adapter is None else tested(adapter)
    of_frozen, of_others = [tested(row) for row in frozen], [tested(row) for row in others]
    try:
        return verdict(own, of_frozen, class_names, of_others), problems
    except ValueError as error:  # a file is whole, and that of another run
        problems.append(f"the methods are not compared: {error}")
        rows_alone = None if adapter is None else (adapter, None)
        return verdict(
            rows_alone, [(row, None) for row in frozen], class_names, [(row, None) for row in others]
        ), problems


def verdict(
    adapter: Tested | None,
    frozen: Sequence[Tested],
    class_names: Sequence[str] | None,
    others: Sequence[Tested] = (),
) -> list[str]:
    """The sentences on one run, most important first.

    Args:
        adapter: the row of the adapter's final run and its predictions: of the test set, or of all folds of the first
            repeat. None if only frozen-feature methods were run.
        frozen: the same of each frozen-feature method.
        class_names: in the order of the labels; None if they are not known.
        others: the same of each other method that trains.

    Raises:
        ValueError: a row's estimate is damaged, or predictions of two methods are of different data.
    """
    lines = []
    own = _found([] if adapter is None else [adapter])
    best = max(_found(frozen), key=lambda item: (item.accuracy.value, _mean(item.accuracy)), default=None)
    if adapter is not None and not own:
        row = adapter[0]
        if row.status == "completed" and row.test_accuracy is not None:
            lines.append(f"{_name(row.method)}: {accuracy_text(row)} right, of an unknown number of images.")
        else:
            reason = "it was not tested" if row.status == "completed" else f"its run {_ended(row)}"
            lines.append(f"{_name(row.method)} has no estimate of its accuracy: {reason}.")
    for item in own:
        lines += [_accuracy_line(item), *_chance_line(item)]
    for name, tested in (("frozen", frozen), ("trained", others)):
        lines += _rival_lines(name, _found(tested), own[0] if own else None)
    shown = own[0] if own else best
    if shown is not None and shown.accuracy.estimate is not None:
        lines.append("The intervals leave out the variation of training sets; each fold trained on fewer images.")
    confused = own[0] if own and own[0].predictions is not None else best
    if confused is not None and confused.predictions is not None:
        by = "" if own and confused is own[0] else f" by {_name(confused.row.method)}"
        lines.append(_confusion_line(_confused_pairs(confused.predictions, class_names), by))
    if shown is not None and shown.accuracy.estimate is not None and shown.accuracy.estimate.untested_classes:
        lines.append(_untested_line(shown.accuracy.estimate.untested_classes))
    return lines


def _found(tested: Sequence[Tested]) -> list[_Found]:
    """The runs that have an accuracy."""
    found = []
    for row, predictions in tested:
        accuracy = run_accuracy(row, None if predictions is None else len(predictions.index))
        if accuracy is not None:
            found.append(_Found(row, predictions, accuracy))
    return found


def _mean(accuracy: RunAccuracy) -> float:
    return accuracy.value if accuracy.estimate is None else accuracy.estimate.mean


def _accuracy_line(item: _Found) -> str:
    found = item.accuracy
    if found.estimate is not None:
        images = f"{_images(found.images)}, {found.estimate.number_of_folds}-fold cross-validation"
    else:
        images = f"{name_text(item.row.data.get('test_name') or 'test')} {_images(found.images)}"
    counts = f"{found.correct:,} of {found.images:,} {images}"
    return f"{_name(item.row.method)}: {points(100 * found.value)} % right (95 % interval {_between(found)}; {counts})."


def _chance_line(item: _Found) -> list[str]:
    """A sentence where the accuracy is not shown to be above that of always answering the largest class."""
    share = item.row.data.get("majority_share")
    if not isinstance(share, int | float) or item.accuracy.low > share:
        return []
    where = "is under chance" if item.accuracy.high < share else "is not shown to be above chance"
    largest = f"always answering the largest class is right for {points(100 * share)} %"
    return [f"{_name(item.row.method)} {where}: {largest}."]


def _rival_lines(name: str, tested: Sequence[_Found], own: _Found | None) -> list[str]:
    """The best of some other methods, and the adapter against it image by image."""
    best = max(tested, key=lambda item: (item.accuracy.value, _mean(item.accuracy)), default=None)
    if best is None:
        return []
    accuracy = f"{points(100 * best.accuracy.value)} % ({_between(best.accuracy)})"
    lines = [f"{_best_of(name, len(tested))}: {_name(best.row.method)}, {accuracy}."]
    if name == "frozen":
        lines += _chance_line(best)
    if own is not None and own.predictions is not None and best.predictions is not None:
        found = compare(own.predictions, best.predictions)
        lines.append(
            f"{_name(own.row.method)} against {_name(best.row.method)}, image by image: "
            + _difference_text(found.difference, f"{signed(found.low)} to {signed(found.high)}", found.shown)
        )
    if own is not None and name == "trained":
        lines += _file_line(own.row.method, own.row.adapter_file_bytes, best.row.method, best.row.adapter_file_bytes)
    return lines


def _best_of(name: str, count: int) -> str:
    one, several = _RIVALS[name]
    return one if count == 1 else f"Best of {count} {several} (an optimistic choice)"


def _difference_text(difference: float, interval: str, shown: bool) -> str:
    if not shown:
        return f"no difference shown ({signed(difference)} points, {interval})."
    return f"{abs(difference):.1f} points {'better' if difference > 0 else 'worse'} ({interval})."


def _file_line(name: str, own: int | None, rival: str, other: int | None) -> list[str]:
    """A sentence on how many times as large another method's adapter file is."""
    if not own or not other:
        return []
    times = f"{other / own:{',.0f' if other >= 10 * own else '.2g'}}"
    words = f"{times} times as large as that of {_name(name)}"
    return [] if times == "1" else [f"The adapter file of {_name(rival)} is {words}."]


def _several(chosen: Summary, runs: list[Row], found: Sequence[Entry]) -> list[str]:
    """The sentences on an entry of several runs."""
    assert chosen.mean is not None and chosen.std is not None
    choice = f", {text}" if (text := _choice(chosen, found)) else ""
    lines = [f"{_name(chosen.label)}{choice}: {points(chosen.mean)} % right ({_over(chosen, runs)}).", *_chance(chosen)]
    for name in _RIVALS:
        rivals = [
            (summary, others)
            for summary, others in found
            if kind(summary) == name and kind(chosen) != name and summary.mean is not None
        ]
        if not rivals or kind(chosen) == "frozen":
            continue
        best, others = max(rivals, key=lambda entry: entry[0].mean or 0)
        assert best.mean is not None
        lines.append(
            f"{_best_of(name, len(rivals))}: {_name(best.label)}, {points(best.mean)} % ({_over(best, others)})."
        )
        if difference := paired_difference(runs, others):
            lines.append(f"{_name(chosen.label)} against {_name(best.label)}{_paired_text(difference)}")
        if name == "trained":
            lines += _file_line(chosen.label, chosen.adapter_file_bytes, best.label, best.adapter_file_bytes)
    if chosen.cross_validated:
        lines.append("Each fold trained on fewer images than the final adapter.")
    sums, problems = entry_confusions(runs, chosen.cell)
    for by_split in sums.values():
        total = reduce(lambda one, other: one.add(other, fill_value=0), by_split.values())
        pairs: Counter[tuple[str, str]] = Counter()
        counts = total.to_numpy()
        for true, predicted in np.argwhere(counts > 0).tolist():
            if true != predicted:
                names = total.index[min(true, predicted)], total.index[max(true, predicted)]
                pairs[names] += int(counts[true, predicted])
        lines.append(_confusion_line(pairs, ""))
    return [*lines, *map(printable, problems)]


def _over(summary: Summary, runs: Sequence[Row]) -> str:
    """What a mean is over: `std 0.8; 12 runs: 4 splits x 3 inits`."""
    counted = grid_text([row for row in runs if row.status == "completed" and _has_accuracy(row)])
    if summary.cross_validated:
        counted = f"{summary.n} folds of {counted}"
    return f"std {points(summary.std or 0)}; {counted}"


def _chance(chosen: Summary) -> list[str]:
    if chosen.chance is None:
        return []
    where = f"{_name(chosen.label)} is under chance" if chosen.under_chance else "Chance"
    return [f"{where}: always answering the largest class is right for {points(chosen.chance)} %."]


def _paired_text(found: Difference) -> str:
    """A paired difference as the end of a sentence."""
    if found.low is None or found.high is None:
        return f": {signed(found.mean)} points on one split, which gives no interval."
    interval = f"{signed(found.low)} to {signed(found.high)}, {plural('split', found.splits)}"
    return ", split by split: " + _difference_text(found.mean, interval, found.shown)


def _confused_pairs(predictions: Predictions, class_names: Sequence[str] | None) -> Counter[tuple[str, str]]:
    """How many images of one class of a pair were predicted as the other, in either direction."""
    wrong = ~predictions.correct
    counted = Counter(
        (min(pair), max(pair))
        for pair in zip(predictions.label[wrong].tolist(), predictions.predicted[wrong].tolist(), strict=True)
    )
    names = class_names or ()

    def name(label: int) -> str:
        return names[label] if label < len(names) else f"class {label}"

    return Counter({(name(first), name(second)): counted[first, second] for first, second in sorted(counted)})


def _confusion_line(pairs: Mapping[tuple[str, str], int], by: str) -> str:
    """The two pairs of classes with the most images of one predicted as the other; of equal ones the first."""
    if not pairs:
        return f"No image was misclassified{by}."
    ranked = sorted(pairs.items(), key=lambda item: -item[1])
    listed = ", ".join(
        f"{_quoted(first)} and {_quoted(second)} ({plural('image', count)})" for (first, second), count in ranked[:2]
    )
    tied = sum(count == ranked[1][1] for _, count in ranked[2:]) if len(ranked) > 2 else 0
    more = f", and {tied} more {'pair' if tied == 1 else 'pairs'} with {ranked[1][1]}" if tied else ""
    return f"Most often confused{by}: {listed}{more}."


def _untested_line(names: Sequence[str]) -> str:
    listed = [_quoted(name) for name in names[:_MOST_NAMES]]
    if rest := len(names) - len(listed):
        listed.append(f"{rest} more {'class' if rest == 1 else 'classes'}")
    joined = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
    each = "has a single image" if len(names) == 1 else "have a single image each"
    return f"No estimate for {joined}: {'it' if len(names) == 1 else 'they'} {each}, which is always trained on."


def _lost_line(found: Sequence[Entry]) -> list[str]:
    """A sentence on the final runs that failed or were interrupted."""
    lost = [row for _, runs in found for row in runs if row.status != "completed"]
    if not lost:
        return []
    counts = [(_name(summary.label), summary.failed + summary.interrupted) for summary, _ in found]
    listed = [f"{name} {count}" for name, count in counts if count]
    more = f" and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
    return [f"Not completed: {plural('run', len(lost))} ({', '.join(listed[:_MOST_NAMES])}{more})."]


def _has_accuracy(row: Row) -> bool:
    return row.test_accuracy is not None or row.estimate is not None


def _between(found: RunAccuracy) -> str:
    return " to ".join(map(points, found.interval))


def _images(count: int) -> str:
    return "image" if count == 1 else "images"


def _ended(row: Row) -> str:
    return "failed" if row.status == "failed" else "was interrupted"


def _name(method: str) -> str:
    return name_text(method, _MOST_CHARACTERS)


def _quoted(name: str) -> str:
    return f"'{name_text(name, _MOST_CHARACTERS)}'"
