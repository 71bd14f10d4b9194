"""Methods at byte budgets: the entries such as `nola@2KB` of a cell as a table, methods by budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nola_vision.common.text import excerpt, plural
from nola_vision.reports.entries import Entry, Summary, common_splits, kind, of_method
from nola_vision.reports.formatting import NOT_MEASURED, bytes_text, points
from nola_vision.reports.statistics import LEAST_SPLITS, ROUNDING, accuracies_by_split, paired_difference
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

    The best mean of a budget, of methods with at least `common_splits`, is marked `best`. A method whose paired
    difference to it over splits has a 95 % interval (Student's t) that contains 0 is marked `even`: it is not
    significantly worse. If there is no interval, the text states that they are not compared.

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
            if absence := _absence(method, budgets, places, measured):
                notes.append(absence)
    for name in dict.fromkeys(split_budget(name)[0] for name in not_run):
        if name not in grid:
            grid[name] = [_place(name, budget, measured, entries, not_run) for budget in budgets]
    shown = [place.entry for places in grid.values() for place in places if place.entry]
    most = common_splits(entry.summary for entry in {entry.summary.label: entry for entry in shown}.values())
    leaders = [_leader([places[column] for places in grid.values()], most) for column in range(len(budgets))]
    compared = most >= LEAST_SPLITS and not any(entry.summary.cross_validated for entry in shown)
    lines = []
    for method, places in grid.items():
        cells = [TableCell(method)]
        for place, leader, budget in zip(places, leaders, budgets, strict=True):
            cells.append(_cell(place.entry, leader, most, compared) if place.entry else TableCell(NOT_MEASURED))
            if place.reason:
                notes.append(f"{method} at {bytes_text(budget)}: {place.reason}")
        lines.append(tuple(cells))
    heading = f"means over n = {plural('split', most)}{_inits(shown)}; best in bold"
    if compared:
        heading += ", in italics: not significantly worse (paired difference over splits, 95 % interval contains 0)"
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
    sizes = [(entry, split_budget(entry.summary.method)[1], entry.summary.adapter_file_bytes) for entry in own]
    within = [entry for entry, limit, _ in sizes if limit == budget]
    within += [entry for entry, limit, size in sizes if limit is None and size is not None and size <= budget]
    if within:
        return _Place(within[0])
    if (why := not_run.get(name)) is None:
        failed = [row for item, runs in entries if item.method == name for row in runs if row.error]
        return _Place(
            None, f"no run was completed; the last failure: {excerpt(failed[-1].error or '')}" if failed else None
        )
    same = next((entry for entry in own if entry.summary.method == why.same_as), None)
    return _Place(same, why.reason)


def _absence(method: str, budgets: Sequence[int], places: Sequence[_Place], measured: Sequence[Entry]) -> str | None:
    """A note on the budgets at which a line has neither an accuracy nor a reason; None if there are none."""
    cells = zip(budgets, places, strict=True)
    empty = [bytes_text(size) for size, place in cells if not place.entry and not place.reason]
    if not empty:
        return None
    own = [entry.summary for entry in measured if of_method(entry.summary) == method]
    size = next((item.adapter_file_bytes for item in own if split_budget(item.method)[1] is None), None)
    return f"{method}: its file has {size:,} bytes" if size else f"{method}: no runs at {', '.join(empty)}"


def _leader(places: Sequence[_Place], most: int) -> Entry | None:
    """The best mean; a mean over fewer splits than `most` is not evidence against the others."""
    found = [place.entry for place in places if place.entry is not None]
    return max(found, key=lambda entry: (min(most, entry.summary.splits), entry.summary.mean or 0.0), default=None)


def _cell(entry: Entry, leader: Entry | None, most: int, compared: bool) -> TableCell:
    """One accuracy of the table.

    Args:
        entry: whose it is.
        leader: the best of the column.
        most: splits of the heading.
        compared: whether the heading explains differences to the best.
    """
    item = entry.summary
    remarks = [f"n = {item.splits}"] if item.splits != most else []
    mark: Mark = "best"
    if leader is not None and item.label != leader.summary.label:
        difference = paired_difference(entry.runs, leader.runs)
        if difference is not None and difference.splits >= LEAST_SPLITS:
            # equal differences have no interval: their spread is unknown
            worse = difference.mean < -ROUNDING and (difference.low is None or difference.shown)
            mark = "even" if compared and not worse else "plain"
        else:
            mark = "plain"
            remarks += ["not compared"] * compared
    return TableCell(points(item.mean) + f" ({', '.join(remarks)})" * bool(remarks), mark)


def _inits(entries: Sequence[Entry]) -> str:
    """How many inits a split has, for the heading; those of methods on frozen features do not exist."""
    trained = [entry.runs for entry in entries if kind(entry.summary) != "frozen"]
    counts = {len(inits) for runs in trained for inits in accuracies_by_split(runs).values()}
    if not counts:
        return ""
    few = f"{min(counts)} to " if len(counts) > 1 else ""
    return f", {few}{plural('init', max(counts))} each"


def _rank(entry: Entry) -> tuple[bool, str]:
    return split_budget(entry.summary.method)[1] is not None, of_method(entry.summary)


def has_budgets(summaries: Sequence[Summary]) -> bool:
    """Whether an entry of a cell has a byte budget."""
    return any(split_budget(item.method)[1] is not None for item in summaries)
