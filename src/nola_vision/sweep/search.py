"""The choice of each entry's settings from its search runs. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nola_vision.common.errors import NolaVisionError
from nola_vision.runs import run_id
from nola_vision.runs.record import Row, count_once
from nola_vision.runs.run_id import search_of, searched_at
from nola_vision.runs.search_grid import Settings, best, choice_in_words, combinations, in_words
from nola_vision.sweep.plan import RunSpec, search_specs


def choose_settings(
    config: Mapping[str, Any], rows: Iterable[Row], methods: Sequence[str] | None = None
) -> dict[str, Settings]:
    """Choose the searched settings of each entry by its search runs, as `search_grid.best`.

    An entry whose search has one combination takes that without a run; an entry without a search keeps its settings.

    Args:
        config: a config with `methods`.
        rows: of any runs; this config's search runs are found by their hash.
        methods: the entries to choose for (default: all).

    Raises:
        NolaVisionError: a search run has not ended yet, or all search runs of an entry failed.
    """
    searched = _searched(rows)
    chosen = {}
    for method in methods if methods is not None else run_id.need(config, "methods"):
        specs = search_specs(config, [method])
        if specs:
            chosen[method] = _best(searched_at(config, method), specs, searched)
        else:
            (chosen[method],) = combinations(search_of(config, method))
    return chosen


def choices_in_words(config: Mapping[str, Any], rows: Iterable[Row], chosen: Mapping[str, Settings]) -> list[str]:
    """One line per entry that was searched, also if it was for others: `nola: lr 0.005, c 2 (best of 6)`.

    Args:
        config: a config with `methods`.
        rows: those given to `choose_settings`.
        chosen: its result.
    """
    found = {searched_at(config, method): settings for method, settings in chosen.items()}
    searched = _searched(rows)
    tried: dict[str, list[Row]] = {}
    for spec in search_specs(config, list(chosen)):
        tried.setdefault(spec.method, []).append(searched[spec.method, spec.run_hash])
    return [choice_in_words(method, found[method], own) for method, own in tried.items()]


def search_failed(config: Mapping[str, Any], rows: Iterable[Row], method: str) -> bool:
    """Whether an entry has search runs and all of them failed."""
    where = searched_at(config, method)
    failed = {row.run_hash for row in count_once(rows) if (row.method, row.status) == (where, "failed")}
    specs = search_specs(config, [method])
    return bool(specs) and all(spec.run_hash in failed for spec in specs)


def _searched(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    return {(row.method, row.run_hash): row for row in count_once(rows) if row.stage == "search"}


def _best(method: str, specs: list[RunSpec], searched: Mapping[tuple[str, str], Row]) -> Settings:
    rows = []
    for spec in specs:
        row = searched.get((method, spec.run_hash))
        if row is None or row.status == "interrupted":
            raise NolaVisionError(
                f"the search run of {method!r} with {in_words(spec.searched)} has not ended: sweep again"
            )
        rows.append(row)
    if (chosen := best([spec.searched for spec in specs], rows)) is None:
        errors = [row.error for row in rows if row.error]
        raise NolaVisionError(
            f"all search runs of {method!r} failed: {errors[-1] if errors else 'none has a validation accuracy'}"
        )
    return chosen
