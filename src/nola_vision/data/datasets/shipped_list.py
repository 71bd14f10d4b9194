"""Data sets without an official split: a rule over file names, version 1, written out as shipped lists.

Rule: in each class the images are ranked by BLAKE2b (8 bytes, big-endian) of the UTF-8 text `<data set>/v1/0/<path>`,
where the path includes the class folder and 0 is the rule's seed. The first ones are for training, the next for
testing. The lists decide, so that a split never changes; `scripts/make_split_lists.py` made them.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import groupby

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import blake2b_integer
from nola_vision.data.datasets.base import DatasetEntry, Split, data_root
from nola_vision.data.datasets.torchvision_readers import read_by_torchvision
from nola_vision.data.sources import FileSource, ImageSource


@dataclass(frozen=True)
class ShippedList(DatasetEntry):
    """A data set without an official split: a shipped list assigns its images to the splits.

    Args:
        name: of the list.
        folder: where the class folders are under the root.
        reader: torchvision's class, for downloading.
        expects: its files under the root.
        strip: how many characters at the start of a class folder do not belong to the class name.
    """

    name: str
    folder: str
    reader: str
    expects: str
    strip: int = 0
    downloads: bool = True

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        return tuple(folder[self.strip :] for folder in _listed_classes(self.name))

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        base = data_root(root) / self.folder
        if download and not base.is_dir():
            read_by_torchvision(self.reader, data_root(root), self, download)
        if not base.is_dir():
            raise self.missing(self.reader, data_root(root), f"there is no folder {base}")
        listed = read_list(self.name)[split]
        paths = [base / path for path in listed]
        if gone := [path for path in paths if not path.is_file()]:
            raise NolaVisionError(
                f"{len(gone)} of {len(paths)} {split} images are missing, for example {gone[0]}: unpack the archive "
                "again"
            )
        index = {folder: number for number, folder in enumerate(_listed_classes(self.name))}
        return FileSource(paths, [index[class_of(path)] for path in listed], self.class_names(root), data_root(root))


@cache
def _listed_classes(name: str) -> tuple[str, ...]:
    return tuple(sorted({class_of(path) for path in read_list(name)["train"]}))


def split_by_rule(dataset: str, paths: Iterable[str], train: int, test: int | None) -> dict[Split, list[str]]:
    """The rule above.

    Args:
        dataset: its name.
        paths: `<class folder>/<file name>` of all images.
        train: training images per class.
        test: test images per class; None for all the others.

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
    """The class folder of a path."""
    return path.rpartition("/")[0]


def _order(path: str) -> tuple[str, str]:
    return class_of(path), path


def pack_list(splits: dict[Split, list[str]]) -> bytes:
    """The content of a list's file: one line per image, `train <path>` or `test <path>`, compressed by LZMA."""
    lines = [f"{split} {path}\n" for split, paths in splits.items() for path in paths]
    return lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)


def read_list(name: str) -> dict[Split, list[str]]:
    """The paths of each split of a shipped list, class after class."""
    packed = (resources.files("nola_vision.data") / "lists" / f"{name}.txt.xz").read_bytes()
    splits: dict[Split, list[str]] = {"train": [], "test": []}
    for line in lzma.decompress(packed).decode().splitlines():
        split, _, path = line.partition(" ")
        splits["train" if split == "train" else "test"].append(path)
    return splits
