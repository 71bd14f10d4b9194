"""Data sets without an official split: a rule over file names, version 1, written out as lists that ship.

Rule: in each class the images are ranked by BLAKE2b (8 bytes, big-endian) of the UTF-8 text `<data set>/v1/0/<path>`,
the path with its class's folder; 0 is the rule's seed. So many first ones train, so many after them test.
The lists decide, so that a split never moves; `scripts/make_split_lists.py` made them.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from importlib import resources
from itertools import groupby
from typing import Literal

from nola_vision.common.hashing import blake2b_integer

Split = Literal["train", "validation", "test"]


def split_by_rule(dataset: str, paths: Iterable[str], train: int, test: int | None) -> dict[Split, list[str]]:
    """The rule above.

    Args:
        dataset: its name.
        paths: `<class folder>/<file name>` of all images.
        train: training images a class.
        test: test images a class; None for all the others.

    Returns:
        Sorted paths of each split.
    """
    chosen: dict[Split, list[str]] = {"train": [], "test": []}
    for _, members in groupby(sorted(paths, key=_order), key=class_of):
        ranked = sorted(members, key=lambda path: blake2b_integer(f"{dataset}/v1/0/{path}"))
        chosen["train"] += ranked[:train]
        chosen["test"] += ranked[train:] if test is None else ranked[train : train + test]
    return {split: sorted(members, key=_order) for split, members in chosen.items()}


def class_of(path: str) -> str:
    """The class's folder of a path."""
    return path.rpartition("/")[0]


def _order(path: str) -> tuple[str, str]:
    return class_of(path), path


def pack_list(splits: dict[Split, list[str]]) -> bytes:
    """The content of a list's file: a line an image, `train <path>` or `test <path>`, compressed by LZMA."""
    lines = [f"{split} {path}\n" for split, paths in splits.items() for path in paths]
    return lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)


def read_list(name: str) -> dict[Split, list[str]]:
    """The paths of each split of a list that ships, class after class."""
    packed = (resources.files(__package__) / "lists" / f"{name}.txt.xz").read_bytes()
    splits: dict[Split, list[str]] = {"train": [], "test": []}
    for line in lzma.decompress(packed).decode().splitlines():
        split, _, path = line.partition(" ")
        splits["train" if split == "train" else "test"].append(path)
    return splits
