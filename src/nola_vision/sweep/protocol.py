"""What a sweep does, whatever engine does its runs: it chooses learning rates on validation images, then goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nola_vision.runs import run_id
from nola_vision.runs.record import Row
from nola_vision.sweep import plan
from nola_vision.sweep.plan import RunSpec

Execute = Callable[[Sequence[RunSpec]], list[Row]]


def sweep(
    config: run_id.Config,
    splits: Sequence[int],
    inits: Sequence[int],
    execute: Execute,
    shard: tuple[int, int] = (1, 1),
) -> list[Row]:
    """Chooses the learning rate of each entry on validation images, then does the final runs.

    Args:
        config: what `plan.complete` returns, or `plan.without_search`.
        splits: the values of `data.split_seed`.
        inits: the values of `model.run_seed`.
        execute: an engine: it does every run that has no row of a completed run yet, and returns a row for each.
        shard: only this part of the final runs. All shards search; where they share a folder, they share that work.

    Returns:
        The rows of the final runs; of an entry whose search runs all failed, which has no final run, those instead.
    """
    methods = list(config["methods"])
    found = execute(plan.search_specs(config, methods))
    failed = [method for method in methods if plan.search_failed(config, found, method)]
    kept = [method for method in methods if method not in failed]
    rates = plan.choose_learning_rates(config, found, kept)
    rows = execute(plan.part(plan.final_specs(config, splits, inits, kept, rates), shard))
    return [*(row for row in found if row.method in failed), *rows]
