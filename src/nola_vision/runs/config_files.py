"""Configs by name: a local file, one that ships with the package, or a cell that is composed of its parts.

A cell's name is `<backbone>_<dataset>_<k>shot` or `<backbone>_<dataset>_<k>shot_<protocol>`, such as
`vitl_cifar100_5shot.yaml`. What a backbone, a data set or a protocol needs is said once, in `configs/parts/`; later
parts win: protocol, backbone, data set, shots.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.suggestions import did_you_mean
from nola_vision.common.files import why_not_a_file

SHIPPED = Path(__file__).parents[1] / "configs"
PARTS = SHIPPED / "parts"
SHOTS = (5, 10)  # of the paper; any other number makes a cell too
Config = dict[str, Any]

_MAX_BYTES = 2**20  # of a config file
_MAX_VALUES = 20_000  # of a config, with every alias written out
_MAX_DEPTH = 64
_INT = re.compile(r"[-+]?(0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)$")
_FLOAT = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_STR = "tag:yaml.org,2002:str"


def load_configs(names: Sequence[str]) -> Config:
    """Reads configs and lays each over those before it, mapping by mapping.

    Raises:
        NolaVisionError: one does not exist, or is not a YAML mapping.
    """
    merged: Config = {}
    for name in names:
        merged = overlay(merged, load_config(name))
    return merged


def load_config(name: str) -> Config:
    """One config: a local file of that name wins over what ships; `.yaml` may be left out.

    Raises:
        NolaVisionError: it does not exist, or is not a YAML mapping.
    """
    for path in (Path(name), Path(f"{name}.yaml")):
        if path.is_file():
            return _read(path)
    if Path(name).exists():
        raise NolaVisionError(f"the config {name} {why_not_a_file(name)}: give a YAML file")
    bare = name.removesuffix(".yaml")
    if (path := SHIPPED / f"{bare}.yaml") in shipped_files():
        config = _read(path)
        return config | {"published": published(config["published"])} if "published" in config else config
    if cell := split_cell(bare):
        return compose(*cell)
    presets = [f"{cell}_{protocol}" for cell in cells() for protocol in part_names("protocols") if "shot_" in bare]
    known = [f"{known}.yaml" for known in (*(path.stem for path in shipped_files()), *cells(), *presets)]
    hint = did_you_mean(f"{bare}.yaml", known, "nola-vision configs list shows the shipped ones", cutoff=0.5)
    raise NolaVisionError(f"there is no config '{name}', neither here nor shipped: {hint}")


def shipped_files() -> list[Path]:
    """The configs that ship as files of their own."""
    return sorted(SHIPPED.glob("*.yaml"))


def cells() -> Iterator[str]:
    """The names of the cells of every backbone, data set and number of shots of the paper, in the default protocol."""
    for backbone, dataset, shots in itertools.product(part_names("backbones"), part_names("datasets"), SHOTS):
        yield f"{backbone}_{dataset}_{shots}shot"


def part_names(kind: str) -> list[str]:
    """The parts of a kind: `backbones`, `datasets` or `protocols`."""
    return sorted(path.stem for path in (PARTS / kind).glob("*.yaml"))


def split_cell(name: str) -> tuple[str, str, int, str] | None:
    """Backbone, data set, shots and protocol of a cell's name; None where it is none."""
    kinds = (part_names(kind) for kind in ("backbones", "datasets", "protocols"))
    backbones, datasets, protocols = ("|".join(names) for names in kinds)
    found = re.fullmatch(f"({backbones})_({datasets})_([1-9][0-9]*)shot(?:_({protocols}))?", name)
    return (found[1], found[2], int(found[3]), found[4] or "default") if found else None


def compose(backbone: str, dataset: str, shots: int, protocol: str = "default") -> Config:
    """The config of a cell."""
    parts = [("protocols", protocol), ("backbones", backbone), ("datasets", dataset)]
    own = {"protocol": protocol, "data": {"shots": shots}}
    config = assemble([*(read_part(kind, name) for kind, name in parts), own])
    config["published"] = published({**config["published"], "shots": shots})
    order = ("protocol", "method", "methods", "model", "data", "trainer", "published")
    return {key: config[key] for key in order}


