"""Images of requests: decoded within limits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from nola_vision.images.decoding import decode_image, decoding_error, stated_size, to_rgb
from nola_vision.serving.http.errors import RequestError

_MOST_RATIO = 50  # of the sides


@contextmanager
def pillow_limit(most_pixels: int) -> Iterator[None]:
    """Pillow's own limit, of this process, during the block.

    It holds for an image inside an image too, such as a PNG in an ICO, whose size the outer header does not state.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = most_pixels // 2  # Pillow refuses twice as many
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def pixels_of(content: bytes, most_pixels: int) -> int:
    """How many pixels are in memory when an image is decoded, as its header shows; 0 if it is refused before.

    Args:
        content: the bytes of the file.
        most_pixels: larger images are refused.
    """
    try:
        kind, width, height = stated_size(content)
    except Exception:  # Pillow raises many types; it is not an image
        return 0
    if kind == "ICO":  # which has an image of another size inside
        return most_pixels
    return width * height if width * height <= most_pixels else 0


def return_memory() -> None:
    """Gives memory that large images took back to the system. The C library would keep up to a gigabyte of it.

    Does nothing where the library is not glibc.
    """
    trim = getattr(ctypes.pythonapi, "malloc_trim", None)
    if trim is not None:
        trim(0)


def decode(content: bytes, name: str, most_pixels: int) -> Image.Image:
    """An image file as an upright image in mode RGB.

    Args:
        content: the bytes of the file.
        name: for messages: `of the request`, or `number 2`.
        most_pixels: larger images are refused.

    Raises:
        RequestError: 400: it is not an image. 413: it has too many pixels, or would have once its shorter side is
            resized to that of the backbone.
    """
    try:
        image = to_rgb(decode_image(content, most_pixels=most_pixels))
    except Image.DecompressionBombError:
        reason = f"the image {name} has more than {most_pixels:,} pixels: send a smaller one"
        raise RequestError(413, reason) from None
    except Exception as error:  # Pillow raises many types
        raise RequestError(400, str(decoding_error(name, error))) from error
    if max(image.size) > _MOST_RATIO * min(image.size):
        raise RequestError(413, f"the image {name} has a side of more than {_MOST_RATIO} times the other: crop it")
    return image
