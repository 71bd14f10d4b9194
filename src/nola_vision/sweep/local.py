"""The local engine: runs specs one after another in this process and skips those that have a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from nola_vision.results import identity
from nola_vision.results.row import Row
from nola_vision.results.store import find_completed
from nola_vision.sweep import plan
from nola_vision.sweep.plan import RunSpec

RunFunction = Callable[[identity.Config, Path, identity.Stage], Row]
Progress = Callable[[RunSpec, Row], None]


def sweep(
    config: identity.Config,
    splits: Sequence[int],
    inits: Sequence[int],
    out: Path,
    run: RunFunction,
    progress: Progress,
) -> list[Row]:
    """Chooses the learning rate of each entry on validation images, then does the final runs.

    Args:
        config: what `plan.complete` returns, or `plan.without_search`.
        splits: the values of `data.split_seed`.
        inits: the values of `model.run_seed`.
        out: the folder of all runs.
        run: does one run, leaves its row and returns it, also where it failed.
        progress: called with each spec and its row, an old one or a new one.

    Returns:
        The rows of the final runs.
    """
    methods = list(config["methods"])
    found = execute(plan.search_specs(config, methods), out, run, progress)
    rates = plan.choose_learning_rates(config, found, methods)
    return execute(plan.final_specs(config, splits, inits, methods, rates), out, run, progress)


def execute(specs: Iterable[RunSpec], out: Path, run: RunFunction, progress: Progress) -> list[Row]:
    """Does every run that has no row of a completed run yet.

    Returns:
        One row a spec. A run that failed leaves a row that says so, and the next one starts; Ctrl-C ends the sweep.
    """
    rows = []
    for spec in specs:
        folder = identity.run_folder(out, spec.config, spec.stage)
        row = find_completed(folder) or run(spec.config, out, spec.stage)
        progress(spec, row)
        rows.append(row)
    return rows
