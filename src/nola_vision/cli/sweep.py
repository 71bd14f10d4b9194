"""`nola-vision sweep`: every split x init x method of a config."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nola_vision.cli.options import config_options, refuse_strays, whole_number
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.progress import PlainLines, is_live, say, say_start, seconds_left, time_left
from nola_vision.common.text import printable
from nola_vision.reports.entries import summarise
from nola_vision.reports.formatting import accuracy_text
from nola_vision.reports.statistics import on_the_same_images
from nola_vision.runs import early_checks, run_id, store
from nola_vision.runs.config_files import load_configs, user_folder
from nola_vision.runs.record import Row
from nola_vision.runs.yaml_files import load_yaml
from nola_vision.sweep import plan, protocol
from nola_vision.sweep.engines import local, multi_device

# A sweep has its own progress bar, and starts a run again rather than resume it
OWN_SETTINGS = ("--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false")


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
    options.add_argument("--slots", type=whole_number, help="runs at a time, one a GPU (default: the GPUs, or 1)")
    vary = "a method's setting (rank), or the config's (data.shots)"
    options.add_argument("--vary", action="append", default=[], metavar="KEY=V1,V2", help=vary)
    options.add_argument("--engine", choices=["local", "ray"], default="local", help="where runs are done")
    options.add_argument("--address", default="auto", help="of the Ray cluster (default: the one of this machine)")
    options.add_argument("--gpus-per-run", type=float, metavar="G", help="on Ray, a fraction too (default: 1 or none)")
    options.add_argument("--shard", default="1/1", metavar="I/N", help="do one of N parts of the runs")
    options.add_argument(
        "--dry-run", action="store_true", help="print the plan, and how long it takes after first runs"
    )
    known, rest = options.parse_known_args(arguments)
    if known.slots == 0:
        raise NolaVisionError("slots is 0: give at least 1, the number of runs at a time")
    refuse_strays(rest, options)
    if known.engine == "local" and (known.address != "auto" or known.gpus_per_run is not None):
        raise NolaVisionError("--address and --gpus-per-run are for --engine ray: give that too")
    if not known.config:
        raise NolaVisionError("a sweep needs a config: give --config quickstart.yaml, for one")
    splits, inits = plan.parse_range("0-3" if known.splits is None else known.splits), plan.parse_range(known.inits)
    shard = plan.parse_shard(known.shard)
    raw = load_configs(known.config, user_folder(known.config_dir))
    methods = plan.parse_methods(known.methods, raw)

    varied = [_varied(text) for text in known.vary]
    of_config = [[(key, value) for value in values] for key, values in varied if "." in key]
    taken = ("--method", "--model.method", "--model.run_seed", "--data.split_seed")
    for option in [word.partition("=")[0] for word in rest] + [f"--{key}" for key, _ in varied if "." in key]:
        if option in taken or option.startswith("--model.method."):
            raise NolaVisionError(
                f"{option} is the sweep's own to set: use the config's `methods`, --methods, --inits or --splits"
            )

    for key, values in varied:
        if "." not in key:
            raw, methods = plan.vary(raw, methods, key, values, _takes)
    for name in methods:
        early_checks.check_run(run_id.resolve(raw, name), rest)
    say_start(verb)
    status = 0
    for settings in itertools.product(*of_config):
        named, names = plan.rename(raw, methods, "".join(plan.suffix(*setting) for setting in settings))
        changed = [f"--{key}={_option(value)}" for key, value in settings]
        status = max(status, _sweep(known, named, names, [*OWN_SETTINGS, *rest, *changed], splits, inits, shard))
    return status


def _sweep(
    known: argparse.Namespace,
    raw: run_id.Config,
    methods: Sequence[str],
    settings: Sequence[str],
    splits: Sequence[int],
    inits: Sequence[int],
    shard: tuple[int, int],
) -> int:
    """One sweep: the plan, the runs, the table; returns the exit status."""
    # Lightning takes seconds to import; a mistake before this should not wait for it
    from nola_vision.data.manifest import read_manifest
    from nola_vision.runs.parsing import has_validation_images, parse

    config = plan.complete(raw, methods, lambda entry: parse(entry, list(settings), known.allow_import))
    if (path := config["data"]["manifest"]) is not None:
        held = read_manifest(path).split_seed
        if known.splits is not None and splits != [held]:
            raise NolaVisionError(f"the manifest {path} holds split {held} alone: leave --splits out")
        splits, config["data"]["split_seed"] = [held], held
    out, console = Path(known.out), Console()
    if not has_validation_images(run_id.resolve(config, methods[0])):  # what is missing is said before the first run
        console.print("there is no validation pool, so every method keeps its own learning rate")
        config = plan.without_search(config)
    if config["trainer"]["num_nodes"] != 1:
        raise NolaVisionError("a sweep's run takes one machine: leave --trainer.num_nodes to `nola-vision fit`")
    on_ray = known.engine == "ray"
    if on_ray and not _one_device(config["trainer"]):
        raise NolaVisionError("on Ray each run has one device: leave --trainer.devices out")
    slots, gpus = (known.slots, []) if on_ray else _slots(known.slots, config["trainer"])
    cell = run_id.cell_name(run_id.resolve(config, methods[0]))
    at_a_time = slots if on_ray else slots or 1
    console.print(_outlook(plan.outlook(config, splits, inits, _rows(out / cell), shard), at_a_time, shard))
    if known.dry_run:
        return 0
    planned = [
        *plan.search_specs(config, methods),
        *plan.part(plan.final_specs(config, splits, inits, methods, {}), shard),
    ]
    left, count, live, lines = Counter(spec.method for spec in planned), len(planned), is_live(), PlainLines()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not live) as bar:
        task = bar.add_task("", total=count)
        ended: list[Row] = []
        running: set[tuple[str, str]] = set()

        def note(spec: plan.RunSpec, row: Row | None) -> None:
            if row is None:
                running.add(spec.key)
            else:
                running.discard(spec.key)
                ended.append(row)
                left[spec.method] -= 1
                bar.console.print(_line(spec, row), highlight=False, markup=False, soft_wrap=not live)
            state = _state(ended, len(running), left, at_a_time)
            bar.update(task, completed=len(ended), description=state)
            if not live:
                lines.say(lambda: f"{len(ended)} of {count} runs ended, {state}")

        def execute(specs: Sequence[plan.RunSpec]) -> list[Row]:
            if on_ray:
                from nola_vision.sweep.engines import ray_cluster

                return ray_cluster.execute(specs, out, note, known.address, slots, known.gpus_per_run)
            if slots:
                return local.execute(specs, out, note, slots, gpus)
            return multi_device.execute(specs, out, note)

        if not live:
            say(f"{count} runs start")
        rows = protocol.sweep(config, splits, inits, execute, shard)
    from nola_vision.reports.cell import cell_of  # scipy takes a while to import
    from nola_vision.reports.terminal import cell_report

    everything, problems = store.read_rows(out / cell)
    same, left_out = on_the_same_images(everything, rows[0] if rows else None)
    found = cell_of(same, cell)
    console.print(cell_report(found))
    for problem in (*(problem for _, problem in problems), *found.verdict[1], *left_out):
        print(problem, file=sys.stderr)
    return 1 if any(row.status != "completed" for row in rows) else 0


def _varied(text: str) -> tuple[str, list[Any]]:
    """`rank=1,4` as a setting and its values."""
    key, equals, values = text.partition("=")
    if not key or not equals or not values:
        raise NolaVisionError(f"--vary {text} is no setting with values: write it like --vary rank=1,4,16")
    try:
        return key, list(load_yaml(f"[{values}]"))
    except yaml.YAMLError as error:
        raise NolaVisionError(f"the values of --vary {text} are no YAML: write them like rank=1,4,16") from error


def _option(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _takes(class_name: str, key: str) -> bool:
    from nola_vision.adapters.methods.registry import METHODS

    return key in [field.name for field in dataclasses.fields(METHODS[class_name])] if class_name in METHODS else False


def _slots(asked: int | None, trainer: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Runs at a time, and the GPUs they may have, as CUDA_VISIBLE_DEVICES names them.

    No slot where a run takes several devices: Lightning starts its processes from this one.
    """
    import torch

    if not _one_device(trainer):
        return 0, []
    if trainer["accelerator"] not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return asked or 1, []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    return asked or len(gpus), gpus


