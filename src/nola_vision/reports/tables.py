"""What a person reads: a cell's tables (terminal, Markdown, LaTeX), a run's panel, and all rows as a frame."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple

import pandas as pd
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nola_vision.common.text import excerpt, printable
from nola_vision.reports.description import NOT_MEASURED, accuracy_text, bytes_text, cell_title, points, signed
from nola_vision.reports.statistics import (
    LEAST_SPLITS,
    Entry,
    Summary,
    count_once,
    entries,
    paired_difference,
    run_accuracy,
)
from nola_vision.reports.verdict import cell_verdict
from nola_vision.runs.published import published_result
from nola_vision.runs.record import Row
from nola_vision.runs.run_id import FROZEN_METHODS, differing_settings

_ORDER = (*FROZEN_METHODS.values(), "LinearProbe", "FullFinetune", "LoRA", "NOLA")
# Columns that a table has by choice: the row's column and the table's, and the factor between their units
COLUMNS: Mapping[str, tuple[str, str, int]] = {
    "balanced": ("balanced_accuracy", "balanced %", 100),
    "f1": ("macro_f1", "macro F1 %", 100),
    "top5": ("top5_accuracy", "top-5 %", 100),
    "nll": ("test_nll", "NLL", 1),
}

# Markdown's own characters, what begins a block, and what GitHub makes a link of
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)|^[-+#](?=\s)|(?<=:)/(?=/)|(?<=\bwww)\.")
_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{letter: f"{{{letter}}}" for letter in "[]*"},  # the end of the line before takes these for its arguments
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_LATEX_FONTS_LACK = re.compile("[^\\x00-\u017f\u2013\u2014\u2018\u2019\u201c\u201d\u2026]")

# What the columns of a cell's tables hold; docs/sweeps.md says more
_HELP: Mapping[str, str] = {
    "method": "name in the config; in brackets the settings that differ, where one name was run with several",
    "trainable": "trainable parameters without the head; where the head alone is trained or fitted, the head's",
    "file, bytes": "size of the adapter file, head included",
    "top-1 %": "share of tested images classified correctly: mean (std, ddof 0) over n, or one run [95 % interval]",
    "n": "accuracies in the mean: completed runs, or the folds of a cross-validation",
    "balanced %": "mean over the classes of the share of their images classified correctly",
    "macro F1 %": "mean over the classes of F1",
    "top-5 %": "share of images whose class is among the five with the largest logits",
    "NLL": "mean cross-entropy in nats, not calibrated",
    "lr": "learning rate, chosen on validation images where there are several to try",
    "difference": "accuracy minus that of the method with the best mean, in points: mean over the splits that both "
    f"have, with Student's t interval from {LEAST_SPLITS} splits on, where there is a test set",
    "splits": "splits that both methods have",
    "std by split": "part of the std that is between splits; the squares of both parts add to the std's square",
    "std by init": "part of the std that is between inits of one split",
    "paper, %": "what the paper prints for this method, mean (std): its own protocol, splits and whole test set",
}

Mark = Literal["best", "close", "plain"]


class Cell(NamedTuple):
    """One place of a table; the best is bold, and what is within a point of it underlined, as in the paper."""

    text: str
    mark: Mark = "plain"


@dataclass(frozen=True)
class Sheet:
    """A table before it is set for a terminal or a file. Its texts are printable; each format escapes what it must.

    Args:
        title: above it.
        columns: their heads; the first names the lines, the others hold numbers.
        lines: one cell a column.
        notes: sentences under it.
        column_help: one explanation per column.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]
    column_help: tuple[str, ...]


@dataclass(frozen=True)
class CellRuns:
    """The runs of one cell, and what the terminal and the page both show of them, each computed at most once.

    Args:
        name: of the cell.
        rows: each run once.
        columns: names of `COLUMNS`, for further metrics in the tables.
    """

    name: str
    rows: Sequence[Row]
    columns: Sequence[str] = ()

    @cached_property
    def title(self) -> str:
        """In words; empty without a row."""
        return cell_title(self.rows)

    @cached_property
    def found(self) -> list[Entry]:
        """The entries of the final runs."""
        return entries(self.rows)

    @cached_property
    def verdict(self) -> tuple[list[str], list[str]]:
        """What the runs showed, and a sentence for each file that could not be used, as `cell_verdict` returns them."""
        return cell_verdict(self.found)

    @cached_property
    def sheets(self) -> list[Sheet]:
        """The tables."""
        return _cell_sheets(self.rows, self.found, self.columns)


