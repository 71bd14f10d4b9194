"""Data sets in the formats that torchvision reads and downloads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nola_vision.data.datasets.base import DatasetEntry, Split, data_root
from nola_vision.data.sources import ArraySource, FileSource, ImageSource

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


@dataclass(frozen=True)
class TorchvisionArray(DatasetEntry):
    """A data set that torchvision reads into one array.

    Args:
        reader: the name of torchvision's class.
        expects: its files under the root.
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
        data = read_by_torchvision(self.reader, data_root(root), self, download, train=split == "train")
        return ArraySource(self.reader.lower(), np.asarray(data.data), data.targets, self.names)


@dataclass(frozen=True)
class TorchvisionFiles(DatasetEntry):
    """A data set whose lists torchvision reads; its images stay files.

    Args:
        reader: the name of torchvision's class.
        expects: its files under the root.
        train: the name of its training split.
        files: the reader's attribute with the images' paths, in the order of the list.
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
        return read_by_torchvision(self.reader, data_root(root), self, download, split=named, **self.options)


def read_by_torchvision(reader: str, base: Path, entry: DatasetEntry, download: bool, **options: Any) -> Any:
    """The data set that torchvision's class of that name opens.

    Raises:
        NolaVisionError: files are missing or damaged, or the download failed.
    """
    from torchvision import datasets

    try:
        return getattr(datasets, reader)(base, download=download, **options)
    except Exception as error:  # each reader raises other types
        reason = str(error).partition(". You can")[0] or type(error).__name__
        raise entry.missing(reader, base, reason, download) from error
