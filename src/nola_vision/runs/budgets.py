"""The budget of a run config: the size of its adapter follows from the bytes of the whole file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nola_vision.adapters.methods import registry
from nola_vision.common.errors import NolaVisionError
from nola_vision.data.datasets.registry import get_dataset
from nola_vision.models.backbones.sources import input_config
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.budgets import MARGIN, most_file_bytes, solve_budget
from nola_vision.models.metadata import AdapterMetadata
from nola_vision.runs.budget_names import split_budget
from nola_vision.runs.search_grid import combinations, in_words, with_settings


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


def refuse_larger_files(run_config: dict[str, Any], search: Mapping[str, Sequence[Any]]) -> None:
    """Refuses a search with settings that make the file of an entry larger than the entry's budget.

    Args:
        run_config: of an entry, with the solved budget.
        search: the values to try of each setting.

    Raises:
        NolaVisionError: a file would be larger.
    """
    budget = split_budget(run_config["method"])[1]
    search = {name: values for name, values in search.items() if name not in ("lr", "head_lr")}  # counted already
    if budget is None or not search:
        return
    for settings in combinations(search):
        found = size_and_bytes(with_settings(run_config, settings))
        if found is not None and found[1] > budget + MARGIN:  # other digits of `c` are within the margin
            raise NolaVisionError(
                f"`search` of the method {run_config['method']!r} has {in_words(settings)}, with which the file has "
                f"{found[1]:,} bytes: search settings that do not change its size"
            )


def _metadata(run_config: dict[str, Any]) -> AdapterMetadata:
    spec, data = BackboneSpec(**run_config["model"]["backbone"]), run_config["data"]
    names = get_dataset(data["dataset"]).class_names(data["root"], data["download"])
    method = registry.check(registry.from_dict(run_config["model"]["method"]))
    return AdapterMetadata(spec, method, names, 0, 0, input_config(spec))
