"""Validation of a `row.json`, which is untrusted, so that tables and plots need no further checks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.text import last_part, shortened
from nola_vision.evaluation.estimates import Estimate
from nola_vision.runs import run_id

# Limits on what a row may contain.
_MOST_KEYS = 1000  # each becomes a column of the frame; a run has about 150
_MOST_DEPTH = 50
LARGEST = 1e100  # sums and squares of numbers up to this stay finite
_MOST_IMAGES = 10**12
_MOST_BRACKETS = 100_000  # in the text, those in names included: 32 MB of empty lists would take 700 MB
_SIGNED = ("basis_seed", "train_loss", "val_loss")  # every other number is at least 0
_FRACTIONS = (
    "test_accuracy",
    "balanced_accuracy",
    "macro_f1",
    "top5_accuracy",
    "val_accuracy",
    "held_out_ece",
    "held_out_ece_calibrated",
)
_NAMES = ("cell", "run_hash", "entry_hash")
_LABELS = ("method", "method_class")
_MOST_CHARACTERS = 255  # of a label, which is a file name or a class
_NAME = re.compile(r"(?!\.)[\w.+-]{1,255}")  # a file name without a separator, as `run_id` makes them
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape in JSON; two of them may be one character
# The settings that tables and plots read from a row's config: type, and whether they are required.
_SETTINGS: dict[str, tuple[type | UnionType, bool]] = {
    "model.backbone.tag": (str, True),
    "model.backbone.file": (str, False),
    "model.method.class_path": (str, True),
    "model.method.init_args": (dict, False),
    "data.dataset": (str, True),
    "data.shots": (int | str, False),
    "trainer": (dict, False),
}


def read_columns(
    text: str, path: Path, schema_version: int, types: Mapping[str, ColumnType], required: Sequence[str]
) -> dict[str, Any]:
    """Parse the JSON text of a row and validate it; unknown keys are left out.

    In the result every number is finite and in its column's range, every text is valid UTF-8, `cell` and the hashes are
    file names, and the config has the settings that tables read.

    Args:
        text: of the file.
        path: of the file, for error messages.
        schema_version: the newest one that is supported.
        types: the type of each column.
        required: the columns that every row must have.

    Raises:
        NolaVisionError: the text is not JSON, has a newer schema, lacks a column, or has a value that no run writes.
    """
    fix = "delete it and run again"
    if text.count("[") + text.count("{") > _MOST_BRACKETS:
        raise NolaVisionError(f"{path} has more than {_MOST_BRACKETS:,} lists and mappings: {fix}")
    try:
        plain = json.loads(text, parse_float=_finite, parse_int=_int64, parse_constant=_finite)
    except (json.JSONDecodeError, RecursionError):
        raise NolaVisionError(f"{path} is not JSON: {fix}") from None
    except ValueError as error:  # by `_finite` or `_int64`
        raise NolaVisionError(f"{path} holds the number {error}: {fix}") from None
    version = plain.get("schema_version") if isinstance(plain, dict) else None
    if type(version) is not int or version < 1:
        raise NolaVisionError(f"{path} is not a result row (no schema_version): {fix}")
    if version > schema_version:
        raise NolaVisionError(
            f"{path} has schema version {version} and this nola-vision reads up to {schema_version}: update it"
        )
    known = {column: plain[column] for column in types if column in plain}
    problem = _size_problem(known) or (_text_problem(known) if _SURROGATE.search(text) else None)
    problem = problem or _column_problem(known, types, required) or _config_problem(known["config"])
    if problem := problem or _estimate_problem(known) or _data_problem(known.get("data", {})):
        raise NolaVisionError(f"{path} {problem}: {fix}")
    return known


class ColumnType(NamedTuple):
    """The JSON values that a column accepts: their types, the values of a literal type, and the items of a list."""

    kinds: frozenset[type]
    choices: tuple[Any, ...]
    items: ColumnType | None


def column_type(hint: Any) -> ColumnType:
    """The values that a type hint accepts. An integer is accepted as a float, a bool only as a bool."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        options = [column_type(option) for option in inner]
        kinds = frozenset[type]().union(*(option.kinds for option in options))
        return ColumnType(kinds, (), next((option.items for option in options if option.items), None))
    if origin is Literal:
        return ColumnType(frozenset(map(type, inner)), inner, None)
    kinds = frozenset({int, float} if hint is float else {origin or hint})
    return ColumnType(kinds, (), column_type(inner[0]) if origin is list else None)


def _fits(value: Any, accepted: ColumnType) -> bool:
    if type(value) not in accepted.kinds:
        return False
    if type(value) is list and accepted.items:
        return all(_fits(item, accepted.items) for item in value)
    return not accepted.choices or value in accepted.choices


def _finite(text: str) -> float:
    value = float(text)
    if not abs(value) <= LARGEST:
        raise ValueError(f"{shortened(text, 60)}, which is not finite or too large")
    return value


