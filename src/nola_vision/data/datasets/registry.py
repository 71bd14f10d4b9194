"""The registry of data sets: a name -> its class names and how to open its training or test images.

To add a data set, write a subclass of `DatasetEntry` (or reuse one) and add a line to `DATASETS`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.suggestions import did_you_mean
from nola_vision.common.local_files import file_digests, read_file, remembered
from nola_vision.common.tags import HUB_PREFIX
from nola_vision.common.text import name_text
from nola_vision.data.datasets.list_file import Listed, parse_list
from nola_vision.data.sources import ArraySource, FileSource, ImageSource, name_under
from nola_vision.data.splits import Split, class_of, read_list
from nola_vision.images.decoding import (
    HEIF_INSTALL,
    HEIF_SUFFIXES,
    MOST_BYTES,
    decoder_versions,
    image_suffixes,
    is_image,
)

MOST_LIST_BYTES = 2**26  # of a text file that lists images or classes
ROOT_VARIABLE = "NOLA_VISION_DATA"


class DatasetEntry:
    """One data set of the registry.

    Attributes:
        expects: the tree that it reads beneath its root, in words.
        downloads: whether it can be fetched.
        needs_root: whether it lies in a folder that a person names.
        in_files: whether each image is stored separately, so that one may be damaged or missing.
        own_images: whether the images are the user's own, so that `fit` reports skipped files and copies.
    """

    expects: str
    downloads: bool = False
    needs_root: bool = True
    in_files: bool = True
    own_images: bool = False

    def place(self, root: str | None) -> Path:
        """Where the data are: the folder given, else that of the environment.

        Raises:
            NolaVisionError: there is neither, or it is not a folder.
        """
        return data_root(root)

    def splits(self, root: str | None) -> tuple[Split, ...]:
        """The splits that `open` takes. Without "test" the accuracy is estimated by cross-validation.

        Args:
            root: the folder the data lie in, as for `open`.

        Raises:
            NolaVisionError: they depend on files, and these are missing or not as they should be.
        """
        return ("train", "test")

    def test_name(self, root: str | None) -> str:
        """What the test images are called by whoever made the data set: test or validation."""
        return "test"

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        """The names by class index, without reading an image.

        Args:
            root: the folder the data lie in, as for `open`.
            download: fetch missing files, where the names stand in them.

        Raises:
            NolaVisionError: they stand on disk, and are not to be found there.
        """
        raise NotImplementedError

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        """Opens one split; the others are not touched.

        Args:
            root: the folder the data lie in; without it the environment variable `NOLA_VISION_DATA`.
            split: one of `splits`.
            download: fetch missing files, where the data set can.

        Raises:
            NolaVisionError: files are missing, unreadable or not as they should be.
        """
        raise NotImplementedError

    def own_content(self, root: str | None) -> bytes:
        """What distinguishes this data set from another of its name, where users make their own; else empty.

        Args:
            root: the folder the data are in, as for `open`.
        """
        return b""

    def other_files(self, root: str | None, split: Split) -> Counter[str]:
        """How many files of a split are not read because of their suffix, by suffix.

        Args:
            root: the folder the data are in, as for `open`.
            split: one of `splits`.
        """
        return Counter()

    def notes(self, root: str | None) -> list[str]:
        """What else is not read, and why: one sentence each.

        Args:
            root: the folder the data are in, as for `open`.
        """
        return []


class Digits(DatasetEntry):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, bundled with it: no download, no root.

    It comes without a test split. The rule here is that of scikit-learn's own example: the first 898 images train, the
    last 899 test. Writers follow one another in the file, so most test digits are by other hands.
    """

    TRAIN_IMAGES = 898
    expects = "bundled with scikit-learn, no root needed"
    needs_root = False
    in_files = False

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        return tuple("0123456789")

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        part = slice(None, self.TRAIN_IMAGES) if split == "train" else slice(self.TRAIN_IMAGES, None)
        pixels = np.round(bunch.images[part] * (255 / 16)).astype(np.uint8)
        return ArraySource("digits", pixels, bunch.target[part], self.class_names(root))


