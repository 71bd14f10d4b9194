"""Exact copies of an image: within a split, under two labels or in two splits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nola_vision.data.kshot import Indices
from nola_vision.data.manifest import content
from nola_vision.data.sources import MOST_BYTES, FileSource, ImageSource
from nola_vision.local_files import file_digests


def digests(source: ImageSource) -> list[str]:
    """SHA-256 of each image, over its file, or over its RGB pixels if it is not stored as a file.

    A file that cannot be read equals no other one.
    """
    if isinstance(source, FileSource):
        found = file_digests(source.base, source.paths, MOST_BYTES)
        return [digest or f"unreadable: {source.where(index)}" for index, digest in enumerate(found)]
    return [content(source, index) for index in range(len(source))]


def groups(source: ImageSource) -> Indices:
    """`[n]` numbers; equal ones are exact copies of one image."""
    numbers: npt.NDArray[np.int64] = np.unique(digests(source), return_inverse=True)[1].astype(np.int64)
    return numbers


def under_two_labels(source: ImageSource) -> list[str]:
    """Names pairs of copies whose labels differ, each with its label."""
    first: dict[str, int] = {}
    pairs = []
    for index, digest in enumerate(digests(source)):
        other = first.setdefault(digest, index)
        if source.labels[other] != source.labels[index]:
            pairs.append(f"{_labelled(source, other)} and {_labelled(source, index)}")
    return pairs


def in_both(one: ImageSource, two: ImageSource) -> list[str]:
    """Names pairs of an image of one source and its copy in another."""
    known = {digest: index for index, digest in enumerate(digests(one))}
    return [
        f"{one.where(known[digest])} and {two.where(index)}"
        for index, digest in enumerate(digests(two))
        if digest in known
    ]


def _labelled(source: ImageSource, index: int) -> str:
    return f"{source.where(index)} ({source.class_names[source.labels[index]]})"
