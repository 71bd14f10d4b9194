"""The identity of a run: the config of one entry, the name of its cell, its hash and its folder. Does not read files.

The hashes cover the settings that can change a result. This file alone decides which settings are left out.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

from nola_vision.adapters.methods.registry import METHODS
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import sha256
from nola_vision.common.mappings import flattened, value_at
from nola_vision.common.suggestions import did_you_mean
from nola_vision.common.tags import short_dataset, short_tag
from nola_vision.common.text import last_part
from nola_vision.common.validation import quoted
from nola_vision.runs.budget_names import budgets_of, split_budget, with_budget

Config = dict[str, Any]
Stage = Literal["final", "search", "fold"]
OWN_IMAGES = ("folder", "list")  # data sets that a person makes: the name of their root names them
# The methods on frozen features, by the name under which `fit` adds each to a config that lacks it
FROZEN_METHODS = {"1nn": "NearestNeighbor", "nearest-mean": "NearestMean", "logistic": "LogisticRegression"}

# `content` is in the hash: digests of files that the config names by a path. Not in it: `protocol` and `method`, which
# are names (they are in the folder's path), and `methods`, the other entries.
_TOP_LEFT_OUT = ("protocol", "method", "methods", "out", "ckpt_path", "allow_import")
_DATA_LEFT_OUT = ("root", "num_workers", "download", "memory_limit_mib", "eval_batch_size", "manifest")
_TRAINER_LEFT_OUT = (
    "logger",
    "accelerator",
    "devices",  # by their number, see `_devices`
    "strategy",
    "default_root_dir",
    "log_every_n_steps",
    "profiler",
    "callbacks",
)
# Settings of steps, epochs and augmentation, which do not affect a method on frozen features.
_OF_STEPS = {
    "data": ("batch_size", "augmentation", "flip"),
    "model": (
        "run_seed",
        "basis_seed",
        "optimizer",
        "label_smoothing",
        "warmup_epochs",
        "min_lr",
        "grad_checkpointing",
        "compile",
        "stop_early",
        "class_weights",
    ),
    "trainer": (
        "max_epochs",
        "min_epochs",
        "max_steps",
        "min_steps",
        "max_time",
        "limit_train_batches",
        "check_val_every_n_epoch",
        "val_check_interval",
        "accumulate_grad_batches",
        "gradient_clip_val",
        "gradient_clip_algorithm",
        "num_sanity_val_steps",
    ),
}
# Classes from here may be written by their short name in a config: both spellings are one run.
_SHORT_NAME_PACKAGES = ("nola_vision.", "lightning.", "pytorch_lightning.")


def resolve(config: Mapping[str, Any], method: str | None = None) -> Config:
    """Choose one entry of a config.

    Args:
        config: a config with `methods`. It stays as it was.
        method: the entry's name; without it the one that the config's `method` names.

    Returns:
        The run config: a copy in which `method` is the entry's name, `model.method` its `class_path` and `init_args`,
        and `methods` (with the `search` of each) and `published` are gone.

    Raises:
        NolaVisionError: no such entry, or an entry without `class_path`.
    """
    name = method if method is not None else need(config, "method")
    settings = entry(config, name)
    if sizes := budgets_of(name, settings):
        entries = ", ".join(with_budget(name, size) for size in sizes)
        raise NolaVisionError(f"the method {name!r} has budgets: name one of {entries}")
    run_config = copy.deepcopy({key: value for key, value in config.items() if key not in ("methods", "published")})
    run_config["method"] = name
    need(run_config, "model")["method"] = {
        "class_path": settings["class_path"],
        "init_args": copy.deepcopy(dict(settings.get("init_args") or {})),
    }
    return run_config


def entry(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the settings of the entry `name`, or raise a NolaVisionError that lists the names close to it.

    An entry with `budgets` has one more entry for each, such as `nola@2KB`, with that `max_bytes`.
    """
    methods = need(config, "methods")
    if isinstance(name, list | dict) or not isinstance(methods, Mapping):
        raise NolaVisionError(f"the config's `methods` must be a mapping and its `method` a name, not {name!r}")
    if name not in methods and isinstance(name, str):
        base, budget = split_budget(name)
        if budget is not None and base in methods and budget in budgets_of(base, settings := entry(config, base)):
            if name != (spelled := with_budget(base, budget)):  # or one folder would have two names
                raise NolaVisionError(f"unknown method {name!r} in the config: write {spelled}")
            args = {**(settings.get("init_args") or {}), "max_bytes": budget}
            return {**{key: value for key, value in settings.items() if key != "budgets"}, "init_args": args}
    if name not in methods:
        base, at, size = str(name).partition("@")
        hint = did_you_mean(base, map(str, methods))  # `lorra@10KB` is like `lora`
        if at and base in methods:
            if not (sizes := budgets_of(base, entry(config, base))):
                raise NolaVisionError(
                    f"the method {base!r} has no budgets, so there is no {name!r}: leave {at}{size} out"
                )
            hint = f"use one of {', '.join(with_budget(base, one) for one in sizes)}"
        raise NolaVisionError(f"unknown method {name!r} in the config: {hint}")
    if not isinstance(name, str) or name != _safe_entry(name):
        raise NolaVisionError(f"the method name {name!r} must do as a folder's name: use letters, digits and `._+-`")
    settings = methods[name]
    if isinstance(settings, Mapping) and not isinstance(settings.get("init_args") or {}, Mapping):
        raise NolaVisionError(f"`init_args` of the method {name!r} must be a mapping: write it like {{rank: 4}}")
    if not isinstance(settings, Mapping) or not isinstance(settings.get("class_path"), str):
        raise NolaVisionError(f"the method {name!r} lacks `class_path`: name its class, such as `class_path: NOLA`")
    if stray := [key for key in settings if key not in ("class_path", "init_args", "search", "budgets")]:
        raise NolaVisionError(
            f"unknown key {stray[0]!r} in the method {name!r}: it takes class_path, init_args, search and budgets"
        )
    known = METHODS.get(settings["class_path"].rpartition(".")[2])
    if settings.get("budgets") is not None and known is not None and not known.size_setting:
        raise NolaVisionError(
            f"the method {name!r} has budgets, but {known.__name__} has no size to choose: leave them out"
        )
    _check_search(methods, name, settings.get("search"))
    return settings