def assemble(parts: Sequence[Mapping[str, Any]]) -> Config:
    """One config of parts, later ones win; `method_defaults`, by class, go under each entry of that class."""
    config: Config = {}
    for part in parts:
        config = overlay(config, part)
    defaults = config.pop("method_defaults")
    config["methods"] = {
        name: {"class_path": entry["class_path"], **overlay(defaults.get(entry["class_path"], {}), entry)}
        for name, entry in config["methods"].items()
    }
    return config


def read_part(kind: str, name: str) -> Config:
    """A file of `configs/parts/`, with what it includes."""
    part = _read(PARTS / kind / f"{name}.yaml")
    below = part.pop("include", None)
    return overlay(read_part(kind, below), part) if below is not None else part


def published(which: Mapping[str, Any]) -> list[Config]:
    """What the paper prints for a cell: table, entry, parameters, mean and std in per cent, and what is doubtful.

    Args:
        which: columns of the published figures (`backbone`, `dataset`, `shots`) that all lines share, and under
            `methods` for each entry the columns that are its own.
    """
    from nola_vision.runs.published import published_figures  # pandas takes a while to import

    shared = {column: value for column, value in which.items() if column != "methods"}
    figures, found = published_figures(), []
    for entry, own in which["methods"].items():
        wanted = {**shared, **(own or {})}
        chosen = figures[(figures[list(wanted)] == list(wanted.values())).all(axis=1)] if own else figures[:0]
        for row in chosen.to_dict("records"):
            line = {key: row[key] for key in ("table", "params", "mean", "std", "note")}
            found.append({"entry": entry, **{k: v for k, v in line.items() if v == v and v != ""}})
    return found


@cache
def published_config(tag: str | None, dataset: str | None, shots: int | str | None) -> Config | None:
    """The shipped config of a backbone, a data set and shots that the paper has figures of; None if there is none."""
    for path in shipped_files():
        config = _read(path)
        place = config.get("model", {}).get("backbone", {}).get("tag"), config.get("data", {}).get("dataset")
        if "published" in config and place == (tag, dataset) and config["data"]["shots"] == shots:
            return load_config(path.stem)
    backbones = [n for n in part_names("backbones") if read_part("backbones", n)["model"]["backbone"]["tag"] == tag]
    datasets = [n for n in part_names("datasets") if read_part("datasets", n)["data"]["dataset"] == dataset]
    if not backbones or not datasets or not isinstance(shots, int):
        return None
    config = compose(backbones[0], datasets[0], shots)
    return config if config["published"] else None


class _Plain(yaml.SafeDumper):
    """Writes equal lists out each time, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump(config: Config, **options: Any) -> str:
    """A config as YAML that `load_config` reads back. `options` replace those given to `yaml.dump`."""
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
    """Reads YAML that a stranger may have written: plain values, within limits of size and depth.

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
    """Looks at YAML before anything is built from it: depth, tags, keys that occur twice, size without aliases."""
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
                raise ValueError(f"the alias *{anchor} names nothing before it, or itself")
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
                raise ValueError(f"{where or 'the config'} has no key {key!r}")
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


def _read(path: Path) -> Config:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES // 2**20} MiB")
        loaded = load_yaml(text)
    except (yaml.YAMLError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise NolaVisionError(f"the config {path} cannot be read as YAML: {reason}") from error
    if not isinstance(loaded, dict):
        raise NolaVisionError(f"the config {path} must be a mapping of keys to values: see the shipped quickstart.yaml")
    for key in ("methods", "model", "data", "trainer"):
        if not isinstance(loaded.get(key, {}), dict):
            raise NolaVisionError(f"`{key}` of the config {path} must be a mapping: see the shipped quickstart.yaml")
    return loaded


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> Config:
    """`above` laid over `below`: mappings are merged, anything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = overlay(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
