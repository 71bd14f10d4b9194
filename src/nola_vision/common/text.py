"""Text from file names and from other people's files, made safe to print, to store and to open in a spreadsheet; and
settings as text."""

from __future__ import annotations

import json
import os
import re
import textwrap
import unicodedata
from pathlib import PurePath
from typing import Any

# C0 and C1 controls, line and paragraph separators, and lone surrogates; Unicode's format characters (category Cf),
# which reorder what is displayed or are not displayed; and the other characters that are not displayed: fillers,
# variation selectors and tags (property Default_Ignorable_Code_Point); and U+FFFE and U+FFFF, which XML forbids. Emoji
# are not exempt: a joiner between two that the font does not combine is not displayed either.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)

_MOST_SETTING = 24  # characters of a setting's value
_DIGEST = re.compile(r"[0-9a-f]{64}")  # SHA-256 of a file or of all images


def last_part(path: str | PurePath) -> str:
    """The last part of a POSIX or Windows path; empty, or `..`, where that is not a name."""
    return PurePath(path).name.rstrip("\\").rpartition("\\")[2]


def plural(noun: str, count: int) -> str:
    """The count and its noun: `1 image`, `1,300 images`, `2 classes`."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def printable(text: str) -> str:
    """The text on one line and valid as UTF-8, with what drives a terminal or is not displayed written as an escape.

    A newline becomes `\\n`, the escape character `\\x1b`, a zero-width space `\\u200b`; a byte of a file name that is
    not UTF-8 becomes `\\xNN`. An emoji of several characters is shown as its parts, with escapes for its joiners and
    variation selectors. Letters that look the same, such as Latin and Cyrillic a, are not escaped.
    """
    return _UNSAFE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    if "\udc80" <= character <= "\udcff":  # how Python stores a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def shortened(text: str, most: int) -> str:
    """The text, or what fits of it before `...` if it is longer than `most` characters.

    It is cut between two words if these take at least half: `max_epochs=5...` must not be read as a value.
    """
    if len(text) <= most:
        return text
    words, space, _ = text[: most - 2].rpartition(" ")
    return f"{words if space and len(words) >= most // 2 else text[: most - 3]}..."


def without_middle(text: str, most: int) -> str:
    """The text, or its beginning and its end with `...` between if it is longer than `most` characters."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[: most - 3 - half]}...{text[len(text) - half :]}"


def excerpt(value: object, most: int = 200) -> str:
    """A message or a value as one line of at most `most` characters, the last words left out."""
    return textwrap.shorten(str(value), most)


def csv_cell(text: str) -> str:
    """The text as a CSV cell that no spreadsheet takes for a formula: an apostrophe goes before =, +, - and @.

    Numbers stay numbers. What `printable` escapes is escaped here too.
    """
    text = printable(text)
    if not text.startswith(("=", "+", "-", "@")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def setting_text(value: Any) -> str:
    """A setting's value in a line, label or table: `8`, `0.001`, `qkv+mlp`, `null`."""
    if isinstance(value, list):
        text = "+".join(map(setting_text, value))
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text[:6] if _DIGEST.fullmatch(text) else shortened(text, _MOST_SETTING)


def name_text(name: str) -> str:
    """A file's name as text that every file can store: accents composed (NFC), bytes that are not UTF-8 as `\\xNN`."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))
