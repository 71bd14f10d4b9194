"""`nola-vision report`: verdicts and tables of folders of runs, and the page, from the files that the runs wrote."""

from __future__ import annotations

import argparse
import gc
import io
import sys
import threading
import webbrowser
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console, RenderableType

from nola_vision.cli.options import Options
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import write_file
from nola_vision.common.text import csv_cell, plural
from nola_vision.reports.cell import Cell, Report, report_of
from nola_vision.reports.frames import frame, text_frame
from nola_vision.reports.markup import latex_table, markdown_table, markdown_text
from nola_vision.reports.statistics import on_the_same_images
from nola_vision.reports.tables import COLUMNS
from nola_vision.reports.terminal import benchmark_tables, cell_report
from nola_vision.reports.vtab import Benchmark, vtab_benchmarks
from nola_vision.runs import store
from nola_vision.runs.record import Row

PAGE_FILE = "report.html"
_BROWSER_SECONDS = 5.0  # to wait for the browser


def main(arguments: Sequence[str], verb: str) -> int:
    options = Options(verb, description="Prints a verdict and tables for each cell of the runs in some folders.")
    options.add_argument("folders", nargs="*", default=["runs"], metavar="DIR", help="folders of runs (default: runs)")
    options.add_argument("--format", choices=["table", "markdown", "latex", "csv", "parquet"], default="table")
    chosen = f"additional metrics in the tables: {', '.join(COLUMNS)}"
    options.add_argument("--columns", type=_columns, default=(), metavar="NAME,...", help=chosen)
    options.add_argument("--out", metavar="FILE", help="write to this file instead of printing; required for parquet")
    options.add_argument("--plots", metavar="DIR", help="write the charts there as PNG files too")
    options.add_argument("--html", metavar="FILE", help="write the report page (HTML)")
    options.add_argument("--open", action="store_true", help=f"open the page in a browser (default: DIR/{PAGE_FILE})")
    options.add_argument("--no-images", action="store_true", help="leave misclassified images out of the page")
    known = options.parse_args(arguments)
    if known.format == "parquet" and known.out is None:
        raise NolaVisionError("parquet cannot be printed: give --out FILE")
    page = None
    if known.html is not None or known.open:
        page = Path(known.folders[0]) / PAGE_FILE if known.html is None else Path(known.html)
        if page.suffix.lower() not in (".html", ".htm"):
            raise NolaVisionError(f"--html '{page}' is not a page's name: it must end in .html")
        if known.out is not None and page.resolve() == Path(known.out).resolve():
            raise NolaVisionError(f"--out '{known.out}' is the page's file: give it another name")
    gc.disable()  # the rows stay in memory; collecting takes a sixth of the time of 5,000 runs
    try:
        return _report(known, page)
    finally:
        gc.enable()


def _report(known: argparse.Namespace, page: Path | None) -> int:
    everything, unreadable = store.read_rows(*known.folders)
    problems = [problem for _, problem in unreadable]
    if not everything:
        cause = f"no results in {', '.join(known.folders)}: give the folder that fit or sweep wrote to, such as runs"
        raise NolaVisionError("; ".join([cause, *problems[:5]]))
    rows, left_out = on_the_same_images(everything)
    problems += left_out
    report = report_of(rows, known.columns)
    if known.plots is not None:
        from nola_vision.reports.plots import cell_plots, write_plots  # matplotlib takes a while to import

        plots = {}
        for cell in report.cells:
            plots[cell.name], unusable = cell_plots(cell)
            problems += unusable
        for path in write_plots(plots, Path(known.plots)):
            print(path, file=sys.stderr)
    if page is not None:
        _write_page(page, report, problems, not known.no_images, known.folders)
    coloured = known.out is None and sys.stdout.isatty()
    if known.format in ("csv", "parquet"):
        rows = everything
        content = _every_row(rows, known.format, problems)
    else:
        content = _tables(report, known.format, problems, coloured)
    if known.out is not None:
        write_file(known.out, content)
        print(f"{known.out}: {len(rows)} rows of {len({row.cell for row in rows})} cells")
    else:
        sys.stdout.write(content.decode())
    if page is not None and known.open:
        sys.stdout.flush()
        _open(page)
    return 0


def _open(page: Path) -> None:
    """Opens the page in a browser; does not wait for a browser in the foreground."""
    opened: list[bool] = []

    def ask() -> None:
        try:
            opened.append(webbrowser.open(page.absolute().as_uri()))
        except (webbrowser.Error, OSError, ValueError):  # an invalid BROWSER
            opened.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_BROWSER_SECONDS)
    if opened == [False]:
        print(f"no browser was found: open {page} in one", file=sys.stderr)


def _write_page(path: Path, report: Report, problems: list[str], images: bool, folders: Sequence[str]) -> None:
    """Writes the page, and one line on stderr that states how many images of the data are in it."""
    from nola_vision.reports.html.page import html_page

    page = html_page(report, problems, images, folders)
    write_file(path, page.text.encode())
    shown = f"{page.images} images of the data are in it (--no-images leaves them out)"
    if page.images < 2:
        shown = "1 image of the data is in it (--no-images leaves it out)" if page.images else "no image is in it"
    print(f"{path}: {plural('cell', page.cells)}, {plural('run', page.runs)}; {shown}", file=sys.stderr)


def _columns(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in COLUMNS]:
        raise NolaVisionError(f"--columns '{unknown[0]}' is not a column: use some of {', '.join(COLUMNS)}")
    return names


class _Captured(io.StringIO):
    """A text buffer with the encoding of stdout, so that rich only draws tables with characters that it can encode."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return sys.stdout.encoding or "utf-8"


def _every_row(rows: list[Row], format: str, problems: list[str]) -> bytes:
    """Every row as CSV or Parquet; problems are printed to stderr."""
    for problem in problems:
        print(problem, file=sys.stderr)
    if format == "csv":
        return bytes(text_frame(rows, csv_cell).to_csv(index=False).encode())
    try:
        return frame(rows).to_parquet(index=False)
    except ImportError as error:
        raise NolaVisionError("Parquet needs pyarrow: pip install 'nola-vision[parquet]'") from error


def _tables(report: Report, format: str, problems: list[str], coloured: bool) -> bytes:
    """The tables of every cell, followed by the problems, as text, Markdown or LaTeX."""
    console = Console(file=_Captured(), force_terminal=coloured, width=Console().width)

    def write(tables: Cell | Benchmark, as_text: Callable[[], RenderableType]) -> None:
        match format:
            case "markdown":
                console.file.write(markdown_table(tables) + "\n")
            case "latex":
                console.file.write(latex_table(tables) + "\n")
            case _:
                console.print(as_text())

    for cell in report.cells:
        write(cell, partial(cell_report, cell))
        if format not in ("markdown", "latex"):
            problems = [*problems, *cell.verdict[1]]
    for benchmark in vtab_benchmarks(report.cells):
        write(benchmark, partial(benchmark_tables, benchmark))
    for name, reason in report.untested.items():
        note = f"{name}: no completed final run" + (f"; the last one ended with: {reason}" if reason else "")
        problems = [*problems, note]
    for problem in dict.fromkeys(problems):
        match format:
            case "markdown":
                console.file.write(f"- {markdown_text(problem)}\n")
            case "latex":
                console.file.write(f"% {problem}\n")
            case _:
                console.file.write(f"{problem}\n")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().encode()
