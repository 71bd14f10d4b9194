"""The grid of a sweep as a list of run specs, and the choice of learning rates from its search runs. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from nola_vision.common.errors import NolaVisionError
from nola_vision.reports.statistics import count_once, search_rank
from nola_vision.runs import run_id
from nola_vision.runs.record import Row

_MOST_NUMBERS = 10_000  # in a range: more are a slip of the hand


@dataclass(frozen=True)
class RunSpec:
    """One run to do; `config` is its run config.

    `init` is None for a method on frozen features, `learning_rate` for one without a learning rate.
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
        """Which run it is: equal settings under two names are two runs."""
        return self.method, self.run_hash


def final_specs(
    config: Mapping[str, Any],
    splits: Sequence[int],
    inits: Sequence[int],
    methods: Sequence[str],
    learning_rates: Mapping[str, float],
) -> list[RunSpec]:
    """Plan the final runs: every split, method and init; for a method on frozen features one run per split.

    Args:
        config: a config with `methods`.
        splits: the values of `data.split_seed`.
        inits: the values of `model.run_seed`; the basis follows it unless the config fixes `model.basis_seed`.
        methods: names of entries.
        learning_rates: the chosen rates; an entry without one keeps its own.
    """
    specs = []
    for split in splits:
        for method in methods:
            own_inits: Sequence[int | None] = inits if run_id.has_init(run_id.resolve(config, method)) else [None]
            for init in own_inits:
                specs.append(_spec(config, method, split, init, "final", learning_rates.get(method)))
    return specs


def search_specs(config: Mapping[str, Any], methods: Sequence[str]) -> list[RunSpec]:
    """Plan the search runs: each rate of every entry that has more than one to try.

    They are of init 0 and split 0, or the one split of the config's manifest: whatever splits follow, every sweep of a
    config chooses alike.
    """
    data = run_id.need(config, "data")
    split = data["split_seed"] if data.get("manifest") is not None else 0
    return [
        _spec(config, method, split, 0, "search", rate)
        for method in methods
        if len(_rates(config, method)) > 1
        for rate in _rates(config, method)
    ]


def choose_learning_rates(
    config: Mapping[str, Any], rows: Iterable[Row], methods: Sequence[str] | None = None
) -> dict[str, float]:
    """Choose each entry's learning rate by its search runs.

    The best validation accuracy wins; ties go to the lower validation loss, then to the smaller rate. A failed run is
    worse than any other. An entry without several rates to try keeps its own, if it has one.

    Args:
        config: a config with `methods`.
        rows: rows of any runs; those of this config's search runs are taken, by their hash.
        methods: the entries to choose for; all of them unless said otherwise.

    Raises:
        NolaVisionError: a search run has not ended yet, or all those of an entry failed.
    """
    searched = {(row.method, row.run_hash): row for row in count_once(rows) if row.stage == "search"}
    chosen = {}
    for method in methods if methods is not None else run_id.need(config, "methods"):
        specs = search_specs(config, [method])
        if specs:
            chosen[method] = _best_rate(method, specs, searched)
        elif rates := _rates(config, method):
            chosen[method] = rates[0]
    return chosen


def search_failed(config: Mapping[str, Any], rows: Iterable[Row], method: str) -> bool:
    """Whether each search run of an entry, one at least, has a row that says that it failed."""
    failed = {row.run_hash for row in count_once(rows) if (row.method, row.status) == (method, "failed")}
    specs = search_specs(config, [method])
    return bool(specs) and all(spec.run_hash in failed for spec in specs)


def complete(
    raw: Mapping[str, Any], methods: Sequence[str], parse: Callable[[run_id.Config], run_id.Config]
) -> run_id.Config:
    """Write out every default of a config, entry by entry, so that its runs have the hashes that they will have.

    Args:
        raw: a config with `methods`, as a person wrote it.
        methods: names of entries; the others are left out.
        parse: from a run config to the full one.
    """
    full = {name: parse(run_id.resolve(raw, name)) for name in methods}
    first = full[methods[0]]
    entries = {
        name: {**run_config["model"]["method"], "learning_rates": raw["methods"][name].get("learning_rates")}
        for name, run_config in full.items()
    }
    model = {key: value for key, value in first["model"].items() if key != "method"}
    return {**first, "model": model, "methods": entries}


@dataclass(frozen=True)
class Outlook:
    """What a sweep has to do for one entry; `seconds` is the median of its completed runs, None before the first."""

    method: str
    search: int
    final: int
    done: int
    seconds: float | None


def outlook(
    config: Mapping[str, Any],
    splits: Sequence[int],
    inits: Sequence[int],
    rows: Iterable[Row],
    shard: tuple[int, int] = (1, 1),
) -> list[Outlook]:
    """The runs of each entry, how many of them have been completed, and how long one takes, from the rows so far."""
    rows = count_once(rows)
    completed = [row for row in rows if row.status == "completed"]
    hashes = {(row.method, row.run_hash) for row in completed}
    methods = list(run_id.need(config, "methods"))
    mine = {(s.method, s.split, s.init) for s in part(final_specs(config, splits, inits, methods, {}), shard)}
    lines = []
    for method in methods:
        search = search_specs(config, [method])
        try:
            rates = choose_learning_rates(config, rows, [method])
        except NolaVisionError:  # its search has not ended
            rates = {}
        every = final_specs(config, splits, inits, [method], rates)
        final = [spec for spec in every if (spec.method, spec.split, spec.init) in mine]
        seconds = [row.seconds_total for row in completed if row.method == method and row.seconds_total is not None]
        done = sum((method, spec.run_hash) in hashes for spec in (*search, *(final if rates or not search else ())))
        lines.append(Outlook(method, len(search), len(final), done, median(seconds) if seconds else None))
    return lines


