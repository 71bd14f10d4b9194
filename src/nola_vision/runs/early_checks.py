"""Checks of a config that need neither torch nor Lightning, which take seconds to import.

`parsing.parse` checks everything. These checks call the same rules earlier, and skip what the parser may convert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from nola_vision.adapters.methods import registry
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import need_checkpoint_file, weights_in
from nola_vision.common.mappings import overlay
from nola_vision.common.validation import check_types
from nola_vision.data.datasets.base import check_root
from nola_vision.data.datasets.registry import get_dataset
from nola_vision.data.manifest import read_manifest
from nola_vision.data.sampling import check_shots
from nola_vision.runs.config_errors import TOP_KEYS, no_option, no_setting
from nola_vision.runs.yaml_files import Config, load_yaml

_ELSEWHERE = ("seed_everything", "print_config", "config", "allow_import")  # `parsing.parse` handles these


def check_run(config: Mapping[str, Any], options: Sequence[str] = (), ckpt_path: str | None = None) -> None:
    """Refuses a config that cannot be run.

    Args:
        config: a run config, as `run_id.resolve` returns it; it may lack what the options give.
        options: command-line options that override it, such as `--data.shots=10`.
        ckpt_path: the checkpoint to start from, or `last`.

    Raises:
        NolaVisionError: an unknown key at the top, method, setting of a method or data set, a setting out of range,
            or a folder or file that does not exist.
    """
    given = option_pairs(options)
    top = (*TOP_KEYS, *_ELSEWHERE)
    if wrong := [key for key in config if key not in top]:
        raise NolaVisionError(f"the configuration is not understood: {no_setting('the config', wrong[0], TOP_KEYS)}")
    for key, _ in given:
        if (name := key.partition(".")[0].rstrip("+")) not in top:
            raise NolaVisionError(f"the configuration is not understood: {no_option(key, name, TOP_KEYS)}")
    whole = {key for key, _ in given}  # keys whose settings may all be replaced
    config = _with_options(config, given)
    model, data = config.get("model"), config.get("data")
    if isinstance(model, Mapping) and "model" not in whole:
        if not whole & {"model.method", "model.method.class_path", "model.method.init_args"}:
            _check_method(model.get("method"))
        backbone = model.get("backbone")
        if isinstance(backbone, Mapping) and "model.backbone" not in whole and isinstance(backbone.get("file"), str):
            weights_in(Path(backbone["file"]))
    if isinstance(data, Mapping) and "data" not in whole:
        _check_data(data)
    if ckpt_path not in (None, "last"):
        need_checkpoint_file(str(ckpt_path))


def option_pairs(options: Sequence[str]) -> list[tuple[str, str]]:
    """Command-line options as key and value, written as `--key=value` or `--key value`."""
    found = []
    for word, following in pairwise([*options, ""]):
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            found.append((key, value if equals else following))
    return found


def load_value(text: str) -> Any:
    """The value of an option. `a:` and `{a, b}` are text, although YAML makes mappings to null of them."""
    value = load_yaml(text)
    void = isinstance(value, dict) and value and not any(v is not None for v in value.values())
    return text if void and ":" not in text.strip().rstrip(":") else value


def plain_value(text: Any) -> Any:
    """What the parser makes of a text where no text is expected."""
    try:
        return load_value(text) if isinstance(text, str) else text
    except yaml.YAMLError:
        return text


def _with_options(config: Mapping[str, Any], given: Sequence[tuple[str, str]]) -> Config:
    """The config with the options of one value; a method's settings may be given without `init_args`."""
    for key, value in given:
        path = key.split(".")
        if path[:2] == ["model", "method"] and len(path) == 3 and path[2] not in ("class_path", "init_args"):
            path.insert(2, "init_args")
        setting: Any = None if value == "null" else value
        for name in reversed(path):
            setting = {name: setting}
        config = overlay(config, setting)
    return dict(config)


def _check_method(described: Any) -> None:
    if not isinstance(described, Mapping) or not isinstance(described.get("class_path"), str):
        return
    path, settings = described["class_path"], described.get("init_args")
    if "." in path and not path.startswith("nola_vision."):  # a plug-in's
        return
    if isinstance(settings, Mapping):
        settings = {key: plain_value(value) for key, value in settings.items()}
    try:
        method = registry.from_dict({"class_path": path, "init_args": settings})
    except TypeError:  # a setting is missing
        return
    try:
        method = check_types(method)
    except NolaVisionError:  # the parser may still convert it
        return
    registry.check(method)


def _check_data(data: Mapping[str, Any]) -> None:
    name, root, manifest, shots = (data.get(key) for key in ("dataset", "root", "manifest", "shots"))
    if isinstance(name, str):
        download = plain_value(data.get("download")) not in (None, False)
        check_root(get_dataset(name), root if isinstance(root, str) else None, download)
    shots = plain_value(shots)
    if isinstance(shots, str | int) and not isinstance(shots, bool):
        check_shots(shots)
    if isinstance(manifest, str):
        read_manifest(manifest)
