"""Nested mappings, such as configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one. Mappings are merged; any other value of `above` replaces that of `below`."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = overlay(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def flattened(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with each value under the path of its keys: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    values: dict[str, Any] = {}
    for key, value in nested.items():
        values |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def value_at(nested: Any, *path: str) -> Any:
    """The value under a path of keys; None if there is none."""
    for key in path:
        nested = nested.get(key) if isinstance(nested, Mapping) else None
    return nested
