"""`nola-vision fit|validate|test`: one run, with frozen features to compare it with, and the verdict."""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nola_vision.cli.options import (
    Options,
    accelerator,
    add_photo_options,
    apply_no_cache,
    config_options,
    photo_settings,
    refuse_strays,
    refuse_without_photos,
    take_photos,
)
from nola_vision.common import process_cache, stopwatch
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.imports import without_collections
from nola_vision.common.progress import say, say_start
from nola_vision.runs import early_checks, photos, run_id
from nola_vision.runs.config_files import load_configs, user_folder

if TYPE_CHECKING:
    from nola_vision.runs.record import Row

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
    apply_no_cache(known)
    raw = config = _config(known, place, rest, verb)
    if "methods" in config:
        config = run_id.resolve(config, known.method)
    elif known.method is not None:
        raise NolaVisionError(f"--method {known.method} needs a config with `methods`: give one by --config")

    if "--help" not in rest:
        early_checks.check_run(config, rest, known.ckpt_path)
    say_start(verb)
    with without_collections():
        from nola_vision.runs import checkpoints
        from nola_vision.runs.parsing import parse
    if place is not None:
        config = photos.for_this_machine(config, accelerator(config, rest))

    run_config = parse(config, rest, known.allow_import, keep_budget=verb == "fit")  # `fit` searches within it
    if run_config["data"]["fold"] is not None or run_config["data"]["hold_out"]:
        raise NolaVisionError(
            "data.fold and data.hold_out are set by `fit` for the runs of an estimate: leave them out"
        )
    if verb != "fit":
        checkpoints.evaluate(run_config, known.out, verb, known.ckpt_path)
        return 0
    stopwatch.started()
    with process_cache.keeping():  # all runs share the images and the backbone
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
    estimate = (
        "'folds' trains on each fold, however long it takes; 'none' skips it (default: folds if under 10 minutes)"
    )
    options.add_argument("--estimate", choices=("folds", "none"), help=f"without a test split. {estimate}")
    options.add_argument(
        "--search", action="store_true", help="choose among the settings of the entry's `search`, on held-out images"
    )
    options.add_argument("--again", action="store_true", help="repeat a completed run")
    add_photo_options(options)
    return options


def _config(known: argparse.Namespace, place: str | None, rest: Sequence[str], verb: str) -> run_id.Config:
    """The config that --config names, or that of PHOTOS."""
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
            f"both '{place}' and --config are given: `nola-vision init {place}` writes a config for it"
        )
    return photos.config(place, **photo_settings(known))


def _fit(run_config: run_id.Config, raw: run_id.Config, known: argparse.Namespace, words: Sequence[str]) -> int:
    """Does the runs of `fit` and prints the result, the table, the verdict and the next commands."""
    from rich.console import Console

    from nola_vision.reports.cell import cell_of
    from nola_vision.reports.formatting import accuracy_text
    from nola_vision.reports.statistics import on_the_same_images
    from nola_vision.reports.terminal import cell_table, row_panel
    from nola_vision.reports.verdict import run_verdict
    from nola_vision.runs import store
    from nola_vision.runs.fit import fit

    out, console = Path(known.out), Console()
    fitted = fit(
        run_config,
        raw,
        out,
        accuracy_text,
        ckpt_path=known.ckpt_path,
        again=known.again,
        search=known.search,
        estimate=known.estimate,
        allow_import=known.allow_import,
    )
    if fitted is None:
        return 0
    row = fitted.row
    rows, problems = store.read_rows(out / row.cell)
    rows, left_out = on_the_same_images(rows, row)
    console.print(row_panel(row))
    console.print(cell_table(cell_of(rows, row.cell)))
    lines, unusable = run_verdict(row, fitted.frozen)
    for line in lines:
        print(textwrap.fill(line, console.width))
    print(textwrap.fill(f"Seconds: {stopwatch.summary()}.", console.width))
    skipped = shlex.join(["nola-vision", *words, "--estimate", "folds"]) if fitted.skipped else None
    for command in _next_commands(row, skipped, out):  # not wrapped: a copy from the terminal joins the line again
        print(f"Next: {command}")
    for problem in (*unusable, *(problem for _, problem in problems), *left_out):
        print(problem, file=sys.stderr)
    return 0


def _next_commands(row: Row, skipped: str | None, out: Path) -> list[str]:
    """The commands to suggest: the skipped folds, the use of the adapter, and the report page."""
    from nola_vision.adapters.methods.registry import METHODS, plugins
    from nola_vision.runs.store import ADAPTER_FILE

    commands = [skipped] if skipped else []
    adapter = row.folder / ADAPTER_FILE if row.folder else None
    if adapter is not None and adapter.is_file():
        predict = f"nola-vision predict --adapter {shlex.quote(str(adapter))} IMAGES"
        if not METHODS[row.method_class].__module__.startswith("nola_vision.") and row.method_class not in plugins():
            say(f"to use the adapter, install the package of {row.method_class} as a plug-in (docs/own-method.md)")
        commands.append(predict)
    return [*commands, shlex.join(["nola-vision", "report", str(out), "--open"])]
