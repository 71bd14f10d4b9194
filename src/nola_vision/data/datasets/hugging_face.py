"""Data sets of the Hugging Face Hub; needs the optional package `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from PIL import Image

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.local_files import read_file
from nola_vision.common.tags import HUB_PREFIX
from nola_vision.data.datasets.base import DatasetEntry, Split, content_list, given_root
from nola_vision.data.sources import ImageSource
from nola_vision.images.decoding import MOST_BYTES, decode_image

TEST_NAMES = ("test", "validation", "valid", "val")
IMAGE_COLUMNS = ("image", "img")  # which of several columns of images is used


class HubSource(ImageSource):
    """Images in a column of a Hugging Face data set.

    Args:
        name: of the data set and its split, for messages.
        column: the images; each item is a dict of `bytes` and `path`, as `datasets.Image(decode=False)` gives it.
        labels: `[n]` class indices.
        class_names: the name of each class index.
    """

    def __init__(self, name: str, column: Any, labels: npt.ArrayLike, class_names: tuple[str, ...]) -> None:
        super().__init__(labels, class_names)
        self._name, self._column = name, column

    def where(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def encoded(self, index: int) -> bytes:
        stored = self._column[index]
        content: bytes = stored["bytes"] or b""
        try:
            if not content and stored["path"]:
                content = read_file(stored["path"], MOST_BYTES)
        except OSError as error:
            raise NolaVisionError(
                f"cannot read the image {self.where(index)} ({error.strerror}): fix, replace or remove it"
            ) from error
        return self._noted(index, content)

    def _decode(self, index: int) -> Image.Image:
        return decode_image(self.encoded(index))


@dataclass(frozen=True)
class HuggingFace(DatasetEntry):
    """A data set of the Hugging Face Hub, or of a local path that its library reads.

    The test split is the first one that exists of test, validation, valid and val. Classes are numbered as in the
    ClassLabel column; without one, by the sorted values of the training split.

    Args:
        name: on the Hub, or a local path.
        label: the label's column; by default `label`, or the only ClassLabel.
        image: the images' column; by default the only column of images, or the one named image or img.
    """

    name: str
    label: str = ""
    image: str = ""
    expects: str = "a data set of the Hugging Face Hub, cached under the root, or a local path in its name"
    downloads: bool = True
    needs_root: bool = False

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        data = self._load(root, "train", download)
        return tuple(map(str, self._values(data, self._label_column(data.features))))

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        data = self._load(root, split, download)
        image, label = self._image_column(data.features), self._label_column(data.features)
        numbered = isinstance(data.features[label], _library().ClassLabel)
        labels = data[label][:]  # a list; going through the column takes 400 times as long
        if None in labels or (numbered and -1 in labels):
            raise self._refusal(f"its {split} split has images without a label", "remove these rows")
        if numbered or split == "train":
            values = self._values(data, label)
        else:
            values = self._values(self._load(root, "train", download), label)
        if not numbered:
            index = {value: label for label, value in enumerate(values)}
            if strange := sorted({str(value) for value in labels if value not in index}):
                cause = f"the label {strange[0]} of its test split is missing from its training split"
                raise self._refusal(cause, "remove these rows, or name another label column by #COLUMN")
            labels = [index[value] for value in labels]
        data = data.cast_column(image, _library().Image(decode=False))
        if empty := _without_image(data, image):
            cause = f"{len(empty)} rows of its {split} split have no image in column {image}, the first is {empty[0]}"
            raise self._refusal(cause, "remove these rows")
        return HubSource(f"{HUB_PREFIX}{self.name}[{split}]", data[image], labels, tuple(map(str, values)))

    def own_content(self, root: str | None) -> bytes:
        """The name and the SHA-256 of every file of a local path, whatever its size: one file may have all images."""
        place = Path(self.name)
        files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else []
        return content_list(place, sorted(files))

    def _load(self, root: str | None, split: Split, download: bool) -> Any:
        """A split, loaded by the library."""
        library, root = _library(), given_root(root)
        with _network(download):
            for name in ("train",) if split == "train" else TEST_NAMES:
                try:
                    return library.load_dataset(self.name, split=name, cache_dir=root)
                except Exception as error:  # missing, not cached, no network: the library raises many types
                    if not (isinstance(error, ValueError) and "Unknown split" in str(error)):
                        raise self._refusal(" ".join(str(error).split())) from error
        raise self._refusal(f"there is no {split} split")

    def _image_column(self, features: Any) -> str:
        library = _library()
        images = [name for name, feature in features.items() if isinstance(feature, library.Image)]
        content = [name for name, feature in features.items() if feature in map(library.Value, _BYTES)]
        found = images or content
        named = [name for name in IMAGE_COLUMNS if name in found]
        chosen: str = self.image or (found[0] if len(found) == 1 else next(iter(named), ""))
        if not self.image and not found:
            raise self._refusal(f"there is no column of images, only {', '.join(features)}", "name another data set")
        if chosen not in images + content:
            which = f"{chosen} is not a column of images" if chosen else "which column has the images is not clear"
            cause = f"{which}, it has {', '.join(found)}"
            raise self._refusal(cause, f"name it, as in {HUB_PREFIX}{self.name}#{self.label or 'label'}#{found[-1]}")
        return chosen

    def _label_column(self, features: Any) -> str:
        library = _library()
        classes = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
        chosen: str = self.label or ("label" if "label" in features else classes[0] if len(classes) == 1 else "")
        if chosen not in features:
            cause = f"which of {', '.join(features)} is the label is not clear"
            raise self._refusal(cause, f"name it, as in {HUB_PREFIX}{self.name}#COLUMN")
        feature = features[chosen]
        dtype = feature.dtype if isinstance(feature, library.Value) else ""
        if chosen not in classes and not str(dtype).startswith(_LABELS):
            kind = dtype or type(feature).__name__
            cause = f"its column {chosen} has values of type {kind}, but a label is one class"
            raise self._refusal(cause, f"name another column, as in {HUB_PREFIX}{self.name}#COLUMN")
        return chosen

    def _values(self, data: Any, label: str) -> Sequence[Any]:
        """The value of each class in the label column, by class index."""
        if isinstance(data.features[label], _library().ClassLabel):
            return list(data.features[label].names)
        return sorted(set(data[label][:]) - {None})

    def _refusal(self, cause: str, fix: str = "") -> NolaVisionError:
        fix = fix or (
            "name a data set of the Hugging Face Hub, and pass --data.download true with a network connection, or a "
            "local path that its library reads"
        )
        return NolaVisionError(f"cannot read {HUB_PREFIX}{self.name} ({cause}): {fix}")


_BYTES = ("binary", "large_binary")
_LABELS = ("string", "large_string", "int", "uint", "bool")


def _without_image(data: Any, column: str) -> list[int]:
    """The rows that have neither an image's content nor its path."""
    import pyarrow.compute as compute  # type: ignore[import-untyped]

    images = data.data.column(column)
    parts = [compute.is_null(compute.struct_field(images, name)) for name in ("bytes", "path")]
    return [index for index, empty in enumerate(compute.and_(*parts).to_pylist()) if empty]


def _library() -> Any:
    """Hugging Face's package."""
    try:
        import datasets
    except ImportError as error:
        raise NolaVisionError(
            "data sets named hf:NAME need Hugging Face's package: pip install 'nola-vision[hf]'"
        ) from error
    return datasets


@contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """Keeps the library off the network unless it is allowed; its switches are read once, at its import."""
    import datasets
    from huggingface_hub import constants

    switches: Any = [datasets.config, constants]
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    for switch, offline in zip(switches, before, strict=True):
        switch.HF_HUB_OFFLINE = offline or not allowed
    try:
        yield
    finally:
        for switch, offline in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = offline