def _one_device(trainer: Mapping[str, Any]) -> bool:
    return trainer["devices"] in ("auto", "1", 1)


def _rows(folder: Path) -> list[Row]:
    """The rows of a cell so far; a file that is none is named before the first run, not when that run is reached."""
    rows, problems = store.read_rows(folder) if folder.is_dir() else ([], [])
    if problems:
        raise NolaVisionError("; ".join(problem for _, problem in problems[:5]))
    return rows


def _outlook(lines: Sequence[plan.Outlook], slots: int | None, shard: tuple[int, int]) -> Table:
    """The plan as a table: runs of each method, those that are done, and the time that the others take.

    `slots` is None where it takes as many at a time as a cluster has room for.
    """
    table = Table("method", "search runs", "final runs", "done", "seconds a run", box=None)
    for line in lines:
        seconds = "-" if line.seconds is None else f"{line.seconds:.1f}"
        table.add_row(line.method, str(line.search), str(line.final), str(line.done), seconds)
    runs, done = sum(line.search + line.final for line in lines), sum(line.done for line in lines)
    told = f"{runs} runs, {done} done"
    left = {line.method: line.search + line.final - line.done for line in lines}
    finished = {line.method: [line.seconds] for line in lines if line.seconds is not None}
    if (rest := seconds_left(left, finished, slots or 1)) is not None:
        told += f"; {time_left(rest)} {f'with {slots} at a time' if slots else 'one after another'}"
    table.caption = told + (f"; of the final runs this is shard {shard[0]} of {shard[1]}" if shard[1] > 1 else "")
    return table


def _state(ended: Sequence[Row], running: int, left: Mapping[str, int], workers: int | None) -> str:
    """How a sweep goes: runs at work, failed ones, the best mean so far, and how long the runs that are left take.

    `workers` is None where it takes as many at a time as a cluster has room for: then it is those at work.
    """
    parts = [f"{running} running"]
    if failed := sum(row.status != "completed" for row in ended):
        parts.append(f"{failed} failed")
    best = max((s for s in summarise(ended) if s.mean is not None), key=lambda s: s.mean or 0, default=None)
    if best is not None:
        parts.append(f"best {best.label} {best.mean:.1f} % (n = {best.completed})")
    finished: dict[str, list[float]] = defaultdict(list)
    for row in ended:
        if row.status == "completed" and row.seconds_total is not None:
            finished[row.method].append(row.seconds_total)
    if sum(left.values()) and (seconds := seconds_left(left, finished, workers or running)) is not None:
        parts.append(time_left(seconds))
    return ", ".join(parts)


def _line(spec: plan.RunSpec, row: Row) -> str:
    where = f"{spec.method} split {spec.split}" + (f" init {spec.init}" if spec.init is not None else "")
    if row.status != "completed":
        return printable(f"{where}: {row.status}, {row.error}")
    if spec.stage == "search":
        return f"{where}: learning rate {spec.learning_rate:g}, validation {100 * (row.val_accuracy or 0):.1f} %"
    return f"{where}: {accuracy_text(row)}, {row.seconds_total:.1f} s"
