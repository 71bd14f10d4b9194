"""The grid of a sweep as a list of run specs. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nola_vision.adapters.methods.registry import known_method
from nola_vision.data.datasets.registry import get_dataset
from nola_vision.runs import run_id
from nola_vision.runs.budget_names import split_budget
from nola_vision.runs.search_grid import Settings, checked, combinations, with_settings


@dataclass(frozen=True)
class RunSpec:
    """A planned run; `config` is its run config.

    `init` is None for a method on frozen features. `searched` has the values of searched settings that replace those of
    the entry.
    """

    method: str
    split: int
    init: int | None
    stage: run_id.Stage
    searched: Settings
    config: run_id.Config
    run_hash: str

    @property
    def key(self) -> tuple[str, str]:
        """Identifies the run; equal settings under two names are two runs."""
        return self.method, self.run_hash


def final_specs(
    config: Mapping[str, Any],
    splits: Sequence[int],
    inits: Sequence[int],
    methods: Sequence[str],
    chosen: Mapping[str, Settings],
) -> list[RunSpec]:
    """Plan the final runs: every split x method x init; one run per split for a method on frozen features.

    Args:
        config: a config with `methods`.
        splits: the values of `data.split_seed`.
        inits: the values of `model.run_seed`; the basis follows it unless the config fixes `model.basis_seed`.
        methods: names of entries.
        chosen: what the search of each entry chose; other entries keep their own settings. A learning rate that was
            chosen at another budget is that of `at_its_size`.
    """
    settings = {method: at_its_size(config, method, chosen.get(method, {})) for method in methods}
    specs = []
    for split in splits:
        for method in methods:
            own_inits: Sequence[int | None] = inits if run_id.has_init(run_id.resolve(config, method)) else [None]
            for init in own_inits:
                specs.append(_spec(config, method, split, init, "final", settings[method]))
    return specs


def at_its_size(config: Mapping[str, Any], method: str, chosen: Settings) -> Settings:
    """The settings of an entry that were chosen at another budget, with a learning rate for the entry's own size.

    lr' = lr min(1, s / s'), rounded to three digits, with the sizes s where it was chosen and s' of the entry, for a
    method whose step grows with its size; unchanged for others. The first step with Adam then changes the model by no
    more than where the search found it to be good (decision 0031).
    """
    source = run_id.searched_at(config, method)
    if source == method or "lr" not in chosen or split_budget(source)[0] != split_budget(method)[0]:
        return chosen
    where, here = (run_id.resolve(config, name) for name in (source, method))
    known = known_method(run_id.method_class(here))
    if not known.step_grows_with_size:
        return chosen
    searched, own = (one["model"]["method"]["init_args"][known.size_setting] for one in (where, here))
    return {**chosen, "lr": float(f"{chosen['lr'] * searched / own:.3g}")} if own > searched else chosen


def search_specs(config: Mapping[str, Any], methods: Sequence[str]) -> list[RunSpec]:
    """Plan the search runs: one per combination of every entry that has several, or whose choice another takes.

    They use init 0 and split 0, or the split of the config's manifest, so that every sweep of a config chooses the same
    settings whatever its splits are. They hold the validation pool out if the final runs train on it.
    """
    data = run_id.need(config, "data")
    split = data["split_seed"] if data.get("manifest") is not None else 0
    if get_dataset(run_id.need(data, "dataset")).trains_on_pool:
        config = {**config, "data": {**data, "hold_out": True}}
    return [
        _spec(config, method, split, 0, "search", settings)
        for method in dict.fromkeys(run_id.searched_at(config, method) for method in methods)
        if len(tried := combinations(run_id.search_of(config, method))) > 1
        for settings in tried
    ]


def shard_of(specs: Sequence[RunSpec], shard: tuple[int, int]) -> Sequence[RunSpec]:
    """Shard (i, n) of some specs: number i, i + n, i + 2n, ..."""
    number, count = shard
    return specs[number - 1 :: count]


def complete(
    raw: Mapping[str, Any], methods: Sequence[str], parse: Callable[[run_id.Config], run_id.Config]
) -> run_id.Config:
    """Fill in the defaults of every entry of a config, so that the hashes of its runs are final, and check its search.

    Args:
        raw: a config with `methods`, as the user wrote it.
        methods: names of entries; the others are dropped.
        parse: completes a run config.

    Raises:
        NolaVisionError: an entry is invalid, as `run_id.resolve` and `parse`, or its search, as `search_grid.checked`.
    """
    full = {name: parse(run_id.resolve(raw, name)) for name in methods}
    first = full[methods[0]]
    entries = {
        name: {**run_config["model"]["method"], "search": _checked_search(raw, name, run_config)}
        for name, run_config in full.items()
    }
    model = {key: value for key, value in first["model"].items() if key != "method"}
    return {**first, "model": model, "methods": entries}


def without_search(config: Mapping[str, Any]) -> run_id.Config:
    """A config whose entries have nothing to choose; each keeps its own settings."""
    entries = {name: {**settings, "search": None} for name, settings in config["methods"].items()}
    return {**config, "methods": entries}


def _checked_search(raw: Mapping[str, Any], name: str, run_config: run_id.Config) -> Mapping[str, list[Any]] | str:
    """The search of an entry with the parser's values, or the name of the entry that searches for it."""
    search = checked(name, run_id.search_of(raw, name), run_config["model"]["method"])
    return search if (source := run_id.searched_at(raw, name)) == name else source


def _spec(
    config: Mapping[str, Any], method: str, split: int, init: int | None, stage: run_id.Stage, searched: Settings
) -> RunSpec:
    run_config = with_settings(run_id.resolve(config, method), searched)
    run_id.need(run_config, "data")["split_seed"] = split
    if init is not None:
        run_config["model"]["run_seed"] = init
    return RunSpec(
        method=method,
        split=split,
        init=init,
        stage=stage,
        searched=searched,
        config=run_config,
        run_hash=run_id.run_hash(run_config, stage),
    )
