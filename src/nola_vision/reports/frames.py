"""Rows as a pandas DataFrame."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import pandas as pd

from nola_vision.common.mappings import flattened
from nola_vision.runs.record import Row


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """One line per row: nested values as columns such as `config.model.run_seed`, lists as JSON text."""
    flat = [
        {name: json.dumps(value) if isinstance(value, list | tuple) else value for name, value in columns.items()}
        for columns in (flattened(row.columns()) for row in rows)
    ]
    whole = [item.name for item in fields(Row) if item.type in ("int", "int | None")]
    every = [item.name for item in fields(Row) if item.name != "folder"]
    names = list(dict.fromkeys(name for line in flat for name in line)) or every
    return pd.DataFrame({name: _column([line.get(name) for line in flat], name in whole) for name in names})


def text_frame(rows: Iterable[Row], safe: Callable[[str], str]) -> pd.DataFrame:
    """The frame with `safe` (`printable` or `csv_cell`) applied to every text, including the column names."""
    table = frame(rows)
    for name in table:
        texts = (value for value in table[name].unique() if isinstance(value, str))
        if changed := {text: other for text in texts if (other := safe(text)) != text}:
            table[name] = [changed.get(value, value) for value in table[name]]
    return table.rename(columns=safe)


def _column(values: list[Any], whole: bool) -> Any:
    """Integers stay exact next to missing values (Int64); mixed numbers and text become text."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {int} or (whole and not kinds):
        return pd.array(values, dtype="Int64")
    if len(kinds) > 1 and kinds != {int, float}:
        return [None if value is None else str(value) for value in values]
    return values
