"""`nola-vision configs list|show|copy`: the shipped configs, the cells of the paper's tables, and the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nola_vision.cli.options import CONFIG_DIR, Options
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import refuse_existing, write_file
from nola_vision.common.mappings import value_at
from nola_vision.common.text import printable
from nola_vision.runs.cells import KINDS, cells, part_files, with_shots
from nola_vision.runs.config_files import load_config, own_files, shipped_files, user_folder
from nola_vision.runs.yaml_files import dump


def main(arguments: Sequence[str], verb: str) -> int:
    options = Options(verb)
    options.description = "Lists the configs, prints one, or copies one to a new file."
    options.add_argument("what", choices=["list", "show", "copy"])
    options.add_argument("name", nargs="?", help="a config, such as vitl_cifar100_5shot.yaml")
    options.add_argument("file", nargs="?", help="where to copy it to (default: its name, here)")
    options.add_argument("--config-dir", metavar="DIR", help=CONFIG_DIR)
    known = options.parse_args(arguments)
    folder = user_folder(known.config_dir)
    if known.what == "list":
        if known.name:
            raise NolaVisionError(f"list takes no name: nola-vision configs show {known.name}")
        _list(folder)
        return 0
    if not known.name:
        raise NolaVisionError(f"configs {known.what} needs the name of a config: nola-vision configs list shows them")
    if known.file and known.what == "show":
        raise NolaVisionError("show takes one name: copy writes to a file")
    text = dump(load_config(known.name, folder))
    if known.what == "show":
        print(text, end="")
        return 0
    name = Path(known.name).name.removesuffix(".yaml")
    target = Path(known.file or f"{name}.yaml")
    refuse_existing(target)
    write_file(target, text.encode())
    won = ": in this folder it replaces the config of its name" if target.name.removesuffix(".yaml") == name else ""
    print(f"{printable(str(target))}: written{won}")
    return 0


def _list(folder: Path | None) -> None:
    table = Table("config", "backbone", "data set", "shots", "methods", "tables of the paper", box=None)
    own = own_files(folder)
    shipped = {name: load_config(name, folder) for name in (*own, *(path.stem for path in shipped_files()))}
    composed = {name: load_config(name, folder) for name in cells() if name not in own}
    published = {name: config for name, config in composed.items() if config["published"]}
    for name, config in {**shipped, **published}.items():
        lines = [] if name in own else config.get("published", [])
        values = [
            value_at(config, "model", "backbone", "tag"),
            value_at(config, "data", "dataset"),
            value_at(config, "data", "shots"),
            len(config.get("methods", ())),
            ", ".join(map(str, sorted({line["table"] for line in lines}))),
        ]
        texts = [f"{name}.yaml", *("" if value is None else str(value) for value in values)]
        table.add_row(*(escape(printable(text)) for text in texts))
    Console(width=max(Console().width, 140)).print(table, highlight=False)
    fixed = with_shots(folder)
    print("\nAny <backbone>_<dataset>_<k>shot or <backbone>_<dataset>_<k>shot_<protocol> is a config:")
    for kind in KINDS:
        yours = ", ".join(part_files(kind, folder).keys() - part_files(kind).keys())
        listed = [name for name in part_files(kind) if kind != "datasets" or name not in fixed]
        print(f"  {kind}: {', '.join(listed)}" + (f"; yours: {printable(yours)}" if yours else ""))
    print("<backbone>_<dataset> is a config of a data set with published training images:")
    print(f"  {printable(', '.join(fixed))}")
