"""The contents of a cell's tables: results, and differences and spread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from nola_vision.common.text import excerpt, printable
from nola_vision.reports.entries import Entry, Summary, common_splits, of_method, subject
from nola_vision.reports.formatting import NOT_MEASURED, count_text, interval_text, points, signed
from nola_vision.reports.published import published_result
from nola_vision.reports.statistics import LEAST_SPLITS, paired_difference
from nola_vision.runs.budget_names import split_budget
from nola_vision.runs.record import Row
from nola_vision.runs.run_id import FROZEN_METHODS, differing_settings

_ORDER = (*FROZEN_METHODS.values(), "LinearProbe", "FullFinetune", "LoRA", "NOLA")
# Optional columns: name in the row, name in the table, and the factor between their units
COLUMNS: Mapping[str, tuple[str, str, int]] = {
    "balanced": ("balanced_accuracy", "balanced %", 100),
    "f1": ("macro_f1", "macro F1 %", 100),
    "top5": ("top5_accuracy", "top-5 %", 100),
    "nll": ("test_nll", "NLL", 1),
}
# Explanations of the columns; docs/sweeps.md has more
_HELP: Mapping[str, str] = {
    "method": "name in the config; in brackets the settings that differ, if it was run with several",
    "trainable": "trainable parameters without the head; those of the head if only the head is trained or fitted",
    "file, bytes": "size of the adapter file, including the head",
    "top-1 %": "share of tested images classified correctly: mean (std, ddof 0) over n, or one run [95 % interval]",
    "n": "number of accuracies in the mean: completed runs, or folds of a cross-validation",
    "balanced %": "mean over classes of the share of images classified correctly",
    "macro F1 %": "mean over classes of F1",
    "top-5 %": "share of images whose class is among the five with the largest logits",
    "NLL": "mean cross-entropy in nats, not calibrated",
    "lr": "learning rate; chosen on validation images if the config's `search` lists several",
    "c": "scale of the adapter's change of a weight; chosen likewise",
    "difference": "accuracy minus that of the method with the best mean (of methods at byte budgets: of the named one "
    "at the same budget, or the next smaller one that it has), in points: mean over the splits that both "
    f"have, with Student's t interval for at least {LEAST_SPLITS} splits on a test set",
    "splits": "number of splits that both methods have",
    "std by split": "part of the std between splits; the squares of both parts add up to the square of the std",
    "std by init": "part of the std between inits of one split",
    "paper, %": "the paper's result for this method, mean (std), with its protocol, splits and whole test set",
}
# close: within a point of the best; even: not significantly worse than the best
Mark = Literal["best", "close", "even", "plain"]


class TableCell(NamedTuple):
    """A value of a table as text, and its mark: bold for `best`, underlined for `close`, italic for `even`."""

    text: str
    mark: Mark = "plain"


@dataclass(frozen=True)
class Table:
    """A table independent of its format. The texts are printable but not escaped.

    Args:
        title: heading.
        columns: their names; the first column names the lines, the others are right-aligned.
        lines: one cell per column.
        notes: sentences under the table.
        column_help: one explanation per column.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[TableCell, ...], ...]
    notes: tuple[str, ...]
    column_help: tuple[str, ...]


def cell_tables(rows: Sequence[Row], entries: Sequence[Entry], columns: Sequence[str]) -> list[Table]:
    """The results of a cell and, if an entry has several runs or a published result, differences and spread."""
    entries = sorted(entries, key=lambda entry: _rank(entry.summary))
    shown = _shown(entries)
    summaries = [item for item, _ in shown]
    names = ("method", "trainable", "file, bytes", "top-1 %", "n", *(COLUMNS[name][1] for name in columns), "lr", "c")
    results = Table(
        title="Results",
        columns=names,
        lines=tuple(_results(item, mark, columns) for item, mark in zip(summaries, _marks(summaries), strict=True)),
        notes=(*_explanations(summaries), *_cautions(rows, entries)),
        column_help=tuple(_HELP[name] for name in names),
    )
    measured = [entry for entry in shown if entry.summary.mean is not None]
    several = any(item.completed > 1 for item, _ in measured)
    both = several or (any(published_result(runs[0]) for _, runs in measured))
    return [printable_table(table) for table in ([results, _comparison(measured)] if both else [results])]


