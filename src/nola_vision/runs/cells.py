"""Cells: configs that are composed of a backbone, a data set, a number of shots and a protocol.

A cell's name is `<backbone>_<dataset>_<k>shot` or `<backbone>_<dataset>_<k>shot_<protocol>`, such as
`vitl_cifar100_5shot`. The settings of each backbone, data set and protocol are stated once, in a part: a file of
`configs/parts/` or of the user's folder (docs/configs.md). Later parts win: protocol, backbone, data set, shots.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nola_vision.adapters.methods import registry
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.mappings import overlay
from nola_vision.common.suggestions import did_you_mean
from nola_vision.runs.published import published
from nola_vision.runs.yaml_files import Config, read_mapping

PARTS = Path(__file__).parents[1] / "configs" / "parts"
KINDS = ("backbones", "datasets", "protocols")
SHOTS = (5, 10)  # of the paper; any other number makes a cell too

_SECTIONS = ("method", "methods", "model", "data", "trainer")  # of a part
_ORDER = ("protocol", *_SECTIONS, "published")


class Cell(NamedTuple):
    """The parts of a cell by name, and its number of shots."""

    backbone: str
    dataset: str
    shots: int
    protocol: str = "default"


def cells() -> Iterator[str]:
    """The names of the cells of every shipped backbone and data set and the paper's shots, in the default protocol."""
    for backbone, dataset, shots in itertools.product(part_files("backbones"), part_files("datasets"), SHOTS):
        yield f"{backbone}_{dataset}_{shots}shot"


def part_files(kind: str, folder: Path | None = None) -> dict[str, Path]:
    """The files of all parts of a kind, by name.

    Args:
        kind: one of `KINDS`.
        folder: of the user's own parts, which come after the shipped ones.

    Raises:
        NolaVisionError: a part of the user has the name of a shipped one. It may not replace that one: a cell's name
            would mean other settings on another machine, while the tables still print the paper's figures for it.
    """
    shipped, own = yaml_files(PARTS / kind), {} if folder is None else yaml_files(folder / kind)
    for name in shipped.keys() & own.keys():
        raise NolaVisionError(f"{own[name]} has the name of a part that ships with the package: rename the file")
    return {**shipped, **own}


