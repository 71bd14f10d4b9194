"""`nola-vision sweep`: every split x init x method of a config."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nola_vision.cli.options import config_options, refuse_strays
from nola_vision.config_files import load_configs
from nola_vision.errors import NolaVisionError
from nola_vision.results import identity, store, tables
from nola_vision.results.row import Row
from nola_vision.sweep import local, plan


def main(arguments: Sequence[str], verb: str) -> int:
    options = config_options(verb, help=True)
    options.description = (
        "Chooses each method's learning rate on validation images (one split, init 0), then trains and tests every "
        "split x init x method, and prints the table. Runs that have a row are skipped, so a sweep that was stopped "
        "goes on where it was. Any key of the config may follow as an option: --data.shots 10."
    )
    options.add_argument("--splits", help="such as 0-3 or 0,2 (default: 0-3, or that of --data.manifest)")
    options.add_argument("--inits", default="0-2", help="such as 0-2 (default: 0-2)")
    options.add_argument("--methods", default="all", help="entries of the config's `methods`, or all (default)")
    known, rest = options.parse_known_args(arguments)
    refuse_strays(rest, options)
    if not known.config:
        raise NolaVisionError("a sweep needs a config: give --config quickstart.yaml, for one")
    splits, inits = plan.parse_range(known.splits or "0-3"), plan.parse_range(known.inits)
    raw = load_configs(known.config)
    methods = plan.parse_methods(known.methods, raw)

    taken = ("--method", "--model.method", "--model.run_seed", "--data.split_seed")
    for option in (word.partition("=")[0] for word in rest):
        if option in taken or option.startswith("--model.method."):
            raise NolaVisionError(
                f"{option} is the sweep's own to set: use the config's `methods`, --methods, --inits or --splits"
            )

    from nola_vision import run  # Lightning takes seconds to import; a mistake above should not wait for it
    from nola_vision.config import has_validation_images, parse
    from nola_vision.data.manifest import read_manifest

    # the sweep has a progress bar of its own, and starts a run anew rather than resume it
    own = ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    config = plan.complete(raw, methods, lambda entry: parse(entry, [*own, *rest]))
    if (path := config["data"]["manifest"]) is not None:
        held = read_manifest(path).split_seed
        if known.splits is not None and splits != [held]:
            raise NolaVisionError(f"the manifest {path} holds split {held} alone: leave --splits out")
        splits, config["data"]["split_seed"] = [held], held
    out, console = Path(known.out), Console(quiet=not run.is_main_process())
    if not has_validation_images(identity.resolve(config, methods[0])):  # what is missing is said before the first run
        console.print("classes too small for a validation pool, so every method keeps its own learning rate")
        config = plan.without_search(config)
    count = len(plan.search_specs(config, methods)) + len(plan.final_specs(config, splits, inits, methods, {}))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("sweep", total=count)

        def done(spec: plan.RunSpec, row: Row) -> None:
            bar.advance(task)
            bar.console.print(_line(spec, row), highlight=False, markup=False)

        rows = local.sweep(config, splits, inits, out, partial(run.run, keep_going=True), done)
    cell = rows[0].cell
    everything, problems = store.read_rows(out / cell)
    console.print(tables.cell_table(everything, cell))
    for path, problem in problems:
        print(f"{path}: {problem}", file=sys.stderr)
    return 1 if any(row.status != "completed" for row in rows) else 0


def _line(spec: plan.RunSpec, row: Row) -> str:
    where = f"{spec.method} split {spec.split}" + (f" init {spec.init}" if spec.init is not None else "")
    if row.status != "completed":
        return f"{where}: {row.status}, {row.error}"
    if spec.stage == "search":
        return f"{where}: learning rate {spec.learning_rate:g}, validation {100 * (row.val_accuracy or 0):.1f} %"
    return f"{where}: test {100 * (row.test_accuracy or 0):.1f} %, {row.seconds_total:.1f} s"