@dataclass(frozen=True)
class _Layout:
    """How a folder of images is laid out.

    Args:
        folders: where the class folders of each split are.
        flat: whether they are directly in the root, without a folder `train`.
        test_name: what the test images are called on disk: test or validation.
    """

    folders: dict[Split, Path]
    flat: bool
    test_name: str


class Folder(DatasetEntry):
    """Image files in class folders: `root/<class>/`, or `root/train/<class>/` with other splits next to `train/`.

    Without `train/`, every folder that has images is a class (the flat layout). With `train/`, only the split folders
    are read: `test/` has the test images and `val/` (or `valid/`, `validation/`) the validation pool; without `test/`,
    `val/` has the test images. The case of these names does not matter.

    Class indices follow the sorted class names, images the sorted paths. Hidden files are skipped; folders under a
    class belong to it. That all splits have the same class folders is checked whichever is opened, so that a mistake
    shows before training.
    """

    expects = (
        "<class>/<image> under the root, or train/<class>/<image>, with test/<class>/<image>, val/<class>/<image> or "
        "both next to train/"
    )
    own_images = True
    VALIDATION_NAMES = ("val", "valid", "validation")
    SPLIT_NAMES = ("train", "test", *VALIDATION_NAMES, "training", "testing")  # the last two are refused

    def splits(self, root: str | None) -> tuple[Split, ...]:
        return tuple(self._layout(root).folders)

    def test_name(self, root: str | None) -> str:
        return self._layout(root).test_name

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        layout = self._layout(root)
        folders = _class_folders(layout.folders["train"])
        return tuple(_with_images(folders) if layout.flat else folders)

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        folders = self._class_folders(self._layout(root))[split]
        files = [_class_images(folder) for folder in folders.values()]
        labels = np.repeat(np.arange(len(folders)), [len(paths) for paths in files])
        return FileSource([path for paths in files for path in paths], labels, tuple(folders), data_root(root))

    def own_content(self, root: str | None) -> bytes:
        """The name and the SHA-256 of every image in the splits' folders."""
        layout, place = self._layout(root), data_root(root)
        folders = _class_folders(place) if layout.flat else layout.folders
        images = [path for folder in folders.values() for path in _images(folder, _files(folder))]
        return content_list(place, images, MOST_BYTES)  # a larger image is refused when it is read

    def other_files(self, root: str | None, split: Split) -> Counter[str]:
        folders = self._class_folders(self._layout(root))[split].values()
        return sum((_other_suffixes(folder, _files(folder)) for folder in folders), Counter())

    def notes(self, root: str | None) -> list[str]:
        layout, place = self._layout(root), data_root(root)
        read = self._class_folders(layout)["train"] if layout.flat else layout.folders
        notes = []
        if ignored := [f"{path.name}/" for path in _folders(place) if path not in read.values()]:
            splits = " and ".join(f"{path.name}/" for path in layout.folders.values())
            why = "without an image" if layout.flat else f"next to {splits}"
            notes.append(f"folders in {place} that are not read, {why}: {_some(ignored)}")
        for folder in dict.fromkeys([place, *layout.folders.values()]):
            hidden = [path for path in _folders(folder, hidden=True) if _images(path, _files(path))]
            if hidden:
                named = _some([f"{path.name}/" for path in hidden])
                notes.append(
                    f"folders of images in {folder} that are not read, since their names begin with a dot: {named}"
                )
            files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
            if loose := _images(folder, files):
                named = _some([path.name for path in loose])
                notes.append(f"images directly in {folder}, in no class folder, that are not read: {named}")
        return notes

    def _class_folders(self, layout: _Layout) -> dict[Split, dict[str, Path]]:
        """The class folders of each split by name, in sorted order."""
        found = {split: _class_folders(folder) for split, folder in layout.folders.items()}
        train = found["train"] = _with_images(found["train"]) if layout.flat else found["train"]
        for split, folder in layout.folders.items():
            if odd := sorted(train.keys() ^ found[split].keys()):
                one = layout.folders["train"]
                where = ", ".join(f"'{name}' is only in {one if name in train else folder}" for name in odd[:5])
                raise NolaVisionError(f"{one} and {folder} must have the same class folders, but {where}: rename them")
        return {split: {name: folders[name] for name in train} for split, folders in found.items()}

    def _layout(self, root: str | None) -> _Layout:
        place = data_root(root)
        named: dict[str, Path] = {}
        for path in _folders(place):
            if (name := path.name.lower()) in self.SPLIT_NAMES:
                if name in named:
                    raise NolaVisionError(f"{named[name]} and {path} differ in case only: rename one")
                named[name] = path
        if "train" not in named:
            if named:
                name = next(iter(named.values())).name
                raise NolaVisionError(
                    f"{place} has the folder {name!r} but no folder 'train': name the folder of the training images "
                    f"train, or, if {name!r} is a class, move all class folders into {place / 'train'}"
                )
            return _Layout({"train": place}, True, "test")
        validation = [named[name] for name in self.VALIDATION_NAMES if name in named]
        if len(validation) > 1:
            raise NolaVisionError(
                f"{' and '.join(map(str, validation))} are folders of validation images, but only one is read: merge "
                "them or remove one"
            )
        test = [named["test"]] if "test" in named else []
        parts: dict[Split, list[Path]] = {
            "train": [named["train"]], "validation": validation if test else [], "test": test or validation
        }  # fmt: skip
        folders = {split: place for split, found in parts.items() for place in found}
        return _Layout(folders, False, "test" if test else "validation")


