"""A user's list of images: a CSV file with a header, or a text file with a path and a label per line."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.local_files import read_file
from nola_vision.common.text import name_text
from nola_vision.data.datasets.base import MOST_LIST_BYTES, ROOT_VARIABLE, DatasetEntry, Split, content_list, given_root
from nola_vision.data.sources import FileSource, ImageSource
from nola_vision.images.decoding import MOST_BYTES

SPLIT_NAMES: dict[str, Split] = {
    "train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"
}  # fmt: skip
_COLUMNS = ("path", "label", "split")
_DELIMITERS = ",;\t"  # a spreadsheet writes the second where a comma is the decimal mark
_LONGEST = 2**16  # characters of a line


class ListFile(DatasetEntry):
    """The image files of a user's list, whose path is the root; `parse_list` has the format.

    Relative paths are relative to the folder of the list. Class indices follow the sorted labels, images the lines. The
    splits are as in `Folder`: without test, val has the test images.
    """

    expects = (
        "a CSV file with the columns path, label and perhaps split (train, val, test), or a text file with "
        "a path and a label per line, as the root"
    )
    own_images = True

    def place(self, root: str | None) -> Path:
        chosen = given_root(root)
        if not chosen:
            raise NolaVisionError(f"this data set needs a list of images: pass --data.root FILE or set {ROOT_VARIABLE}")
        return Path(chosen)

    def splits(self, root: str | None) -> tuple[Split, ...]:
        return tuple(self._splits(root))

    def test_name(self, root: str | None) -> str:
        splits = self._splits(root)
        return splits["test"] if "test" in splits else "test"

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        return tuple(sorted({row.label for row in self._rows(root)}))

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        file, rows, names = self.place(root), self._rows(root), self.class_names(root)
        if gone := [row for row in rows if not os.path.exists(file.parent / row.path)]:
            raise NolaVisionError(
                f"{len(gone)} of the {len(rows)} images of the list {file} do not exist, the first is {gone[0].path!r} "
                f"in line {gone[0].line}: correct the paths, which are relative to {file.parent.absolute()}"
            )
        wanted = self._splits(root).get(split)
        rows = tuple(row for row in rows if row.split == wanted)
        index = {name: label for label, name in enumerate(names)}
        return FileSource(
            [file.parent / row.path for row in rows], [index[row.label] for row in rows], names, file.parent
        )

    def own_content(self, root: str | None) -> bytes:
        """The list, and the name and the SHA-256 of every image in it."""
        base = self.place(root).parent
        images = [base / row.path for row in self._rows(root)]
        return self._content(root) + b"\0" + content_list(base, images, MOST_BYTES)

    def _splits(self, root: str | None) -> dict[Split, Split]:
        """The splits, each with its name in the list."""
        labels: dict[Split, set[str]] = {}
        for row in self._rows(root):
            labels.setdefault(row.split, set()).add(row.label)
        for split, listed in labels.items():
            if odd := sorted(labels["train"] ^ listed):
                where = ", ".join(
                    f"{name!r} is only in {'train' if name in labels['train'] else split}" for name in odd[:5]
                )
                raise NolaVisionError(
                    f"train and {split} of the list {self.place(root)} must have the same classes, but {where}: "
                    "correct the labels, or move images"
                )
        found: dict[Split, Split] = {"train": "train"}
        if "test" in labels:
            found |= {"validation": "validation"} if "validation" in labels else {}
            found["test"] = "test"
        elif "validation" in labels:
            found["test"] = "validation"
        return found

    def _rows(self, root: str | None) -> tuple[Listed, ...]:
        return parse_list(self._content(root), str(self.place(root)))

    def _content(self, root: str | None) -> bytes:
        file = self.place(root)
        try:
            return read_file(file, MOST_LIST_BYTES)
        except OSError as error:
            raise NolaVisionError(
                f"cannot read the list {file} ({error.strerror}): give a CSV or text file of paths and labels by "
                "--data.root"
            ) from error


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
            raise NolaVisionError(f"line {number} of the list {name} lacks the {'label' if path else 'path'}: add it")
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
        raise NolaVisionError(f"no {'training ' if listed else ''}images in the list {name}: add some")
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
