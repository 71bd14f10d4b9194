"""The list of every run of a cell on the report page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nola_vision.common.text import excerpt, plural, printable, setting_text
from nola_vision.reports.entries import scale_of
from nola_vision.reports.statistics import run_accuracy
from nola_vision.runs.record import Row


@dataclass(frozen=True)
class RunColumn:
    """A column of the table of runs; `kind` is the CSS class of its cells: number, name, long or empty."""

    name: str
    kind: str = ""


@dataclass(frozen=True)
class RunLine:
    """A run."""

    status: str
    texts: Sequence[str]


@dataclass(frozen=True)
class RunsView:
    """Every run of a cell."""

    title: str
    columns: Sequence[RunColumn]
    lines: Sequence[RunLine]


_RUN_COLUMNS = (
    RunColumn("status"),
    RunColumn("stage"),
    RunColumn("method", "name"),
    RunColumn("split", "number"),
    RunColumn("init", "number"),
    RunColumn("lr", "number"),
    RunColumn("c", "number"),
    RunColumn("accuracy %", "number"),
    RunColumn("validation %", "number"),
    RunColumn("file bytes", "number"),
    RunColumn("seconds", "number"),
    RunColumn("device", "name"),
    RunColumn("started"),
    RunColumn("hash"),
    RunColumn("error", "long"),
)


def runs_view(rows: Sequence[Row]) -> RunsView:
    stages = {"final": 0, "search": 1, "fold": 2}
    ordered = sorted(rows, key=lambda row: (stages[row.stage], row.method, row.entry_hash, row.split, row.init or 0))
    ended = Counter(row.status for row in ordered)
    title = f"{plural('run', len(rows))}: {', '.join(f'{number:,} {status}' for status, number in ended.items())}"
    return RunsView(title, _RUN_COLUMNS, [RunLine(row.status, _run_texts(row)) for row in ordered])


def _run_texts(row: Row) -> tuple[str, ...]:
    found = run_accuracy(row)
    accuracy = row.test_accuracy if found is None else found.value
    fold = row.config["data"].get("fold") if row.stage == "fold" else None
    fold = fold if type(fold) is int else None
    scale = scale_of(row)
    texts = (
        row.status,
        row.stage if fold is None else f"fold {fold + 1}",
        row.method,
        str(row.split),
        "" if row.init is None else str(row.init),
        "" if row.learning_rate is None else setting_text(row.learning_rate),
        "" if scale is None else setting_text(scale),
        "" if accuracy is None else f"{100 * accuracy:.1f}",
        "" if row.val_accuracy is None else f"{100 * row.val_accuracy:.1f}",
        "" if row.adapter_file_bytes is None else f"{row.adapter_file_bytes:,}",
        "" if row.seconds_total is None else f"{row.seconds_total:,.1f}",
        row.device or "",
        row.started.removesuffix("+00:00").replace("T", " "),
        row.run_hash,
        excerpt(row.error) if row.error else "",
    )
    return tuple(map(printable, texts))
