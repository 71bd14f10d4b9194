"""`nola-vision report`: the tables of folders of runs, from their rows alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from nola_vision.cli.options import Options
from nola_vision.errors import NolaVisionError
from nola_vision.results import store, tables


def main(arguments: Sequence[str], verb: str) -> int:
    options = Options(verb, description="Prints a table for each cell of the rows.")
    options.add_argument("folders", nargs="+", metavar="DIR", help="folders of runs")
    options.add_argument("--format", choices=["table", "markdown", "csv"], default="table")
    known = options.parse_args(arguments)
    rows, problems = store.read_rows(*known.folders)
    for path, problem in problems:
        print(f"{path}: {problem}", file=sys.stderr)
    if not rows:
        raise NolaVisionError(f"there are no rows under {', '.join(known.folders)}: `nola-vision fit` leaves them")
    if known.format == "csv":
        print(tables.frame(rows).to_csv(index=False), end="")
        return 0
    tested, others = tables.tested_cells(rows)
    for cell in tested:
        if known.format == "markdown":
            print(tables.markdown_table(rows, cell), end="\n\n")
        else:
            Console().print(tables.cell_table(rows, cell))
    for cell, error in others.items():
        print(f"{cell}: no completed final run" + (f"; the last one ended with: {error}" if error else ""))
    return 0
