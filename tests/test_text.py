"""Names as text: nothing in them drives a terminal, breaks a file's encoding or runs in a spreadsheet."""

import hashlib
import os
import struct
import sys
from unicodedata import category

import pytest
import torch

from nola_vision.common import hashing
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.suggestions import did_you_mean
from nola_vision.common.text import csv_cell, name_text, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("straße 日本 😀 a\\b", "straße 日本 😀 a\\b"),
        ("a\x1b[31mred\x07\n", "a\\x1b[31mred\\x07\\n"),
        ("a\u202egnp.exe\x9b", "a\\u202egnp.exe\\x9b"),
        (os.fsdecode(b"stra\xdfe.png"), "stra\\xdfe.png"),
        ("\ud83d", "\\ud83d"),
        ("line\u2028two\r", "line\\u2028two\\r"),
        ("c\u200bat c\xadat \ufeffcat", "c\\u200bat c\\xadat \\ufeffcat"),
        ("\ufffe\uffff\ufffd", "\\ufffe\\uffff\ufffd"),
        ("cat\U000e0041 cat\ufe0f cat\u3164", "cat\\U000e0041 cat\\ufe0f cat\\u3164"),
        ("👩\u200d🚀 👍🏽 cafe\u0301", "👩\\u200d🚀 👍🏽 cafe\u0301"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected == printable(expected)
    assert str(NolaVisionError(text)) == expected  # every error is one line, whatever names are in it
    expected.encode()


def test_every_format_character_is_escaped() -> None:
    """Of the Unicode version of this Python, which may be newer than the ranges."""
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    unsafe = [character for character in map(chr, range(sys.maxunicode + 1)) if category(character) in hidden]
    assert len(unsafe) > 2000 and printable("".join(unsafe)).isascii()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("=cmd()|x", "'=cmd()|x"),
        ("@sum", "'@sum"),
        ("+1 a", "'+1 a"),
        ("-x.png", "'-x.png"),
        ("-0.5", "-0.5"),
        ("+1e3", "+1e3"),
        ("cat", "cat"),
        ("\t=1", "\\t=1"),
        ("\u200b=1", "\\u200b=1"),
        ("", ""),
    ],
)
def test_csv_cell(text: str, expected: str) -> None:
    assert csv_cell(text) == expected


def test_a_name_is_text() -> None:
    assert name_text(os.fsdecode(b"caf\xe9")) == "caf\\xe9" and name_text("cafe\u0301") == "caf\xe9"


def test_did_you_mean() -> None:
    known = ["rank", "rink", "bits"]
    assert did_you_mean("rnk", known) == "did you mean rink or rank?"
    assert did_you_mean("x", iter(known)) == "use one of rank, rink, bits"
    assert did_you_mean("x", known, "see --help") == "see --help"
    assert did_you_mean("rnk", known, "", cutoff=0.9) == ""
    assert did_you_mean(None, known, "") == ""  # YAML's null
    assert did_you_mean("rank" + "k" * 10**7, known, "") == ""


def test_hashes_are_those_of_hashlib() -> None:
    """By their definition: they name folders, and are stored in files."""
    blake = hashlib.blake2b(b"nola-vision-1:draw:1:2", digest_size=8).digest()
    shake = hashlib.shake_256(b"nola-vision-1:augment:3").digest(40)
    tensors = {"b": torch.tensor([[1.0, 2.0]]).half(), "a": torch.tensor(3)}
    content = b"x\na int64 []\n\3\0\0\0\0\0\0\0\nb float16 [1, 2]\n\x00\x3c\x00\x40"
    assert hashing.sha256("é") == hashing.sha256("é".encode()) == hashlib.sha256(b"\xc3\xa9").hexdigest()
    seven = hashlib.sha256(b"3 order").digest()[:7]
    assert hashing.sha256_integer("3 order", 7) == struct.unpack("<Q", seven + b"\0")[0]
    assert hashing.keyed_hash("draw", 1, 2) == hashing.blake2b_integer("nola-vision-1:draw:1:2")
    assert hashing.keyed_hash("draw", 1, 2) == struct.unpack(">Q", blake)[0]
    assert hashing.keyed_hashes(5, "augment", 3).tolist() == list(struct.unpack(">5Q", shake))
    assert hashing.sha256_of_tensors(tensors, "x") == hashlib.sha256(content).hexdigest()
