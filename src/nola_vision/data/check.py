"""What a data set has: images per class and split, unreadable ones, and the same image in several places."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nola_vision.data.datasets import DatasetEntry, open_split
from nola_vision.data.manifest import digest
from nola_vision.data.splits import Split
from nola_vision.errors import NolaVisionError


@dataclass(frozen=True)
class SplitReport:
    """One split of a data set.

    Args:
        counts: the name of each class and its number of images, by class index; two classes may have one name.
        unreadable: a sentence for each image that cannot be decoded.
        contents: each image's name and class index by the digest of its file or pixels, as in a manifest (of equal
            images, the first).
        repeated: names of images that are the same as an earlier one of the same class.
        contradictory: pairs of names of the same image in two classes, each with its class.
        other_files: how many files are not read because of their suffix, by suffix.
    """

    counts: list[tuple[str, int]]
    unreadable: list[str]
    contents: dict[str, tuple[str, int]]
    repeated: list[str]
    contradictory: list[str]
    other_files: Counter[str]


def check_split(
    entry: DatasetEntry, root: str | None, split: Split, download: bool, progress: Callable[[int, int], None]
) -> SplitReport:
    """Opens a split and decodes every image.

    Args:
        entry: the data set.
        root: its folder.
        split: one of the data set's.
        download: fetch it if it is missing, where that is possible.
        progress: called with the number of images seen and of all.

    Raises:
        NolaVisionError: files are missing, or there is only one class.
    """
    source = open_split(entry, root, split, download)
    names = source.class_names
    unreadable: list[str] = []
    contents: dict[str, tuple[str, int]] = {}
    repeated: list[str] = []
    contradictory: list[str] = []
    for index, label in enumerate(source.labels.tolist()):
        name = source.where(index)
        try:
            encoded = source.encoded(index)
            image = source.image(index, encoded)
        except NolaVisionError as error:
            unreadable.append(str(error))
        else:
            first, other = contents.setdefault(digest(encoded or image.tobytes()), (name, label))
            if other != label:
                contradictory.append(f"{first} ({names[other]}) and {name} ({names[label]})")
            elif first != name:
                repeated.append(name)
        progress(index + 1, len(source))
    counts = np.bincount(source.labels, minlength=len(names)).tolist()
    others = entry.other_files(root, split)
    return SplitReport(list(zip(names, counts, strict=True)), unreadable, contents, repeated, contradictory, others)


def in_both(train: SplitReport, test: SplitReport) -> list[str]:
    """Pairs of equal images of two splits, with their classes if these differ."""
    pairs = []
    for found, (name, label) in test.contents.items():
        if found in train.contents:
            first, other = train.contents[found]
            one, two = train.counts[other][0], test.counts[label][0]
            differ = other != label
            pairs.append(f"{first} ({one}) and {name} ({two}): the labels differ" if differ else f"{first} and {name}")
    return pairs