@dataclass(frozen=True)
class Report:
    """What a report is about.

    Args:
        rows: as they were read.
        cells: those with a completed final run.
        untested: the other cells, each with the error of its last failed run.
    """

    rows: Sequence[Row]
    cells: Sequence[CellRuns]
    untested: Mapping[str, str | None]


def cell_runs(rows: Iterable[Row], cell: str, columns: Sequence[str] = ()) -> CellRuns:
    """One cell of some rows; `columns` are names of `COLUMNS`."""
    return CellRuns(cell, count_once(row for row in rows if row.cell == cell), columns)


def report_of(rows: Sequence[Row], columns: Sequence[str] = ()) -> Report:
    """The cells of some rows; `columns` are names of `COLUMNS`."""
    tested, others = tested_cells(rows)
    of_cells: dict[str, list[Row]] = {cell: [] for cell in tested}
    for row in rows:
        if row.cell in of_cells:
            of_cells[row.cell].append(row)
    return Report(rows, [cell_runs(runs, cell, columns) for cell, runs in of_cells.items()], others)


def tested_cells(rows: Sequence[Row]) -> tuple[list[str], dict[str, str | None]]:
    """The cells with a completed final run, and the other cells, each with the error of its last failed run."""
    tested = sorted({row.cell for row in rows if row.stage == "final" and row.status == "completed"})
    others: dict[str, str | None] = {}
    for row in sorted(rows, key=lambda row: row.started):
        if row.cell not in tested:
            others[row.cell] = excerpt(printable(row.error)) if row.error else others.get(row.cell)
    return tested, others


def cell_report(cell: CellRuns) -> Group:
    """A cell for the terminal: its title, what its runs showed, and its tables."""
    lines, _ = cell.verdict
    return Group(*_head(cell), "", *map(Text, lines), *_tables(cell))


def cell_table(cell: CellRuns) -> Group:
    """The title and the tables of one cell, for the terminal."""
    return Group(*_head(cell), *_tables(cell))


def markdown_table(cell: CellRuns) -> str:
    """The same tables as Markdown."""
    head = f"## {markdown_text(cell.title or printable(cell.name))}"
    return "\n".join([head, "", *map(_markdown, cell.sheets)])


def latex_table(cell: CellRuns) -> str:
    """The same tables as LaTeX, which needs no package."""
    title = cell.title or printable(cell.name)
    return "\n".join(_latex(sheet, title) for sheet in cell.sheets)


def _head(cell: CellRuns) -> Iterator[Text]:
    """A cell's title and, under it, its name."""
    if cell.title:
        yield Text(cell.title, style="bold")
    yield Text(printable(cell.name), style="dim")


def _tables(cell: CellRuns) -> Iterator[RenderableType]:
    for sheet in cell.sheets:
        yield ""
        yield _rich(sheet)
        yield from map(Text, sheet.notes)


def _rich(sheet: Sheet) -> Table:
    styles = {"best": "bold", "close": "underline", "plain": ""}
    table = Table(title=Text(sheet.title), title_justify="left")
    for place, column in enumerate(sheet.columns):
        head = Text(column.replace(" (", "\n("))  # the interval on its own line, for a terminal of 80 columns
        table.add_column(head, justify="right" if place else "left", overflow="fold")
    for line in sheet.lines:
        table.add_row(*(Text(cell.text, style=styles[cell.mark]) for cell in line))
    return table


def _markdown(sheet: Sheet) -> str:
    styles = {"best": "**{}**", "close": "<u>{}</u>", "plain": "{}"}
    text = [f"### {markdown_text(sheet.title)}", "", _markdown_row(map(markdown_text, sheet.columns))]
    text.append(_markdown_row("---:" if place else "---" for place in range(len(sheet.columns))))
    text += [_markdown_row(styles[cell.mark].format(markdown_text(cell.text)) for cell in line) for line in sheet.lines]
    return "\n".join([*text, "", *(f"- {markdown_text(note)}" for note in sheet.notes)]) + "\n"


