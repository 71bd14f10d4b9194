"""Strict YAML: plain values only, within limits of size and depth, since a file may come from a stranger."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.local_files import read_file

Config = dict[str, Any]

_MAX_BYTES = 2**20  # of a file
_MAX_VALUES = 20_000  # of a file, with every alias written out
_MAX_DEPTH = 64
_INT = re.compile(r"[-+]?(0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$")
_FLOAT = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_STR = "tag:yaml.org,2002:str"


class _Plain(yaml.SafeDumper):
    """Writes equal lists out each time, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump(config: Config, **options: Any) -> str:
    """A config as YAML that `load_yaml` reads back. `options` override those given to `yaml.dump`."""
    defaults = {"sort_keys": False, "width": 160, "allow_unicode": True, "default_flow_style": None}
    text: str = yaml.dump(config, Dumper=_Plain, **{**defaults, **options})
    return text


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML's safe loader, in which 1e-3 is a number, and a date and 12:30:00 are text."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if not tag.endswith((":timestamp", ":int", ":float"))]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _tag, _form in (("int", _INT), ("float", _FLOAT)):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _form, list("-+0123456789."))


def load_yaml(text: str) -> Any:
    """Values of a text in YAML.

    Raises:
        yaml.YAMLError: it is not YAML, a key occurs twice, a value is not plain (a number beyond 64 bits, NaN), or it
            is too large with every alias written out.
    """
    try:
        _check_events(text)
        return plain(yaml.load(text, Loader=_Loader))
    except (ValueError, OverflowError, UnicodeEncodeError) as error:  # a number of 5,000 digits, a lone surrogate
        raise yaml.YAMLError(str(error)) from error


@dataclass
class _Collection:
    """A list or mapping of YAML that is being read."""

    anchor: str | None
    keys: set[str] | None  # None for a list
    size: int = 1  # values so far, aliases written out
    at_key: bool = True


def _check_events(text: str) -> None:
    """Checks YAML before anything is built from it: depth, tags, keys that occur twice, size without aliases."""
    sizes: dict[str, int] = {}  # of what an anchor names
    open_collections: list[_Collection] = []
    event: Any
    for event in yaml.parse(text, Loader=_Loader):
        if getattr(event, "tag", None) not in (None, "!", _STR):
            raise ValueError(f"it has the tag {event.tag}: write plain values, without tags")
        anchor, size = getattr(event, "anchor", None), 1
        if isinstance(event, yaml.CollectionStartEvent):
            if len(open_collections) == _MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")
            open_collections.append(_Collection(anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            ended = open_collections.pop()
            anchor, size = ended.anchor, ended.size
        elif isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise ValueError(f"the alias *{anchor} must come after the value that it repeats, and outside it")
            size = sizes[anchor]
        elif not isinstance(event, yaml.ScalarEvent):
            continue  # the start or end of the document
        if anchor is not None:
            sizes[anchor] = size
        if open_collections:
            around = open_collections[-1]
            if around.keys is not None and around.at_key and isinstance(event, yaml.ScalarEvent):
                if event.value in around.keys:
                    mark: Any = event.start_mark
                    raise ValueError(f"the key '{event.value}' occurs twice, line {mark.line + 1}")
                around.keys.add(event.value)
            around.at_key = not around.at_key
            around.size += size
            if around.size > _MAX_VALUES:
                raise ValueError(f"it has more than {_MAX_VALUES} values")


def plain(value: Any, where: str = "") -> Any:
    """A copy of a config's value, made of mappings with text as keys, lists, text, numbers, true, false and null.

    Raises:
        ValueError: it holds anything else, a number beyond 64 bits or not finite, or text with a NUL character.
    """
    if isinstance(value, Mapping):
        copied: Config = {}
        for key, inner in value.items():
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise ValueError(f"the key {key!r} of {where or 'the config'} is not text: write it in quotes")
            if str(key).startswith("__") or "\0" in str(key):
                raise ValueError(f"unknown key {key!r} in {where or 'the config'}")
            copied[str(key)] = plain(inner, f"{where}.{key}".lstrip("."))
        return copied
    if isinstance(value, list | tuple):
        return [plain(inner, where) for inner in value]
    where = f"a value of {where}" if where else "a value"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 63:
        raise ValueError(f"{where} is a whole number beyond 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: give a finite number")
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{where} has a NUL character in it")
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{where} is of type {type(value).__name__}: use text, numbers, lists and mappings")
    return value


def read_mapping(path: Path) -> Config:
    """A config file, or a part of one.

    Raises:
        NolaVisionError: it cannot be read, is not a YAML mapping, or a section of it is not one.
    """
    try:
        loaded = load_yaml(read_file(path, _MAX_BYTES).decode())
    except (yaml.YAMLError, ValueError, OSError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise NolaVisionError(f"the config {path} cannot be read as YAML: {reason}") from error
    if not isinstance(loaded, dict):
        fault = "is empty" if loaded is None else "must be a mapping of keys to values"
        raise NolaVisionError(f"the config {path} {fault}: see the shipped quickstart.yaml")
    for key in ("methods", "model", "data", "trainer"):
        if not isinstance(loaded.get(key, {}), dict):
            raise NolaVisionError(f"`{key}` of the config {path} must be a mapping: see the shipped quickstart.yaml")
    return loaded