class ListFile(DatasetEntry):
    """The image files of a user's list (`data/list_file.py` has its forms), whose path is the root.

    Relative paths are relative to the folder of the list. Class indices follow the sorted labels, images the lines. The
    splits are as in `Folder`: val without test has the test images.
    """

    expects = (
        "a CSV file with the columns path, label and perhaps split (train, val, test), or a text file with "
        "a path and a label per line, as the root"
    )
    own_images = True

    def place(self, root: str | None) -> Path:
        chosen = given_root(root)
        if not chosen:
            raise NolaVisionError(f"this data set needs a list of images: pass --data.root FILE or set {ROOT_VARIABLE}")
        return Path(chosen)

    def splits(self, root: str | None) -> tuple[Split, ...]:
        return tuple(self._splits(root))

    def test_name(self, root: str | None) -> str:
        splits = self._splits(root)
        return splits["test"] if "test" in splits else "test"

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        return tuple(sorted({row.label for row in self._rows(root)}))

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        file, rows, names = self.place(root), self._rows(root), self.class_names(root)
        if gone := [row for row in rows if not os.path.exists(file.parent / row.path)]:
            raise NolaVisionError(
                f"{len(gone)} of the {len(rows)} images of the list {file} do not exist, the first is {gone[0].path!r} "
                f"in line {gone[0].line}: correct the paths, which are relative to {file.parent.absolute()}"
            )
        wanted = self._splits(root).get(split)
        rows = tuple(row for row in rows if row.split == wanted)
        index = {name: label for label, name in enumerate(names)}
        return FileSource(
            [file.parent / row.path for row in rows], [index[row.label] for row in rows], names, file.parent
        )

    def own_content(self, root: str | None) -> bytes:
        """The list, and the name and the SHA-256 of every image in it."""
        base = self.place(root).parent
        images = [base / row.path for row in self._rows(root)]
        return self._content(root) + b"\0" + content_list(base, images, MOST_BYTES)

    def _splits(self, root: str | None) -> dict[Split, Split]:
        """The splits, each with the name that the list has for it."""
        labels: dict[Split, set[str]] = {}
        for row in self._rows(root):
            labels.setdefault(row.split, set()).add(row.label)
        for split, listed in labels.items():
            if odd := sorted(labels["train"] ^ listed):
                where = ", ".join(
                    f"{name!r} is only in {'train' if name in labels['train'] else split}" for name in odd[:5]
                )
                raise NolaVisionError(
                    f"train and {split} of the list {self.place(root)} must have the same classes, but {where}: "
                    "correct the labels, or move images"
                )
        found: dict[Split, Split] = {"train": "train"}
        if "test" in labels:
            found |= {"validation": "validation"} if "validation" in labels else {}
            found["test"] = "test"
        elif "validation" in labels:
            found["test"] = "validation"
        return found

    def _rows(self, root: str | None) -> tuple[Listed, ...]:
        return parse_list(self._content(root), str(self.place(root)))

    def _content(self, root: str | None) -> bytes:
        file = self.place(root)
        try:
            return read_file(file, MOST_LIST_BYTES)
        except OSError as error:
            raise NolaVisionError(
                f"cannot read the list {file} ({error.strerror}): give a CSV or text file of paths and labels by "
                "--data.root"
            ) from error