def markdown_text(text: str) -> str:
    """Printable text that Markdown shows as it is."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", text)


def _latex(sheet: Sheet, title: str) -> str:
    styles = {"best": r"\textbf{{{}}}", "close": r"\underline{{{}}}", "plain": "{}"}

    caption = " ".join(_latex_text(f"{text}.") for text in (title, sheet.title, *sheet.notes))

    def row(cells: Iterable[str]) -> str:
        return "  " + " & ".join(cells) + r" \\"

    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{caption}}}",
            rf"  \begin{{tabular}}{{l{'r' * (len(sheet.columns) - 1)}}}",
            r"  \hline",
            row(map(_latex_text, sheet.columns)),
            r"  \hline",
            *(row(styles[cell.mark].format(_latex_text(cell.text)) for cell in line) for line in sheet.lines),
            r"  \hline",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_text(text: str) -> str:
    escaped = "".join(_LATEX.get(letter, letter) for letter in text)
    return _LATEX_FONTS_LACK.sub(lambda found: f"U+{ord(found[0]):04X}", escaped)


def row_panel(row: Row) -> Panel:
    """Return a short account of one run, for its end."""
    place = f"split {row.split}" + (f", init {row.init}" if row.init is not None else "")
    accuracy, found = _percent(row.test_accuracy), run_accuracy(row)
    tested = row.data.get("test_name") or "test"
    if found is not None and found.estimate is None:
        accuracy += f", 95 % interval {_between(found.interval)} (Wilson, of the {tested} images alone)"
    measured = {f"{tested} accuracy" if tested == "test" else f"accuracy on {tested} images": accuracy}
    if found is not None and found.estimate is not None:
        first = f"each image once: {found.correct} of {found.images} right, {points(100 * found.value)} %"
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
        "parameters": f"adapter {_count(row.adapter_parameters)}, head {_count(row.head_parameters)}, "
        f"other {_count(row.other_parameters)}",
        "adapter file": _bytes(row.adapter_file_bytes),
        **({"best epoch": f"{row.epoch} (from 0), by {row.monitor}"} if row.monitor is not None else {}),
        "seconds": NOT_MEASURED if row.seconds_total is None else f"{row.seconds_total:.1f}",
        "peak memory": NOT_MEASURED if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f} MiB",
    }
    body = Table.grid(padding=(0, 2))
    for name, value in [*facts.items(), *(("warning", warning) for warning in row.warnings)]:
        body.add_row(Text(name), Text(printable(value)))
    return Panel(body, title=Text(printable(row.cell)), expand=False)


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """Return one line a row with plain columns: `config.model.run_seed` for a nested value, JSON text for a list."""
    flat: list[dict[str, Any]] = []
    for row in rows:
        line: dict[str, Any] = {}
        _flatten("", row.columns(), line)
        flat.append(line)
    whole = [item.name for item in fields(Row) if item.type in ("int", "int | None")]
    every = [item.name for item in fields(Row) if item.name != "folder"]
    names = list(dict.fromkeys(name for line in flat for name in line)) or every
    return pd.DataFrame({name: _column([line.get(name) for line in flat], name in whole) for name in names})


def _column(values: list[Any], whole: bool) -> Any:
    """A column of whole numbers keeps all their digits next to a missing one; numbers next to text become text."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {int} or (whole and not kinds):
        return pd.array(values, dtype="Int64")
    if len(kinds) > 1 and kinds != {int, float}:
        return [None if value is None else str(value) for value in values]
    return values


def text_frame(rows: Iterable[Row], safe: Callable[[str], str]) -> pd.DataFrame:
    """Return the frame with every text, the column names included, as `safe` (`printable` or `csv_cell`) returns it."""
    table = frame(rows)
    for name in table:
        texts = (value for value in table[name].unique() if isinstance(value, str))
        if changed := {text: other for text in texts if (other := safe(text)) != text}:
            table[name] = [changed.get(value, value) for value in table[name]]
    return table.rename(columns=safe)


