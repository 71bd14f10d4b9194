"""Text from file names and from other people's files, made safe to print, to store and to open in a spreadsheet."""

from __future__ import annotations

import os
import re
import unicodedata

# C0 and C1 controls, line and paragraph separators, marks that reorder what is displayed, and lone surrogates
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text on one line and valid as UTF-8, with everything that could drive a terminal written as an escape.

    A newline becomes `\\n`, the escape character `\\x1b`; a byte of a file name that is not UTF-8 becomes `\\xNN`.
    """
    return _UNSAFE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    if "\udc80" <= character <= "\udcff":  # how Python stores a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


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


def name_text(name: str) -> str:
    """A file's name as text that every file can store: accents composed (NFC), bytes that are not UTF-8 as `\\xNN`."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))