@dataclass(frozen=True)
class TorchvisionArray(DatasetEntry):
    """A data set that torchvision reads into one array.

    Args:
        reader: the name of torchvision's class.
        expects: its files beneath the root.
        names: the class names, as torchvision numbers them.
    """

    reader: str
    expects: str
    names: tuple[str, ...]
    downloads: bool = True
    in_files: bool = False

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        return self.names

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        data = _torchvision(self.reader, data_root(root), self, download, train=split == "train")
        return ArraySource(self.reader.lower(), np.asarray(data.data), data.targets, self.names)


@dataclass(frozen=True)
class TorchvisionFiles(DatasetEntry):
    """A data set whose lists torchvision reads; its images stay files.

    Args:
        reader: the name of torchvision's class.
        expects: its files beneath the root.
        train: the name of its training split.
        files: the reader's attribute that holds the images' paths, in the order of the list.
        options: other arguments of the reader.
    """

    reader: str
    expects: str
    train: str = "train"
    files: str = "_image_files"
    options: dict[str, str] = field(default_factory=dict)
    downloads: bool = True

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        return tuple(self._read(root, "train", download).classes)

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        data = self._read(root, split, download)
        paths = [Path(path) for path in getattr(data, self.files)]
        return FileSource(paths, data._labels, tuple(data.classes), data_root(root))

    def _read(self, root: str | None, split: Split, download: bool) -> Any:
        named = self.train if split == "train" else split
        return _torchvision(self.reader, data_root(root), self, download, split=named, **self.options)


