"""What a person reads: a cell's table (terminal and Markdown), the panel at a run's end, and all rows as a frame."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal, NamedTuple

import pandas as pd
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nola_vision.results.identity import differing_settings
from nola_vision.results.row import Row
from nola_vision.results.statistics import Summary, summarise

COLUMNS = ("method", "trainable", "adapter file", "top-1 % (std)", "n", "lr")

_ORDER = ("NearestNeighbor", "LinearProbe", "FullFinetune", "LoRA", "NOLA")
_NOT_MEASURED = "-"

Mark = Literal["best", "close", "plain"]


class _Line(NamedTuple):
    cells: tuple[str, str, str, str, str, str]
    mark: Mark


def tested_cells(rows: Sequence[Row]) -> tuple[list[str], dict[str, str | None]]:
    """The cells with a completed final run, and the other cells, each with what its last run that failed said."""
    tested = sorted({row.cell for row in rows if row.stage == "final" and row.status == "completed"})
    others: dict[str, str | None] = {}
    for row in sorted(rows, key=lambda row: row.started):
        if row.cell not in tested:
            others[row.cell] = row.error or others.get(row.cell)
    return tested, others


def cell_table(rows: Iterable[Row], cell: str) -> Table:
    """Return the table of one cell's final runs, for the terminal."""
    lines, notes = _lines(rows, cell)
    styles = {"best": "bold", "close": "underline", "plain": ""}
    table = Table(title=Text(cell), caption=Text("\n".join(notes)), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right", overflow="fold")
    for line in lines:
        table.add_row(
            *(
                Text(text, style=styles[line.mark] if column == "top-1 % (std)" else "")
                for column, text in zip(COLUMNS, line.cells, strict=True)
            )
        )
    return table


def markdown_table(rows: Iterable[Row], cell: str) -> str:
    """Return the same table as Markdown."""
    lines, notes = _lines(rows, cell)
    styles = {"best": "**{}**", "close": "<u>{}</u>", "plain": "{}"}
    text = [f"### {cell}", "", _markdown_row(COLUMNS), "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for line in lines:
        text.append(
            _markdown_row(
                styles[line.mark].format(cell_text) if column == "top-1 % (std)" else cell_text
                for column, cell_text in zip(COLUMNS, line.cells, strict=True)
            )
        )
    return "\n".join([*text, "", *(f"- {note}" for note in notes)]) + "\n"


def row_panel(row: Row) -> Panel:
    """Return a short account of one run, for its end."""
    place = f"split {row.split}" + (f", init {row.init}" if row.init is not None else "")
    facts = {
        "run": f"{row.method} ({row.method_class}), {place}, {row.stage} {row.run_hash}",
        "status": row.status + (f": {row.error}" if row.error else ""),
        "test accuracy": _percent(row.test_accuracy),
        "validation accuracy": _percent(row.val_accuracy),
        "parameters": f"adapter {_count(row.adapter_parameters)}, head {_count(row.head_parameters)}, "
        f"other {_count(row.other_parameters)}",
        "adapter file": _bytes(row.adapter_file_bytes),
        "seconds": _NOT_MEASURED if row.seconds_total is None else f"{row.seconds_total:.1f}",
        "peak memory": _NOT_MEASURED if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f} MiB",
    }
    body = Table.grid(padding=(0, 2))
    for name, value in [*facts.items(), *(("warning", warning) for warning in row.warnings)]:
        body.add_row(Text(name), Text(value))
    return Panel(body, title=Text(row.cell), expand=False)


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Return one line a row with plain columns: `config.model.run_seed` for a nested value, JSON text for a list."""
    flat: list[dict[str, Any]] = []
    for row in rows:
        line: dict[str, Any] = {}
        _flatten("", asdict(row), line)
        flat.append(line)
    whole = [item.name for item in fields(Row) if item.type in ("int", "int | None")]
    table = pd.DataFrame(flat, columns=None if flat else [item.name for item in fields(Row)])
    return table.astype(dict.fromkeys(whole, "Int64"))


def _lines(rows: Iterable[Row], cell: str) -> tuple[list[_Line], list[str]]:
    """Return a cell's lines in the order of the methods, and the footnotes."""
    rows = [row for row in rows if row.cell == cell]
    every = sorted(summarise(rows), key=_rank)
    summaries = [item for item in every if item.completed or item.untested]
    # Compared as printed, in tenths of a point, so that a reader can check the marks.
    tenths = {item: round(10 * float(_points(item.mean))) for item in summaries if item.mean is not None}
    best = max(tenths.values(), default=0)
    lines = []
    for item in summaries:
        distance = best - tenths[item] if item in tenths else None
        mark: Mark = "plain" if distance is None or distance > 10 else "close" if distance else "best"
        lines.append(_Line(_cells(item), mark))
    notes = [
        "trainable: parameters without the head",
        "std over runs, ddof 0; the best in bold, those within one point of it underlined",
    ]
    if mixed := differing_settings(r.config for r in rows if r.stage == "final" and r.status == "completed"):
        notes.append(f"these runs differ in more than their method, so compare with care: {', '.join(mixed)}")
    if any(item.label != item.method for item in summaries):
        notes.append(
            "(four digits): one method's name with several settings; the digits begin the `entry_hash` of its rows"
        )
    if not summaries:
        notes.append("no final run has left a row yet")
    for item in summaries:
        counts = {"failed": item.failed, "interrupted": item.interrupted, "without a test accuracy": item.untested}
        if told := ", ".join(f"{n} {what}" for what, n in counts.items() if n):
            notes.append(f"{item.label}: {told}, not in its mean")
    without: dict[str, int] = {}
    for item in every:
        if item not in summaries:
            without[item.method] = without.get(item.method, 0) + item.failed + item.interrupted
    if without:
        told = ", ".join(f"{method} {count}" for method, count in without.items())
        notes.append(f"failed or interrupted runs of settings that no run completed: {told}")
    return lines, notes


def _cells(item: Summary) -> tuple[str, str, str, str, str, str]:
    accuracy = _NOT_MEASURED if item.mean is None or item.std is None else f"{_points(item.mean)} ({_points(item.std)})"
    rate = _NOT_MEASURED if item.learning_rate is None else f"{item.learning_rate:g}"
    parameters = _count(item.trainable_parameters)
    return item.label, parameters, _bytes(item.adapter_file_bytes), accuracy, str(item.completed), rate


def _rank(item: Summary) -> tuple[int, str, str]:
    place = [index for index, start in enumerate(_ORDER) if item.method_class.startswith(start)]
    return (place[0], "", item.label) if place else (len(_ORDER), item.method_class, item.label)


def _count(number: int | None) -> str:
    return _NOT_MEASURED if number is None else f"{number:,}"


def _points(per_cent: float) -> str:
    return f"{per_cent:.1f}"


def _percent(fraction: float | None) -> str:
    return _NOT_MEASURED if fraction is None else f"{100 * fraction:.2f} %"


def _bytes(number: int | None) -> str:
    """Write a size for people, with the exact bytes beside it: `96.3 KiB (98,612 B)`."""
    if number is None or number < 1024:
        return _NOT_MEASURED if number is None else f"{number} B"
    size, unit = (number / 2**10, "KiB") if number < 2**20 else (number / 2**20, "MiB")
    return f"{size:.1f} {unit} ({number:,} B)"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _flatten(name: str, value: Any, line: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{name}.{key}" if name else str(key), item, line)
    else:
        line[name] = json.dumps(value) if isinstance(value, list | tuple) else value
