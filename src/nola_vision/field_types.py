"""Values from Python code and from files, against the types that their dataclass declares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from nola_vision.errors import NolaVisionError

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}


def check_types(value: Any) -> None:
    """Refuses a dataclass with a field that is not of its declared type; true and false are no numbers.

    Raises:
        NolaVisionError: the first such field, with what it must be.
    """
    for name, hint in get_type_hints(type(value)).items():
        held = getattr(value, name)
        try:
            check_type(held, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            wrong = isinstance(held, bool) and hint is not bool
        except TypeCheckError:
            wrong = True
        if wrong:
            own = " (Python's own, not NumPy's)" if type(held).__module__ == "numpy" else ""
            raise NolaVisionError(f"{name} of {type(value).__name__} is {held!r}: it must be {_in_words(hint)}{own}")


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
