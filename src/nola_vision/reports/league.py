"""Methods at byte budgets: the entries such as `nola@2KB` of a cell as a table, methods by budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nola_vision.common.text import excerpt
from nola_vision.reports.entries import Entry, Summary, of_method
from nola_vision.reports.formatting import NOT_MEASURED, bytes_text, plural, points
from nola_vision.reports.statistics import LEAST_SPLITS, ROUNDING, paired_difference
from nola_vision.reports.tables import Mark, Table, TableCell, printable_table
from nola_vision.runs.budget_names import split_budget, with_budget
from nola_vision.runs.not_run import NotRun

_METHOD_HELP = (
    "name in the config; a method without budgets is in each column that its file, which has one size, is within"
)
_BUDGET_HELP = "mean accuracy in per cent over splits, of the largest adapter file of the method within this budget"


@dataclass(frozen=True)
class _Place:
    """One method at one budget: its entry, or why there is none."""

    entry: Entry | None
    reason: str | None = None


def budget_table(entries: Sequence[Entry], not_run: Mapping[str, NotRun]) -> Table | None:
    """Mean accuracies of methods by budgets; None if no entry has a budget.

    The best of a budget is marked `best`. A method whose paired difference to it over splits has a 95 % interval
    (Student's t) that contains 0 is marked `close`: it is not significantly worse.

    Args:
        entries: of one cell.
        not_run: entries that were not run, by name.
    """
    measured = [entry for entry in entries if entry.summary.mean is not None]
    budgets = sorted({size for name in _names(entries, not_run) if (size := split_budget(name)[1]) is not None})
    if not budgets or not measured:
        return None
    notes: list[str] = []
    grid: dict[str, list[_Place]] = {}
    for method in dict.fromkeys(of_method(item) for item, _ in sorted(entries, key=_rank)):
        places = [_place(method, budget, measured, entries, not_run) for budget in budgets]
        if any(place.entry or place.reason for place in places):
            grid[method] = places
    for name in dict.fromkeys(split_budget(name)[0] for name in not_run):
        if name not in grid:
            grid[name] = [_place(name, budget, measured, entries, not_run) for budget in budgets]
    most = max((place.entry.summary.splits for places in grid.values() for place in places if place.entry), default=0)
    best = [_best([places[column] for places in grid.values()]) for column in range(len(budgets))]
    lines = []
    for method, places in grid.items():
        cells = [TableCell(method)]
        for place, leader, budget in zip(places, best, budgets, strict=True):
            if place.entry is None:
                cells.append(TableCell(NOT_MEASURED))
            else:
                item = place.entry.summary
                fewer = f" (n = {item.splits})" if item.splits < most else ""
                cells.append(TableCell(f"{points(item.mean)}{fewer}", _mark(place.entry, leader)))
            if place.reason:
                notes.append(f"{method} at {bytes_text(budget)}: {place.reason}")
        lines.append(tuple(cells))
    inits = max(item.completed // max(1, item.splits) for item, _ in measured)
    heading = f"means over n = {plural('split', most)}, {plural('init', inits)} each; best in bold"
    if most >= LEAST_SPLITS:
        heading += ", underlined: not significantly worse (paired difference over splits, 95 % interval contains 0)"
    return printable_table(
        Table(
            title="Accuracy by budget of the whole file",
            columns=("method", *(f"{bytes_text(budget)}, %" for budget in budgets)),
            lines=tuple(lines),
            notes=(heading, *notes),
            column_help=(_METHOD_HELP, *[_BUDGET_HELP] * len(budgets)),
        )
    )


def _names(entries: Sequence[Entry], not_run: Mapping[str, NotRun]) -> list[str]:
    return [*(item.method for item, _ in entries), *not_run]


def _place(
    method: str, budget: int, measured: Sequence[Entry], entries: Sequence[Entry], not_run: Mapping[str, NotRun]
) -> _Place:
    name = with_budget(method, budget)
    own = [entry for entry in measured if of_method(entry.summary) == method]
    for entry in own:
        size, limit = entry.summary.adapter_file_bytes, split_budget(entry.summary.method)[1]
        if limit == budget or (limit is None and size is not None and size <= budget):
            return _Place(entry)
    if (why := not_run.get(name)) is None:
        failed = [row for item, runs in entries if item.method == name for row in runs if row.error]
        return _Place(
            None, f"no run was completed; the last failure: {excerpt(failed[-1].error or '')}" if failed else None
        )
    same = next((entry for entry in own if entry.summary.method == why.same_as), None)
    return _Place(same, why.reason)


def _best(places: Sequence[_Place]) -> Entry | None:
    found = [place.entry for place in places if place.entry is not None]
    return max(found, key=lambda entry: entry.summary.mean or 0.0, default=None)


def _mark(entry: Entry, best: Entry | None) -> Mark:
    if best is None or entry.summary.label == best.summary.label:
        return "best"
    difference = paired_difference(entry.runs, best.runs)
    if difference is None or difference.cross_validated:
        return "plain"
    same = difference.splits >= LEAST_SPLITS and difference.low is None and abs(difference.mean) <= ROUNDING
    return "close" if same or (difference.low is not None and not difference.shown) else "plain"


def _rank(entry: Entry) -> tuple[bool, str]:
    return split_budget(entry.summary.method)[1] is not None, of_method(entry.summary)


def has_budgets(summaries: Sequence[Summary]) -> bool:
    """Whether an entry of a cell has a byte budget."""
    return any(split_budget(item.method)[1] is not None for item in summaries)