def searched_at(config: Mapping[str, Any], name: str) -> str:
    """The entry whose search chooses settings of an entry: itself, or the one that its `search` names.

    Raises:
        NolaVisionError: as `entry`.
    """
    search = entry(config, name).get("search")
    return search if isinstance(search, str) else name


def search_of(config: Mapping[str, Any], name: str) -> Mapping[str, list[Any]]:
    """The values to try of each searched setting of an entry; empty if it has no search.

    Raises:
        NolaVisionError: as `entry`.
    """
    return entry(config, searched_at(config, name)).get("search") or {}


def _check_search(methods: Mapping[str, Any], name: str, search: Any) -> None:
    """Refuses what is not a mapping of settings to values, nor the name of an entry with such a mapping."""
    whose = f"`search` of the method {name!r}"
    if isinstance(search, str):
        if search not in methods:
            hint = did_you_mean(search, map(str, methods))
            raise NolaVisionError(f"{whose} names an unknown method {search!r}: {hint}")
        if not isinstance(value_at(methods, search, "search"), Mapping) or value_at(methods, search, "budgets"):
            raise NolaVisionError(f"{whose} names {search!r}: name an entry with a mapping `search`, without budgets")
        return
    if not isinstance(search, Mapping | None):
        raise NolaVisionError(f"{whose} is {quoted(search)}: write it like {{lr: [0.005, 0.001]}}")
    for setting, values in (search or {}).items():
        if not isinstance(values, list) or not values:
            raise NolaVisionError(
                f"{whose} has {quoted(values)} for {setting}: list the values to try, such as [0.005, 0.001]"
            )


