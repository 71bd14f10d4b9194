"""A user's folder of images, one folder per class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nola_vision.common.errors import NolaVisionError
from nola_vision.data.datasets.base import DatasetEntry, Split, content_list, data_root
from nola_vision.data.datasets.image_folders import (
    class_folders,
    files_under,
    folders_in,
    images_among,
    open_class_folders,
    other_suffixes,
    with_images,
)
from nola_vision.data.sources import ImageSource
from nola_vision.images.decoding import MOST_BYTES


@dataclass(frozen=True)
class _Layout:
    """How a folder of images is laid out.

    Args:
        folders: where the class folders of each split are.
        flat: whether they are directly in the root, without a folder `train`.
        test_name: the name of the test images on disk: test or validation.
    """

    folders: dict[Split, Path]
    flat: bool
    test_name: str


class Folder(DatasetEntry):
    """Image files in class folders: `root/<class>/`, or `root/train/<class>/` with other splits next to `train/`.

    Without `train/`, every folder that has images is a class (the flat layout). With `train/`, only the split folders
    are read: `test/` has the test images and `val/` (or `valid/`, `validation/`) the validation pool; without `test/`,
    `val/` has the test images. The case of these names does not matter.

    Class indices follow the sorted class names, images the sorted paths. Hidden files are skipped; images in folders
    under a class folder are of that class. Opening any split checks that all splits have the same class folders, so
    that a mistake is found before training.
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
        folders = class_folders(layout.folders["train"])
        return tuple(with_images(folders) if layout.flat else folders)

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        return open_class_folders(self._class_folders(self._layout(root))[split], data_root(root))

    def own_content(self, root: str | None) -> bytes:
        """The name and the SHA-256 of every image in the splits' folders."""
        layout, place = self._layout(root), data_root(root)
        folders = class_folders(place) if layout.flat else layout.folders
        images = [path for folder in folders.values() for path in images_among(folder, files_under(folder))]
        return content_list(place, images, MOST_BYTES)  # a larger image is refused when it is read

    def other_files(self, root: str | None, split: Split) -> Counter[str]:
        folders = self._class_folders(self._layout(root))[split].values()
        return sum(map(other_suffixes, folders), Counter())

    def notes(self, root: str | None) -> list[str]:
        layout, place = self._layout(root), data_root(root)
        read = self._class_folders(layout)["train"] if layout.flat else layout.folders
        notes = []
        if ignored := [f"{path.name}/" for path in folders_in(place) if path not in read.values()]:
            splits = " and ".join(f"{path.name}/" for path in layout.folders.values())
            why = "without an image" if layout.flat else f"next to {splits}"
            notes.append(f"folders in {place} that are not read, {why}: {_some(ignored)}")
        for folder in dict.fromkeys([place, *layout.folders.values()]):
            hidden = [path for path in folders_in(folder, hidden=True) if images_among(path, files_under(path))]
            if hidden:
                named = _some([f"{path.name}/" for path in hidden])
                notes.append(
                    f"folders of images in {folder} that are not read, since their names begin with a dot: {named}"
                )
            files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
            if loose := images_among(folder, files):
                named = _some([path.name for path in loose])
                notes.append(f"images directly in {folder}, in no class folder, that are not read: {named}")
        return notes

    def _class_folders(self, layout: _Layout) -> dict[Split, dict[str, Path]]:
        """The class folders of each split by name, in sorted order."""
        found = {split: class_folders(folder) for split, folder in layout.folders.items()}
        train = found["train"] = with_images(found["train"]) if layout.flat else found["train"]
        for split, folder in layout.folders.items():
            if odd := sorted(train.keys() ^ found[split].keys()):
                one = layout.folders["train"]
                where = ", ".join(f"'{name}' is only in {one if name in train else folder}" for name in odd[:5])
                raise NolaVisionError(f"{one} and {folder} must have the same class folders, but {where}: rename them")
        return {split: {name: folders[name] for name in train} for split, folders in found.items()}

    def _layout(self, root: str | None) -> _Layout:
        place = data_root(root)
        named: dict[str, Path] = {}
        for path in folders_in(place):
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


def _some(names: Sequence[str]) -> str:
    """The first of some names and their number, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