def _shown(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with a completed run."""
    return [entry for entry in entries if entry.summary.completed or entry.summary.untested]


def _results(item: Summary, mark: Mark, columns: Sequence[str]) -> tuple[TableCell, ...]:
    accuracy = points(item.mean)
    if item.interval:
        accuracy += f" {interval_text(item.interval)}"
    elif item.std is not None:
        accuracy += f" ({points(item.std)})"
    others = []
    for name in columns:
        key, _, factor = COLUMNS[name]
        digits = 1 if factor == 100 else 3
        mean, std = item.metrics.get(key, (None, 0.0))
        spread = f" ({factor * std:.{digits}f})" if item.completed > 1 else ""
        others.append(NOT_MEASURED if mean is None else f"{factor * mean:.{digits}f}{spread}")
    chosen = [NOT_MEASURED if one is None else f"{one:g}" for one in (item.learning_rate, item.scale)]
    head_alone = item.trainable_parameters == 0 and item.head_parameters is not None
    trainable = item.head_parameters if head_alone else item.trainable_parameters
    before = (item.label, count_text(trainable), count_text(item.adapter_file_bytes))
    return (*map(TableCell, before), TableCell(accuracy, mark), *map(TableCell, (str(item.n), *others, *chosen)))


def _explanations(shown: Sequence[Summary]) -> list[str]:
    """How to read the accuracy column."""
    parts = []
    over = ["folds" if item.cross_validated else "runs" for item in shown if item.std is not None]
    if over:
        parts.append(f"mean (std) over n {' or '.join(dict.fromkeys(over))}")
    if len(set(over)) > 1:
        folded = [item.label for item in shown if item.cross_validated]
        parts.append(f"folds: {', '.join(folded)}")
    if any(item.interval for item in shown):
        parts.append("one run with its 95 % interval")
    if shares := sorted({points(item.chance) for item in shown if item.chance is not None}, key=float):
        parts.append(f"chance {' to '.join(dict.fromkeys((shares[0], shares[-1])))} %")
    if any(mark != "plain" for mark in _marks(shown)):
        most = common_splits(shown)
        fewer = any(item.mean is not None and item.splits < most for item in shown)
        of = f" of those with at least {most} splits" if fewer else ""
        parts.append(f"best{of} in bold, within 1 point underlined")
    notes = ["; ".join(parts)] if parts else []
    if len(folds := {item.n for item in shown if item.cross_validated and item.n}) > 1:
        notes.append(f"n over {min(folds)}: several divisions into folds; methods are compared only on the first one")
    return notes


def _marks(summaries: Sequence[Summary]) -> list[Mark]:
    most = common_splits(summaries)
    # compared as printed, in tenths of a point, so that readers can check the marks
    tenths = [
        None if item.mean is None or item.under_chance or item.splits < most else round(10 * float(points(item.mean)))
        for item in summaries
    ]
    best = max((one for one in tenths if one is not None), default=0)
    return ["plain" if one is None or best - one > 10 else "close" if best - one else "best" for one in tenths]


def _comparison(entries: Sequence[Entry]) -> Table:
    """Each entry's difference to its reference (`_references`), the parts of its std, and the paper's result."""
    reference, rivals = _references(entries)
    published = {item: figure for item, runs in entries if (figure := published_result(runs[0]))}
    lines, notes = [], []
    differences = {
        item: paired_difference(runs, rival.runs) for (item, runs), rival in zip(entries, rivals, strict=True) if rival
    }
    compared = [difference for difference in differences.values() if difference is not None]
    if any(difference.cross_validated for difference in compared):
        notes.append("differences have no interval: the splits divide the same images, so they are not independent")
    elif any(difference.low is None for difference in compared):
        notes.append("a difference without an interval: too few splits for an interval")
    others = [
        f"{item.label} with {rival.summary.label}"
        for (item, _), rival in zip(entries, rivals, strict=True)
        if rival
        and reference != rival.summary.label
        and split_budget(item.method)[1] != split_budget(rival.summary.method)[1]
    ]
    if others:
        notes.append(f"compared at another budget: {', '.join(others)}")
    for item, _ in entries:
        difference = differences.get(item)
        shown = [NOT_MEASURED, NOT_MEASURED]
        if difference is not None:
            interval = ""
            if difference.low is not None and difference.high is not None:
                interval = f" [{signed(difference.low)}, {signed(difference.high)}]"
            shown = [f"{signed(difference.mean)}{interval}", str(difference.splits)]
        printed = NOT_MEASURED
        if figure := published.get(item):
            printed = f"{figure['mean']:.1f}" + (f" ({figure['std']:.1f})" if "std" in figure else "")
            notes += [f"published {item.method}: {figure['note']}"] if "note" in figure else []
        parts = [points(item.split_std), points(item.init_std)]
        lines.append(tuple(TableCell(text) for text in (item.label, *shown, *parts, *([printed] if published else []))))
    interval = " (95 % CI)" if any(difference.low is not None for difference in compared) else ""
    difference_column = f"difference to {reference}{interval}"
    names = ("method", difference_column, "splits", "std by split", "std by init", *(["paper, %"] if published else []))
    return Table(
        title="Differences and spread",
        columns=names,
        lines=tuple(lines),
        notes=tuple(notes),
        column_help=tuple(_HELP["difference" if name == difference_column else name] for name in names),
    )


def _references(entries: Sequence[Entry]) -> tuple[str, list[Entry | None]]:
    """What each entry is compared with, in words, and the entry; None for what is compared with others.

    It is the entry with the best mean, of those with at least `common_splits`. Of entries at byte budgets it is the
    method of the cell's subject at the same budget, or at the largest smaller one; for a file of a single size, at the
    smallest budget that this is within.
    """
    chosen = subject([item for item, _ in entries])
    if chosen is None or split_budget(chosen.method)[1] is None:
        most = common_splits(item for item, _ in entries)
        best = max((one for one in entries if one.summary.splits >= most), key=lambda one: one.summary.mean or 0)
        return best.summary.label, [None if entry is best else best for entry in entries]
    method = of_method(chosen)
    at = {split_budget(entry.summary.method)[1] or 0: entry for entry in entries if of_method(entry.summary) == method}
    found: list[Entry | None] = []
    for item, _ in entries:
        budget, size = split_budget(item.method)[1], item.adapter_file_bytes
        if budget is None and size is not None:
            budget = min((one for one in at if one >= size), default=None)
        smaller = [one for one in at if budget is not None and one <= budget]
        found.append(at[max(smaller)] if smaller and of_method(item) != method else None)
    return f"{method} at the same budget", found


def _cautions(rows: Sequence[Row], entries: Sequence[Entry]) -> list[str]:
    """Warnings under the results: runs that failed, are missing or differ in other settings."""
    notes = []
    shown = _shown(entries)
    # the runs of one entry differ only in their seeds
    completed = (next(row for row in runs if row.status == "completed") for _, runs in shown)
    if mixed := differing_settings(row.config for row in completed):
        notes.append(f"these runs differ in more than their method, so compare with care: {', '.join(mixed)}")
    if not shown:
        notes.append("no final run has finished yet")
    for item, runs in shown:
        without = "whose folds were not run" if runs[0].data.get("folds") else "without a test accuracy"
        counts = {"failed": item.failed, "interrupted": item.interrupted, without: item.untested}
        if excluded := ", ".join(f"{n} {what}" for what, n in counts.items() if n):
            notes.append(f"{item.label}: {excluded}, not in its mean{_last_error(runs)}")
    for item, runs in entries:
        if not item.completed and not item.untested:
            ended = item.failed + item.interrupted
            notes.append(f"{item.method}: none of its runs ({ended}) was completed{_last_error(runs)}")
    final = {item.method for item, _ in entries}
    others: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.method not in final:
            others[row.method].append(row)
    for method, runs in sorted(others.items()):
        errors = [row.error for row in runs if row.error]
        folds = sum(row.stage == "fold" and row.status == "completed" for row in runs)
        done = f"no final run yet, {folds} folds done" if folds else "search runs only"
        notes.append(f"{method}: {done}" + (f"; the last failure: {excerpt(errors[-1])}" if errors else ""))
    places = [(item, {(row.split, row.init) for row in runs}) for item, runs in shown]
    every = set().union(*(places for _, places in places))
    with_init = {place for place in every if place[1] is not None}
    without_init = {(split, None) for split, _ in every}
    for item, own in places:
        expected = without_init if any(init is None for _, init in own) else with_init  # frozen features have no init
        if missing := len(expected) - len(expected & own):
            notes.append(f"{item.label}: {missing} of {len(expected)} runs have no row (splits x inits of the others)")
    return notes


def _last_error(runs: Sequence[Row]) -> str:
    """The error of the last failed run of an entry, as the end of a sentence."""
    failed = sorted((row for row in runs if row.status == "failed"), key=lambda row: row.started)
    return f"; the last failure: {excerpt(failed[-1].error or 'unknown')}" if failed else ""


def printable_table(table: Table) -> Table:
    """The table with all texts made printable."""
    return replace(
        table,
        columns=tuple(map(printable, table.columns)),
        lines=tuple(tuple(TableCell(printable(cell.text), cell.mark) for cell in line) for line in table.lines),
        notes=tuple(map(printable, table.notes)),
    )


def _rank(item: Summary) -> tuple[int, str, str, int]:
    place = [index for index, start in enumerate(_ORDER) if item.method_class.startswith(start)]
    name = of_method(item), split_budget(item.method)[1] or 0
    return (place[0], "", *name) if place else (len(_ORDER), item.method_class, *name)
