"""The registry of data sets: a name -> its class names and how to open its training or test images.

To add a data set, write a subclass of `DatasetEntry` (or reuse one) and add a line to `DATASETS`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from nola_vision.errors import NolaVisionError

Split = Literal["train", "test"]
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
ROOT_VARIABLE = "NOLA_VISION_DATA"


class ImageSource:
    """The images of one split, decoded when asked for.

    Args:
        labels: `[n]` class indices.
        class_names: the name of each class index.
    """

    def __init__(self, labels: npt.ArrayLike, class_names: tuple[str, ...]) -> None:
        self.labels: npt.NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """Decodes one image.

        Returns:
            An upright PIL image in mode RGB.

        Raises:
            NolaVisionError: the image is corrupt, truncated or in a pixel format without an 8-bit meaning.
        """
        try:
            return to_rgb(self._decode(index))
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
            raise NolaVisionError(
                f"cannot decode the image {self.where(index)} ({error}): mend, replace or remove it"
            ) from error

    def where(self, index: int) -> str:
        """Names an image for a person: its path, or as `digits[17]`."""
        raise NotImplementedError

    def _decode(self, index: int) -> Image.Image:
        raise NotImplementedError


class ArraySource(ImageSource):
    """Images held in one uint8 array `[n, h, w]` or `[n, h, w, 3]`."""

    def __init__(
        self, name: str, pixels: npt.NDArray[np.uint8], labels: npt.ArrayLike, class_names: tuple[str, ...]
    ) -> None:
        super().__init__(labels, class_names)
        self._name, self._pixels = name, pixels

    def where(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def _decode(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])


class FileSource(ImageSource):
    """Images in files of their own."""

    def __init__(self, paths: Sequence[Path], labels: npt.ArrayLike, class_names: tuple[str, ...]) -> None:
        super().__init__(labels, class_names)
        self._paths = list(paths)

    def where(self, index: int) -> str:
        return str(self._paths[index])

    def _decode(self, index: int) -> Image.Image:
        with Image.open(self._paths[index]) as image:
            image.load()
            return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image in mode RGB: 16-bit grey is scaled to 8 bits, alpha is dropped.

    Raises:
        NolaVisionError: the pixels are floating point or 32-bit, with no agreed white.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise NolaVisionError(f"pixel mode {image.mode} has no agreed white, save it with 8 or 16 bits")
        image = Image.fromarray(np.round(values.astype(np.float64) / 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


class DatasetEntry:
    """One data set of the registry."""

    def class_names(self, root: str | None) -> tuple[str, ...]:
        """The names by class index, without reading an image.

        Raises:
            NolaVisionError: they stand on disk, and are not to be found there.
        """
        raise NotImplementedError

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        """Opens one split; the other is not touched.

        Args:
            root: the folder the data lie in; without it the environment variable `NOLA_VISION_DATA`.
            split: "train" or "test".
            download: fetch missing files, where the data set can.

        Raises:
            NolaVisionError: files are missing, unreadable or not as they should be.
        """
        raise NotImplementedError


class Digits(DatasetEntry):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, bundled with it: no download, no root.

    It comes without a test split. The rule here is that of scikit-learn's own example: the first 898 images train, the
    last 899 test. Writers follow one another in the file, so most test digits are by other hands.
    """

    TRAIN_IMAGES = 898

    def class_names(self, root: str | None) -> tuple[str, ...]:
        return tuple("0123456789")

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        part = slice(None, self.TRAIN_IMAGES) if split == "train" else slice(self.TRAIN_IMAGES, None)
        pixels = np.round(bunch.images[part] * (255 / 16)).astype(np.uint8)
        return ArraySource("digits", pixels, bunch.target[part], self.class_names(root))


class Folder(DatasetEntry):
    """Image files in `root/train/<class>/` and `root/test/<class>/` (or `val` where there is no `test`).

    Class indices follow the sorted class names, images the sorted paths. Hidden files and files without an image's
    suffix are skipped; folders beneath a class belong to it. That both splits have the same class folders is checked
    whichever is opened, so that a mistake shows before training.
    """

    def class_names(self, root: str | None) -> tuple[str, ...]:
        return _class_folders(_root(root) / "train")

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        train, test, val = (_root(root) / name for name in ("train", "test", "val"))
        test = val if val.exists() and not test.exists() else test
        names, others = self.class_names(root), _class_folders(test)
        if odd := sorted({*names} ^ {*others}):
            listed = ", ".join(f"{name!r} is only in {train if name in names else test}" for name in odd[:5])
            raise NolaVisionError(f"{train} and {test} must have the same class folders, but {listed}: mend the names")
        files = [_image_files((train if split == "train" else test) / name) for name in names]
        labels = np.repeat(np.arange(len(names)), [len(paths) for paths in files])
        return FileSource([path for paths in files for path in paths], labels, names)


