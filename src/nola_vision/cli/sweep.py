"""`nola-vision sweep`: every split x init x method of a config."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from nola_vision.cli.options import (
    accelerator,
    apply_no_cache,
    config_options,
    parse_budgets,
    parse_methods,
    parse_range,
    parse_shard,
    refuse_strays,
    whole_number,
)
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.progress import say_aside, say_start
from nola_vision.reports.entries import summarise
from nola_vision.reports.formatting import accuracy_text
from nola_vision.reports.statistics import on_the_same_images
from nola_vision.runs import early_checks, run_id, store
from nola_vision.runs.config_files import load_configs, user_folder
from nola_vision.runs.record import Row
from nola_vision.runs.yaml_files import load_yaml
from nola_vision.sweep import budget_entries, runner, variations
from nola_vision.sweep.display import SweepDisplay, plan_table, threads_warning
from nola_vision.sweep.engines import local

_SET_BY_SWEEP = ("--method", "--model.method", "--model.run_seed", "--data.split_seed")


def main(arguments: Sequence[str], verb: str) -> int:
    options = _options()
    known, rest = options.parse_known_args(arguments)
    if known.workers == 0:
        raise NolaVisionError("--workers is 0: give at least 1, the number of runs at a time")
    refuse_strays(rest, options)
    if known.basis_seed is not None:
        rest.append(f"--model.basis_seed={known.basis_seed}")
    apply_no_cache(known)
    if known.engine == "local" and (known.address != "auto" or known.gpus_per_run is not None):
        raise NolaVisionError("--address and --gpus-per-run are for --engine ray: give that too")
    if not known.config:
        raise NolaVisionError("a sweep needs a config, for example --config quickstart.yaml")
    splits = None if known.splits is None else parse_range(known.splits)
    inits, shard = parse_range(known.inits), parse_shard(known.shard)
    raw = load_configs(known.config, user_folder(known.config_dir))
    methods = parse_methods(known.methods, raw)

    varied = [_varied(text) for text in known.vary]
    of_config = [[(key, value) for value in values] for key, values in varied if "." in key]
    for option in [word.partition("=")[0] for word in rest] + [f"--{key}" for key, _ in varied if "." in key]:
        if option in _SET_BY_SWEEP or option.startswith("--model.method."):
            raise NolaVisionError(
                f"{option} is set by the sweep: use the config's `methods`, --methods, --inits or --splits"
            )

    if any("." not in key for key, _ in varied):
        _import_plugins(raw, methods, known.allow_import)
    for key, values in varied:
        if "." not in key:
            raw, methods = variations.vary(raw, methods, key, values)
    methods = budget_entries.expand(raw, methods, None if known.budgets is None else parse_budgets(known.budgets))
    for name in methods:
        early_checks.check_run(run_id.resolve(raw, name), rest)
    say_start(verb)
    if known.engine == "local" and accelerator(raw, rest) == "cpu" and not known.dry_run and "torch" not in sys.modules:
        local.import_ahead()  # on another core, while this process imports the same
    status, fastest, warned = 0, _fastest(known), set[str]()
    for settings in itertools.product(*of_config):
        suffix = "".join(variations.suffix(*setting) for setting in settings)
        named, names = variations.rename(raw, methods, suffix)
        changed = [f"--{key}={_option(value)}" for key, value in settings]
        sweep = runner.prepare(named, names, [*rest, *changed], known.allow_import, splits, inits, shard, fastest)
        status = max(status, _run(sweep, known, warned))
    return status


def _options() -> argparse.ArgumentParser:
    options = config_options("sweep", help=True)
    options.description = (
        "Chooses each method's searched settings on validation images (one split, init 0), then trains and tests every "
        "split x init x method, and prints the table. Completed runs are skipped, so the same command resumes a sweep "
        "that was stopped. Any key of the config may follow as an option: --data.shots 10."
    )
    options.add_argument("--splits", help="such as 0-3 or 0,2 (default: 0-3, or that of --data.manifest)")
    options.add_argument("--inits", default="0-2", help="such as 0-2 (default: 0-2)")
    shared = "one random basis for all inits, which a bank of adapters then holds once (default: one per init)"
    options.add_argument("--basis-seed", type=whole_number, metavar="SEED", help=shared)
    options.add_argument("--methods", default="all", help="entries of the config's `methods`, or all (default)")
    sizes = "such as 10KB,20KB: of the entries with `budgets`, only these (default: all)"
    options.add_argument("--budgets", metavar="SIZE,...", help=sizes)
    workers = "runs at a time (default: one per GPU; 1 on the CPU)"
    options.add_argument("--workers", type=whole_number, metavar="N", help=workers)
    vary = "a method's setting (rank), or the config's (data.shots)"
    options.add_argument("--vary", action="append", default=[], metavar="KEY=V1,V2", help=vary)
    options.add_argument("--engine", choices=["local", "ray"], default="local", help="where runs are executed")
    options.add_argument("--address", default="auto", help="of the Ray cluster (default: the one of this machine)")
    options.add_argument(
        "--gpus-per-run", type=float, metavar="G", help="on Ray, a fraction too (default: 1 if it has any)"
    )
    options.add_argument("--shard", default="1/1", metavar="I/N", help="do one of N parts of the runs")
    options.add_argument(
        "--dry-run", action="store_true", help="print the plan, and estimate the time from a few timed steps"
    )
    return options


def _run(sweep: runner.Sweep, known: argparse.Namespace, warned: set[str]) -> int:
    """Prints the plan of a sweep, its progress and its tables, and each warning once; returns the exit status."""
    out, console = Path(known.out), Console()
    if not sweep.searches:
        console.print("there is no validation pool, so nothing is searched: every method keeps its own settings")
    trainer = sweep.config["trainer"]
    if known.engine == "ray":
        engine = runner.ray_engine(trainer, known.workers, known.address, known.gpus_per_run)
    else:
        engine = runner.local_engine(trainer, known.workers)
    entries, shared = sweep.progress(out), 0.0
    if known.dry_run and engine.name != "ray" and any(entry.seconds is None and entry.left for entry in entries):
        say_aside("timing a few steps of each method, for about a minute after building and decoding")
        entries, shared = sweep.timed(entries)
    console.print(plan_table(entries, engine.workers, sweep.shard, shared, sweep.sizes()))
    for line in (*sweep.notes, *(f"{name} is not run: {why.reason}" for name, why in sweep.not_run.items())):
        console.print(line, highlight=False, markup=False)
    if engine.name == "local" and not engine.gpus and (warning := _too_many_threads(sweep, engine.workers or 1)):
        if warning not in warned:
            say_aside(warning)
        warned.add(warning)
    if known.dry_run:
        return 0
    sweep.note_not_run(out)
    with SweepDisplay(sweep.planned(), engine.workers, console, accuracy_text, _best) as display:
        rows = sweep.run(lambda specs: engine.execute(specs, out, display.update), display.say)
    from nola_vision.reports.cell import cell_of  # scipy takes a while to import
    from nola_vision.reports.terminal import cell_report

    everything, problems = store.read_rows(out / sweep.cell)
    same, left_out = on_the_same_images(everything, rows[0] if rows else None)
    cell = cell_of(same, sweep.cell)
    console.print(cell_report(cell))
    for problem in (*(problem for _, problem in problems), *cell.verdict[1], *left_out):
        print(problem, file=sys.stderr)
    return 1 if any(row.status != "completed" for row in rows) else 0


def _too_many_threads(sweep: runner.Sweep, workers: int) -> str | None:
    """The warning if the workers have more threads than this process may use cores."""
    import torch
    from joblib import cpu_count

    return threads_warning(workers, sweep.config["threads"] or torch.get_num_threads(), cpu_count())


def _fastest(known: argparse.Namespace) -> Callable[[Any], str] | None:
    """What `trainer.precision: auto` asks, where it is not this machine; a cluster is asked once."""
    if known.engine != "ray":
        return None
    from nola_vision.sweep.engines.ray import fastest_precision

    return cache(partial(fastest_precision, address=known.address, gpus=known.gpus_per_run))


def _best(rows: Sequence[Row]) -> str:
    """The entry with the highest mean so far: `best nola 93.2 % (n = 3)`; empty before the first accuracy."""
    best = max((s for s in summarise(rows) if s.mean is not None), key=lambda s: s.mean or 0, default=None)
    return "" if best is None else f"best {best.label} {best.mean:.1f} % (n = {best.completed})"


def _varied(text: str) -> tuple[str, list[Any]]:
    """Parses `rank=1,4` as a setting and its values."""
    key, equals, values = text.partition("=")
    if not key or not equals or not values:
        raise NolaVisionError(f"--vary {text} is not a setting with values: write it like --vary rank=1,4,16")
    try:
        return key, list(load_yaml(f"[{values}]"))
    except yaml.YAMLError as error:
        raise NolaVisionError(f"the values of --vary {text} are not YAML: write them like rank=1,4,16") from error


def _option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _import_plugins(config: Mapping[str, Any], methods: Sequence[str], packages: Sequence[str]) -> None:
    """Makes the methods of other packages known, so that `variations.vary` knows their settings."""
    for name in methods:
        path = run_id.entry(config, name)["class_path"]
        if "." in path and not path.startswith("nola_vision."):
            from nola_vision.runs.import_policy import register_method  # imports Lightning

            register_method(path, packages)
