"""Where the images of a split come from: an array or files, decoded when asked for, always upright RGB."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from nola_vision import __version__
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.local_files import open_regular, read_file
from nola_vision.common.text import name_text, printable

# What Pillow decodes itself, and HEIF by pi-heif. Others are left out on purpose: EPS starts Ghostscript, HDF5 and GRIB
# only name a plug-in.
FORMATS = (
    "AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
HEIF_SUFFIXES = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
HEIF_INSTALL = "pip install 'nola-vision[heic]'"
MOST_BYTES = 2**29  # of an image's file


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

    def image(self, index: int, content: bytes | None = None, side: int | None = None) -> Image.Image:
        """Decodes one image.

        Args:
            index: which one.
            content: what `encoded` gave for it, if that was kept: no file is opened then.
            side: of `decoded`, if there is a content.

        Returns:
            An upright PIL image in mode RGB.

        Raises:
            NolaVisionError: the image is corrupt, truncated or in a pixel format without an 8-bit meaning.
        """
        try:
            return to_rgb(self._decode(index) if content is None else decoded(content, side))
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
            reason = str(error)
            if isinstance(error, UnidentifiedImageError):
                reason = "not an image, or of an unsupported format"
                if "HEIF" not in _formats() and Path(self.where(index)).suffix.lower() in HEIF_SUFFIXES:
                    reason = f"HEIC needs {HEIF_INSTALL}"
            elif isinstance(error, OSError) and error.strerror:
                reason = error.strerror
            raise NolaVisionError(
                f"cannot decode the image {self.where(index)} ({reason}): fix, replace or remove it"
            ) from error

    def where(self, index: int) -> str:
        """Names an image for a person: its path, or as `digits[17]`."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Names an image wherever its data set lies: its path beneath the data set's folder, or as `digits[17]`."""
        return self.where(index)

    def encoded(self, index: int) -> bytes | None:
        """The content of an image's file; None if the image is not stored as a file.

        Raises:
            NolaVisionError: the file cannot be read.
        """
        return None

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
            return read_file(self.paths[index], MOST_BYTES)
        except OSError as error:
            raise NolaVisionError(
                f"cannot read the image {self.where(index)} ({error.strerror}): fix, replace or remove it"
            ) from error

    def _decode(self, index: int) -> Image.Image:
        return decoded(read_file(self.paths[index], MOST_BYTES))


def name_under(base: Path, path: Path) -> str:
    """A file's path under a folder as text that every file can store; its own path if it is elsewhere."""
    return name_text((path.relative_to(base) if path.is_relative_to(base) else path).as_posix())


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that are read as images, in lower case: those of `FORMATS` that this Pillow can decode."""
    kinds = {*_formats(), "MPO"}  # MPO is what Pillow opens as a JPEG
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in kinds)


@cache
def _formats() -> tuple[str, ...]:
    """The `FORMATS` that this Pillow was built with, and HEIF if pi-heif is installed."""
    Image.init()
    formats = tuple(kind for kind in FORMATS if kind in Image.OPEN and kind != "HEIF")
    try:
        import pi_heif
    except ImportError:
        return formats
    pi_heif.register_heif_opener()
    return (*formats, "HEIF")


def decoders() -> str:
    """What decides which files are images, for the name of a cache."""
    return f"nola-vision {__version__} and Pillow {PIL.__version__} for {' '.join(_formats())}"


def is_image(path: Path) -> bool:
    """Whether a file's content begins like an image that is read, whatever its name; TGA has no such beginning."""
    formats = [kind for kind in _formats() if kind != "TGA"]
    try:
        with open_regular(path, MOST_BYTES) as file, Image.open(file, formats=formats):
            return True
    except Exception:  # Pillow raises many types
        return False


def decoded(content: bytes, side: int | None = None) -> Image.Image:
    """The image of an image file's content, upright.

    Args:
        content: of the file.
        side: let a JPEG file be decoded at 1/2, 1/4 or 1/8 of its resolution, which is faster, as long as both sides
            have at least this many pixels.
    """
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        if side is not None:
            image.draft(None, (side, side))
        image.load()
        return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image in mode RGB: 16-bit grey is scaled to 8 bits, alpha is dropped.

    White is 65535 for every grey image of more than 8 bits, so that all images of a data set are scaled equally. One
    that stays under 2^14 is refused: most store fewer bits in that range, and a quarter of the grey levels or fewer
    would be left. An image that is all black is accepted.

    Raises:
        NolaVisionError: floating-point pixels, or grey values outside 0 to 65535 or with a maximum of 1 to 16383.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise NolaVisionError(f"pixel mode {image.mode} has no agreed white, save it with 8 or 16 bits")
        most = int(values.max())
        if 0 < most < 2**14:
            raise NolaVisionError(
                f"its grey values reach {most}, but in 16 bits white is expected at 65535: multiply all images of the "
                f"data set by the same power of two (by at most {2 ** (16 - most.bit_length())} for this one), or save "
                "them with 8 bits"
            )
        image = Image.fromarray(np.round(values.astype(np.float64) / 257).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
