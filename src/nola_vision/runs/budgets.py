"""The budget of a run config: the size of its adapter follows from the bytes of the whole file."""

from __future__ import annotations

from typing import Any

from nola_vision.adapters.methods import registry
from nola_vision.data.datasets.registry import get_dataset
from nola_vision.models.backbones.sources import input_config
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.budgets import most_file_bytes, solve_budget
from nola_vision.models.metadata import AdapterMetadata


def solved(run_config: dict[str, Any]) -> dict[str, Any]:
    """The `model.method` of a full run config with `max_bytes`: the setting that was solved for, and no budget.

    Raises:
        UnreachableBudgetError: no file of the method is that small.
        NolaVisionError: the backbone or the classes of the data set are not known, or the method does not fit them.
    """
    method, metadata = run_config["model"]["method"], _metadata(run_config)
    size = {metadata.method.size_setting: getattr(solve_budget(metadata), metadata.method.size_setting)}
    return {**method, "init_args": {**method["init_args"], **size, "max_bytes": None}}


def size_and_bytes(run_config: dict[str, Any]) -> tuple[str, int] | None:
    """The setting that decides a file's size, such as `rank 4`, and the bytes of the longest file.

    Empty text for a method without such a setting; None for one whose file is as large as the backbone, or that has
    none.
    """
    metadata = _metadata(run_config)
    method = metadata.method
    if method.trains_backbone or method.edits_backbone or not method.savable:
        return None
    name = method.size_setting
    return f"{name} {getattr(method, name):,}" if name else "", most_file_bytes(metadata)


def _metadata(run_config: dict[str, Any]) -> AdapterMetadata:
    spec, data = BackboneSpec(**run_config["model"]["backbone"]), run_config["data"]
    names = get_dataset(data["dataset"]).class_names(data["root"], data["download"])
    method = registry.check(registry.from_dict(run_config["model"]["method"]))
    return AdapterMetadata(spec, method, names, 0, 0, input_config(spec))
