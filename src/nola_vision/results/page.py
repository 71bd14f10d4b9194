"""One HTML page of everything: each cell's tables and pictures, and every row; a browser opens it from disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from nola_vision.results import plots, tables
from nola_vision.results.row import Row
from nola_vision.results.store import find_run_folders
from nola_vision.results.tables import Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .2em .7em; text-align: right; }
th { border-bottom: 1px solid #888; } th:first-child, td:first-child { text-align: left; }
ul { color: #555; } img { max-width: 48%; } .rows { overflow-x: auto; font-size: 12px; }
.best { font-weight: bold; } .close { text-decoration: underline; }
"""


def html_page(rows: Sequence[Row], folders: Sequence[str | Path], problems: Sequence[str] = ()) -> str:
    """The page; it loads nothing from anywhere.

    Args:
        rows: of any runs.
        folders: that the runs are beneath, for their logs and confusion matrices.
        problems: what is wrong with files that are no rows.

    Raises:
        NolaVisionError: matplotlib is not installed.
    """
    tested, others = tables.tested_cells(rows)
    of_runs = find_run_folders(folders)
    parts = [f"<!doctype html><meta charset=utf-8><title>nola-vision</title><style>{_STYLE}</style>"]
    for cell in tested:
        parts.append(f"<h1>{escape(cell)}</h1>")
        parts += [_table(sheet) for sheet in tables.cell_sheets(rows, cell)]
        parts += [_picture(figure, name) for name, figure in plots.pictures(rows, cell, of_runs).items()]
    if others:
        said = (f"{escape(cell)}: {escape(reason or 'no reason left')}" for cell, reason in others.items())
        parts.append(f"<h1>Without a completed final run</h1><ul>{''.join(f'<li>{line}' for line in said)}</ul>")
    if problems:
        told = "".join(f"<li>{escape(problem)}" for problem in problems)
        parts.append(f"<h1>Files that could not be read</h1><ul>{told}</ul>")
    every = tables.frame(rows).to_html(index=False, na_rep="", border=0)
    parts.append(
        f"<h1>Every row</h1><details><summary>{len(rows)} rows</summary><div class=rows>{every}</div></details>"
    )
    return "\n".join(parts) + "\n"


def _table(sheet: Sheet) -> str:
    head = "".join(f"<th>{escape(column)}" for column in sheet.columns)
    lines = ("".join(f"<td class={cell.mark}>{escape(cell.text)}" for cell in line) for line in sheet.lines)
    notes = "".join(f"<li>{escape(note)}" for note in sheet.notes)
    body = "".join(f"<tr>{line}" for line in lines)
    return f"<h2>{escape(sheet.title)}</h2><table><tr>{head}{body}</table><ul>{notes}</ul>"


def _picture(figure: Figure, name: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    coded = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{coded}">'
