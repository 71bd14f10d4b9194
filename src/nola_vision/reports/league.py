"""Methods at byte budgets: the entries such as `nola@2KB` of a cell as a table, methods by budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nola_vision.common.text import excerpt, plural
from nola_vision.reports.entries import Entry, Summary, kind, of_method
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

    The best mean of a budget over the most splits that a method has there is marked `best`. A method whose paired
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
    lines_of, notes = _lines(measured)
    grid: dict[str, list[_Place]] = {}
    ranked = [entry.summary for entry in sorted(entries, key=_rank)]
    names = [name for item in ranked for name in (split_budget(item.method)[0], of_method(item))]
    for method in dict.fromkeys([*names, *(split_budget(name)[0] for name in not_run)]):
        places = [_place(method, budget, lines_of.get(method, []), entries, not_run) for budget in budgets]
        if any(place.entry or place.reason for place in places):
            grid[method] = places
    most = max((place.entry.summary.splits for places in grid.values() for place in places if place.entry), default=0)
    leaders = [_leader([places[column] for places in grid.values()]) for column in range(len(budgets))]
    shown = [place.entry for places in grid.values() for place in places if place.entry]
    compared = most >= LEAST_SPLITS and not any(entry.summary.cross_validated for entry in shown)
    lines = []
    for method, places in grid.items():
        cells = [TableCell(method)]
        for place, leader, budget in zip(places, leaders, budgets, strict=True):
            cells.append(_cell(place.entry, leader, most, compared) if place.entry else TableCell(NOT_MEASURED))
            if reason := place.reason or (_absence(lines_of.get(method, [])) if place.entry is None else None):
                notes.append(f"{method} at {bytes_text(budget)}: {reason}")
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


def _lines(measured: Sequence[Entry]) -> tuple[dict[str, list[Entry]], list[str]]:
    """The entries of each line of the table, by the line's name, and what is to be noted.

    If an entry has several versions (it was run with other settings, by one `fit` for instance), the one with the most
    splits is in the method's line. If several have as many, each has a line.
    """
    versions: dict[str, list[Entry]] = {}
    for entry in measured:
        versions.setdefault(entry.summary.method, []).append(entry)
    lines: dict[str, list[Entry]] = {}
    notes = []
    for name, found in versions.items():
        most = max(entry.summary.splits for entry in found)
        leading = [entry for entry in found if entry.summary.splits == most]
        if len(leading) > 1:
            for entry in found:
                lines.setdefault(of_method(entry.summary), []).append(entry)
            continue
        lines.setdefault(split_budget(name)[0], []).append(leading[0])
        if len(found) > 1:
            others = plural("version", len(found) - 1)
            notes.append(f"{leading[0].summary.label}: has the most splits; {others} with other settings left out")
    return lines, notes


def _place(
    method: str, budget: int, own: Sequence[Entry], entries: Sequence[Entry], not_run: Mapping[str, NotRun]
) -> _Place:
    """Where a line of the table has its accuracy from at one budget.

    Args:
        method: the line's name.
        budget: in bytes.
        own: the entries of this line.
        entries: of the cell.
        not_run: as in `budget_table`.
    """
    name = with_budget(method, budget)
    with_size = [(entry, split_budget(entry.summary.method)[1], entry.summary.adapter_file_bytes) for entry in own]
    within = [entry for entry, limit, _ in with_size if limit == budget]
    within += [entry for entry, limit, size in with_size if limit is None and size is not None and size <= budget]
    if within:
        return _Place(within[0])
    if (why := not_run.get(name)) is None:
        failed = [row for item, runs in entries if item.method == name for row in runs if row.error]
        return _Place(
            None, f"no run was completed; the last failure: {excerpt(failed[-1].error or '')}" if failed else None
        )
    same = next((entry for entry in own if entry.summary.method == why.same_as), None)
    return _Place(same, why.reason)


def _absence(own: Sequence[Entry]) -> str:
    """Why a line has no accuracy at a budget for which nothing is noted."""
    sizes = [item.adapter_file_bytes for item, _ in own if split_budget(item.method)[1] is None]
    return f"its file has {sizes[0]:,} bytes" if sizes and sizes[0] else "no run was completed"


def _leader(places: Sequence[_Place]) -> Entry | None:
    """The best mean; a mean over fewer splits than others have is not evidence against them."""
    found = [place.entry for place in places if place.entry is not None]
    return max(found, key=lambda entry: (entry.summary.splits, entry.summary.mean or 0.0), default=None)


def _cell(entry: Entry, leader: Entry | None, most: int, compared: bool) -> TableCell:
    """One accuracy of the table.

    Args:
        entry: whose it is.
        leader: the best of the column.
        most: splits of the heading.
        compared: whether the heading explains differences to the best.
    """
    item = entry.summary
    remarks = [f"n = {item.splits}"] if item.splits < most else []
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