def need(config: Mapping[str, Any], *path: str) -> Any:
    """Return the value at `path` (`need(config, "data", "shots")`); a missing or empty one is a NolaVisionError."""
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            raise NolaVisionError(f"the config lacks a value for `{'.'.join(path)}`: add it")
    return value


def method_class(run_config: Mapping[str, Any]) -> str:
    """Return the bare name of the entry's class, such as `NOLA`."""
    return str(need(run_config, "model", "method", "class_path")).rpartition(".")[2]


def has_init(run_config: Mapping[str, Any]) -> bool:
    """Whether `run_seed` matters. It does not for a method on frozen features, which has one run per split."""
    known = METHODS.get(method_class(run_config))
    return known is None or not known.on_frozen_features


def cell_name(run_config: Mapping[str, Any]) -> str:
    """Return `<backbone tag>-<dataset>-<shots>shot-<protocol>`, safe as a folder's name.

    A local weight file adds its stem (`tag+stem`), weights that are not pretrained what they are (`tag+random`); the
    data set `folder` adds its folder's name (`folder.flowers`). Of a local path only the last part is in it.
    """
    backbone = short_tag(str(need(run_config, "model", "backbone", "tag")))
    if file := run_config["model"]["backbone"].get("file"):
        backbone += f"+{PurePath(last_part(file)).stem}"
    if (base := run_config["model"]["backbone"].get("base", "pretrained")) != "pretrained":
        backbone += f"+{base}"
    dataset = short_dataset(str(need(run_config, "data", "dataset")))
    if dataset in OWN_IMAGES:
        dataset += f".{_root_name(run_config)}"
    shots = need(run_config, "data", "shots")
    return _safe(f"{backbone}-{dataset}-{shots}shot-{need(run_config, 'protocol')}")


def run_hash(run_config: Mapping[str, Any], stage: Stage) -> str:
    """A hash of everything in a run config that can change its result, as 10 hexadecimal digits."""
    return _digest({"stage": stage, "config": _relevant(run_config)})


def entry_hash(run_config: Mapping[str, Any]) -> str:
    """The hash that all runs of one entry share: of its config without the split and the seeds.

    A `basis_seed` that follows `run_seed` (null) is left out; a fixed one is a setting of the entry and stays.
    """
    return _digest(_of_entry(run_config))


