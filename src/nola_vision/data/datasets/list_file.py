"""A user's list of images: a CSV file with a header, or a text file with a path and a label per line."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.text import name_text
from nola_vision.data.splits import Split

SPLIT_NAMES: dict[str, Split] = {
    "train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"
}  # fmt: skip
_COLUMNS = ("path", "label", "split")
_DELIMITERS = ",;\t"  # a spreadsheet writes the second where a comma is the decimal mark
_LONGEST = 2**16  # characters of a line


@dataclass(frozen=True)
class Listed:
    """One image of a list: its path as written, its label, its split and its line."""

    path: str
    label: str
    split: Split
    line: int


@lru_cache(maxsize=2)
def parse_list(content: bytes, name: str) -> tuple[Listed, ...]:
    """The images of a list.

    A CSV file (its name ends in .csv or .tsv) has a header with the columns path, label and perhaps split, in any
    order; other columns are ignored. In a text file, what follows the last tab of a line is the label; in a line
    without a tab, what follows the last space. So a path may have spaces, and a label only after a tab.

    Args:
        content: of the file, in UTF-8. Bytes that are not UTF-8 remain in paths, as in file names.
        name: of the file, for messages.

    Raises:
        NolaVisionError: it is not such a list, or a path is there twice.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise NolaVisionError(f"the list {name} is not text in UTF-8: save it as UTF-8, or give another file")
    text = content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    is_csv = name.lower().endswith((".csv", ".tsv"))
    listed: list[Listed] = []
    lines: dict[str, Listed] = {}
    for number, (path, label, split) in _csv_rows(text, name) if is_csv else _text_rows(text, name):
        path, label = path.strip(), label.strip()
        if not path or not label:
            raise NolaVisionError(f"line {number} of the list {name} has no {'label' if path else 'path'}: add it")
        named = SPLIT_NAMES.get(split.strip().lower() or "train")
        if named is None:
            raise NolaVisionError(f"line {number} of the list {name} has split {split!r}: write train, val or test")
        row = Listed(path, name_text(label), named, number)
        first = lines.setdefault(os.path.normpath(path), row)
        if first is not row:
            differ = next(
                (
                    f"the {what}s {one!r} and {other!r}"
                    for what, one, other in (("label", first.label, row.label), ("split", first.split, row.split))
                    if one != other
                ),
                "the same label",
            )
            raise NolaVisionError(
                f"lines {first.line} and {number} of the list {name} give {path!r} {differ}: keep one of them"
            )
        listed.append(row)
    if not any(row.split == "train" for row in listed):
        raise NolaVisionError(f"the list {name} has no {'training ' if listed else ''}images: add some")
    return tuple(listed)


def _csv_rows(text: str, name: str) -> Iterator[tuple[int, tuple[str, str, str]]]:
    header = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = [column.strip().lower() for column in next(reader, [])]
        if not {"path", "label"} <= {*columns} or any(columns.count(column) > 1 for column in _COLUMNS):
            raise NolaVisionError(
                f"the list {name} begins with {header.strip()[:80]!r}: its first line must be path,label or "
                "path,label,split"
            )
        places = [columns.index(column) if column in columns else None for column in _COLUMNS]
        for row in reader:
            if row:
                path, label, split = ("" if i is None or i >= len(row) else row[i] for i in places)
                yield reader.line_num, (path, label, split)
    except csv.Error as error:
        raise NolaVisionError(f"line {reader.line_num} of the list {name} is not CSV ({error}): fix it") from error


def _text_rows(text: str, name: str) -> Iterator[tuple[int, tuple[str, str, str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if len(line) > _LONGEST:
            raise NolaVisionError(f"line {number} of the list {name} has {len(line)} characters: give a list of images")
        if line:
            path, _, label = line.rpartition("\t") if "\t" in line else line.rpartition(" ")
            yield number, (path or label, label if path else "", "")
