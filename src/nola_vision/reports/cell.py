"""One cell of an evaluation, and a report on several: what all outputs show of a cell is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from nola_vision.common.text import excerpt, printable
from nola_vision.reports.description import cell_title
from nola_vision.reports.entries import Entry, Kind, Summary, entries, rivals, subject
from nola_vision.reports.league import budget_table
from nola_vision.reports.tables import Table, cell_tables
from nola_vision.reports.verdict import cell_verdict
from nola_vision.runs.not_run import NotRun, read_not_run
from nola_vision.runs.record import Row, count_once


@dataclass(frozen=True)
class Cell:
    """The runs of one cell, and what the terminal, the page and the charts show of them.

    Args:
        name: of the cell.
        rows: one per run.
        columns: names of `tables.COLUMNS`, for additional metrics in the tables.
    """

    name: str
    rows: Sequence[Row]
    columns: Sequence[str] = ()

    @cached_property
    def title(self) -> str:
        """The title in words; the cell's name if there are no rows."""
        return cell_title(self.rows) or printable(self.name)

    @cached_property
    def entries(self) -> list[Entry]:
        """The entries of the final runs."""
        return entries(self.rows)

    @cached_property
    def summaries(self) -> list[Summary]:
        """The summary of each entry."""
        return [entry.summary for entry in self.entries]

    @cached_property
    def subject(self) -> Entry | None:
        """The entry that the report of the cell is about; None if no entry has an accuracy."""
        chosen = subject(self.summaries)
        return next((entry for entry in self.entries if entry.summary is chosen), None)

    @cached_property
    def rivals(self) -> Mapping[Kind, Sequence[Entry]]:
        """The entries of each kind that can be compared with the subject, the best first."""
        kinds: tuple[Kind, ...] = ("trained", "frozen")
        return {name: rivals(name, self.subject.summary, self.entries) if self.subject else [] for name in kinds}

    @cached_property
    def verdict(self) -> tuple[list[str], list[str]]:
        """What the runs showed, and one message per file that could not be used, as returned by `cell_verdict`."""
        return cell_verdict(self.entries, self.subject, self.rivals)

    @cached_property
    def not_run(self) -> Mapping[str, NotRun]:
        """The entries with a byte budget that were not run, as a sweep noted them next to the runs."""
        folders = {row.folder.parent.parent for row in self.rows if row.folder is not None}
        return {name: why for folder in sorted(folders) for name, why in read_not_run(folder).items()}

    @cached_property
    def tables(self) -> list[Table]:
        """The tables."""
        by_budget = budget_table(self.entries, self.not_run)
        return [*([by_budget] if by_budget else []), *cell_tables(self.rows, self.entries, self.columns)]


@dataclass(frozen=True)
class Report:
    """The contents of a report.

    Args:
        rows: as they were read.
        cells: the cells with a completed final run.
        untested: the other cells, each with the error of its last failed run.
    """

    rows: Sequence[Row]
    cells: Sequence[Cell]
    untested: Mapping[str, str | None]


def cell_of(rows: Iterable[Row], name: str, columns: Sequence[str] = ()) -> Cell:
    """The cell of that name; `columns` are names of `tables.COLUMNS`."""
    return Cell(name, count_once(row for row in rows if row.cell == name), columns)


def report_of(rows: Sequence[Row], columns: Sequence[str] = ()) -> Report:
    """A report on all rows; `columns` are names of `tables.COLUMNS`."""
    tested, others = measured_cells(rows)
    by_cell: dict[str, list[Row]] = {name: [] for name in tested}
    for row in rows:
        if row.cell in by_cell:
            by_cell[row.cell].append(row)
    return Report(rows, [cell_of(of_cell, name, columns) for name, of_cell in by_cell.items()], others)


def measured_cells(rows: Sequence[Row]) -> tuple[list[str], dict[str, str | None]]:
    """The cells with a completed final run, and the other cells, each with the error of its last failed run."""
    tested = sorted({row.cell for row in rows if row.stage == "final" and row.status == "completed"})
    others: dict[str, str | None] = {}
    for row in sorted(rows, key=lambda row: row.started):
        if row.cell not in tested:
            others[row.cell] = excerpt(printable(row.error)) if row.error else others.get(row.cell)
    return tested, others
