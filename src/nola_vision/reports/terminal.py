"""A cell and a run for the terminal, as renderables of rich."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from nola_vision.common.mappings import value_at
from nola_vision.common.text import printable
from nola_vision.reports.cell import Cell
from nola_vision.reports.formatting import NOT_MEASURED, accuracy_text, bytes_text, count_text, interval_text, points
from nola_vision.reports.statistics import run_accuracy
from nola_vision.reports.tables import COLUMNS, Table
from nola_vision.reports.vtab import Benchmark
from nola_vision.runs.record import Row


def cell_report(cell: Cell) -> Group:
    """Title, verdict and tables of a cell."""
    lines, _ = cell.verdict
    return Group(*_head(cell), "", *map(Text, lines), *_tables(cell))


def cell_table(cell: Cell) -> Group:
    """Title and tables of a cell."""
    return Group(*_head(cell), *_tables(cell))


def benchmark_tables(benchmark: Benchmark) -> Group:
    """Title and tables of a benchmark."""
    return Group(Text(benchmark.title, style="bold"), *_tables(benchmark))


def _head(cell: Cell) -> Iterator[Text]:
    if cell.rows:
        yield Text(cell.title, style="bold")
    yield Text(printable(cell.name), style="dim")


def _tables(cell: Cell | Benchmark) -> Iterator[RenderableType]:
    for table in cell.tables:
        yield ""
        yield _rich(table)
        yield from map(Text, table.notes)


def _rich(table: Table) -> RichTable:
    styles = {"best": "bold", "close": "underline", "even": "italic", "plain": ""}
    rich = RichTable(title=Text(table.title), title_justify="left")
    for place, column in enumerate(table.columns):
        head = Text(column.replace(" (", "\n("))  # the interval on a second line, for terminals of 80 columns
        rich.add_column(head, justify="right" if place else "left", overflow="fold")
    for line in table.lines:
        rich.add_row(*(Text(cell.text, style=styles[cell.mark]) for cell in line))
    return rich


def row_panel(row: Row) -> Panel:
    """The result of one run, printed at its end."""
    place = f"split {row.split}" + (f", init {row.init}" if row.init is not None else "")
    accuracy, found = _percent(row.test_accuracy), run_accuracy(row)
    tested = row.data.get("test_name") or "test"
    if found is not None and found.estimate is None:
        accuracy += f", 95 % interval {interval_text(found.interval)} (Wilson, of the {tested} images alone)"
    measured = {f"{tested} accuracy" if tested == "test" else f"accuracy on {tested} images": accuracy}
    if found is not None and found.estimate is not None:
        first = f"each image once: {found.correct} of {found.images} correct, {points(100 * found.value)} %"
        between = f"95 % interval {' to '.join(map(points, found.interval))}"
        measured = {"cross-validated accuracy": accuracy_text(row), "": f"{first}, {between}"}
    for key, name, factor in COLUMNS.values():
        if (value := getattr(row, key)) is not None:
            measured[name.removesuffix(" %")] = f"{100 * value:.2f} %" if factor == 100 else f"{value:.3f}"
    facts = {
        "run": f"{row.method} ({row.method_class}), {place}, {row.stage} {row.run_hash}",
        "status": row.status + (f": {row.error}" if row.error else ""),
        **measured,
        "validation accuracy": _percent(row.val_accuracy),
        "parameters": f"adapter {count_text(row.adapter_parameters)}, head {count_text(row.head_parameters)}, "
        f"other {count_text(row.other_parameters)}",
        "adapter file": _bytes(row.adapter_file_bytes),
        **({"best epoch": f"{row.epoch} (from 0), by {row.monitor}"} if row.monitor is not None else {}),
        **(
            {} if (precision := value_at(row.config, "trainer", "precision")) is None else {"precision": str(precision)}
        ),
        "seconds": NOT_MEASURED if row.seconds_total is None else f"{row.seconds_total:.1f}",
        "peak memory": NOT_MEASURED if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f} MiB",
    }
    body = RichTable.grid(padding=(0, 2))
    for name, value in [*facts.items(), *(("warning", warning) for warning in row.warnings)]:
        body.add_row(Text(name), Text(printable(value)))
    return Panel(body, title=Text(printable(row.cell)), expand=False)


def _percent(fraction: float | None) -> str:
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.2f} %"


def _bytes(number: int | None) -> str:
    """A size in units of 1,000, with the exact bytes: `98.6 KB (98,612 bytes)`."""
    return NOT_MEASURED if number is None else f"{bytes_text(number)} ({number:,} bytes)"
