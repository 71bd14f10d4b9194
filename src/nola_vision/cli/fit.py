"""`nola-vision fit|validate|test`: what frozen features can do, one run through LightningCLI, and the verdict."""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nola_vision.cli.options import (
    Options,
    add_photo_options,
    config_options,
    photo_settings,
    refuse_strays,
    refuse_without_photos,
    take_photos,
)
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.progress import duration, say, say_start, time_left
from nola_vision.common.text import printable
from nola_vision.runs import early_checks, photos, run_id
from nola_vision.runs.config_files import load_configs, user_folder

if TYPE_CHECKING:
    from nola_vision.data.datamodule import KShotDataModule
    from nola_vision.runs.record import Row

LONGEST_ESTIMATE = 600.0  # seconds that the folds may take unless they are asked for

_EPILOG = """Every key of the config is an option too, such as --data.shots 10, --model.method.rank 8 or
--trainer.max_epochs 100; --print_config prints the whole config, and --help=all lists all of them.
"""


def main(arguments: Sequence[str], verb: str) -> int:
    options = _options(verb)
    known, rest = options.parse_known_args(arguments)
    if "-h" in rest or "--help" in rest:
        print(options.format_help(), flush=True)
        return 0
    rest = ["--help" if word == "--help=all" else word for word in rest]
    place, rest = take_photos(rest) if verb == "fit" else (None, rest)
    refuse_strays(rest, options)
    raw = config = _config(known, place, rest, verb)
    if "methods" in config:
        config = run_id.resolve(config, known.method)
    elif known.method is not None:
        raise NolaVisionError(f"--method {known.method} needs a config with `methods`: give one by --config")

    if "--help" not in rest:
        early_checks.check_run(config, rest, known.ckpt_path)
    say_start(verb)
    from nola_vision.runs import runner  # Lightning takes seconds to import; a mistake above should not wait for it
    from nola_vision.runs.parsing import parse

    run_config = parse(config, rest, known.allow_import)
    if run_config["data"]["fold"] is not None or run_config["data"]["hold_out"]:
        raise NolaVisionError(
            "data.fold and data.hold_out are what `fit` sets for the runs of an estimate: leave them out"
        )
    if verb != "fit":
        runner.evaluate(run_config, known.out, verb, known.ckpt_path)
        return 0
    from nola_vision.common import process_cache

    with process_cache.keeping():  # all runs here share their images and the backbone
        return _fit(run_config, raw, known, [verb, *arguments])


def _options(verb: str) -> Options:
    options = config_options(verb)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.epilog = _EPILOG
    options.usage = f"nola-vision {verb} --config FILE [options] [--KEY VALUE ...]"
    purpose = "resume from, or 'last' for this run's own" if verb == "fit" else "evaluate"
    options.add_argument("--ckpt_path", metavar="FILE", help=f"a checkpoint to {purpose}")
    if verb != "fit":
        options.add_argument("--method", metavar="NAME", help="entry of the config's `methods`")
        return options
    options.usage = f"nola-vision fit PHOTOS [options] [--KEY VALUE ...]\n       {options.usage}"
    options.description = f"PHOTOS: {photos.PHOTOS}"
    estimate = "folds: train on each fold, whatever it takes; none (default: unless it takes over 10 minutes)"
    options.add_argument("--estimate", choices=("folds", "none"), help=f"without a test split. {estimate}")
    options.add_argument(
        "--search", action="store_true", help="choose among the entry's learning_rates, on held-out images"
    )
    options.add_argument("--again", action="store_true", help="repeat a run that is completed")
    add_photo_options(options)
    return options


def _config(known: argparse.Namespace, place: str | None, rest: Sequence[str], verb: str) -> run_id.Config:
    """The config that PHOTOS or --config stand for."""
    if place is None:
        if verb == "fit":
            refuse_without_photos(known)
        if not known.config and not rest:
            start = (
                "a folder of photos, or --config quickstart.yaml" if verb == "fit" else "a config: give --config FILE"
            )
            raise NolaVisionError(f"nola-vision {verb} needs {start}")
        return load_configs(known.config, user_folder(known.config_dir))
    if known.config:
        raise NolaVisionError(
            f"both '{place}' and --config are given: `nola-vision init {place}` writes a config of it"
        )
    return photos.config(place, **photo_settings(known))