@dataclass(frozen=True)
class ShippedList(DatasetEntry):
    """A data set without an official split: a list that ships says which image is for what (`data/splits.py`).

    Args:
        name: of the list.
        folder: where the class folders lie beneath the root.
        reader: torchvision's class, for fetching.
        expects: its files beneath the root.
        strip: so many characters of a class's folder are no part of its name.
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
            _torchvision(self.reader, data_root(root), self, download)
        if not base.is_dir():
            raise NolaVisionError(_missing(self.reader, self, data_root(root), f"there is no folder {base}"))
        listed = read_list(self.name)[split]
        paths = [base / path for path in listed]
        if gone := [path for path in paths if not path.is_file()]:
            raise NolaVisionError(
                f"{len(gone)} of {len(paths)} {split} images are missing, {gone[0]} for one: unpack the archive anew"
            )
        index = {folder: number for number, folder in enumerate(_listed_classes(self.name))}
        return FileSource(paths, [index[class_of(path)] for path in listed], self.class_names(root), data_root(root))


@cache
def _listed_classes(name: str) -> tuple[str, ...]:
    return tuple(sorted({class_of(path) for path in read_list(name)["train"]}))


class Cub200(DatasetEntry):
    """CUB-200-2011 (Caltech-UCSD Birds), read from its own lists."""

    expects = (
        "CUB_200_2011/ with images.txt, image_class_labels.txt, train_test_split.txt, classes.txt and images/ beneath "
        "the root, or be that folder"
    )

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        return tuple(self._table(root, "classes.txt").values())

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        labels = self._table(root, "image_class_labels.txt")
        in_train = self._table(root, "train_test_split.txt")
        flag = "1" if split == "train" else "0"
        listed = self._table(root, "images.txt")
        index = {number: label for label, number in enumerate(self._table(root, "classes.txt"))}
        for number in listed:
            if number not in in_train or labels.get(number) not in index:
                raise NolaVisionError(
                    f"the lists of CUB-200-2011 in {data_root(root)} do not fit one another, image {number} has no "
                    "class or split: unpack the archive anew"
                )
        chosen = [number for number in listed if in_train[number] == flag]
        paths = [self._base(root) / "images" / listed[number] for number in chosen]
        return FileSource(paths, [index[labels[number]] for number in chosen], self.class_names(root), data_root(root))

    def _base(self, root: str | None) -> Path:
        outer = data_root(root)
        inner = outer / "CUB_200_2011"
        return outer if (outer / "images.txt").is_file() and not inner.is_dir() else inner

    def _table(self, root: str | None, name: str) -> dict[str, str]:
        path = self._base(root) / name
        try:
            lines = read_file(path, MOST_LIST_BYTES).decode().splitlines()
            return dict(line.split(maxsplit=1) for line in lines if line.strip())
        except OSError as error:
            raise NolaVisionError(
                _missing("CUB-200-2011", self, data_root(root), f"{path}: {error.strerror}")
            ) from error
        except ValueError as error:
            raise NolaVisionError(f"{path} is damaged ({error}): unpack the archive anew") from error


class ImageNet100(DatasetEntry):
    """100 classes of an ImageNet tree: those of `imagenet100.txt` beneath the root, else of the list that ships.

    The test images are ImageNet's validation images, as everywhere.
    """

    LIST = "imagenet100.txt"
    expects = "train/<wnid>/<image> and val/<wnid>/<image> of ImageNet beneath the root"

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        text = self.own_content(root).decode() or (resources.files("nola_vision.data") / "lists" / self.LIST).read_text(
            encoding="utf-8"
        )
        listed = [line.split()[0] for line in text.splitlines() if line.strip() and line[0] != "#"]
        if len(set(listed)) != len(listed) or not listed:
            again = next((name for name in listed if listed.count(name) > 1), None)
            fault = f"has {again} twice" if again else "names no class"
            raise NolaVisionError(f"{data_root(root) / self.LIST} {fault}: write one class (n01440764) a line")
        return tuple(sorted(listed))

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        base, names = data_root(root) / ("train" if split == "train" else "val"), self.class_names(root)
        if gone := [name for name in names if not (base / name).is_dir()]:
            reason = f"{base} lacks {len(gone)} of the {len(names)} class folders, {gone[0]} for one"
            raise NolaVisionError(_missing("ImageNet-100", self, data_root(root), reason))
        files = [_class_images(base / name) for name in names]
        labels = np.repeat(np.arange(len(names)), [len(paths) for paths in files])
        return FileSource([path for paths in files for path in paths], labels, names, data_root(root))

    def own_content(self, root: str | None) -> bytes:
        """A user's own list of the classes in UTF-8, if there is one under the root."""
        path = data_root(root) / self.LIST
        if not path.exists():
            return b""
        try:
            content = read_file(path, MOST_LIST_BYTES)
            content.decode()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise NolaVisionError(f"{path} cannot be read ({reason}): write one class (n01440764) per line") from error
        return content

    def other_files(self, root: str | None, split: Split) -> Counter[str]:
        base = data_root(root) / ("train" if split == "train" else "val")
        folders = [base / name for name in self.class_names(root)]
        return sum((_other_suffixes(folder, _files(folder)) for folder in folders), Counter())


def _torchvision(reader: str, base: Path, entry: DatasetEntry, download: bool, **options: Any) -> Any:
    """A data set as torchvision's class of that name opens it."""
    from torchvision import datasets

    try:
        return getattr(datasets, reader)(base, download=download, **options)
    except Exception as error:  # missing, damaged or unreachable: each reader has its own ways to say so
        reason = str(error).partition(". You can")[0] or type(error).__name__
        raise NolaVisionError(_missing(reader, entry, base, reason, download)) from error


def _missing(name: str, entry: DatasetEntry, base: Path, reason: str, download: bool = False) -> str:
    if download:
        return f"cannot fetch {name} into {base} ({reason}): try where there is a network, or put there {entry.expects}"
    reason = reason if base.is_dir() else "there is no such folder"
    return f"cannot read {name} in {base} ({reason}): it must have {entry.expects}{_or_fetch(entry)}"


def _or_fetch(entry: DatasetEntry) -> str:
    return ", or pass --data.download true where there is a network" if entry.downloads else ""