def part(specs: Sequence[RunSpec], shard: tuple[int, int]) -> Sequence[RunSpec]:
    """Shard (i, n) of some specs: the i-th, the (i + n)-th, ..."""
    number, count = shard
    return specs[number - 1 :: count]


def vary(
    config: Mapping[str, Any],
    methods: Sequence[str],
    key: str,
    values: Sequence[Any],
    takes: Callable[[str, str], bool],
) -> tuple[run_id.Config, list[str]]:
    """A config in which each entry that has a setting stands once for each of its values, named `nola-rank4`.

    Args:
        config: a config with `methods`.
        methods: the entries to look at.
        key: the setting of a method.
        values: what it shall be.
        takes: whether a class (its short name) has a setting.

    Returns:
        The config, and the names of its entries in place of `methods`; one without the setting stays as it is.

    Raises:
        NolaVisionError: none of the entries has the setting.
    """
    entries, names = dict(run_id.need(config, "methods")), []
    for name in methods:
        settings = run_id.entry(config, name)
        if not takes(settings["class_path"].rpartition(".")[2], key):
            names.append(name)
            continue
        for value in values:
            if (varied := name + suffix(key, value)) in entries:
                raise NolaVisionError(
                    f"the config has a method {varied!r} already: give each value once, and vary once"
                )
            entries[varied] = {**settings, "init_args": {**(settings.get("init_args") or {}), key: value}}
            if key == "lr":  # it is what the search would choose
                entries[varied]["learning_rates"] = None
            names.append(varied)
    if names == list(methods):
        raise NolaVisionError(f"none of {', '.join(methods)} has a setting {key!r}: vary one of a method's settings")
    return {**config, "methods": entries}, names


def suffix(key: str, value: Any) -> str:
    """What a varied setting adds to an entry's name: `-rank4`, `-shots10` of data.shots."""
    shown = "+".join(map(str, value)) if isinstance(value, list) else value
    return f"-{key.rpartition('.')[2]}{shown}"


def rename(config: Mapping[str, Any], methods: Sequence[str], suffix: str) -> tuple[run_id.Config, list[str]]:
    """A config in which some entries stand under another name too, and those names."""
    names = [name + suffix for name in methods]
    entries = {name + suffix: run_id.entry(config, name) for name in methods}
    return {**config, "methods": {**run_id.need(config, "methods"), **entries}}, names


def without_search(config: Mapping[str, Any]) -> run_id.Config:
    """A config whose entries have no learning rates to try, so that each keeps its own."""
    entries = {name: {**settings, "learning_rates": None} for name, settings in config["methods"].items()}
    return {**config, "methods": entries}


def parse_range(text: str) -> list[int]:
    """Read `0-3`, `0,2,5`, `7` or a mix of them as a list of numbers, each once.

    Raises:
        NolaVisionError: anything else.
    """
    numbers: dict[int, None] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise NolaVisionError(f"{text!r} is no range of numbers: write it like 0-3, 0,2,5 or 7")
        if last - first >= _MOST_NUMBERS:
            raise NolaVisionError(f"{text!r} is more than {_MOST_NUMBERS:,} numbers: give a shorter range")
        numbers |= dict.fromkeys(range(first, last + 1))
    return list(numbers)


def parse_shard(text: str) -> tuple[int, int]:
    """Read `2/5` as the second of five shards.

    Raises:
        NolaVisionError: anything else.
    """
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count:
        raise NolaVisionError(f"{text!r} is no shard: write it like 2/5, from 1/5 to 5/5")
    return number, count


def parse_methods(text: str, config: Mapping[str, Any]) -> list[str]:
    """Read `all` or names with commas between them as names of the config's entries, each once.

    Raises:
        NolaVisionError: the config has no entry of such a name.
    """
    names = (
        list(run_id.need(config, "methods")) if text.strip() == "all" else [name.strip() for name in text.split(",")]
    )
    for name in names:
        run_id.entry(config, name)
    return list(dict.fromkeys(names))


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


def _rates(config: Mapping[str, Any], method: str) -> list[float]:
    """Return the rates that an entry has to try, each once; without a list its own rate, if it has one."""
    settings = run_id.entry(config, method)
    own_rate = (settings.get("init_args") or {}).get("lr")
    listed = settings.get("learning_rates") or ([] if own_rate is None else [own_rate])
    if not isinstance(listed, list):
        raise NolaVisionError(f"`learning_rates` of {method!r} is no list: write it like [0.005, 0.001]")
    return list(dict.fromkeys(_number(rate, method) for rate in listed))


def _number(rate: Any, method: str) -> float:
    try:
        return float(rate)  # YAML reads 5e-3, without a point, as text
    except (TypeError, ValueError):
        raise NolaVisionError(f"{rate!r} is no learning rate for {method!r}: write a number") from None


def _best_rate(method: str, specs: list[RunSpec], searched: Mapping[tuple[str, str], Row]) -> float:
    ranked, errors = [], []
    for spec in specs:
        row = searched.get((method, spec.run_hash))
        if row is None or row.status == "interrupted" or spec.learning_rate is None:
            raise NolaVisionError(
                f"the search run of {method!r} at learning rate {spec.learning_rate} has not ended: sweep again"
            )
        errors += [row.error] if row.error else []
        ranked.append((search_rank(row), spec.learning_rate))
    best = min(ranked)
    if best[0][0] == math.inf:
        raise NolaVisionError(
            f"all search runs of {method!r} failed: {errors[-1] if errors else 'none has a validation accuracy'}"
        )
    return best[1]
