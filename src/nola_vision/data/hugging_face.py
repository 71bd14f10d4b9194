"""Data sets of the Hugging Face Hub, read by timm's reader; needs the optional package `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from PIL import Image

from nola_vision.data.datasets import HUB_PREFIX, DatasetEntry, given_root
from nola_vision.data.sources import ImageSource, decoded
from nola_vision.data.splits import Split
from nola_vision.errors import NolaVisionError

TEST_NAMES = ("test", "validation", "valid", "val")


class ReaderSource(ImageSource):
    """Images that a timm reader opens.

    Args:
        name: of the data set and its split, for messages.
        reader: timm's reader; indexing it gives an open file and a label.
        labels: `[n]` class indices.
        class_names: the name of each class index.
    """

    def __init__(self, name: str, reader: Any, labels: npt.ArrayLike, class_names: tuple[str, ...]) -> None:
        super().__init__(labels, class_names)
        self._name, self._reader = name, reader

    def where(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def encoded(self, index: int) -> bytes:
        with self._reader[index][0] as file:
            content: bytes = file.read()
        return content

    def _decode(self, index: int) -> Image.Image:
        return decoded(self.encoded(index))


@dataclass(frozen=True)
class HuggingFace(DatasetEntry):
    """A data set of the Hugging Face Hub, or of a local path that its library reads.

    The test split is the first there is of test, validation, valid and val. Classes are numbered as the data set's
    ClassLabel column numbers them; without one, by the sorted values of the training split.

    Args:
        name: on the Hub, or a local path.
        label: the label's column; by default the one called label, or the only ClassLabel.
    """

    name: str
    label: str = ""
    expects: str = "a data set of the Hugging Face Hub, cached beneath the root, or a local path in its name"
    downloads: bool = True
    needs_root: bool = False

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        return tuple(map(str, self._values(self._reader(root, "train", download))))

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        reader = self._reader(root, split, download)
        labels = reader.dataset[reader.label_key][:]  # a list; going through the column takes 400 times as long
        if None in labels or (_is_numbered(reader) and -1 in labels):
            raise self._refusal(f"its {split} split has images without a label")
        if _is_numbered(reader) or split == "train":
            values = self._values(reader)
        else:
            values = self._values(self._reader(root, "train", download))
        if not _is_numbered(reader):
            index = {value: label for label, value in enumerate(values)}
            if strange := sorted({str(value) for value in labels if value not in index}):
                raise self._refusal(f"its training split has no label {strange[0]}, its test split has")
            labels = [index[value] for value in labels]
        return ReaderSource(f"{HUB_PREFIX}{self.name}[{split}]", reader, labels, tuple(map(str, values)))

    def _reader(self, root: str | None, split: Split, download: bool) -> Any:
        """timm's reader of a split."""
        library, root = _library(), given_root(root)
        from timm.data.readers import create_reader

        try:
            with _network(download):
                for name in ("train",) if split == "train" else TEST_NAMES:
                    try:
                        features = library.load_dataset(self.name, split=name, cache_dir=root).features
                        break
                    except ValueError as error:
                        if "Unknown split" not in str(error):
                            raise
                else:
                    raise self._refusal(f"it has no {split} split")
                keys = {"input_key": self._image_column(features), "target_key": self._label_column(features)}
                return create_reader(f"hfds/{self.name}", root=root, split=name, **keys)
        except NolaVisionError:
            raise
        except Exception as error:  # not there, not cached, no network: the library has many ways to say so
            raise self._refusal(" ".join(str(error).split())) from error

    def _image_column(self, features: Any) -> str:
        images: list[str] = [name for name, feature in features.items() if isinstance(feature, _library().Image)]
        if not images:
            raise self._refusal(f"it has no column of images, only {', '.join(features)}")
        return images[0]

    def _label_column(self, features: Any) -> str:
        classes = [name for name, feature in features.items() if isinstance(feature, _library().ClassLabel)]
        chosen: str = self.label or ("label" if "label" in features else classes[0] if len(classes) == 1 else "")
        if chosen not in features:
            raise self._refusal(f"which of {', '.join(features)} is the label is not clear: add #COLUMN to the name")
        return chosen

    def _values(self, reader: Any) -> Sequence[Any]:
        """What stands for each class in the label column, by class index."""
        if _is_numbered(reader):
            return list(reader.dataset.features[reader.label_key].names)
        return sorted(set(reader.dataset[reader.label_key][:]) - {None})

    def _refusal(self, cause: str) -> NolaVisionError:
        return NolaVisionError(
            f"cannot read {HUB_PREFIX}{self.name} ({cause}): name a data set of the Hugging Face Hub, and pass "
            "--data.download true where there is a network, or a local path that its library reads"
        )


def _is_numbered(reader: Any) -> bool:
    """Whether the label column holds class indices with names."""
    return isinstance(reader.dataset.features[reader.label_key], _library().ClassLabel)


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