def get_dataset(name: str) -> DatasetEntry:
    """The entry of a name.

    Raises:
        NolaVisionError: there is none; the message names close ones, or all.
    """
    if name.startswith(HUB_PREFIX):
        from nola_vision.data.datasets.hugging_face import HuggingFace

        path, _, columns = name.removeprefix(HUB_PREFIX).partition("#")
        if not path:
            raise NolaVisionError(f"the data set {name!r} has no name after {HUB_PREFIX}: write {HUB_PREFIX}NAME")
        label, _, image = columns.partition("#")
        return HuggingFace(path, label, image)
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS, f"use one of {', '.join(sorted(DATASETS))}, or {HUB_PREFIX}NAME")
        raise NolaVisionError(f"there is no data set {name!r}: {hint}")
    return DATASETS[name]


def open_split(entry: DatasetEntry, root: str | None, split: Split, download: bool = False) -> ImageSource:
    """Opens one split of a data set that something can be learned from.

    Args:
        entry: the data set.
        root, split, download: as for `DatasetEntry.open`.

    Raises:
        NolaVisionError: as `DatasetEntry.open`, or there is only one class.
    """
    source = entry.open(root, split, download)
    if len(source.class_names) < 2:
        raise NolaVisionError(f"there is one class only, {', '.join(source.class_names)}: give images of two or more")
    return source


def data_root(root: str | None) -> Path:
    """The folder given, else that of the environment.

    Raises:
        NolaVisionError: there is neither, or it is no folder.
    """
    chosen = given_root(root)
    if not chosen:
        raise NolaVisionError(f"this data set needs a folder: pass --data.root FOLDER or set {ROOT_VARIABLE}")
    path, whence = Path(chosen), f"--data.root{'' if root else f' (now from {ROOT_VARIABLE})'}"
    if path.is_file():
        raise NolaVisionError(
            f"the data root {path} is a file: give the folder of the data set by {whence}, or read the file as a list "
            "of images by --data.dataset list"
        )
    return path


def check_root(entry: DatasetEntry, root: str | None, download: bool = False) -> None:
    """Refuses a root that a data set cannot be in, without opening anything.

    Raises:
        NolaVisionError: as `data_root`; or it does not exist, and nothing will be downloaded.
    """
    if entry.needs_root and not (path := entry.place(root)).exists() and not download:
        raise NolaVisionError(f"the data root {path} does not exist: check --data.root{_or_fetch(entry)}")


def given_root(root: str | None) -> str | None:
    """The folder given, else that of the environment, if there is one."""
    chosen = root or os.environ.get(ROOT_VARIABLE)
    return str(Path(chosen).expanduser()) if chosen else None


def _folders(folder: Path, hidden: bool = False) -> list[Path]:
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


