"""Checks of a data set: images per class and split, unreadable images, files that are not read, and copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import sha256
from nola_vision.data import duplicates
from nola_vision.data.datasets.base import DatasetEntry, Split
from nola_vision.data.datasets.image_folders import suffix_counts
from nola_vision.data.datasets.registry import open_split
from nola_vision.data.sources import ImageSource


@dataclass(frozen=True)
class SplitReport:
    """One split of a data set.

    Args:
        counts: the name of each class and its number of images, by class index; two classes may have one name.
        unreadable: a sentence for each image that cannot be decoded.
        source: its images.
        digests: of them, for `duplicates`.
        other_files: how many files are not read because of their suffix, by suffix.
    """

    counts: list[tuple[str, int]]
    unreadable: list[str]
    source: ImageSource
    digests: list[str]
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
    unreadable: list[str] = []
    digests: list[str] = []
    for index in range(len(source)):
        try:
            encoded = source.encoded(index)
            image = source.image(index, encoded)
        except NolaVisionError as error:
            unreadable.append(str(error))
            digests.append(duplicates.unreadable(source, index))
        else:
            digests.append(sha256(encoded or image.tobytes()))
        progress(index + 1, len(source))
    counts = np.bincount(source.labels, minlength=len(source.class_names)).tolist()
    named = list(zip(source.class_names, counts, strict=True))
    return SplitReport(named, unreadable, source, digests, entry.other_files(root, split))


def find_mistakes(entry: DatasetEntry, root: str | None, sources: Mapping[Split, ImageSource]) -> list[str]:
    """Files that are not read, and copies of an image in two classes or splits: one sentence each.

    Args:
        entry: the data set.
        root: its folder.
        sources: all its splits, open. Images are digested once.
    """
    skipped = sum((entry.other_files(root, split) for split in sources), Counter())
    mistakes = [f"files that are not read: {suffix_counts(skipped)}"] if skipped else []
    mistakes += entry.notes(root)
    has_test = "test" in sources
    known = {split: duplicates.digests(source) for split, source in sources.items()}
    untested = "" if has_test else ", trained on and never tested; delete the wrong ones"
    found = {
        f"that are in two classes{f' of {split}' if has_test else ''}{untested}": duplicates.under_two_labels(
            source, known[split]
        )
        for split, source in sources.items()
    }
    for one, two in combinations(sources, 2):
        found[f"in both {one} and {two}"] = duplicates.in_both(sources[one], known[one], sources[two], known[two])
    return mistakes + [f"images {where}: {len(pairs)}, such as {pairs[0]}" for where, pairs in found.items() if pairs]