def _cell_sheets(rows: Sequence[Row], found: Sequence[Entry], columns: Sequence[str]) -> list[Sheet]:
    """A cell's results, and where their spread comes from and how the entries differ, if there is more than one run."""
    found = sorted(found, key=lambda entry: _rank(entry[0]))
    shown = [(item, runs) for item, runs in found if item.completed or item.untested]
    summaries = [item for item, _ in shown]
    names = ("method", "trainable", "file, bytes", "top-1 %", "n", *(COLUMNS[name][1] for name in columns), "lr")
    results = Sheet(
        title="Results",
        columns=names,
        lines=tuple(_results(item, mark, columns) for item, mark in zip(summaries, _marks(summaries), strict=True)),
        notes=(*_explanations(summaries), *_cautions(rows, found)),
        column_help=tuple(_HELP[name] for name in names),
    )
    measured = [(item, runs) for item, runs in shown if item.mean is not None]
    several = any(item.completed > 1 for item, _ in measured)
    both = several or (any(published_result(runs[0]) for _, runs in measured))
    return [_printable(sheet) for sheet in ([results, _comparison(measured)] if both else [results])]


def _explanations(shown: Sequence[Summary]) -> list[str]:
    """What the figures of the accuracy column are."""
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
        parts.append("best in bold, within 1 point underlined")
    notes = ["; ".join(parts)] if parts else []
    if len(folds := {item.n for item in shown if item.cross_validated and item.n}) > 1:
        notes.append(f"n over {min(folds)}: several divisions into folds; methods are compared on the first one alone")
    return notes


def _printable(sheet: Sheet) -> Sheet:
    return Sheet(
        printable(sheet.title),
        tuple(map(printable, sheet.columns)),
        tuple(tuple(Cell(printable(cell.text), cell.mark) for cell in line) for line in sheet.lines),
        tuple(map(printable, sheet.notes)),
        sheet.column_help,
    )


def _marks(summaries: Sequence[Summary]) -> list[Mark]:
    # Compared as printed, in tenths of a point, so that a reader can check the marks.
    tenths = [
        None if item.mean is None or item.under_chance else round(10 * float(points(item.mean))) for item in summaries
    ]
    best = max((one for one in tenths if one is not None), default=0)
    return ["plain" if one is None or best - one > 10 else "close" if best - one else "best" for one in tenths]


def _results(item: Summary, mark: Mark, columns: Sequence[str]) -> tuple[Cell, ...]:
    accuracy = NOT_MEASURED
    if item.mean is not None:
        accuracy = points(item.mean)
        if item.interval:
            accuracy += f" {_between(item.interval)}"
        elif item.std is not None:
            accuracy += f" ({points(item.std)})"
    others = []
    for name in columns:
        key, _, factor = COLUMNS[name]
        digits = 1 if factor == 100 else 3
        mean, std = item.metrics.get(key, (None, 0.0))
        spread = f" ({factor * std:.{digits}f})" if item.completed > 1 else ""
        others.append(NOT_MEASURED if mean is None else f"{factor * mean:.{digits}f}{spread}")
    rate = NOT_MEASURED if item.learning_rate is None else f"{item.learning_rate:g}"
    head_alone = item.trainable_parameters == 0 and item.head_parameters is not None
    trainable = item.head_parameters if head_alone else item.trainable_parameters
    before = (item.label, _count(trainable), _count(item.adapter_file_bytes))
    return (*map(Cell, before), Cell(accuracy, mark), *map(Cell, (str(item.n), *others, rate)))


def _between(interval: tuple[float, float]) -> str:
    return f"[{points(interval[0])}, {points(interval[1])}]"


