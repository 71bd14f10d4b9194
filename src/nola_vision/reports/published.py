"""The paper's figure for a run, if it was made with the paper's settings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from nola_vision.common.mappings import value_at
from nola_vision.runs.cells import compose, part_files, read_part
from nola_vision.runs.config_files import load_shipped, shipped_files
from nola_vision.runs.record import Row
from nola_vision.runs.yaml_files import Config

_OF_PROTOCOL = ("lr", "head_lr", "c", "start", "bits", "head_bits")


def published_result(row: Row) -> Mapping[str, Any] | None:
    """What the paper prints for a run's entry: of the same name, class and settings, on the same pretrained weights.

    The keys are `entry`, `mean`, and where the paper gives them `std` and `note`.
    """
    model, data = row.config.get("model") or {}, row.config.get("data") or {}
    backbone, method = model.get("backbone") or {}, model.get("method") or {}
    shipped = _published_config(backbone.get("tag"), data.get("dataset"), data.get("shots"))
    entry = shipped["methods"].get(row.method) if shipped else None
    if not shipped or not entry or backbone.get("base") != (shipped["model"]["backbone"].get("base") or "pretrained"):
        return None
    asked = {key: value for key, value in (entry.get("init_args") or {}).items() if key not in _OF_PROTOCOL}
    used = method.get("init_args") or {}
    if row.method_class != entry["class_path"] or any(used.get(key) != value for key, value in asked.items()):
        return None
    figures = [line for line in shipped["published"] if line["entry"] == row.method]
    return figures[0] if figures else None


@cache
def _published_config(tag: str | None, dataset: str | None, shots: int | str | None) -> Config | None:
    """The shipped config of a backbone, a data set and shots for which the paper has figures; None if there is none."""
    for path in shipped_files():
        config = load_shipped(path)
        place = value_at(config, "model", "backbone", "tag"), value_at(config, "data", "dataset")
        if "published" in config and place == (tag, dataset) and config["data"]["shots"] == shots:
            return config
    backbones = [n for n in part_files("backbones") if _tag(n) == tag]
    datasets = [n for n in part_files("datasets") if read_part("datasets", n)["data"]["dataset"] == dataset]
    if not backbones or not datasets or not isinstance(shots, int):
        return None
    config = compose(backbones[0], datasets[0], shots)
    return config if config["published"] else None


def _tag(backbone: str) -> Any:
    return read_part("backbones", backbone)["model"]["backbone"]["tag"]
