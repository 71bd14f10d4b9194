"""Configs by name: a local file, a file of the user's folder, one that ships with the package, or a cell."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import why_not_a_file
from nola_vision.common.mappings import overlay
from nola_vision.common.suggestions import did_you_mean
from nola_vision.runs import cells
from nola_vision.runs.budget_names import split_budget
from nola_vision.runs.published import published
from nola_vision.runs.yaml_files import Config, read_mapping

SHIPPED = Path(__file__).parents[1] / "configs"
VARIABLE = "NOLA_VISION_CONFIGS"
_CONTENTS = f"*.yaml files and {', '.join(cells.KINDS)} folders"


def load_configs(names: Sequence[str], folder: Path | None = None) -> Config:
    """Several configs as one: each overrides those before it, mapping by mapping.

    Raises:
        NolaVisionError: as `load_config`, or the name of a method is one that its budgets would have.
    """
    merged: Config = {}
    for name in names:
        merged = overlay(merged, load_config(name, folder))
    methods = merged.get("methods")
    for method in methods if isinstance(methods, Mapping) else ():
        if split_budget(str(method))[1] is not None:
            raise NolaVisionError(f"the method name {method!r} looks like a budget: list it as `budgets` of the method")
    return merged


def load_config(name: str, folder: Path | None = None) -> Config:
    """One config. A local file wins over a file of the user's folder, that over a shipped file, that over a cell.

    Args:
        name: of the config, or the path of a file; `.yaml` may be left out.
        folder: the user's, as `user_folder` returns it.

    Raises:
        NolaVisionError: it does not exist, or is not a YAML mapping.
    """
    for path in (Path(name), Path(f"{name}.yaml")):
        if path.is_file():
            return read_mapping(path)
    if Path(name).exists():
        raise NolaVisionError(f"the config {name} {why_not_a_file(name)}: give a YAML file")
    bare = name.removesuffix(".yaml")
    own = own_files(folder)
    if bare in own:
        return read_mapping(own[bare])
    if (path := SHIPPED / f"{bare}.yaml") in shipped_files():
        return load_shipped(path)
    if cell := cells.split_cell(bare, folder):
        return cells.compose(*cell, folder)
    where = "neither here nor shipped" if folder is None else f"neither here, nor in {folder}, nor shipped"
    raise NolaVisionError(f"there is no config '{name}', {where}: {_hint(bare, folder)}")


def load_shipped(path: Path) -> Config:
    """A shipped file, with the paper's figures for it."""
    config = read_mapping(path)
    return config | {"published": published(config["published"])} if "published" in config else config


def user_folder(given: str | None) -> Path | None:
    """The folder of the user's own configs and parts: the one given, or that of the environment variable.

    Raises:
        NolaVisionError: it is not a folder.
    """
    where = "--config-dir" if given is not None else VARIABLE
    name = os.environ.get(VARIABLE) or None if given is None else given
    if name is not None and not os.path.isdir(name):
        raise NolaVisionError(f"{where} is '{name}', which is not a folder: give one with {_CONTENTS}")
    return None if name is None else Path(name)


def shipped_files() -> list[Path]:
    """The shipped configs that are files, not cells."""
    return sorted(SHIPPED.glob("*.yaml"))


def own_files(folder: Path | None) -> dict[str, Path]:
    """The configs of the user's folder by name."""
    return {} if folder is None else cells.yaml_files(folder)


def _hint(bare: str, folder: Path | None) -> str:
    protocols = cells.part_files("protocols", folder)
    if unknown := cells.unknown_part(bare, folder):
        kind, name = unknown
        parts = list(cells.part_files(kind, folder))
        if not did_you_mean(name, parts, otherwise=""):
            return f"'{name}' is not one of the {kind}, {', '.join(parts)}"
    composed = list(cells.cells(folder))
    if "shot_" in bare:
        composed += [f"{cell}_{protocol}" for cell in composed for protocol in protocols]
    known = [*own_files(folder), *(path.stem for path in shipped_files()), *composed]
    otherwise = "nola-vision configs list shows the shipped ones"
    return did_you_mean(f"{bare}.yaml", [f"{name}.yaml" for name in known], otherwise, cutoff=0.5)
