"""Images of requests: decoded within limits."""

from __future__ import annotations

import binascii
import ctypes

from PIL import Image

from nola_vision.images.decoding import decode_image, decoding_error, stated_size, to_rgb
from nola_vision.serving.http.errors import RequestError, without_folders

_MOST_RATIO = 50  # of the sides
_LARGE = 4_000_000  # pixels


def limit_pillow(most_pixels: int) -> None:
    """Pillow's own limit, of this process: it holds for an image inside an image too, such as a PNG in an ICO."""
    Image.MAX_IMAGE_PIXELS = most_pixels // 2  # Pillow refuses twice as many


def from_base64(text: str, name: str) -> bytes:
    """The bytes of an image in base64.

    Args:
        text: what the request has.
        name: for messages: `of the request`, or `number 2`.

    Raises:
        RequestError: 422: it is not base64.
    """
    try:
        return binascii.a2b_base64(text.encode(), strict_mode=True)
    except ValueError as error:  # binascii.Error, and surrogates
        reason = f"the image {name} is not base64: encode the bytes of its file, without line breaks"
        raise RequestError(422, reason) from error


def is_large(content: bytes) -> bool:
    """Whether decoding an image takes much memory, as its header shows. Not an image: False."""
    try:
        kind, width, height = stated_size(content)
    except Exception:  # Pillow raises many types
        return False
    return width * height > _LARGE or kind == "ICO"  # which has an image of another size inside


def return_memory() -> None:
    """Gives memory that large images took back to the system. The C library would keep up to a gigabyte of it.

    Does nothing where the library is not glibc.
    """
    trim = getattr(ctypes.pythonapi, "malloc_trim", None)
    if trim is not None:
        trim(0)


def decode(content: bytes, name: str, most_pixels: int) -> Image.Image:
    """An image file as an upright image in mode RGB.

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
        raise RequestError(400, without_folders(str(decoding_error(name, error)))) from error
    if max(image.size) > _MOST_RATIO * min(image.size):
        raise RequestError(413, f"the image {name} has a side of more than {_MOST_RATIO} times the other: crop it")
    return image
