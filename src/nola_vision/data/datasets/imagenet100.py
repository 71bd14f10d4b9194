"""ImageNet-100: 100 classes of ImageNet."""

from __future__ import annotations

from collections import Counter
from importlib import resources
from pathlib import Path

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.local_files import read_file
from nola_vision.data.datasets.base import MOST_LIST_BYTES, DatasetEntry, Split, data_root
from nola_vision.data.datasets.image_folders import open_class_folders, other_suffixes
from nola_vision.data.sources import ImageSource


class ImageNet100(DatasetEntry):
    """100 classes of an ImageNet tree: those of `imagenet100.txt` under the root, else of the shipped list.

    The test images are ImageNet's validation images, as is usual.
    """

    LIST = "imagenet100.txt"
    expects = "train/<wnid>/<image> and val/<wnid>/<image> of ImageNet under the root"

    def class_names(self, root: str | None, download: bool = False) -> tuple[str, ...]:
        text = self.own_content(root).decode() or (resources.files("nola_vision.data") / "lists" / self.LIST).read_text(
            encoding="utf-8"
        )
        listed = [line.split()[0] for line in text.splitlines() if line.strip() and line[0] != "#"]
        if len(set(listed)) != len(listed) or not listed:
            again = next((name for name in listed if listed.count(name) > 1), None)
            fault = f"has {again} twice" if again else "names no class"
            raise NolaVisionError(f"{data_root(root) / self.LIST} {fault}: write one class (n01440764) per line")
        return tuple(sorted(listed))

    def open(self, root: str | None, split: Split, download: bool = False) -> ImageSource:
        base = self._base(root, split)
        folders = {name: base / name for name in self.class_names(root)}
        if gone := [name for name, folder in folders.items() if not folder.is_dir()]:
            reason = f"{base} lacks {len(gone)} of the {len(folders)} class folders, for example {gone[0]}"
            raise self.missing("ImageNet-100", data_root(root), reason)
        return open_class_folders(folders, data_root(root))

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
        base = self._base(root, split)
        return sum((other_suffixes(base / name) for name in self.class_names(root)), Counter())

    def _base(self, root: str | None, split: Split) -> Path:
        return data_root(root) / ("train" if split == "train" else "val")
