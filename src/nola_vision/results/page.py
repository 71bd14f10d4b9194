"""One HTML page of everything: each cell's tables and pictures, and every row; a browser opens it from disk."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from nola_vision.results import tables
from nola_vision.results.row import Row
from nola_vision.results.tables import Sheet
from nola_vision.text import printable

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .2em .7em; text-align: right; }
th { border-bottom: 1px solid #888; } th:first-child, td:first-child { text-align: left; }
ul { color: #555; } img { max-width: 48%; } .rows { overflow-x: auto; font-size: 12px; }
.best { font-weight: bold; } .close { text-decoration: underline; }
"""


def html_page(
    rows: Sequence[Row],
    plots: Mapping[str, Mapping[str, bytes]],
    problems: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> str:
    """The page; it loads nothing from anywhere.

    Args:
        rows: of any runs.
        plots: PNG files by cell and by what they show, as `plots.cell_plots` returns them.
        problems: a sentence for each file that could not be read.
        columns: further metrics, as in `tables.cell_sheets`.
    """
    tested, others = tables.tested_cells(rows)
    parts = [f"<!doctype html><meta charset=utf-8><title>nola-vision</title><style>{_STYLE}</style>"]
    for cell in tested:
        parts.append(f"<h1>{escape(cell)}</h1>")
        parts += [_table(sheet) for sheet in tables.cell_sheets(rows, cell, columns)]
        parts += [_image(content, name) for name, content in plots.get(cell, {}).items()]
    if others:
        said = (f"{escape(cell)}: {escape(reason or 'no reason left')}" for cell, reason in others.items())
        parts.append(f"<h1>Without a completed final run</h1><ul>{''.join(f'<li>{line}' for line in said)}</ul>")
    if problems:
        listed = "".join(f"<li>{escape(problem)}" for problem in problems)
        parts.append(f"<h1>Files that could not be read</h1><ul>{listed}</ul>")
    every = tables.text_frame(rows, printable).to_html(index=False, na_rep="", border=0)
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


def _image(content: bytes, name: str) -> str:
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