def yaml_files(folder: Path) -> dict[str, Path]:
    """The YAML files of a folder by name, without hidden ones."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if not path.name.startswith(".")}


def split_cell(name: str, folder: Path | None = None) -> Cell | None:
    """The parts of a cell's name; None if it is not the name of a cell.

    Raises:
        NolaVisionError: it is the name of two cells, as `a_b_c_5shot` is of `a` with `b_c` and of `a_b` with `c`.
    """
    backbones, datasets, protocols = (part_files(kind, folder) for kind in KINDS)
    found = []
    for backbone, dataset in itertools.product(backbones, datasets):
        start = f"{backbone}_{dataset}_"
        rest = re.fullmatch("([1-9][0-9]{0,8})shot(?:_(.+))?", name[len(start) :]) if name.startswith(start) else None
        if rest and (rest[2] is None or rest[2] in protocols):
            found.append(Cell(backbone, dataset, int(rest[1]), rest[2] or "default"))
    if len(found) > 1:
        named = " or ".join(f"'{cell.backbone}' with '{cell.dataset}'" for cell in found)
        raise NolaVisionError(f"the config name '{name}' can be {named}: rename one of these files in {folder}")
    return found[0] if found else None


def unknown_part(name: str, folder: Path | None = None) -> tuple[str, str] | None:
    """The kind and name of the unknown part in a cell's name; None if the name does not have a cell's form."""
    backbones, datasets, protocols = (part_files(kind, folder) for kind in KINDS)
    if (parts := re.fullmatch("(.+)_[1-9][0-9]*shot(?:_(.+))?", name)) is None:
        return None
    for backbone in backbones:
        if parts[1].startswith(f"{backbone}_"):
            dataset = parts[1].removeprefix(f"{backbone}_")
            return ("protocols", parts[2]) if dataset in datasets and parts[2] else ("datasets", dataset)
    ends = (parts[1].removesuffix(f"_{dataset}") for dataset in datasets if parts[1].endswith(f"_{dataset}"))
    return next((("backbones", backbone) for backbone in ends), None)


def compose(backbone: str, dataset: str, shots: int, protocol: str = "default", folder: Path | None = None) -> Config:
    """The config of a cell. It has the paper's figures if backbone and data set are shipped parts.

    Raises:
        NolaVisionError: a part of `folder` cannot be read, or lacks what a config needs.
    """
    parts = [("protocols", protocol), ("backbones", backbone), ("datasets", dataset)]
    own = {"protocol": protocol, "data": {"shots": shots}}
    config = assemble([*(read_part(kind, name, folder) for kind, name in parts), own])
    is_shipped = backbone in part_files("backbones") and dataset in part_files("datasets")
    config["published"] = published({**config["published"], "shots": shots}) if is_shipped else []
    if not config["methods"]:
        raise NolaVisionError(f"the protocol '{protocol}' in {folder} lacks `methods`: add `include: default` to it")
    return {key: config[key] for key in _ORDER if key in config}


def assemble(parts: Sequence[Mapping[str, object]]) -> Config:
    """One config of parts, later ones win; `method_defaults`, by class, go under each entry of that class."""
    config: Config = {}
    for part in parts:
        config = overlay(config, part)
    defaults = {_class_name(path): settings for path, settings in config.pop("method_defaults", {}).items()}
    entries = [_class_name(entry.get("class_path", "")) for entry in config.get("methods", {}).values()]
    for name in defaults:
        if name not in registry.METHODS and name not in entries and name not in (plugins := registry.plugins()):
            known = [*registry.METHODS, *entries, *plugins]
            raise NolaVisionError(f"`method_defaults` names an unknown method '{name}': {did_you_mean(name, known)}")
    config["methods"] = {name: _with_defaults(entry, defaults) for name, entry in config.get("methods", {}).items()}
    return config


def _with_defaults(entry: Config, defaults: Config) -> Config:
    if "class_path" not in entry:  # `run_id.entry` reports it
        return entry
    return {"class_path": entry["class_path"], **overlay(defaults.get(_class_name(entry["class_path"]), {}), entry)}


def _class_name(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def read_part(kind: str, name: str, folder: Path | None = None) -> Config:
    """A part with what it includes.

    Raises:
        NolaVisionError: it cannot be read, has an unknown key or a section that is not a mapping, or its includes are
            unknown or form a circle.
    """
    files, part = part_files(kind, folder), Config()
    included, read = name, list[str]()
    while included is not None:
        path = files[included]
        read.append(included)
        below = read_mapping(path)
        _check_part(below, path, may_be_published=path.is_relative_to(PARTS))
        included = below.pop("include", None)
        part = overlay(below, part)
        if included is not None and included not in files:
            raise NolaVisionError(f"{path} includes '{included}', an unknown part: {did_you_mean(included, files)}")
        if included in read:
            raise NolaVisionError(f"{path} includes '{included}', which includes it: remove one `include`")
    return part


def _check_part(part: Config, path: Path, may_be_published: bool) -> None:
    known = ["include", "method_defaults", *_SECTIONS, *(["published"] if may_be_published else [])]
    for key in part:
        if key not in known:
            raise NolaVisionError(f"unknown key '{key}' in {path}: {did_you_mean(key, known)}")
    if not isinstance(part.get("include", ""), str):
        raise NolaVisionError(f"`include` in {path} is {part['include']!r}: give the name of another part")
    defaults = part.get("method_defaults", {})
    if not isinstance(defaults, dict) or not all(isinstance(settings, dict) for settings in defaults.values()):
        raise NolaVisionError(f"`method_defaults` in {path} must be a mapping of class names to mappings")
    for name, entry in part.get("methods", {}).items():
        if not isinstance(entry, dict) or not isinstance(entry.get("class_path", ""), str):
            raise NolaVisionError(f"the method '{name}' in {path} must be a mapping with the `class_path` of its class")
