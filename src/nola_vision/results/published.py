"""The figures that the NOLA paper prints, as a data frame."""

from __future__ import annotations

from importlib import resources

import pandas as pd


def published_figures() -> pd.DataFrame:
    """Return every printed figure of Tables 6, 7 and 10 (few shots) and 8 and 9 (from scratch).

    The columns are `table`, `backbone`, `method`, `params` (text, as printed), `dataset`, `shots`, `mean` and `std`
    (top-1 in per cent) and `note`, which says what is doubtful about a figure. From scratch there are no shots.
    """
    folder = resources.files(__package__) / "published"
    with (folder / "published_fewshot.csv").open(encoding="utf-8") as file:
        few_shot = pd.read_csv(file, dtype={"params": "str", "shots": "Int64"})
    with (folder / "published_from_scratch.csv").open(encoding="utf-8") as file:
        from_scratch = pd.read_csv(file, dtype={"params": "str"})
    from_scratch = from_scratch.rename(columns={"architecture": "backbone", "top1": "mean"})
    figures = pd.concat([few_shot, from_scratch], ignore_index=True)
    return figures.fillna({"note": ""})
