"""Exact copies of an image: within a split, under two labels or in two splits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nola_vision.common.local_files import file_digests
from nola_vision.data.manifest import content
from nola_vision.data.sampling import Indices
from nola_vision.data.sources import FileSource, ImageSource
from nola_vision.images.decoding import MOST_BYTES


def digests(source: ImageSource, indices: Indices | None = None) -> list[str]:
    """SHA-256 of each image, over its file, or over its RGB pixels if it is not stored as a file.

    A file that cannot be read is not equal to any other.

    Args:
        source: of the images.
        indices: which ones; all if not given.
    """
    positions = range(len(source)) if indices is None else indices.tolist()
    if isinstance(source, FileSource):
        found = file_digests(source.base, [source.paths[index] for index in positions], MOST_BYTES)
        return [digest or unreadable(source, index) for index, digest in zip(positions, found, strict=True)]
    return [content(source, index) for index in positions]


def unreadable(source: ImageSource, index: int) -> str:
    """The placeholder for the digest of an image that cannot be read."""
    return f"unreadable: {source.where(index)}"


def groups(source: ImageSource, indices: Indices | None = None) -> Indices:
    """`[n]` numbers of the images, as `digests`; equal ones are exact copies of one image."""
    numbers: npt.NDArray[np.int64] = np.unique(digests(source, indices), return_inverse=True)[1].astype(np.int64)
    return numbers


def repeated(source: ImageSource, found: Sequence[str]) -> list[str]:
    """The names of images that are copies of an earlier one of the same class, given the digests of all."""
    return [
        source.where(index)
        for other, index in _copies(found)
        if source.labels[other] == source.labels[index] and source.where(other) != source.where(index)
    ]


def under_two_labels(source: ImageSource, found: Sequence[str]) -> list[str]:
    """The names of pairs of copies whose labels differ, each with its label, given the digests of all images."""
    return [
        f"{_labelled(source, other)} and {_labelled(source, index)}"
        for other, index in _copies(found)
        if source.labels[other] != source.labels[index]
    ]


def in_both(one: ImageSource, found_one: Sequence[str], two: ImageSource, found_two: Sequence[str]) -> list[str]:
    """The names of pairs of an image of one source and its copy in another, with their classes if these differ.

    Args:
        one: a split.
        found_one: the digests of its images.
        two: another split.
        found_two: the digests of its images.
    """
    first, pairs = _first(found_one), []
    for digest, index in _first(found_two).items():
        if digest in first:
            other = first[digest]
            if one.labels[other] == two.labels[index]:
                pairs.append(f"{one.where(other)} and {two.where(index)}")
            else:
                pairs.append(f"{_labelled(one, other)} and {_labelled(two, index)}: the labels differ")
    return pairs


def _first(found: Sequence[str]) -> dict[str, int]:
    """The first image of each digest."""
    return {digest: index for index, digest in reversed([*enumerate(found)])}


def _copies(found: Sequence[str]) -> list[tuple[int, int]]:
    """Each image that is a copy of an earlier one, after the first such."""
    first = _first(found)
    return [(first[digest], index) for index, digest in enumerate(found) if first[digest] != index]


def _labelled(source: ImageSource, index: int) -> str:
    return f"{source.where(index)} ({source.class_names[source.labels[index]]})"
