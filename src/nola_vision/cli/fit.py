"""`nola-vision fit|validate|test`: one run through LightningCLI, with every Lightning option open."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from nola_vision import early_checks, progress
from nola_vision.cli.options import config_options, refuse_strays
from nola_vision.config_files import load_configs
from nola_vision.errors import NolaVisionError
from nola_vision.results import identity, store

HELP = "\n".join(
    [
        "usage: nola-vision {verb} --config FILE [--method NAME] [--out DIR] [--ckpt_path FILE] [--KEY VALUE ...]",
        "",
        "  --config FILE     a config, shipped or local; may be given several times, later ones win",
        "  --method NAME     which entry of the config's `methods` (default: the config's `method`)",
        "  --out DIR         the folder of all runs (default: runs)",
        "  --ckpt_path FILE  a checkpoint to {purpose}",
        "  --allow-import P  a package whose classes the config may name, such as a callback of your own",
        "  --debug           print the traceback of an error",
        "",
        "Every key of the config is an option too, such as --data.shots 10, --model.method.rank 8 or",
        "--trainer.max_epochs 100; --print_config prints the whole config, and --help=all lists all of them.",
    ]
)


def main(arguments: Sequence[str], verb: str) -> int:
    options = config_options(verb)
    options.add_argument("--method")
    options.add_argument("--ckpt_path")
    known, rest = options.parse_known_args(arguments)
    if "-h" in rest or "--help" in rest:
        purpose = "resume from, or 'last' for this run's own" if verb == "fit" else "evaluate"
        print(HELP.format(verb=verb, purpose=purpose), flush=True)
        return 0
    rest = ["--help" if word == "--help=all" else word for word in rest]
    refuse_strays(rest, options)
    if not known.config and not rest:
        raise NolaVisionError(f"nola-vision {verb} needs a config: give --config quickstart.yaml, for one")
    config = load_configs(known.config)
    if "methods" in config:
        config = identity.resolve(config, known.method)
    elif known.method is not None:
        raise NolaVisionError(f"--method {known.method} needs a config with `methods`: give one by --config")

    if "--help" not in rest:
        early_checks.check_run(config, rest, known.ckpt_path)
    progress.say_start(verb)
    from nola_vision import run  # Lightning takes seconds to import; a mistake above should not wait for it
    from nola_vision.config import parse

    run_config = parse(config, rest, known.allow_import)
    if verb != "fit":
        run.evaluate(run_config, known.out, verb, known.ckpt_path)
        return 0
    row = run.run(run_config, known.out, ckpt_path=known.ckpt_path)
    if not run.is_main_process():
        return 0
    from nola_vision.results import tables  # pandas takes a while to import

    rows, problems = store.read_rows(Path(known.out) / row.cell)
    console = Console()
    console.print(tables.row_panel(row))
    adapter = identity.run_folder(known.out, run_config, "final") / run.ADAPTER_FILE
    if adapter.exists():
        print(f"adapter: {adapter}")
    console.print(tables.cell_table(rows, row.cell))
    for _, problem in problems:
        print(problem, file=sys.stderr)
    return 0
