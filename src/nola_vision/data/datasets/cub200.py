"""CUB-200-2011: 200 bird species."""

from __future__ import annotations

from pathlib import Path

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.local_files import read_file
from nola_vision.data.datasets.base import MOST_LIST_BYTES, DatasetEntry, Split, data_root
from nola_vision.data.sources import FileSource, ImageSource


class Cub200(DatasetEntry):
    """CUB-200-2011 (Caltech-UCSD Birds), read from its own lists."""

    expects = (
        "CUB_200_2011/ with images.txt, image_class_labels.txt, train_test_split.txt, classes.txt and images/ under "
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
                    f"the lists of CUB-200-2011 in {data_root(root)} do not match, the class or split of image "
                    f"{number} is missing: unpack the archive again"
                )
        chosen = [number for number in listed if in_train[number] == flag]
        paths = [self._base(root) / "images" / listed[number] for number in chosen]
        return FileSource(paths, [index[labels[number]] for number in chosen], self.class_names(root), data_root(root))

    def _base(self, root: str | None) -> Path:
        outer = data_root(root)
        inner = outer / "CUB_200_2011"
        return outer if (outer / "images.txt").is_file() and not inner.is_dir() else inner

    def _table(self, root: str | None, name: str) -> dict[str, str]:
        """A list of the data set as number -> value."""
        path = self._base(root) / name
        try:
            lines = read_file(path, MOST_LIST_BYTES).decode().splitlines()
            return dict(line.split(maxsplit=1) for line in lines if line.strip())
        except OSError as error:
            raise self.missing("CUB-200-2011", data_root(root), f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise NolaVisionError(f"{path} is damaged ({error}): unpack the archive again") from error