def _int64(text: str) -> int:
    # 20 characters bound the time: Python refuses to convert thousands of digits
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**63:
        raise ValueError(f"{shortened(text, 60)}, which does not fit 64 bits")
    return value


def _size_problem(columns: dict[str, Any]) -> str | None:
    """Why nested values are too many for a table, or None."""
    stack: list[tuple[Any, int]] = [(columns, 0)]
    keys = 0
    while stack:
        value, depth = stack.pop()
        if depth > _MOST_DEPTH:
            return f"is nested more than {_MOST_DEPTH} levels deep"
        if type(value) is dict:
            keys += len(value)
            value = value.values()
        if keys > _MOST_KEYS:
            return f"has more than {_MOST_KEYS} keys"
        stack += [(item, depth + 1) for item in value if type(item) is dict or type(item) is list]
    return None


def _text_problem(columns: dict[str, Any]) -> str | None:
    """Why a text is unusable, or None."""
    try:
        json.dumps(columns, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "holds text that is not valid Unicode (a lone surrogate)"
    return None


def _column_problem(columns: dict[str, Any], types: Mapping[str, ColumnType], required: Sequence[str]) -> str | None:
    """Why a value is invalid in its column, or which column is missing; None if all are valid."""
    for name, value in columns.items():
        if not _fits(value, types[name]):
            return f"holds a value of the wrong kind in {name} ({_quoted(value)})"
        if type(value) in (int, float) and name not in _SIGNED:
            if value < 0 or (name in _FRACTIONS and value > 1):
                limits = "between 0 and 1" if name in _FRACTIONS else "0 or more"
                return f"has {name} {_quoted(value)}, which must be {limits}"
        if name in _LABELS and len(value) > _MOST_CHARACTERS:
            return f"has {name} {_quoted(value)} of {len(value):,} characters, more than {_MOST_CHARACTERS}"
        if name in _NAMES and not _NAME.fullmatch(value):
            return f"has {name} {_quoted(value)}, which is not a file name of letters, digits and `._+-`"
    for name in types:
        if name in required and name not in columns:
            return f"lacks {name}"
    started = columns.get("started", "")
    if started and not _is_utc(started):
        return f"has started {_quoted(started)}, which is not like 2026-01-31T12:00:00+00:00"
    return None


def _config_problem(config: dict[str, Any]) -> str | None:
    """Which setting that the tables need is missing in a config, or None."""
    wanted = _SETTINGS
    if isinstance(config.get("data"), dict) and config["data"].get("dataset") in run_id.OWN_IMAGES:
        wanted = {**wanted, "data.root": (str, True)}
    for setting, (kind, required) in wanted.items():
        value: Any = config
        keys = setting.split(".")
        for depth, key in enumerate(keys):
            if value is not None and not isinstance(value, dict):
                return f"has a config whose {'.'.join(keys[:depth])} is not a mapping"
            value = None if value is None else value.get(key)
        if value is None and required:
            return f"has a config without {setting}"
        if value is not None and not isinstance(value, kind):
            return f"has a config of the wrong kind in {setting} ({_quoted(value)})"
        if setting == "data.root" and last_part(str(value)) in ("", ".."):
            return f"has data.root {_quoted(value)} in its config, which does not end in a name"
    return None


def _estimate_problem(columns: dict[str, Any]) -> str | None:
    """Why an estimate is unusable, or None."""
    if columns.get("estimate") is None:
        return None
    try:
        Estimate.from_dict(columns["estimate"])
    except ValueError as error:
        return f"has an unusable estimate ({error})"
    return None


def _data_problem(data: dict[str, Any]) -> str | None:
    """What is wrong with the description of the data that tables read, or None."""
    counts, share = data.get("counts"), data.get("majority_share")
    images = counts.get("test") if isinstance(counts, dict) else None
    fits = type(images) in (int, type(None)) and 0 <= (images or 0) <= _MOST_IMAGES
    if not isinstance(counts, dict | None) or not fits:
        return f"lacks a valid number of test images in data.counts ({_quoted(counts)})"
    if share is not None and not (type(share) in (int, float) and 0 <= share <= 1):
        return f"has data.majority_share {_quoted(share)}, which must be between 0 and 1"
    for name in ("class_names", "untested_classes"):
        found = data.get(name)
        if found is not None and not (isinstance(found, list) and all(isinstance(item, str) for item in found)):
            return f"has data.{name} {_quoted(found)}, which must be a list of names"
    return None


def _is_utc(text: str) -> bool:
    """Whether this is a time in UTC to the second, in the one spelling whose text order is the order of times."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return False
    return time.utcoffset() == timedelta(0) and time.isoformat(timespec="seconds") == text


def _quoted(value: Any) -> str:
    """A value for an error message, shortened."""
    return shortened(json.dumps(value, ensure_ascii=False), 60)
