"""What is there of a data set: images a class and a split, unreadable ones, and those in both train and test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nola_vision.data.datasets import DatasetEntry
from nola_vision.data.manifest import digest
from nola_vision.data.splits import Split
from nola_vision.errors import NolaVisionError


@dataclass(frozen=True)
class SplitReport:
    """One split of a data set.

    Args:
        counts: images a class.
        unreadable: a sentence for each image that cannot be decoded.
        contents: each image's name by the digest of its file or pixels, as in a manifest (of equal ones, the first).
        repeated: names of images that are an earlier one's double.
    """

    counts: dict[str, int]
    unreadable: list[str]
    contents: dict[str, str]
    repeated: list[str]


def check_split(
    entry: DatasetEntry, root: str | None, split: Split, download: bool, progress: Callable[[int, int], None]
) -> SplitReport:
    """Opens a split and decodes every image.

    Args:
        entry: the data set.
        root: where it lies.
        split: "train" or "test".
        download: fetch it if it is missing, where that is possible.
        progress: called with the number of images seen and of all.

    Raises:
        NolaVisionError: files are missing.
    """
    source = entry.open(root, split, download)
    unreadable: list[str] = []
    contents: dict[str, str] = {}
    repeated: list[str] = []
    for index in range(len(source)):
        name = source.where(index)
        try:
            encoded = source.encoded(index)
            image = source.image(index, encoded)
        except NolaVisionError as error:
            unreadable.append(str(error))
        else:
            if contents.setdefault(digest(encoded or image.tobytes()), name) != name:
                repeated.append(name)
        progress(index + 1, len(source))
    counts = np.bincount(source.labels, minlength=len(source.class_names)).tolist()
    return SplitReport(dict(zip(source.class_names, counts, strict=True)), unreadable, contents, repeated)


def in_both(train: SplitReport, test: SplitReport) -> list[tuple[str, str]]:
    """Pairs of a training image and a test image of the same content."""
    return [(train.contents[digest], name) for digest, name in test.contents.items() if digest in train.contents]