def entry_settings(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """What `entry_hash` is computed from, by the key of each value: `{"model.method.init_args.rank": 8, ...}`."""
    return flattened(_of_entry(run_config))


def _of_entry(run_config: Mapping[str, Any]) -> Config:
    config = _relevant(run_config)
    config["data"].pop("split_seed", None)
    config["model"].pop("run_seed", None)
    if config["model"].get("basis_seed") is None:
        config["model"].pop("basis_seed", None)
    return config


def differing_settings(run_configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """Name the settings outside method and seeds that differ between runs, which a fair table would share.

    A setting without effect on a run, such as the epochs for 1-NN, does not differ.
    """
    flat = []
    for run_config in run_configs:
        config = _relevant(run_config)
        config["data"].pop("split_seed", None)
        for key in ("method", "run_seed", "basis_seed"):
            config["model"].pop(key, None)
        flat.append(
            {
                f"{section}.{key}".rstrip("."): value
                for section, settings in config.items()
                for key, value in (settings.items() if isinstance(settings, Mapping) else [("", settings)])
            }
        )
    names = sorted({name for settings in flat for name in settings})
    values = {name: [settings[name] for settings in flat if name in settings] for name in names}
    return [name for name in names if any(value != values[name][0] for value in values[name])]


def run_folder(out: str | Path, run_config: Mapping[str, Any], stage: Stage) -> Path:
    """Return `OUT/<cell>/<method name>/split0-init0-<hash>`.

    Without the init for a method on frozen features; a search run has the prefix `search-`, a fold's run `fold2-`.
    """
    name = f"split{need(run_config, 'data', 'split_seed')}-"
    if has_init(run_config):
        name += f"init{need(run_config, 'model', 'run_seed')}-"
    fold = need(run_config, "data").get("fold")
    prefix = "search-" if stage == "search" else ""
    prefix += f"fold{fold}-" if fold is not None else ""
    folder = method_folder(Path(out) / cell_name(run_config), str(need(run_config, "method")))
    return folder / f"{prefix}{name}{run_hash(run_config, stage)}"


def _relevant(run_config: Mapping[str, Any]) -> Config:
    """Copy a run config without what cannot change its result, each value in its one spelling."""
    config: Config = {key: value for key, value in run_config.items() if key not in _TOP_LEFT_OUT}

    data = need(run_config, "data")
    config["data"] = {key: value for key, value in data.items() if key not in _DATA_LEFT_OUT}
    if data.get("dataset") in OWN_IMAGES:
        config["data"]["root"] = _root_name(run_config)
    elif "dataset" in data:
        config["data"]["dataset"] = short_dataset(str(data["dataset"]))

    model = dict(need(run_config, "model"))
    model["backbone"] = dict(need(run_config, "model", "backbone"))
    model["backbone"]["tag"] = short_tag(str(need(run_config, "model", "backbone", "tag")))
    if file := model["backbone"].get("file"):
        model["backbone"]["file"] = last_part(file)
    config["model"] = model

    trainer = run_config.get("trainer") or {}
    config["trainer"] = {
        key: value for key, value in trainer.items() if key not in _TRAINER_LEFT_OUT and not key.startswith("enable_")
    }
    if callbacks := _without_progress_bars(trainer.get("callbacks")):
        config["trainer"]["callbacks"] = callbacks
    if (devices := _devices(trainer)) != 1:
        config["trainer"]["devices"] = devices
    if not has_init(run_config):
        config["trainer"].pop("callbacks", None)
        for group, names in _OF_STEPS.items():
            config[group] = {key: value for key, value in config[group].items() if key not in names}

    relevant: Config = _canonical(config)
    return relevant


def _devices(trainer: Mapping[str, Any]) -> Any:
    """The number of devices that a run trains on together, or what only a machine can count (`auto`, -1).

    Where they do not divide the images, some count twice per epoch, so the result differs.
    """
    devices = trainer.get("devices")
    if isinstance(devices, str) and "," in devices:
        devices = [name for name in devices.split(",") if name]
    if isinstance(devices, list | tuple):
        return len(devices)
    if isinstance(devices, str) and devices.isdecimal() and len(devices) < 5:
        devices = int(devices)
    return 1 if devices is None else devices


def _without_progress_bars(callbacks: Any) -> list[Any]:
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    return [
        callback
        for callback in listed
        if not (isinstance(callback, Mapping) and str(callback.get("class_path")).endswith("ProgressBar"))
    ]


def _canonical(value: Any) -> Any:
    """Give equal settings one spelling: `1.0` and `1`, a tuple and a list, a class's full and short name."""
    if isinstance(value, Mapping):
        plain = {str(key): _canonical(item) for key, item in value.items()}
        class_path = plain.get("class_path")
        if isinstance(class_path, str) and class_path.startswith(_SHORT_NAME_PACKAGES):
            plain["class_path"] = class_path.rpartition(".")[2]
        return plain
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str | int | float) or value is None:
        return value
    if isinstance(value, Iterable):
        return [_canonical(item) for item in value]
    return str(value)


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":")))[:10]


def _root_name(run_config: Mapping[str, Any]) -> str:
    root = need(run_config, "data", "root")
    name = last_part(root)
    if name in ("", ".."):
        raise NolaVisionError(f"`data.root: {root}` does not end in the data set's name: write out the folder's name")
    return name


def method_folder(cell_folder: Path, method: str) -> Path:
    """Return the folder of an entry's runs, by its name."""
    return cell_folder / _safe_entry(method)


def _safe_entry(name: str) -> str:
    base, budget = split_budget(name)
    return _safe(name) if budget is None else with_budget(_safe(base), budget)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name).lstrip(".") or "_"
