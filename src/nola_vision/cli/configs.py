"""`nola-vision configs list|show|copy`: the shipped configs, and the cells of the paper's tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nola_vision.cli.options import Options
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import refuse_existing, write_file
from nola_vision.runs import config_files


def main(arguments: Sequence[str], verb: str) -> int:
    options = Options(verb)
    options.description = "Lists the shipped configs, prints one, or copies one to a file."
    options.add_argument("what", choices=["list", "show", "copy"])
    options.add_argument("name", nargs="?", help="a config, such as vitl_cifar100_5shot.yaml")
    options.add_argument("file", nargs="?", help="where to copy it to (default: its name, here)")
    known = options.parse_args(arguments)
    if known.what == "list":
        if known.name:
            raise NolaVisionError(f"list takes no name: nola-vision configs show {known.name}")
        _list()
        return 0
    if not known.name:
        raise NolaVisionError(f"configs {known.what} needs the name of a config: nola-vision configs list shows them")
    if known.file and known.what == "show":
        raise NolaVisionError("show takes one name: copy writes to a file")
    text = config_files.dump(config_files.load_config(known.name))
    if known.what == "show":
        print(text, end="")
        return 0
    name = Path(known.name).name.removesuffix(".yaml")
    target = Path(known.file or f"{name}.yaml")
    refuse_existing(target)
    write_file(target, text.encode())
    won = (
        ": in this folder it overrides the shipped config of that name"
        if target.name.removesuffix(".yaml") == name
        else ""
    )
    print(f"{target}: written{won}")
    return 0


def _list() -> None:
    table = Table("config", "backbone", "data set", "shots", "methods", "tables of the paper", box=None)
    for name in (*(path.stem for path in config_files.shipped_files()), *config_files.cells()):
        config = config_files.load_config(name)
        published = sorted({line["table"] for line in config.get("published", [])})
        if config_files.split_cell(name) and not published:
            continue
        table.add_row(
            f"{name}.yaml",
            config.get("model", {}).get("backbone", {}).get("tag", ""),
            config.get("data", {}).get("dataset", ""),
            str(config.get("data", {}).get("shots", "")),
            str(len(config["methods"])),
            ", ".join(map(str, published)),
        )
    parts = {kind: ", ".join(config_files.part_names(kind)) for kind in ("backbones", "datasets", "protocols")}
    Console(width=max(Console().width, 140)).print(table, highlight=False)
    print(
        f"\nAny <backbone>_<dataset>_<k>shot or <backbone>_<dataset>_<k>shot_<protocol> is a config:\n"
        f"  backbones: {parts['backbones']}\n  data sets: {parts['datasets']}\n  protocols: {parts['protocols']}"
    )
