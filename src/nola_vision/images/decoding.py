"""Decoding of image files to upright RGB images: formats, limits, errors. Importing it does not import torch."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from nola_vision import __version__
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.local_files import open_regular

# What Pillow decodes itself, and HEIF by pi-heif. Others are excluded on purpose: EPS starts Ghostscript, HDF5 and GRIB
# need a plug-in.
FORMATS = (
    "AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
HEIF_SUFFIXES = frozenset({".heic", ".heics", ".heif", ".heifs", ".hif"})
HEIF_INSTALL = "pip install 'nola-vision[heic]'"
MOST_BYTES = 2**29  # of an image's file


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


def decoder_versions() -> str:
    """What determines which files can be decoded, as part of a cache key."""
    return f"nola-vision {__version__} and Pillow {PIL.__version__} for {' '.join(_formats())}"


def is_image(path: Path) -> bool:
    """Whether a file's content has the signature of an image format, whatever its name; TGA files lack a signature."""
    formats = [kind for kind in _formats() if kind != "TGA"]
    try:
        with open_regular(path, MOST_BYTES) as file, Image.open(file, formats=formats):
            return True
    except Exception:  # Pillow raises many types
        return False


def decode_image(content: bytes, side: int | None = None, most_pixels: int | None = None) -> Image.Image:
    """Decodes the content of an image file and turns the image upright.

    Args:
        content: the bytes of the file.
        side: let a JPEG file be decoded at 1/2, 1/4 or 1/8 of its resolution, which is faster, as long as both sides
            have at least this many pixels.
        most_pixels: refuse images with more. Pillow itself refuses more than 179 million.

    Raises:
        PIL.Image.DecompressionBombError: it has too many pixels; it was not decoded.
        Exception: it cannot be decoded. Pillow raises many types.
    """
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        if most_pixels is not None and image.width * image.height > most_pixels:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        if side is not None:
            image.draft(None, (side, side))
        image.load()
        return ImageOps.exif_transpose(image)


def stated_size(content: bytes) -> tuple[str | None, int, int]:
    """The format, width and height of an image file, from its header.

    Raises:
        Exception: it is not an image. Pillow raises many types.
    """
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        return image.format, image.width, image.height


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image in mode RGB: 16-bit grey is scaled to 8 bits, alpha is dropped.

    White is 65535 for every grey image of more than 8 bits, so that all images of a data set are scaled equally. An
    image whose values stay below 2^14 is refused: most such files store fewer than 16 bits, and at most a quarter of
    the grey levels would be left. An image that is all black is accepted.

    Raises:
        NolaVisionError: floating-point pixels, or grey values outside 0 to 65535 or with a maximum of 1 to 16383.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise NolaVisionError(f"the white level of pixel mode {image.mode} is undefined, save it with 8 or 16 bits")
        most = int(values.max())
        if 0 < most < 2**14:
            raise NolaVisionError(
                f"its grey values reach {most}, but in 16 bits white is expected at 65535: multiply all images of the "
                f"data set by the same power of two (by at most {2 ** (16 - most.bit_length())} for this one), or save "
                "them with 8 bits"
            )
        # a table, since a copy as float64 would take four times the memory of the image
        image = Image.fromarray(np.round(np.arange(65536) / 257).astype(np.uint8)[values])
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def decoding_error(name: str, error: Exception) -> NolaVisionError:
    """The user error for an image that cannot be decoded.

    Args:
        name: the image's path, or another name that the user recognises.
        error: what Pillow raised, or `to_rgb`.
    """
    reason = str(error)
    if isinstance(error, UnidentifiedImageError):
        reason = "not an image, or of an unsupported format"
        if "HEIF" not in _formats() and Path(name).suffix.lower() in HEIF_SUFFIXES:
            reason = f"HEIC needs {HEIF_INSTALL}"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return NolaVisionError(f"cannot decode the image {name} ({reason}): fix, replace or remove it")
