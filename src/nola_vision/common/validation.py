"""Values from Python code and from files, checked against the types that their dataclass declares."""

from __future__ import annotations

import dataclasses
import operator
import reprlib
from collections.abc import Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from nola_vision.common.errors import NolaVisionError

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
MOST_COUNT = 2**31 - 1
_PLAIN = frozenset({bool, int, float, str, NoneType})
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
T = TypeVar("T")


def quoted(value: Any) -> str:
    """The repr of a value on one line, shortened for a message."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to convert integers of more than 4,300 digits to text
        return f"a value of type {type(value).__name__} that is too long to show"


def check_counts(**counts: Any) -> None:
    """Refuses what is not a whole number from 1 to `MOST_COUNT`."""
    for name, count in counts.items():
        number = plain_number(count)
        if type(number) is not int or not 1 <= number <= MOST_COUNT:
            raise NolaVisionError(f"{name} is {quoted(count)}: it must be a whole number from 1 to {MOST_COUNT}")


@cache
def _type_hints(kind: Any) -> dict[str, tuple[Any, frozenset[Any]]]:
    """The declared type of each field, and the plain types that need no further check."""
    hints = get_type_hints(kind)  # compiles each of a class's annotations
    unions = {
        name: get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,) for name, hint in hints.items()
    }
    return {name: (hint, _PLAIN.intersection(unions[name])) for name, hint in hints.items()}


def check_types(value: T) -> T:
    """A dataclass with Python's own numbers in its fields, if each field is of its declared type.

    NumPy's numbers, and whatever else Python accepts as an index, become int, float or bool. True and false are not
    accepted as numbers.

    Raises:
        NolaVisionError: the first field of another type, with what it must be.
    """
    plain: dict[str, Any] = {}
    kind: Any = type(value)
    for name, (hint, plain_types) in _type_hints(kind).items():
        given = getattr(value, name)
        if type(given) in plain_types:
            continue
        own = plain_number(given)
        if own is not given:
            plain[name] = own
        try:
            check_type(own, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            wrong = isinstance(own, bool) and hint is not bool
        except (TypeCheckError, RecursionError):
            wrong = True
        if wrong:
            raise NolaVisionError(f"{name} of {type(value).__name__} is {quoted(given)}: it must be {_in_words(hint)}")
    return dataclasses.replace(value, **plain) if plain else value  # type: ignore[type-var]


def plain_number(value: Any) -> Any:
    """NumPy's scalars, and other types with `__index__`, as Python's own numbers; anything else as it is."""
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    if isinstance(value, bool | int | str) or "bool" in str(getattr(value, "dtype", "")):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def _in_words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (tuple, Sequence):
        many = f"{len(inner)} values" if ... not in inner and origin is tuple else "a list"
        return f"{many}, each {_in_words(inner[0])}"
    if origin is dict:
        return "a mapping"
    if not inner:
        return KINDS.get(hint.__name__, str(hint.__name__))
    return " or ".join(_in_words(one) for one in inner if one is not type(None))
