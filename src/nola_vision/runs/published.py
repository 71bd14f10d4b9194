"""The figures that the NOLA paper prints: all of them as a data frame, and that of a run's entry."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import pandas as pd

from nola_vision.runs.config_files import Config, published_config
from nola_vision.runs.record import Row


def published_figures() -> pd.DataFrame:
    """Return every printed figure of Tables 6, 7 and 10 (few shots) and 8 and 9 (from scratch).

    The columns are `table`, `backbone`, `method`, `params` (text, as printed), `dataset`, `shots`, `mean` and `std`
    (top-1 in per cent) and `note`, which says what is doubtful about a figure. From scratch there are no shots.
    """
    folder = resources.files(__package__) / "paper"
    with (folder / "published_fewshot.csv").open(encoding="utf-8") as file:
        few_shot = pd.read_csv(file, dtype={"params": "str", "shots": "Int64"})
    with (folder / "published_from_scratch.csv").open(encoding="utf-8") as file:
        from_scratch = pd.read_csv(file, dtype={"params": "str"})
    from_scratch = from_scratch.rename(columns={"architecture": "backbone", "top1": "mean"})
    figures = pd.concat([few_shot, from_scratch], ignore_index=True)
    return figures.fillna({"note": ""})


def published_result(row: Row) -> Mapping[str, Any] | None:
    """What the paper prints for a run's entry: of the same name, class and settings, on the same pretrained weights.

    The keys are `entry`, `mean`, and where the paper gives them `std` and `note`.
    """
    model, data = row.config.get("model") or {}, row.config.get("data") or {}
    backbone, method = model.get("backbone") or {}, model.get("method") or {}
    shipped = _shipped(backbone.get("tag"), data.get("dataset"), data.get("shots"))
    entry = shipped["methods"].get(row.method) if shipped else None
    if not shipped or not entry or backbone.get("base") != (shipped["model"]["backbone"].get("base") or "pretrained"):
        return None
    asked = {key: value for key, value in (entry.get("init_args") or {}).items() if key not in ("lr", "c", "start")}
    held = method.get("init_args") or {}
    if row.method_class != entry["class_path"] or any(held.get(key) != value for key, value in asked.items()):
        return None
    figures = [line for line in shipped["published"] if line["entry"] == row.method]
    return figures[0] if figures else None


@cache
def _shipped(tag: str | None, dataset: str | None, shots: int | str | None) -> Config | None:
    return published_config(tag, dataset, shots)
