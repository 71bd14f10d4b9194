"""The budget of a run config: the size of its adapter follows from the bytes of the whole file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nola_vision.adapters.methods import registry
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.mappings import value_at
from nola_vision.data.datasets.registry import get_dataset
from nola_vision.models.backbones.sources import input_config
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.budget_solver import LONGEST, most_file_bytes, solve_budget
from nola_vision.models.metadata import AdapterMetadata
from nola_vision.runs import run_id
from nola_vision.runs.budget_names import split_budget
from nola_vision.runs.early_checks import plain_value
from nola_vision.runs.search_grid import combinations, in_words, with_settings


def budget_of(run_config: Mapping[str, Any]) -> int | None:
    """The `max_bytes` of a run config's method; None if it has none, or after `solved`."""
    budget: int | None = plain_value(value_at(run_config, "model", "method", "init_args", "max_bytes"))
    return budget


def solved(run_config: dict[str, Any]) -> dict[str, Any]:
    """A full run config with the setting that its budget was solved for instead of the budget, if it has one.

    Raises:
        UnreachableBudgetError: no file of the method is that small.
        NolaVisionError: the backbone or the classes of the data set are not known, or the method does not fit them.
    """
    if budget_of(run_config) is None:
        return run_config
    metadata = _metadata(run_config)
    name = metadata.method.size_setting
    return with_settings(run_config, {name: getattr(solve_budget(metadata), name), "max_bytes": None})


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


def refuse_larger_files(run_config: dict[str, Any], search: Mapping[str, Sequence[Any]], budget: int | None) -> None:
    """Refuses a search over the setting that a budget decides, or with settings that make the file larger than it.

    Args:
        run_config: of an entry, with the solved budget.
        search: the values to try of each setting, as `search_grid.checked` returns them.
        budget: of the entry, in bytes.

    Raises:
        NolaVisionError: the search has that setting, or a file would be larger.
    """
    if budget is None:
        return
    whose = f"`search` of the method {run_config['method']!r}"
    size_setting = registry.known_method(run_id.method_class(run_config)).size_setting
    if size_setting in search:
        raise NolaVisionError(f"{whose} has {size_setting}, which its budget decides: leave it out")
    sizes = {name: values for name, values in search.items() if name not in LONGEST}  # these are counted already
    if not sizes:
        return
    for settings in combinations(sizes):
        found = size_and_bytes(with_settings(run_config, settings))
        if found is not None and found[1] > budget:
            raise NolaVisionError(
                f"{whose} has {in_words(settings)}, with which the file has {found[1]:,} bytes, more than {budget:,}: "
                "search values with smaller files"
            )


def refuse_contradictions(run_config: Mapping[str, Any], full: Mapping[str, Any]) -> None:
    """Refuses options that contradict the budget of a run.

    Args:
        run_config: of an entry, without options.
        full: the same, with the options and all defaults.

    Raises:
        NolaVisionError: the entry is named for its budget, such as `nola@2KB`, and an option gives another one; or
            the entry or an option sets what the budget decides.
    """
    name, budget = run_config.get("method"), budget_of(run_config)
    if budget is not None and budget == split_budget(str(name))[1] and budget != budget_of(full):
        raise NolaVisionError(
            f"max_bytes would give {name} another budget than its name: use a method without budgets, or list the "
            "budget in the config"
        )
    if (budget := budget_of(full)) is None:
        return
    size = registry.check(registry.from_dict(full["model"]["method"])).size_setting
    place = "model", "method", "init_args", size
    given = plain_value(value_at(run_config, *place))
    default = getattr(registry.known_method(run_id.method_class(full)), size, None)
    both = given is not None and split_budget(str(name))[1] is not None
    if both or value_at(full, *place) != (default if given is None else given):
        raise NolaVisionError(f"the budget of {budget:,} bytes decides {size}: leave one of them out")


def _metadata(run_config: dict[str, Any]) -> AdapterMetadata:
    spec, data = BackboneSpec(**run_config["model"]["backbone"]), run_config["data"]
    names = get_dataset(data["dataset"]).class_names(data["root"], data["download"])
    method = registry.check(registry.from_dict(run_config["model"]["method"]))
    return AdapterMetadata(spec, method, names, 0, 0, input_config(spec))
