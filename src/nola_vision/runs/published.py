"""Published figures: those of the NOLA paper, all as a data frame and those of a cell; and those on VTAB-1k."""

from __future__ import annotations

import csv
from collections.abc import Mapping
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
    import pandas as pd  # it takes a while, and most configs have no figures

    folder = resources.files(__package__) / "paper"
    with (folder / "published_fewshot.csv").open(encoding="utf-8") as file:
        few_shot = pd.read_csv(file, dtype={"params": "str", "shots": "Int64"})
    with (folder / "published_from_scratch.csv").open(encoding="utf-8") as file:
        from_scratch = pd.read_csv(file, dtype={"params": "str"})
    from_scratch = from_scratch.rename(columns={"architecture": "backbone", "top1": "mean"})
    figures = pd.concat([few_shot, from_scratch], ignore_index=True)
    return figures.fillna({"note": ""})


def published(which: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The paper's figures of a cell: table, entry, parameters, mean and std in per cent, and what is doubtful.

    Args:
        which: columns of the published figures (`backbone`, `dataset`, `shots`) that all lines share, and under
            `methods` the columns of each entry that differ. Without a backbone or a data set there are no figures.
    """
    shared = {column: value for column, value in which.items() if column != "methods"}
    if not {"backbone", "dataset"} <= shared.keys():  # the paper lacks figures of a part
        return []
    figures, found = _figures(), []
    for entry, own in which["methods"].items():
        wanted = {**shared, **(own or {})}
        chosen = figures[(figures[list(wanted)] == list(wanted.values())).all(axis=1)] if own else figures[:0]
        for row in chosen.to_dict("records"):
            line = {key: row[key] for key in ("table", "params", "mean", "std", "note")}
            found.append({"entry": entry, **{k: v for k, v in line.items() if v == v and v != ""}})
    return found


_figures = cache(published_figures)
