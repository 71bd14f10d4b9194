"""Configs by name: a local file, or one that ships with the package; several are laid over one another."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from nola_vision.errors import NolaVisionError

LIGHTNINGS_OWN = ("--protocol", "--method", "--threads", "--seed_everything", "--print_config", "--help")
SHIPPED = Path(__file__).parent.parent / "configs"
Config = dict[str, Any]


def find_config(name: str) -> Path:
    """The path of a config: a local file of that name wins over a shipped one; `.yaml` may be left out for those.

    Raises:
        NolaVisionError: neither is there; close names are listed.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {path.name: path for path in sorted(SHIPPED.glob("*.yaml"))}
    for candidate in (name, f"{name}.yaml"):
        if candidate in shipped:
            return shipped[candidate]
    close = difflib.get_close_matches(name, shipped, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"shipped ones are {', '.join(shipped)}"
    raise NolaVisionError(f"there is no config '{name}', neither here nor shipped: {hint}")


def load_configs(names: Sequence[str]) -> Config:
    """Reads configs and lays each over those before it, mapping by mapping.

    Raises:
        NolaVisionError: one is not there, or is no YAML mapping.
    """
    merged: Config = {}
    for name in names:
        path = find_config(name)
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise NolaVisionError(f"the config {path} cannot be read as YAML: {reason}") from error
        if not isinstance(loaded, dict):
            raise NolaVisionError(f"the config {path} is no mapping of keys to values: see the shipped quickstart.yaml")
        for key in ("methods", "model", "data", "trainer"):
            if not isinstance(loaded.get(key, {}), dict):
                raise NolaVisionError(f"`{key}` of the config {path} is no mapping: see the shipped quickstart.yaml")
        merged = overlay(merged, loaded)
    return merged


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> Config:
    """`above` laid over `below`: mappings are merged, anything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = overlay(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def refuse_strays(rest: Sequence[str], options: argparse.ArgumentParser) -> None:
    """Catches what can only be a slip among the words that go on to Lightning's parser.

    Raises:
        NolaVisionError: a config given without `--config`, or an option that is nearly one of the verb's own.
    """
    own = [name for action in options._actions for name in action.option_strings]
    for option in (word.partition("=")[0] for word in rest if word.startswith("--") and "." not in word):
        if option not in LIGHTNINGS_OWN and (close := difflib.get_close_matches(option, own, n=1, cutoff=0.8)):
            raise NolaVisionError(f"there is no option {option}: did you mean {close[0]}?")
    if rest and not rest[0].startswith("-"):
        raise NolaVisionError(f"'{rest[0]}' is no option: a config is given by --config {rest[0]}")


class Options(argparse.ArgumentParser):
    """A verb's own options, whose mistakes are one sentence like any other."""

    def __init__(self, verb: str, **settings: Any) -> None:
        super().__init__(f"nola-vision {verb}", allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise NolaVisionError(f"{message} ({self.prog} --help lists the options)")


def config_options(verb: str, help: bool = False) -> Options:
    """A parser of the options that every verb with a config shares; other options are Lightning's."""
    parser = Options(verb, add_help=help)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="a config, shipped or local")
    parser.add_argument("--out", default="runs", metavar="DIR", help="the folder of all runs (default: runs)")
    return parser