@dataclass(frozen=True)
class Torchvision(DatasetEntry):
    """A data set that torchvision reads.

    Args:
        reader: the name of torchvision's class.
        folder: where its files lie beneath the root, for the error message.
        files: their names, for the error message.
        names: the class names, as torchvision numbers them.
    """

    reader: str
    folder: str
    files: str
    names: tuple[str, ...]

    def class_names(self, root: str | None) -> tuple[str, ...]:
        return self.names

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        from torchvision import datasets

        base = _root(root)
        try:
            data: Any = getattr(datasets, self.reader)(base, train=split == "train", download=download)
        except Exception as error:  # missing, damaged or unreachable: each reader has its own ways to say so
            raise NolaVisionError(
                f"cannot read {self.reader} in {base} ({str(error).partition('. You can')[0]}): put its files into "
                f"{base / self.folder} ({self.files}), or pass --data.download true where there is a network"
            ) from error
        return ArraySource(self.reader.lower(), np.asarray(data.data), data.targets, self.names)


def get_dataset(name: str) -> DatasetEntry:
    """The entry of a name.

    Raises:
        NolaVisionError: there is none; the message names close ones, or all.
    """
    if name not in DATASETS:
        names = difflib.get_close_matches(name, DATASETS)
        hint = f"did you mean {' or '.join(names)}?" if names else f"choose one of {', '.join(sorted(DATASETS))}"
        raise NolaVisionError(f"there is no data set {name!r}: {hint}")
    return DATASETS[name]


def _root(root: str | None) -> Path:
    """The folder given, else that of the environment."""
    chosen = root or os.environ.get(ROOT_VARIABLE)
    if not chosen:
        raise NolaVisionError(f"this data set needs a folder: pass --data.root FOLDER or set {ROOT_VARIABLE}")
    return Path(chosen).expanduser()


def _class_folders(folder: Path) -> tuple[str, ...]:
    """Sorted names of the folders in a folder."""
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise NolaVisionError(
            f"cannot read the folder {folder} ({error.strerror}): put images there as {folder / '<class>' / '<image>'}"
        ) from error
    if not names:
        raise NolaVisionError(f"{folder} has no class folders: put images there as {folder / '<class>' / '<image>'}")
    return tuple(names)


def folder_listing(root: str | None) -> str:
    """The relative path and size of every image of a `folder` data set, a line each; empty where there is none."""
    place = Path(root).expanduser() if root else None
    if place is None or not place.is_dir():
        return ""
    try:
        files = _image_files(place)
    except NolaVisionError:
        return ""
    return "\n".join(f"{path.relative_to(place).as_posix()} {path.stat().st_size}" for path in files)


def _image_files(folder: Path) -> list[Path]:
    """Sorted image files beneath a class's folder."""

    def refuse(error: OSError) -> None:
        raise NolaVisionError(f"cannot read the folder {error.filename} ({error.strerror}): allow it to be read")

    paths = []
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in files if not name.startswith(".")]
    images = sorted((path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES), key=Path.as_posix)
    if not images:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise NolaVisionError(f"{folder} has no images ({suffixes}): add some, or remove the folder")
    return images


def find_images(places: Sequence[str]) -> list[Path]:
    """The image files that are named or lie beneath folders that are named, in the order given.

    Raises:
        NolaVisionError: a name is neither file nor folder, or a folder has no images.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise NolaVisionError(f"{place} does not exist: name image files, or folders of them")
        found += _image_files(place) if place.is_dir() else [place]
    return found


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

DATASETS: dict[str, DatasetEntry] = {
    "digits": Digits(),
    "folder": Folder(),
    "cifar10": Torchvision(
        "CIFAR10", "cifar-10-batches-py", "data_batch_1 to data_batch_5, test_batch, batches.meta", CIFAR10_NAMES
    ),
    "cifar100": Torchvision("CIFAR100", "cifar-100-python", "train, test, meta", CIFAR100_NAMES),
    "mnist": Torchvision(
        "MNIST", "MNIST/raw", "train-images-idx3-ubyte, train-labels-idx1-ubyte, and both for t10k", tuple("0123456789")
    ),
    "fashion_mnist": Torchvision(
        "FashionMNIST",
        "FashionMNIST/raw",
        "train-images-idx3-ubyte, train-labels-idx1-ubyte, and both for t10k",
        FASHION_MNIST_NAMES,
    ),
}