def _fit(run_config: run_id.Config, raw: run_id.Config, known: argparse.Namespace, words: Sequence[str]) -> int:
    """The run of a config: frozen features first, then the folds if there are any, the final run, and the verdict."""
    import torch
    from rich.console import Console

    from nola_vision.reports.cell import cell_of
    from nola_vision.reports.statistics import on_the_same_images
    from nola_vision.reports.terminal import cell_table, row_panel
    from nola_vision.reports.verdict import run_verdict
    from nola_vision.runs import cross_validation, runner, store
    from nola_vision.runs.parsing import open_data

    if run_config["trainer"]["accelerator"] in ("cuda", "gpu") and not torch.cuda.is_available():
        raise NolaVisionError("there is no CUDA device here: leave --device (--trainer.accelerator) out, or give cpu")
    main, out, console = runner.is_main_process(run_config), Path(known.out), Console()
    options: dict[str, Any] = {"ckpt_path": known.ckpt_path, "again": known.again}
    rates = _learning_rates(raw, run_config) if known.search else []
    data = open_data(run_config)
    if main:
        say(_summary(run_config, data))
    folds = cross_validation.number_of_folds(run_config, data) if known.estimate != "none" else 0
    if run_id.has_init(run_config) and data.number_of_folds and not folds and known.estimate != "none":
        if known.estimate == "folds":
            raise NolaVisionError("folds are trained on one device: leave --trainer.devices out, or --estimate folds")
        if main:
            say("the adapter gets no estimate: folds are trained on one device, and this run has several")
    folder = run_id.run_folder(out, run_config, "final")
    store.refuse_other_things(folder)
    done = None if known.again or rates else runner.completed_row(folder)
    settled = done is not None and (not folds or done.estimate is not None)
    if main and settled:
        say(f"this run is completed: --again repeats it ({folder})")
    frozen: list[Row] = []
    if main and run_id.has_init(run_config):
        if done is None and run_config["model"]["backbone"]["base"] == "pretrained":
            runner.check(run_config, known.ckpt_path)
        frozen = _frozen_rows(run_config, raw, known)
    pending, skipped = list(range(folds)), None
    if settled:
        folds = 0
    elif folds:
        if not known.again and not rates:
            pending = cross_validation.pending_folds(run_config, out, folds)
        if skipped := _too_long(run_config, known, rates, folds, len(pending), words):
            folds = 0
    clock = time.monotonic()

    def note(fold: int, row: Row) -> None:
        correct = round((row.test_accuracy or 0) * row.data["counts"]["test"])
        left = [one for one in pending if one > fold]
        seconds = (time.monotonic() - clock) / max(1, len(pending) - len(left)) * len(left)
        more = f"; {time_left(seconds)}" if left and fold in pending else ""
        say(f"fold {fold + 1} of {folds}: {correct} of its {row.data['counts']['test']} images right{more}")

    row = cross_validation.run_with_estimate(
        run_config, out, learning_rates=rates, note=note if main else None, folds=folds, **options
    )
    if not main:
        return 0
    rows, problems = store.read_rows(out / row.cell)
    rows, left_out = on_the_same_images(rows, row)
    console.print(row_panel(row))
    console.print(cell_table(cell_of(rows, row.cell)))
    lines, unusable = run_verdict(row, frozen)
    for line in lines:
        print(textwrap.fill(line, console.width))
    for command in _next_commands(row, skipped, out):  # a terminal that breaks a line joins it again when it is copied
        print(f"Next: {command}")
    for problem in (*unusable, *(problem for _, problem in problems), *left_out):
        print(problem, file=sys.stderr)
    return 0


