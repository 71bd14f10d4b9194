"""The tables of a cell as Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pandas as pd

from nola_vision.reports.cell import Cell
from nola_vision.reports.tables import Mark, Table
from nola_vision.reports.vtab import Benchmark

# Markdown's special characters, the beginnings of blocks, and what GitHub turns into links
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)|^[-+#](?=\s)|(?<=:)/(?=/)|(?<=\bwww)\.")
_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{letter: f"{{{letter}}}" for letter in "[]*"},  # else arguments of the line break before them
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
_LATEX_FONTS_LACK = re.compile("[^\\x00-\u017f\u2013\u2014\u2018\u2019\u201c\u201d\u2026]")


def markdown_table(cell: Cell | Benchmark) -> str:
    """The tables of a cell or of a benchmark as Markdown."""
    return "\n".join([f"## {markdown_text(cell.title)}", "", *map(_markdown, cell.tables)])


def latex_table(cell: Cell | Benchmark) -> str:
    """The tables of a cell or of a benchmark as LaTeX, which needs the package booktabs."""
    return "\n".join(_latex(table, cell.title) for table in cell.tables)


def markdown_text(text: str) -> str:
    """Escapes printable text for Markdown."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", text)


def _markdown(table: Table) -> str:
    frame = _frame(table, markdown_text, {"best": "**{}**", "close": "<u>{}</u>", "even": "*{}*", "plain": "{}"})
    alignment = ["left", *["right"] * (len(table.columns) - 1)]
    text = frame.to_markdown(index=False, colalign=alignment, disable_numparse=True)
    notes = "".join(f"- {markdown_text(note)}\n" for note in table.notes)
    return f"### {markdown_text(table.title)}\n\n{text}\n\n{notes}"


def _latex(table: Table, title: str) -> str:
    styles: dict[Mark, str] = {"best": r"\textbf{{{}}}", "close": r"\underline{{{}}}", "even": r"\textit{{{}}}"}
    frame = _frame(table, _latex_text, styles | {"plain": "{}"})
    return frame.style.hide(axis="index").to_latex(
        caption=" ".join(_latex_text(f"{text}.") for text in (title, table.title, *table.notes)),
        column_format="l" + "r" * (len(table.columns) - 1),
        position_float="centering",
        hrules=True,
    )


def _latex_text(text: str) -> str:
    escaped = "".join(_LATEX.get(letter, letter) for letter in text)
    return _LATEX_FONTS_LACK.sub(lambda found: f"U+{ord(found[0]):04X}", escaped)


def _frame(table: Table, escape: Callable[[str], str], styles: Mapping[Mark, str]) -> pd.DataFrame:
    """A table with escaped texts and the markup of marks; pandas does not escape Markdown, nor `<` and `|` in LaTeX."""
    lines = [[styles[cell.mark].format(escape(cell.text)) for cell in line] for line in table.lines]
    return pd.DataFrame(lines, columns=list(map(escape, table.columns)), dtype=object)
