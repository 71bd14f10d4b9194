"""Images of a split, from an array or from files: decoded on access, always upright RGB."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import sha256
from nola_vision.common.local_files import read_file
from nola_vision.common.text import name_text, printable
from nola_vision.images.decoding import MOST_BYTES, decode_image, decoding_error, to_rgb


class ImageSource:
    """The images of one split, decoded on access.

    Args:
        labels: `[n]` class indices.
        class_names: the name of each class index.

    Attributes:
        first_read: SHA-256 of the content of each image file that this process has read, when it first did.
    """

    def __init__(self, labels: npt.ArrayLike, class_names: tuple[str, ...]) -> None:
        self.labels: npt.NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        self.class_names = class_names
        self.first_read: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int, content: bytes | None = None, side: int | None = None) -> Image.Image:
        """Decodes one image.

        Args:
            index: which one.
            content: what `encoded` gave for it, if that was kept: no file is opened then.
            side: of `decode_image`, if there is a content.

        Returns:
            An upright PIL image in mode RGB.

        Raises:
            NolaVisionError: the image is corrupt, truncated or in a pixel format without an 8-bit meaning.
        """
        try:
            return to_rgb(self._decode(index) if content is None else decode_image(content, side))
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
            raise decoding_error(self.where(index), error) from error

    def where(self, index: int) -> str:
        """An image's name in messages: its path, or as `digits[17]`."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """An image's name on any machine: its path under the data set's folder, or as `digits[17]`."""
        return self.where(index)

    def encoded(self, index: int) -> bytes | None:
        """The content of an image's file; None if the image is not stored as a file.

        Raises:
            NolaVisionError: the file cannot be read.
        """
        return None

    def _decode(self, index: int) -> Image.Image:
        raise NotImplementedError

    def _noted(self, index: int, content: bytes) -> bytes:
        """Fills in `first_read`."""
        if index not in self.first_read:
            self.first_read[index] = sha256(content)
        return content


class ArraySource(ImageSource):
    """Images in one uint8 array `[n, h, w]` or `[n, h, w, 3]`."""

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
    """Images in separate files.

    Args:
        paths: of the images.
        labels: `[n]` class indices.
        class_names: the name of each class index.
        base: the data set's folder; `name` is relative to it.
    """

    def __init__(
        self, paths: Sequence[Path], labels: npt.ArrayLike, class_names: tuple[str, ...], base: Path = Path()
    ) -> None:
        super().__init__(labels, class_names)
        self.paths, self.base = list(paths), base

    def where(self, index: int) -> str:
        return printable(str(self.paths[index]))

    def name(self, index: int) -> str:
        return name_under(self.base, self.paths[index])

    def encoded(self, index: int) -> bytes:
        try:
            return self._read(index)
        except OSError as error:
            raise NolaVisionError(
                f"cannot read the image {self.where(index)} ({error.strerror}): fix, replace or remove it"
            ) from error

    def _decode(self, index: int) -> Image.Image:
        return decode_image(self._read(index))

    def _read(self, index: int) -> bytes:
        return self._noted(index, read_file(self.paths[index], MOST_BYTES))


def name_under(base: Path, path: Path) -> str:
    """A file's path relative to a folder, as text without undecodable bytes; its full path if it is elsewhere."""
    return name_text((path.relative_to(base) if path.is_relative_to(base) else path).as_posix())