def _summary(run_config: run_id.Config, data: KShotDataModule) -> str:
    """What is about to happen, in one line."""
    described = data.describe()
    classes, images = len(described["class_names"]), described["counts"]["train"]
    if data.has_test:
        tested = f"tested on {data.test_name} images"
    elif data.number_of_folds:
        tested = f"no test images, so accuracy is estimated by {data.number_of_folds} folds"
    else:
        tested = "no test images, and no class has two distinct ones to estimate an accuracy with"
    spec = run_config["model"]["backbone"]
    backbone = f"{spec['tag']} at {described['transform']['size']} pixels"
    backbone += f", weights of {printable(Path(spec['file']).name)}" if spec["file"] else ""
    return f"{images:,} training images of {classes} classes, {tested}; backbone {backbone}"


def _learning_rates(raw: run_id.Config, run_config: run_id.Config) -> list[float]:
    """The learning rates of the entry, for --search."""
    entry = raw.get("methods", {}).get(run_config["method"]) or {}
    rates = [float(rate) for rate in entry.get("learning_rates") or []]
    if len(rates) < 2:
        raise NolaVisionError(
            f"--search has nothing to choose from: give {run_config['method']} several `learning_rates` in the config"
        )
    return rates


def _frozen_rows(run_config: run_id.Config, raw: run_id.Config, known: argparse.Namespace) -> list[Row]:
    """The rows of the methods on frozen features, each printed when it is known."""
    from nola_vision.reports.formatting import accuracy_text
    from nola_vision.runs import runner
    from nola_vision.runs.parsing import parse

    if run_config["model"]["backbone"]["base"] != "pretrained":
        return []
    say("accuracy with frozen features, without an adapter:")
    rows = []
    for name, class_name in run_id.FROZEN_METHODS.items():
        entries = {key: entry for key, entry in raw.get("methods", {}).items() if _class_of(entry) == class_name}
        name, entry = next(iter(entries.items()), (name, {"class_path": class_name}))
        method = {"class_path": class_name, "init_args": entry.get("init_args") or {}}
        one = {key: value for key, value in run_config.items() if key not in ("content", "allow_import")}
        # one device and no callbacks: those of the run may need epochs
        trainer = {
            **one["trainer"],
            "devices": 1,
            "num_nodes": 1,
            "strategy": "auto",
            "callbacks": None,
            "logger": None,
        }
        model = {key: value for key, value in one["model"].items() if key != "optimizer"}
        one |= {"method": name, "model": {**model, "method": method}, "trainer": trainer}
        rows.append(runner.run(parse(one, [], known.allow_import), known.out, again=known.again))
        say(f"  {printable(name):14s}{accuracy_text(rows[-1])}")
    return rows


def _class_of(entry: dict[str, Any]) -> str:
    return str(entry["class_path"]).rpartition(".")[2]


def _too_long(
    run_config: run_id.Config,
    known: argparse.Namespace,
    rates: Sequence[float],
    folds: int,
    pending: int,
    words: Sequence[str],
) -> str | None:
    """Says how long the folds and the last training will take; returns the command for later if the folds are skipped.

    Args:
        folds: how many there are.
        pending: how many of them were not completed before.
    """
    from nola_vision.runs import cross_validation

    if not pending:
        return None
    each = cross_validation.training_seconds(run_config) * (1 + len(rates))
    total = each * pending * (folds - 1) / folds  # every fold leaves out one part of the images
    if known.estimate is None and total > LONGEST_ESTIMATE:
        command = shlex.join(["nola-vision", *words, "--estimate", "folds"])
        say(f"{folds} folds would take {duration(total)}, so the adapter gets no estimate now")
        return command
    say(f"{run_config['method']}: {pending} folds in about {duration(total)}, then all images in {duration(each)}")
    return None


def _next_commands(row: Row, skipped: str | None, out: Path) -> list[str]:
    """What to type next: the folds that were skipped, the use of the adapter, and the page."""
    from nola_vision.runs.runner import ADAPTER_FILE

    commands = [skipped] if skipped else []
    adapter = row.folder / ADAPTER_FILE if row.folder else None
    if adapter is not None and adapter.is_file():
        commands.append(f"nola-vision predict --adapter {shlex.quote(str(adapter))} IMAGES")
    return [*commands, shlex.join(["nola-vision", "report", str(out), "--open"])]
