"""The choice of each entry's learning rate from its search runs. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nola_vision.common.errors import NolaVisionError
from nola_vision.runs import run_id
from nola_vision.runs.record import Row, count_once, search_rank
from nola_vision.sweep.plan import RunSpec, rates_to_try, search_specs, searched_at


def choose_learning_rates(
    config: Mapping[str, Any], rows: Iterable[Row], methods: Sequence[str] | None = None
) -> dict[str, float]:
    """Choose each entry's learning rate by its search runs.

    The best validation accuracy wins; ties go to the lower validation loss, then to the smaller rate. A failed run is
    worse than any other. An entry with a single rate keeps it.

    Args:
        config: a config with `methods`.
        rows: of any runs; this config's search runs are found by their hash.
        methods: the entries to choose for (default: all).

    Raises:
        NolaVisionError: a search run has not ended yet, or all search runs of an entry failed.
    """
    searched = {(row.method, row.run_hash): row for row in count_once(rows) if row.stage == "search"}
    chosen = {}
    for method in methods if methods is not None else run_id.need(config, "methods"):
        specs = search_specs(config, [method])
        if specs:
            chosen[method] = _best_rate(searched_at(config, method), specs, searched)
        elif rates := rates_to_try(config, method):
            chosen[method] = rates[0]
    return chosen


def search_failed(config: Mapping[str, Any], rows: Iterable[Row], method: str) -> bool:
    """Whether an entry has search runs and all of them failed."""
    where = searched_at(config, method)
    failed = {row.run_hash for row in count_once(rows) if (row.method, row.status) == (where, "failed")}
    specs = search_specs(config, [method])
    return bool(specs) and all(spec.run_hash in failed for spec in specs)


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
