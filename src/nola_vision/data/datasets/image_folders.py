"""Finding class folders and image files on disk, in an order that does not depend on the file system."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.local_files import remembered
from nola_vision.common.text import name_text
from nola_vision.data.sources import FileSource
from nola_vision.images.decoding import (
    HEIF_INSTALL,
    HEIF_SUFFIXES,
    MOST_BYTES,
    decoder_versions,
    image_suffixes,
    is_image,
)


def folders_in(folder: Path, hidden: bool = False) -> list[Path]:
    """The folders in a folder, sorted by name: those that are not hidden, or the hidden ones.

    Raises:
        NolaVisionError: the folder cannot be read.
    """
    try:
        inner = [path for path in folder.iterdir() if path.is_dir() and path.name.startswith(".") == hidden]
    except FileNotFoundError as error:
        raise NolaVisionError(f"the data root {folder} does not exist: check --data.root") from error
    except OSError as error:
        raise NolaVisionError(
            f"cannot read the folder {folder} ({error.strerror}): put images there as {folder / '<class>' / '<image>'}"
        ) from error
    return sorted(inner, key=lambda path: name_text(path.name))


def class_folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder, by their names in sorted order.

    Raises:
        NolaVisionError: there are no folders, two have the same name, or the folder cannot be read.
    """
    inner = folders_in(folder)
    names = {name_text(path.name): path for path in inner}
    if len(names) < len(inner):
        raise NolaVisionError(f"two class folders of {folder} have one name in Unicode's two forms: rename one")
    if not names:
        raise NolaVisionError(f"no class folders in {folder}: put images there as {folder / '<class>' / '<image>'}")
    return names


def with_images(folders: dict[str, Path]) -> dict[str, Path]:
    """Those of the class folders that have images.

    Raises:
        NolaVisionError: none has.
    """
    found = {
        name: folder
        for name, folder in folders.items()
        # photos that need another package make a class too: the error of reading them names the package
        if images_among(folder, files := files_under(folder))
        or any(path.suffix.lower() in HEIF_SUFFIXES for path in files)
    }
    if not found:
        folder = next(iter(folders.values())).parent
        raise NolaVisionError(f"no folder in {folder} has images: put images there as {folder / '<class>' / '<image>'}")
    return found


def open_class_folders(folders: Mapping[str, Path], base: Path) -> FileSource:
    """The images of class folders; class indices follow the order of the folders, images the sorted paths.

    Args:
        folders: class name -> folder.
        base: the folder of the data set.

    Raises:
        NolaVisionError: there are no images of a class, or two of them have the same name.
    """
    files = [_class_images(folder) for folder in folders.values()]
    labels = np.repeat(np.arange(len(folders)), [len(paths) for paths in files])
    return FileSource([path for paths in files for path in paths], labels, tuple(folders), base)


def _class_images(folder: Path) -> list[Path]:
    """`image_files` of a class. Their names must differ, since a draw and a manifest identify images by name.

    Raises:
        NolaVisionError: as `image_files`, or two have the same name.
    """
    images = image_files(folder)
    for (one, (name, _)), (two, (other, _)) in pairwise((path, _order(path)) for path in images):
        if name == other:
            raise NolaVisionError(
                f"{ascii(str(one))} and {ascii(str(two))} are one name in Unicode's two forms, or after bytes that are "
                "not UTF-8 are written as text: rename one"
            )
    return images


def image_files(folder: Path) -> list[Path]:
    """Sorted image files under a folder: those with one of the `image_suffixes`, and those without any suffix that
    Pillow identifies by their content.

    Raises:
        NolaVisionError: there are no images, or a folder cannot be read.
    """
    files = files_under(folder)
    images = images_among(folder, files)
    if not images:
        others = suffix_counts(other_suffixes(folder, files))
        has = f"files of other kinds: {others}" if others else f"{', '.join(sorted(image_suffixes()))}"
        raise NolaVisionError(f"no images in {folder} ({has}): add some, or remove the folder")
    return images


def images_among(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Those of the files under a folder that are images, sorted."""
    files = list(files)
    suffixes = image_suffixes()
    images = [path for path in files if path.suffix.lower() in suffixes]
    if bare := [path for path in files if not path.suffix]:
        found = remembered(f"identified by {decoder_versions()}", folder, bare, _identified, MOST_BYTES)
        images += [path for path, kind in zip(bare, found, strict=True) if kind == "image"]
    return sorted(images, key=_order)


def _identified(path: Path) -> str:
    return "image" if is_image(path) else "other"


def _order(path: Path) -> tuple[str, bytes]:
    """The sort key of files: their name as text, and then as bytes."""
    return name_text(path.as_posix()), os.fsencode(path)


def files_under(folder: Path) -> list[Path]:
    """The files under a folder in any order; hidden ones are left out, links are followed once.

    Raises:
        NolaVisionError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise NolaVisionError(f"cannot read the folder {error.filename} ({error.strerror}): allow it to be read")

    paths = []
    seen = {os.path.realpath(folder)}  # a link may lead back
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        places = {name: os.path.realpath(os.path.join(parent, name)) for name in folders if not name.startswith(".")}
        folders[:] = [name for name, place in places.items() if place not in seen]
        seen.update(places.values())
        paths += [Path(parent, name) for name in files if not name.startswith(".")]
    return paths


def other_suffixes(folder: Path, files: Iterable[Path] | None = None) -> Counter[str]:
    """How many files under a folder are not images, by suffix.

    Args:
        folder: of the files.
        files: `files_under(folder)`, if that is known.
    """
    files = files_under(folder) if files is None else list(files)
    images = {*images_among(folder, files)}
    return Counter(path.suffix.lower() or "without suffix" for path in files if path not in images)


def suffix_counts(others: Counter[str]) -> str:
    """Suffixes and their counts for a message, such as `12 .heic (pip install 'nola-vision[heic]'), 1 .txt`."""
    named = []
    for suffix, count in others.most_common(5):
        named.append(f"{count} {suffix}" + (f" ({HEIF_INSTALL})" if suffix in HEIF_SUFFIXES else ""))
    rest = others.total() - sum(count for _, count in others.most_common(5))
    return ", ".join(named) + (f" and {rest} more" if rest else "")
