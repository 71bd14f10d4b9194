"""The grid of a sweep as a list of run specs. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nola_vision.common.errors import NolaVisionError
from nola_vision.data.datasets.registry import get_dataset
from nola_vision.runs import run_id


@dataclass(frozen=True)
class RunSpec:
    """A planned run; `config` is its run config.

    `init` is None for a method on frozen features, `learning_rate` for a method without one.
    """

    method: str
    split: int
    init: int | None
    stage: run_id.Stage
    learning_rate: float | None
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
    learning_rates: Mapping[str, float],
) -> list[RunSpec]:
    """Plan the final runs: every split x method x init; one run per split for a method on frozen features.

    Args:
        config: a config with `methods`.
        splits: the values of `data.split_seed`.
        inits: the values of `model.run_seed`; the basis follows it unless the config fixes `model.basis_seed`.
        methods: names of entries.
        learning_rates: the chosen rates; other entries keep their own.
    """
    specs = []
    for split in splits:
        for method in methods:
            own_inits: Sequence[int | None] = inits if run_id.has_init(run_id.resolve(config, method)) else [None]
            for init in own_inits:
                specs.append(_spec(config, method, split, init, "final", learning_rates.get(method)))
    return specs


def search_specs(config: Mapping[str, Any], methods: Sequence[str]) -> list[RunSpec]:
    """Plan the search runs: one per learning rate of every entry that has several, or whose choice another takes.

    They use init 0 and split 0, or the split of the config's manifest, so that every sweep of a config chooses the same
    rates whatever its splits are. They hold the validation pool out if the final runs train on it.
    """
    data = run_id.need(config, "data")
    split = data["split_seed"] if data.get("manifest") is not None else 0
    if get_dataset(run_id.need(data, "dataset")).trains_on_pool:
        config = {**config, "data": {**data, "hold_out": True}}
    return [
        _spec(config, method, split, 0, "search", rate)
        for method in dict.fromkeys(searched_at(config, method) for method in methods)
        if len(rates_to_try(config, method)) > 1
        for rate in rates_to_try(config, method)
    ]


def shard_of(specs: Sequence[RunSpec], shard: tuple[int, int]) -> Sequence[RunSpec]:
    """Shard (i, n) of some specs: number i, i + n, i + 2n, ..."""
    number, count = shard
    return specs[number - 1 :: count]


def complete(
    raw: Mapping[str, Any], methods: Sequence[str], parse: Callable[[run_id.Config], run_id.Config]
) -> run_id.Config:
    """Fill in the defaults of every entry of a config, so that the hashes of its runs are final.

    Args:
        raw: a config with `methods`, as the user wrote it.
        methods: names of entries; the others are dropped.
        parse: completes a run config.
    """
    full = {name: parse(run_id.resolve(raw, name)) for name in methods}
    first = full[methods[0]]
    entries = {
        name: {**run_config["model"]["method"], "learning_rates": run_id.entry(raw, name).get("learning_rates")}
        for name, run_config in full.items()
    }
    model = {key: value for key, value in first["model"].items() if key != "method"}
    return {**first, "model": model, "methods": entries}


def without_search(config: Mapping[str, Any]) -> run_id.Config:
    """A config whose entries have no learning rates to choose from; each keeps its own."""
    entries = {name: {**settings, "learning_rates": None} for name, settings in config["methods"].items()}
    return {**config, "methods": entries}


def _spec(
    config: Mapping[str, Any], method: str, split: int, init: int | None, stage: run_id.Stage, rate: float | None
) -> RunSpec:
    run_config = run_id.resolve(config, method)
    run_id.need(run_config, "data")["split_seed"] = split
    if init is not None:
        run_config["model"]["run_seed"] = init
    init_args = run_config["model"]["method"]["init_args"]
    if rate is not None:
        init_args["lr"] = rate
    own_rate = init_args.get("lr")
    return RunSpec(
        method=method,
        split=split,
        init=init,
        stage=stage,
        learning_rate=None if own_rate is None else _number(own_rate, method),
        config=run_config,
        run_hash=run_id.run_hash(run_config, stage),
    )


def searched_at(config: Mapping[str, Any], method: str) -> str:
    """The entry whose search chooses the learning rate of an entry: itself, or the one that `learning_rates` names."""
    named = run_id.entry(config, method).get("learning_rates")
    return named if isinstance(named, str) and named in config["methods"] else method


def rates_to_try(config: Mapping[str, Any], method: str) -> list[float]:
    """Return the distinct learning rates of an entry's list; without a list its own rate, if it has one."""
    settings = run_id.entry(config, method)
    own_rate = (settings.get("init_args") or {}).get("lr")
    listed = settings.get("learning_rates") or ([] if own_rate is None else [own_rate])
    if not isinstance(listed, list):
        raise NolaVisionError(f"`learning_rates` of {method!r} is not a list: write it like [0.005, 0.001]")
    return list(dict.fromkeys(_number(rate, method) for rate in listed))


def _number(rate: Any, method: str) -> float:
    try:
        return float(rate)  # YAML reads 5e-3, without a decimal point, as text
    except (TypeError, ValueError):
        raise NolaVisionError(f"{rate!r} is not a learning rate for {method!r}: write a number") from None