def _comparison(found: Sequence[Entry]) -> Sheet:
    """The parts of each entry's std, its difference from the best entry, and what the paper prints."""
    best, of_best = max(found, key=lambda entry: entry[0].mean or 0)
    published = {item: figure for item, runs in found if (figure := published_result(runs[0]))}
    lines, notes = [], []
    differences = {item: paired_difference(runs, of_best) for item, runs in found if item != best}
    compared = [difference for difference in differences.values() if difference is not None]
    if any(difference.cross_validated for difference in compared):
        notes.append("differences have no interval: the splits divide the same images, so they are not independent")
    elif any(difference.low is None for difference in compared):
        notes.append("a difference without an interval: too few splits for an interval")
    for item, _ in found:
        difference = differences.get(item)
        told = [NOT_MEASURED, NOT_MEASURED]
        if difference is not None:
            interval = ""
            if difference.low is not None and difference.high is not None:
                interval = f" [{signed(difference.low)}, {signed(difference.high)}]"
            told = [f"{signed(difference.mean)}{interval}", str(difference.splits)]
        printed = NOT_MEASURED
        if figure := published.get(item):
            printed = f"{figure['mean']:.1f}" + (f" ({figure['std']:.1f})" if "std" in figure else "")
            notes += [f"published {item.method}: {figure['note']}"] if "note" in figure else []
        parts = [NOT_MEASURED if part is None else points(part) for part in (item.split_std, item.init_std)]
        lines.append(tuple(Cell(text) for text in (item.label, *told, *parts, *([printed] if published else []))))
    interval = " (95 % CI)" if any(difference.low is not None for difference in compared) else ""
    difference_column = f"difference to {best.label}{interval}"
    names = ("method", difference_column, "splits", "std by split", "std by init", *(["paper, %"] if published else []))
    return Sheet(
        title="Differences and spread",
        columns=names,
        lines=tuple(lines),
        notes=tuple(notes),
        column_help=tuple(_HELP["difference" if name == difference_column else name] for name in names),
    )


def _cautions(rows: Sequence[Row], found: Sequence[Entry]) -> list[str]:
    """What a reader of a cell's results must know besides."""
    notes = []
    shown = [(item, runs) for item, runs in found if item.completed or item.untested]
    # the runs of one entry differ in their seeds alone
    completed = (next(row for row in runs if row.status == "completed") for _, runs in shown)
    if mixed := differing_settings(row.config for row in completed):
        notes.append(f"these runs differ in more than their method, so compare with care: {', '.join(mixed)}")
    if not shown:
        notes.append("no final run has left a row yet")
    for item, runs in shown:
        lacking = "whose folds were not run" if runs[0].data.get("folds") else "without a test accuracy"
        counts = {"failed": item.failed, "interrupted": item.interrupted, lacking: item.untested}
        if told := ", ".join(f"{n} {what}" for what, n in counts.items() if n):
            notes.append(f"{item.label}: {told}, not in its mean{_last_error(runs)}")
    for item, runs in found:
        if not item.completed and not item.untested:
            ended = item.failed + item.interrupted
            notes.append(f"{item.method}: none of its runs ({ended}) was completed{_last_error(runs)}")
    final = {item.method for item, _ in found}
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
    without = {(split, None) for split, _ in every}
    for item, own in places:
        expected = without if any(init is None for _, init in own) else with_init  # frozen features have no init
        if missing := len(expected) - len(expected & own):
            notes.append(f"{item.label}: {missing} of {len(expected)} runs have no row (splits x inits of the others)")
    return notes


def _last_error(runs: Sequence[Row]) -> str:
    """What the last failed run of an entry said, as the end of a sentence."""
    failed = sorted((row for row in runs if row.status == "failed"), key=lambda row: row.started)
    return f"; the last failure: {excerpt(failed[-1].error or 'unknown')}" if failed else ""


def _rank(item: Summary) -> tuple[int, str, str]:
    place = [index for index, start in enumerate(_ORDER) if item.method_class.startswith(start)]
    return (place[0], "", item.label) if place else (len(_ORDER), item.method_class, item.label)


def _count(number: int | None) -> str:
    return NOT_MEASURED if number is None else f"{number:,}"


def _percent(fraction: float | None) -> str:
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.2f} %"


def _bytes(number: int | None) -> str:
    """A size in units of 1,000, with the exact bytes: `98.6 KB (98,612 bytes)`."""
    return NOT_MEASURED if number is None else f"{bytes_text(number)} ({number:,} bytes)"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _flatten(name: str, value: Any, line: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{name}.{key}" if name else str(key), item, line)
    else:
        line[name] = json.dumps(value) if isinstance(value, list | tuple) else value
