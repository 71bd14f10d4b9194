"""The registry of data sets: a name -> its class names and how to open its training or test images.

To add a data set, add an entry to `DATASETS`, of a class in this folder or of a new subclass of `DatasetEntry`, and a
config part in `configs/parts/datasets/`.
"""

from __future__ import annotations

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.suggestions import did_you_mean
from nola_vision.common.tags import HUB_PREFIX
from nola_vision.data.datasets.base import DatasetEntry, Split
from nola_vision.data.datasets.cub200 import Cub200
from nola_vision.data.datasets.digits import Digits
from nola_vision.data.datasets.folder import Folder
from nola_vision.data.datasets.hugging_face import HuggingFace
from nola_vision.data.datasets.imagenet100 import ImageNet100
from nola_vision.data.datasets.list_file import ListFile
from nola_vision.data.datasets.shipped_list import ShippedList
from nola_vision.data.datasets.torchvision_readers import (
    CIFAR10_NAMES,
    CIFAR100_NAMES,
    FASHION_MNIST_NAMES,
    TorchvisionArray,
    TorchvisionFiles,
)
from nola_vision.data.datasets.vtab import PREFIX, TASKS, Vtab
from nola_vision.data.sources import ImageSource

_IDX = "train-images-idx3-ubyte, train-labels-idx1-ubyte, and both for t10k in {}/raw/ under the root"

DATASETS: dict[str, DatasetEntry] = {
    "digits": Digits(),
    "folder": Folder(),
    "list": ListFile(),
    "cifar10": TorchvisionArray(
        "CIFAR10",
        "data_batch_1 to data_batch_5, test_batch, batches.meta in cifar-10-batches-py/ under the root",
        CIFAR10_NAMES,
    ),
    "cifar100": TorchvisionArray("CIFAR100", "train, test, meta in cifar-100-python/ under the root", CIFAR100_NAMES),
    "mnist": TorchvisionArray("MNIST", _IDX.format("MNIST"), tuple("0123456789")),
    "fashion_mnist": TorchvisionArray("FashionMNIST", _IDX.format("FashionMNIST"), FASHION_MNIST_NAMES),
    "fgvc_aircraft": TorchvisionFiles(
        "FGVCAircraft",
        "fgvc-aircraft-2013b/data/ with variants.txt, images_variant_trainval.txt, images_variant_test.txt and images/ "
        "under the root",
        train="trainval",
        options={"annotation_level": "variant"},
    ),
    "food101": TorchvisionFiles(
        "Food101", "food-101/ with meta/train.json, meta/test.json and images/<class>/ under the root"
    ),
    "oxford_iiit_pet": TorchvisionFiles(
        "OxfordIIITPet",
        "oxford-iiit-pet/ with annotations/trainval.txt, annotations/test.txt and images/ under the root",
        train="trainval",
        files="_images",
    ),
    "caltech101": ShippedList(
        "caltech101_v1",
        "caltech101/101_ObjectCategories",
        "Caltech101",
        "caltech101/101_ObjectCategories/<class>/image_<number>.jpg under the root",
    ),
    "sun397": ShippedList(
        "sun397_v1", "SUN397", "SUN397", "SUN397/<letter>/<class>/sun_<name>.jpg under the root", strip=2
    ),
    "cub200": Cub200(),
    "imagenet100": ImageNet100(),
    **{f"{PREFIX}{task}": Vtab(task) for task in TASKS},
}


def get_dataset(name: str) -> DatasetEntry:
    """The data set of a name: one of `DATASETS`, or `hf:NAME#LABEL#IMAGE` of Hugging Face.

    Raises:
        NolaVisionError: there is none; the message suggests similar names, or lists all.
    """
    if name.startswith(HUB_PREFIX):
        path, _, columns = name.removeprefix(HUB_PREFIX).partition("#")
        if not path:
            raise NolaVisionError(f"the data set {name!r} lacks a name after {HUB_PREFIX}: write {HUB_PREFIX}NAME")
        label, _, image = columns.partition("#")
        return HuggingFace(path, label, image)
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS, f"use one of {', '.join(sorted(DATASETS))}, or {HUB_PREFIX}NAME")
        raise NolaVisionError(f"there is no data set {name!r}: {hint}")
    return DATASETS[name]


def open_split(entry: DatasetEntry, root: str | None, split: Split, download: bool = False) -> ImageSource:
    """Opens one split of a data set and checks that it has at least two classes.

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
