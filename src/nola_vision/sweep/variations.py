"""Entries of a config with other settings, under other names: the option --vary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nola_vision.adapters.methods.registry import METHODS
from nola_vision.common.errors import NolaVisionError
from nola_vision.runs import run_id
from nola_vision.runs.budget_names import budgets_of, split_budget


def vary(
    config: Mapping[str, Any], methods: Sequence[str], key: str, values: Sequence[Any]
) -> tuple[run_id.Config, list[str]]:
    """A config in which each entry with a setting is replaced by one entry per value, named such as `nola-rank4`.

    Args:
        config: a config with `methods`.
        methods: the entries to vary.
        key: the setting of a method.
        values: of the setting.

    Returns:
        The config, and the names that replace `methods`; an entry without the setting is unchanged.

    Raises:
        NolaVisionError: none of the entries has the setting, or the budgets of one decide it.
    """
    entries, names = dict(run_id.need(config, "methods")), list[str]()
    for name in methods:
        base = _without_budget(config, name)
        settings, search = run_id.entry(config, base), run_id.search_of(config, base)
        elsewhere = run_id.searched_at(config, base) != base
        method = METHODS.get(settings["class_path"].rpartition(".")[2])
        if method is None or key not in [field.name for field in dataclasses.fields(method)]:
            names.append(name)
            continue
        has_budgets = bool(budgets_of(base, settings))
        has_budget = has_budgets or (settings.get("init_args") or {}).get("max_bytes") is not None
        if (key == method.size_setting and has_budget) or (key == "max_bytes" and has_budgets):
            raise NolaVisionError(f"the budget of {base!r} decides {key}: vary another setting, or remove the budget")
        for value in values:
            varied = base + suffix(key, value)
            if varied in config["methods"] or (new := varied + name.removeprefix(base)) in names:
                raise NolaVisionError(
                    f"the config already has a method {varied!r}: give each value once, and each setting once"
                )
            entries[varied] = {**settings, "init_args": {**(settings.get("init_args") or {}), key: value}}
            if key in search or elsewhere:  # the search would replace the value, or be that of another value
                entries[varied]["search"] = {one: search[one] for one in search if one != key}
            names.append(new)
    if names == list(methods):
        raise NolaVisionError(f"none of {', '.join(methods)} has a setting {key!r}: vary one of a method's settings")
    return {**config, "methods": entries}, names


def _without_budget(config: Mapping[str, Any], name: str) -> str:
    """The entry of a config that a name belongs to: `nola` for `nola@2KB`."""
    return name if name in config["methods"] else split_budget(name)[0]


def suffix(key: str, value: Any) -> str:
    """The suffix of a varied entry's name: `-rank4`, or `-shots10` for data.shots."""
    shown = "+".join(map(str, value)) if isinstance(value, list) else value
    return f"-{key.rpartition('.')[2]}{shown}"


def rename(config: Mapping[str, Any], methods: Sequence[str], suffix: str) -> tuple[run_id.Config, list[str]]:
    """A config with copies of some entries, and of those that are searched for them, under names with a suffix.

    Returns:
        The config, and the new names of `methods`.
    """
    bases = [_without_budget(config, name) for name in methods]
    names = [base + suffix + name.removeprefix(base) for base, name in zip(bases, methods, strict=True)]
    entries = dict[str, Any]()
    for base in bases:
        entries[base + suffix] = run_id.entry(config, base)
        if (source := run_id.searched_at(config, base)) != base:
            entries[source + suffix] = run_id.entry(config, source)
            entries[base + suffix] = {**entries[base + suffix], "search": source + suffix}
    return {**config, "methods": {**run_id.need(config, "methods"), **entries}}, names
