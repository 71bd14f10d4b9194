"""What every data set provides, and the folder that it is read from."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy.typing as npt

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.local_files import file_digests
from nola_vision.data.sampling import Indices, validation_pool
from nola_vision.data.sources import ImageSource, name_under

Split = Literal["train", "validation", "test"]

MOST_LIST_BYTES = 2**26  # of a text file that lists images or classes
ROOT_VARIABLE = "NOLA_VISION_DATA"


class DatasetEntry:
    """One data set of the registry.

    Attributes:
        expects: the files that it reads under its root, in words.
        downloads: whether it can be downloaded.
        needs_root: whether it is read from a folder that the user names.
        in_files: whether each image is stored separately, so that one may be damaged or missing.
        own_images: whether the images are the user's own, so that `fit` reports skipped files and copies.
        trains_on_pool: whether final runs train on the validation pool too, as the data set's protocol has it. Only
            search runs hold it out. Classes may then lack training images.
    """

    expects: str
    downloads: bool = False
    needs_root: bool = True
    in_files: bool = True
    own_images: bool = False
    trains_on_pool: bool = False

    def place(self, root: str | None) -> Path:
        """Where the data are: the folder given, else that of the environment.

        Raises:
            NolaVisionError: there is neither, or it is not a folder.
        """
        return data_root(root)

    def splits(self, root: str | None) -> tuple[Split, ...]:
        """The splits that `open` takes. Without "test" the accuracy is estimated by cross-validation.

        Args:
            root: the folder of the data, as for `open`.

        Raises:
            NolaVisionError: they depend on files, and these are missing or wrong.
        """
        return ("train", "test")

    def test_name(self, root: str | None) -> str:
        """The name of the test images in the data set itself: test or validation."""
        return "test"

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        """The names by class index, without reading an image.

        Args:
            root: the folder of the data, as for `open`.
            download: download missing files, if the names are read from them.

        Raises:
            NolaVisionError: the names are read from files, and these are missing or wrong.
        """
        raise NotImplementedError

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        """Opens one split; the others are not read.

        Args:
            root: the folder of the data; by default the environment variable `NOLA_VISION_DATA`.
            split: one of `splits`.
            download: download missing files, if the data set can.

        Raises:
            NolaVisionError: files are missing, unreadable or wrong.
        """
        raise NotImplementedError

    def pool(self, root: str | None, labels: npt.ArrayLike) -> Indices:
        """Positions of the validation pool in the training split, if it is not a separate split.

        Args:
            root: the folder of the data, as for `open`.
            labels: `[n]` class indices of the training split.
        """
        return validation_pool(labels)

    def own_content(self, root: str | None) -> bytes:
        """What distinguishes this data set from another of the same name, if users supply it; else empty.

        Args:
            root: the folder of the data, as for `open`.
        """
        return b""

    def other_files(self, root: str | None, split: Split) -> Counter[str]:
        """How many files of a split are not read because of their suffix, by suffix.

        Args:
            root: the folder of the data, as for `open`.
            split: one of `splits`.
        """
        return Counter()

    def notes(self, root: str | None) -> list[str]:
        """What else is not read, and why: one sentence each.

        Args:
            root: the folder of the data, as for `open`.
        """
        return []

    def missing(self, name: str, base: Path, reason: str, download: bool = False) -> NolaVisionError:
        """The error for a data set that cannot be read or downloaded.

        Args:
            name: of the data set, as its authors write it.
            base: where it was looked for.
            reason: why it could not be read.
            download: whether a download was tried.
        """
        if download:
            return NolaVisionError(
                f"cannot download {name} into {base} ({reason}): try again with a network connection, or copy there "
                f"{self.expects}"
            )
        reason = reason if base.is_dir() else "the folder does not exist"
        return NolaVisionError(f"cannot read {name} in {base} ({reason}): it must have {self.expects}{_or_load(self)}")


def given_root(root: str | None) -> str | None:
    """The folder given, else that of the environment, if there is one."""
    chosen = root or os.environ.get(ROOT_VARIABLE)
    return str(Path(chosen).expanduser()) if chosen else None


def data_root(root: str | None) -> Path:
    """The folder given, else that of the environment.

    Raises:
        NolaVisionError: there is neither, or it is a file.
    """
    chosen = given_root(root)
    if not chosen:
        raise NolaVisionError(f"this data set needs a folder: pass --data.root FOLDER or set {ROOT_VARIABLE}")
    path, option = Path(chosen), f"--data.root{'' if root else f' (now from {ROOT_VARIABLE})'}"
    if path.is_file():
        raise NolaVisionError(
            f"the data root {path} is a file: give the folder of the data set by {option}, or read the file as a list "
            "of images by --data.dataset list"
        )
    return path


def check_root(entry: DatasetEntry, root: str | None, download: bool = False) -> None:
    """Refuses a missing data root, without opening anything.

    Raises:
        NolaVisionError: as `data_root`; or it does not exist, and the data set will not be downloaded.
    """
    if entry.needs_root and not (path := entry.place(root)).exists() and not download:
        raise NolaVisionError(f"the data root {path} does not exist: check --data.root{_or_load(entry)}")


def content_list(base: Path, paths: list[Path], most_bytes: int | None = None) -> bytes:
    """The name under `base` and the SHA-256 of each file, one per line.

    Args:
        base: the folder that paths are under.
        paths: of the files.
        most_bytes: the digest of a larger file is empty, as is that of an unreadable one.
    """
    digests = file_digests(base, paths, most_bytes)
    names = [name_under(base, path) for path in paths]
    return "".join(f"{name}\0{found or ''}\n" for name, found in zip(names, digests, strict=True)).encode()


def _or_load(entry: DatasetEntry) -> str:
    return ", or pass --data.download true with a network connection" if entry.downloads else ""
