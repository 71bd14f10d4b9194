"""What a data set has: images per class and split, unreadable ones, and digests that show copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import sha256
from nola_vision.data import duplicates
from nola_vision.data.datasets.base import DatasetEntry, Split
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
