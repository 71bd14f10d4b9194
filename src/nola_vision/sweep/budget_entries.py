"""The entries of a sweep that have byte budgets: which can be reached, and where their settings are searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from nola_vision.common.errors import NolaVisionError, UnreachableBudgetError
from nola_vision.runs import run_id
from nola_vision.runs.budget_names import budget_text, budgets_of, search_budgets, split_budget, with_budget
from nola_vision.runs.not_run import NotRun
from nola_vision.sweep import plan


@dataclass(frozen=True)
class Entries:
    """The entries of a sweep.

    Args:
        config: a full config, as `plan.complete` returns it; also with entries that are only searched, for others.
        methods: names of the entries with final runs.
        not_run: the entries without runs.
        notes: one sentence for each method whose search uses another budget than the first of `search_budgets`.
    """

    config: run_id.Config
    methods: Sequence[str]
    not_run: Mapping[str, NotRun]
    notes: Sequence[str]


def expand(raw: Mapping[str, Any], methods: Sequence[str], budgets: Sequence[int] | None = None) -> list[str]:
    """The names of entries, with one name per budget for those that have budgets.

    Args:
        raw: a config with `methods`.
        methods: names of entries; `nola@2KB` is one too.
        budgets: in bytes; only these of the entries that have budgets.

    Raises:
        NolaVisionError: no entry has one of the budgets.
    """
    names: list[str] = []
    had: set[int] = set()
    for method in methods:
        sizes = budgets_of(method, run_id.entry(raw, method))
        own = split_budget(method)[1]
        had |= {*sizes} if own is None else {own}
        kept = [size for size in sizes if budgets is None or size in budgets]
        names += [with_budget(method, size) for size in kept] if sizes else [method]
    if missing := [size for size in budgets or () if size not in had]:
        known = ", ".join(map(budget_text, sorted(had)))
        hint = f"give some of {known}" if known else "name methods with `budgets` in the config"
        raise NolaVisionError(f"no entry has the budget {budget_text(missing[0])}: {hint}")
    return list(dict.fromkeys(names))


def solve(raw: Mapping[str, Any], methods: Sequence[str], parse: Callable[[run_id.Config], run_id.Config]) -> Entries:
    """Solves the budgets of entries, and fills in the defaults of all.

    Of the budgets of a method with the same solution the smallest one is run, whichever of them are named. Settings are
    searched once for all budgets of a method, at `search_budgets`. So a part of the budgets has the runs that the whole
    has.

    Args:
        raw: a config with `methods`, as the user wrote it.
        methods: names of entries, as `expand` returns them.
        parse: completes a run config, and solves its budget.

    Raises:
        UnreachableBudgetError: no entry can be run.
        NolaVisionError: a search cannot be done, or would exceed a budget.
    """
    from nola_vision.runs.budgets import budget_of, refuse_larger_files  # imports torch, as `parse` does

    parsed = cache(lambda name: parse(run_id.resolve(raw, name)))
    runs: list[str] = []
    not_run: dict[str, NotRun] = {}
    unreachable: UnreachableBudgetError | None = None

    def smallest_same(name: str) -> str:
        """The smallest budget of the method with the solution of the entry `name`, which can be reached."""
        base, budget = split_budget(name)
        sizes = [] if name in raw["methods"] else budgets_of(base, raw["methods"][base])
        for smaller in (with_budget(base, size) for size in reversed(sizes) if size < (budget or 0)):
            try:
                if parsed(smaller)["model"] != parsed(name)["model"]:
                    break
            except UnreachableBudgetError:
                break
            name = smaller
        return name

    for name in methods:
        try:
            parsed(name)
        except UnreachableBudgetError as error:
            unreachable = error
            not_run[name] = NotRun(f"the smallest file ({error.smallest}) needs {error.least:,} bytes")
            continue
        if (same := smallest_same(name)) != name:
            not_run[name] = NotRun(f"no larger file is within it than that of {same}", same)
        runs.append(same)
    if not runs and unreachable is not None:
        raise unreachable
    runs = list(dict.fromkeys(runs))
    # where settings are chosen for other entries: by name, or for all budgets of a method
    named = [source for name in runs if (source := run_id.searched_at(raw, name)) != name]
    sources, notes = dict[str, str](), []
    for base in dict.fromkeys(split_budget(name)[0] for name in runs if name not in raw["methods"]):
        if not isinstance(raw["methods"][base].get("search"), Mapping):
            continue
        wanted, *larger = (with_budget(base, size) for size in search_budgets(budgets_of(base, raw["methods"][base])))
        for name in (wanted, *larger):
            try:
                parsed(name)
            except UnreachableBudgetError:
                continue
            sources[base] = smallest_same(name)
            break
        if (used := sources[base]) != wanted and any(values[1:] for values in raw["methods"][base]["search"].values()):
            reason = "which is the same" if name == wanted else "the next within reach"
            notes.append(f"{base} is searched at {used}, {reason}, instead of {wanted}")
    config = plan.complete(raw, [*dict.fromkeys([*runs, *sources.values(), *named])], lambda one: parsed(one["method"]))
    for name, settings in config["methods"].items():
        source = sources.get(split_budget(name)[0], name) if name not in raw["methods"] else name
        if source != name:
            settings["search"] = source
    for name in runs:
        budget = budget_of(run_id.resolve(raw, name))
        refuse_larger_files(run_id.resolve(config, name), run_id.search_of(config, name), budget)
    return Entries(config, runs, not_run, notes)
