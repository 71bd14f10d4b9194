"""Results in plain sentences: the accuracy, the comparison with other methods, and the most confused classes.

`run_verdict` is about one run and printed by `fit`; `cell_verdict` is about all runs of a cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from statistics import fmean
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.text import plural, printable
from nola_vision.evaluation.estimates import compare
from nola_vision.evaluation.predictions import Predictions
from nola_vision.reports.confusion import MOST_CLASSES, confused_pairs, count_predictions, run_confusions
from nola_vision.reports.description import grid_text
from nola_vision.reports.entries import Entry, Kind, Summary, kind
from nola_vision.reports.entry_predictions import load_run_predictions
from nola_vision.reports.formatting import accuracy_text, points, short_printable, signed
from nola_vision.reports.statistics import (
    RunAccuracy,
    first_pair,
    is_measured,
    paired_difference,
    run_accuracies,
    run_accuracy,
)
from nola_vision.runs.record import Row

RunPredictions = tuple[Row, Predictions | None]
Rivals = Mapping[Kind, Sequence[Entry]]
_MOST_NAMES = 3  # in one sentence
_MOST_CHARACTERS = 40  # of a name
_COMPARED: Sequence[Kind] = ("frozen", "trained")
_LEFT_OUT = "The intervals leave out the variation of training sets; each fold trained on fewer images."
_KINDS: Mapping[Kind, str] = {
    "NOLA": "NOLA entries",
    "trained": "methods that train",
    "frozen": "frozen-feature methods",
}


class _TestedRun(NamedTuple):
    """A run with an accuracy."""

    row: Row
    predictions: Predictions | None
    accuracy: RunAccuracy


def cell_verdict(entries: Sequence[Entry], chosen: Entry | None, rivals: Rivals) -> tuple[list[str], list[str]]:
    """The sentences on all runs of a cell, the most important first.

    If the subject has a single run, they are those of `run_verdict`. If it has several: its mean, the best of the other
    methods with the paired difference over splits (image by image for cross-validation), and the most confused classes.

    Args:
        entries: of one cell. Predictions and `confusion.csv` are read from the folders of their runs.
        chosen: the subject, as `entries.subject` chooses it; None if no entry has an accuracy.
        rivals: of kind "trained" and "frozen", as `entries.rivals` ranks them.

    Returns:
        The sentences, and one message per file that could not be used.
    """
    if chosen is None:
        return ["No run of this cell has an accuracy yet.", *_not_completed(entries)], []
    lines, problems = (_several if chosen.summary.completed > 1 else _single)(chosen, entries, rivals)
    return [*lines, *_not_completed(entries)], problems


def _single(subject: Entry, entries: Sequence[Entry], rivals: Rivals) -> tuple[list[str], list[str]]:
    """`run_verdict` of an entry's only run and the other entries' runs on its split."""
    chosen, run = subject.summary, next(filter(is_measured, subject.runs))

    def labelled(summary: Summary, runs: Sequence[Row]) -> Row:
        same = [row for row in runs if row.split == run.split and is_measured(row)]
        return replace(min(same, key=lambda row: (row.init != run.init, row.init or 0)), method=summary.label)

    frozen, trained = ([labelled(*entry) for entry in rivals[one]] for one in _COMPARED)
    if kind(chosen) == "frozen":  # no method that trains has an accuracy
        adapter = next((others[-1] for summary, others in entries if kind(summary) != "frozen"), None)
        return run_verdict(adapter, frozen)
    run = replace(run, method=chosen.label)
    lines, problems = run_verdict(run, frozen, trained if kind(chosen) == "NOLA" else ())
    if choice := _choice(chosen, entries):
        lines.insert(1, f"{_name(chosen.label)} is {choice}.")
    return lines, problems


def _choice(chosen: Summary, entries: Sequence[Entry]) -> str:
    """`the best of 3 NOLA entries`, counting those with as many runs as the chosen one; empty if it is the only one."""
    same = [
        summary
        for summary, _ in entries
        if kind(summary) == kind(chosen) and (summary.splits, summary.completed) == (chosen.splits, chosen.completed)
    ]
    return f"the best of {len(same)} {_KINDS[kind(chosen)]} (an optimistic choice)" if len(same) > 1 else ""


def run_verdict(
    adapter: Row | None,
    frozen: Sequence[Row],
    others: Sequence[Row] = (),
) -> tuple[list[str], list[str]]:
    """The sentences of `verdict`, with predictions read from the folders of the runs.

    Args:
        adapter: the adapter's final run; None if there is none.
        frozen: runs of methods on frozen features.
        others: runs of other methods that train.

    Returns:
        The sentences, and one message per file that could not be used.
    """
    problems: list[str] = []
    own = None if adapter is None else _read(adapter, problems)
    of_frozen, of_others = ([_read(row, problems) for row in rows] for rows in (frozen, others))
    try:
        return verdict(own, of_frozen, of_others), problems
    except ValueError as error:  # an intact file of another run
        problems.append(f"the methods are not compared: {error}")
        without = None if adapter is None else (adapter, None)
        return verdict(without, [(row, None) for row in frozen], [(row, None) for row in others]), problems


def _read(row: Row, problems: list[str]) -> RunPredictions:
    """A run with its predictions; a message on a file that cannot be used is added to `problems`."""
    try:
        return row, load_run_predictions(row)
    except NolaVisionError as error:
        problems.append(printable(str(error)))
        return row, None


def verdict(
    adapter: RunPredictions | None,
    frozen: Sequence[RunPredictions],
    others: Sequence[RunPredictions] = (),
) -> list[str]:
    """The sentences on one run, the most important first.

    Args:
        adapter: the adapter's final run and its predictions, on the test set or on all folds of the first repeat. None
            if only frozen-feature methods were run.
        frozen: the same for each frozen-feature method.
        others: the same for each other method that trains.

    Raises:
        ValueError: a row's estimate is damaged, or predictions of two methods are of different data.
    """
    lines = []
    own = _tested([] if adapter is None else [adapter])
    best = _best(_tested(frozen))
    if adapter is not None and not own:
        row = adapter[0]
        if row.status == "completed" and row.test_accuracy is not None:
            lines.append(f"{_name(row.method)}: top-1 accuracy {accuracy_text(row)}, of an unknown number of images.")
        else:
            reason = "its folds were not run" if row.data.get("folds") else "it was not tested"
            if row.status != "completed":
                reason = "its run failed" if row.status == "failed" else "its run was interrupted"
            lines.append(f"There is no accuracy estimate for {_name(row.method)}: {reason}.")
    for item in own:
        lines += [_accuracy_line(item), *_chance_line(item)]
    for name, runs in zip(_COMPARED, (frozen, others), strict=True):
        lines += _rival_lines(name, _tested(runs), own[0] if own else None)
    shown = own[0] if own else best
    if shown is not None and shown.accuracy.estimate is not None:
        lines.append(_LEFT_OUT)
    confused = own[0] if own and own[0].predictions is not None else best
    if confused is not None and confused.predictions is not None:
        by = "" if own and confused is own[0] else f" by {_name(confused.row.method)}"
        largest = int(max(confused.predictions.label.max(), confused.predictions.predicted.max()))
        names = confused.row.data.get("class_names") or [f"class {label}" for label in range(largest + 1)]
        if len(names) <= MOST_CLASSES:  # the matrix is dense, and a row may have any number of classes
            lines.append(_confusion_line(count_predictions([confused.predictions], len(names)), names, by))
    if shown is not None and shown.accuracy.estimate is not None and shown.accuracy.estimate.untested_classes:
        lines.append(_untested_line(shown.accuracy.estimate.untested_classes))
    return lines


def _tested(runs: Sequence[RunPredictions]) -> list[_TestedRun]:
    """The runs with an accuracy."""
    found = []
    for row, predictions in runs:
        accuracy = run_accuracy(row, None if predictions is None else len(predictions.index))
        if accuracy is not None:
            found.append(_TestedRun(row, predictions, accuracy))
    return found


def _best(found: Sequence[_TestedRun]) -> _TestedRun | None:
    """The run with the highest accuracy, for cross-validation the mean of all folds, as in `entries.rivals`."""
    return max(found, key=lambda item: fmean(run_accuracies(item.row)), default=None)


def _accuracy_line(item: _TestedRun) -> str:
    found = item.accuracy
    if found.estimate is not None:
        images = f"{_images(found.images)}, {found.estimate.number_of_folds}-fold cross-validation"
    else:
        images = f"{short_printable(item.row.data.get('test_name') or 'test')} {_images(found.images)}"
    counts = f"{found.correct:,} of {found.images:,} {images}"
    accuracy = f"top-1 accuracy {points(100 * found.value)} %"
    return f"{_name(item.row.method)}: {accuracy} (95 % interval {_between(found)}; {counts})."


def _chance_line(item: _TestedRun) -> list[str]:
    """A sentence if the accuracy is not shown to be above that of always predicting the largest class."""
    share = item.row.data.get("majority_share")
    if not isinstance(share, int | float) or item.accuracy.low > share:
        return []
    where = "is under chance" if item.accuracy.high < share else "is not shown to be above chance"
    largest = f"always predicting the largest class is right for {points(100 * share)} %"
    return [f"{_name(item.row.method)} {where}: {largest}."]


def _rival_lines(name: Kind, tested: Sequence[_TestedRun], own: _TestedRun | None) -> list[str]:
    """The best of some other methods, and the comparison of the adapter with it, image by image."""
    if (best := _best(tested)) is None:
        return []
    accuracy = f"{points(100 * best.accuracy.value)} % ({_between(best.accuracy)})"
    lines = [f"{_best_of(name, len(tested))}: {_name(best.row.method)}, {accuracy}."]
    if name == "frozen":
        lines += _chance_line(best)
    if own is not None and own.predictions is not None and best.predictions is not None:
        who = f"{_name(own.row.method)} against {_name(best.row.method)}"
        lines.append(f"{who}, image by image: {_compared(own.predictions, best.predictions)}")
    if own is not None and name == "trained":
        lines += _file_line(own.row.method, own.row.adapter_file_bytes, best.row.method, best.row.adapter_file_bytes)
    return lines


def _best_of(name: Kind, count: int) -> str:
    if count == 1:
        return "Frozen features" if name == "frozen" else "The other method that trains"
    return f"Best of {count} {'other ' if name == 'trained' else ''}{_KINDS[name]} (an optimistic choice)"


def _compared(own: Predictions, other: Predictions) -> str:
    """The comparison of two runs image by image, as the end of a sentence; ValueError if their data differ."""
    found = compare(own, other)
    return _difference_text(found.difference, f"{signed(found.low)} to {signed(found.high)}", found.shown)


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


def _several(subject: Entry, entries: Sequence[Entry], rivals: Rivals) -> tuple[list[str], list[str]]:
    """The sentences on an entry with several runs, and the messages on files that could not be used."""
    chosen, runs = subject
    choice = f", {text}" if (text := _choice(chosen, entries)) else ""
    accuracy = f"top-1 accuracy {points(chosen.mean)} % ({_over(chosen, runs)})"
    lines = [f"{_name(chosen.label)}{choice}: {accuracy}.", *_chance(chosen)]
    problems: list[str] = []
    for name in _COMPARED:
        others = rivals[name] if kind(chosen) not in ("frozen", name) else []
        if not others:
            continue
        best, of_best = others[0]
        accuracy = f"{points(best.mean)} % ({_over(best, of_best)})"
        lines.append(f"{_best_of(name, len(others))}: {_name(best.label)}, {accuracy}.")
        if text := _paired_text(runs, of_best, problems):
            lines.append(f"{_name(chosen.label)} against {_name(best.label)}{text}")
        if name == "trained":
            lines += _file_line(chosen.label, chosen.adapter_file_bytes, best.label, best.adapter_file_bytes)
    if chosen.cross_validated:
        lines.append(_LEFT_OUT)
    read, unusable = run_confusions(runs)
    if read:
        names = read[0][1].index.tolist()
        lines.append(_confusion_line(reduce(np.add, (counts.to_numpy() for _, counts in read)), names, "", len(read)))
    return lines, [*problems, *map(printable, unusable)]


def _over(summary: Summary, runs: Sequence[Row]) -> str:
    """The std and number of runs of a mean: `std 0.8; 12 runs: 4 splits x 3 inits`."""
    counted = grid_text([row for row in runs if is_measured(row)])
    if summary.cross_validated:
        counted = f"{summary.n} folds of {counted}"
    return counted if summary.std is None else f"std {points(summary.std)}; {counted}"


def _chance(chosen: Summary) -> list[str]:
    if chosen.chance is None:
        return []
    where = f"{_name(chosen.label)} is under chance" if chosen.under_chance else "Chance"
    return [f"{where}: always predicting the largest class is right for {points(chosen.chance)} %."]


def _paired_text(runs: Sequence[Row], others: Sequence[Row], problems: list[str]) -> str:
    """The difference of two entries as the end of a sentence; empty if they cannot be compared.

    They are compared by their means per split; cross-validated runs image by image, in the first split and init of
    both, since their splits divide the same images.
    """
    found = paired_difference(runs, others)
    if found is None:
        return ""
    if not found.cross_validated:
        if found.low is None or found.high is None:
            return f": {signed(found.mean)} points on {plural('split', found.splits)}, too few splits for an interval."
        interval = f"{signed(found.low)} to {signed(found.high)}, {plural('split', found.splits)}"
        return f", split by split: {_difference_text(found.mean, interval, found.shown)}"
    one, other = first_pair(runs, others)
    (_, own), (_, rival) = _read(one, problems), _read(other, problems)
    if own is None or rival is None:
        return ""
    try:
        compared = _compared(own, rival)
    except ValueError as error:  # an intact file of another run
        problems.append(f"the methods are not compared: {error}")
        return ""
    where = f"split {one.split}" + ("" if one.init is None else f", init {one.init}")
    return f", image by image ({where}): {compared}"


def _confusion_line(counts: npt.NDArray[np.int64], names: Sequence[str], by: str, runs: int = 1) -> str:
    """The two most confused pairs of classes; of equally frequent ones the first.

    Args:
        counts: by true and predicted class, summed over `runs`.
        names: class names.
        by: the method, as part of a sentence; may be empty.
        runs: number of runs; an image counts once per run.
    """
    pairs = confused_pairs(counts)
    if not len(pairs):
        return f"No image was misclassified{by}."

    def often(count: int) -> str:
        return plural("image", count) if runs == 1 else f"{plural('time', count)} in {runs} runs"

    top = pairs[:2].tolist()
    listed = ", ".join(f"{_quoted(names[i])} as {_quoted(names[j])} ({often(count)})" for i, j, count in top)
    tied = int((pairs[2:, 2] == top[-1][2]).sum())
    more = f", and {tied} more {'pair' if tied == 1 else 'pairs'} with {top[-1][2]}" if tied else ""
    return f"Most often misclassified{by}: {listed}{more}."


def _untested_line(names: Sequence[str]) -> str:
    listed = [_quoted(name) for name in names[:_MOST_NAMES]]
    if rest := len(names) - len(listed):
        listed.append(f"{rest} more {'class' if rest == 1 else 'classes'}")
    joined = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
    each = "has a single image" if len(names) == 1 else "have a single image each"
    return f"No estimate for {joined}: {'it' if len(names) == 1 else 'they'} {each}, which is always trained on."


def _not_completed(entries: Sequence[Entry]) -> list[str]:
    """A sentence on the final runs that failed or were interrupted."""
    failed = [row for _, runs in entries for row in runs if row.status != "completed"]
    if not failed:
        return []
    counts = [(_name(summary.label), summary.failed + summary.interrupted) for summary, _ in entries]
    listed = [f"{name} {count}" for name, count in counts if count]
    more = f" and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
    return [f"Not completed: {plural('run', len(failed))} ({', '.join(listed[:_MOST_NAMES])}{more})."]


def _between(found: RunAccuracy) -> str:
    return " to ".join(map(points, found.interval))


def _images(count: int) -> str:
    return "image" if count == 1 else "images"


def _name(method: str) -> str:
    return short_printable(method, _MOST_CHARACTERS)


def _quoted(name: str) -> str:
    return f"'{short_printable(name, _MOST_CHARACTERS)}'"
