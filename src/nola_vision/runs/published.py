"""Published figures: those of the NOLA paper, all as a data frame and those of a cell; and those on VTAB-1k."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd


VTAB_BACKBONE = "vit_base_patch16_224.orig_in21k"  # of the published results on VTAB-1k


class PublishedVtab(NamedTuple):
    """A published result on VTAB-1k.

    `mean` is the mean of the three groups' mean top-1 accuracies in per cent, `kib` the size of the whole file with its
    head per task, and `note` a reason to doubt the figure, or empty.
    """

    name: str
    kib: float
    mean: float
    source: str
    note: str


def published_vtab() -> list[PublishedVtab]:
    """The published results of whole files on VTAB-1k, in the order of their table."""
    with (resources.files(__package__) / "paper" / "published_vtab_kb.csv").open(encoding="utf-8") as file:
        return [
            PublishedVtab(
                name=line["method"]
                + (f" r={line['rank']}" if line["rank"] else "")
                + (", 1-bit head" if line["head_bits"] == "1" else ""),
                kib=float(line["kb_per_task_whole_file"]),
                mean=float(line["vtab1k_mean_top1"]),
                source=line["source"],
                note=line["note"],
            )
            for line in csv.DictReader(file)
        ]


def published_figures() -> pd.DataFrame:
    """Every printed figure of Tables 6, 7 and 10 (few shots) and 8 and 9 (from scratch).

    The columns are `table`, `backbone`, `method`, `params` (text, as printed), `dataset`, `shots`, `mean` and `std`
    (top-1 in per cent) and `note`, a reason to doubt the figure. From scratch there are no shots.
    """
    import pandas as pd  # it takes a while, and no config needs it

    columns = ["table", "backbone", "method", "params", "dataset", "shots", "mean", "std", "note"]
    return pd.DataFrame(_figures(), columns=columns).astype({"shots": "Int64"}).fillna({"note": ""})


def published(which: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The paper's figures of a cell: table, entry, parameters, mean and std in per cent, and what is doubtful.

    Args:
        which: columns of the published figures (`backbone`, `dataset`, `shots`) that all lines share, and under
            `methods` the columns of each entry that differ. Without a backbone or a data set there are no figures.
    """
    shared = {column: value for column, value in which.items() if column != "methods"}
    if not {"backbone", "dataset"} <= shared.keys():  # the paper lacks figures of a part
        return []
    return [
        {"entry": entry, **{key: line[key] for key in ("table", "params", "mean", "std", "note") if key in line}}
        for entry, own in which["methods"].items()
        if own
        for line in _figures()
        if {**shared, **own}.items() <= line.items()
    ]


@cache
def _figures() -> list[dict[str, Any]]:
    """The lines of both files, each without the columns that are empty in it."""
    lines = []
    for name in ("published_fewshot.csv", "published_from_scratch.csv"):
        with (resources.files(__package__) / "paper" / name).open(encoding="utf-8") as file:
            for line in csv.DictReader(file):
                named = {_COLUMNS.get(column, column): text for column, text in line.items() if text}
                lines.append({column: _TYPES.get(column, str)(text) for column, text in named.items()})
    return lines


_COLUMNS = {"architecture": "backbone", "top1": "mean"}  # as the other file names them
_TYPES: dict[str, Callable[[str], Any]] = {"table": int, "shots": int, "mean": float, "std": float}