def _class_folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder, by their names in sorted order."""
    inner = _folders(folder)
    names = {name_text(path.name): path for path in inner}
    if len(names) < len(inner):
        raise NolaVisionError(f"two class folders of {folder} have one name in Unicode's two forms: rename one")
    if not names:
        raise NolaVisionError(f"{folder} has no class folders: put images there as {folder / '<class>' / '<image>'}")
    return names


def _with_images(folders: dict[str, Path]) -> dict[str, Path]:
    """Those of the class folders that have images.

    Raises:
        NolaVisionError: none has.
    """
    found = {
        name: folder
        for name, folder in folders.items()
        # with photos that need another package it is a class all the same: reading it names the package
        if _images(folder, files := _files(folder)) or any(path.suffix.lower() in HEIF_SUFFIXES for path in files)
    }
    if not found:
        folder = next(iter(folders.values())).parent
        raise NolaVisionError(f"no folder in {folder} has images: put images there as {folder / '<class>' / '<image>'}")
    return found


def _class_images(folder: Path) -> list[Path]:
    """`image_files` of a class, which a draw and a manifest must be able to tell apart by their names.

    Raises:
        NolaVisionError: as `image_files`, or two have one name.
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
        NolaVisionError: there are none, or a folder cannot be read.
    """
    files = _files(folder)
    images = _images(folder, files)
    if not images:
        others = kinds_of_files(_other_suffixes(folder, files))
        has = f"files of other kinds: {others}" if others else f"{', '.join(sorted(image_suffixes()))}"
        raise NolaVisionError(f"{folder} has no images ({has}): add some, or remove the folder")
    return images


def _images(folder: Path, files: Iterable[Path]) -> list[Path]:
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
    """The key that files are sorted by: their name as text, and then as bytes."""
    return name_text(path.as_posix()), os.fsencode(path)


def _files(folder: Path) -> list[Path]:
    """The files under a folder in any order; hidden ones are left out, links are followed once."""

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


def _other_suffixes(folder: Path, files: Iterable[Path]) -> Counter[str]:
    """How many files under a folder are not images, by suffix."""
    files = list(files)
    images = {*_images(folder, files)}
    return Counter(path.suffix.lower() or "without suffix" for path in files if path not in images)


def kinds_of_files(others: Counter[str]) -> str:
    """Suffixes and their counts for a message, such as `12 .heic (pip install 'nola-vision[heic]'), 1 .txt`."""
    named = []
    for suffix, count in others.most_common(5):
        named.append(f"{count} {suffix}" + (f" ({HEIF_INSTALL})" if suffix in HEIF_SUFFIXES else ""))
    rest = others.total() - sum(count for _, count in others.most_common(5))
    return ", ".join(named) + (f" and {rest} more" if rest else "")


def _some(names: Sequence[str]) -> str:
    """The first of some names and their number, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def content_list(base: Path, paths: list[Path], most_bytes: int | None = None) -> bytes:
    """The name under `base` and the SHA-256 of each file, one per line.

    Args:
        base: the folder that paths are under.
        paths: of the files.
        most_bytes: a larger file has no digest, as one that cannot be read.
    """
    digests = file_digests(base, paths, most_bytes)
    names = [name_under(base, path) for path in paths]
    return "".join(f"{name}\0{found or ''}\n" for name, found in zip(names, digests, strict=True)).encode()


CIFAR10_NAMES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())
CIFAR100_NAMES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
    turtle wardrobe whale willow_tree wolf woman worm
    """.split()
)
FASHION_MNIST_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

_IDX = "train-images-idx3-ubyte, train-labels-idx1-ubyte, and both for t10k in {}/raw/ beneath the root"

DATASETS: dict[str, DatasetEntry] = {
    "digits": Digits(),
    "folder": Folder(),
    "list": ListFile(),
    "cifar10": TorchvisionArray(
        "CIFAR10",
        "data_batch_1 to data_batch_5, test_batch, batches.meta in cifar-10-batches-py/ beneath the root",
        CIFAR10_NAMES,
    ),
    "cifar100": TorchvisionArray("CIFAR100", "train, test, meta in cifar-100-python/ beneath the root", CIFAR100_NAMES),
    "mnist": TorchvisionArray("MNIST", _IDX.format("MNIST"), tuple("0123456789")),
    "fashion_mnist": TorchvisionArray("FashionMNIST", _IDX.format("FashionMNIST"), FASHION_MNIST_NAMES),
    "fgvc_aircraft": TorchvisionFiles(
        "FGVCAircraft",
        "fgvc-aircraft-2013b/data/ with variants.txt, images_variant_trainval.txt, images_variant_test.txt and images/ "
        "beneath the root",
        train="trainval",
        options={"annotation_level": "variant"},
    ),
    "food101": TorchvisionFiles(
        "Food101", "food-101/ with meta/train.json, meta/test.json and images/<class>/ beneath the root"
    ),
    "oxford_iiit_pet": TorchvisionFiles(
        "OxfordIIITPet",
        "oxford-iiit-pet/ with annotations/trainval.txt, annotations/test.txt and images/ beneath the root",
        train="trainval",
        files="_images",
    ),
    "caltech101": ShippedList(
        "caltech101_v1",
        "caltech101/101_ObjectCategories",
        "Caltech101",
        "caltech101/101_ObjectCategories/<class>/image_<number>.jpg beneath the root",
    ),
    "sun397": ShippedList(
        "sun397_v1", "SUN397", "SUN397", "SUN397/<letter>/<class>/sun_<name>.jpg beneath the root", strip=2
    ),
    "cub200": Cub200(),
    "imagenet100": ImageNet100(),
}
