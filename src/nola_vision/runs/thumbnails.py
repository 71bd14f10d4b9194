"""Thumbnails of the images that a run misclassified with the highest probability, stored next to its predictions.

A report shows them on any machine that has the run's folder, without opening the data set.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from PIL import Image, ImageCms

from nola_vision.common import process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import write_whole
from nola_vision.common.tags import HUB_PREFIX
from nola_vision.common.text import printable, shortened
from nola_vision.data.sources import ImageSource
from nola_vision.evaluation.predictions import Predictions
from nola_vision.runs.store import read_run_file

THUMBNAILS_FILE = "thumbnails.safetensors"
MOST_THUMBNAILS = 24
SIDE = 128  # pixels of the longer side
_QUALITY = 80  # of JPEG
_MOST_SIDE = 512  # when read: the file may come from anyone
_MOST_BYTES = 2**21
_MOST_JPEG_BYTES = 2**16  # about four times what a run writes
_SCAN = b"\xff\xda"
_KEPT_BYTES = 2**24  # of thumbnails, in memory
_KEY = re.compile(r"(0|[1-9][0-9]{0,17}) (.+)")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Thumbnail:
    """A small copy of a tested image.

    Args:
        index: of the image, as in `Predictions.index`.
        name: the image's path under its data set's folder, or such as `digits[17]`; printable.
        jpeg: the content of a JPEG file, without metadata.
        width: in pixels.
        height: in pixels.
    """

    index: int
    name: str
    jpeg: bytes
    width: int
    height: int


def most_confident_mistakes(predictions: Predictions, most: int = MOST_THUMBNAILS) -> npt.NDArray[np.int64]:
    """The misclassified images as positions in the arrays of `predictions`, the highest probability first.

    Images of equal probability are in the order of their index. At most `most` are returned.
    """
    wrong = np.flatnonzero(~predictions.correct)
    order = np.argsort(-predictions.probability[wrong], kind="stable")
    return wrong[order][:most].astype(np.int64)


def write_thumbnails(folder: Path, predictions: Predictions, source: ImageSource) -> None:
    """Writes the thumbnails into a run's folder: one uint8 tensor per image, the content of a JPEG file.

    A tensor's name is the image's index, a space and the image's name. The file contains no tensors if no image was
    misclassified. An error is logged as a warning; the run continues.

    Args:
        folder: of the run.
        predictions: of the run.
        source: which the indices of `predictions` refer to.
    """
    path, stored, problems = folder / THUMBNAILS_FILE, {}, []
    for index in predictions.index[most_confident_mistakes(predictions)].tolist():
        try:
            stored[f"{index} {_name(source, index)}"] = np.frombuffer(_jpeg(source, index), dtype=np.uint8)
        except NolaVisionError as error:
            problems.append(str(error))
    if problems:
        _warn(f"{len(problems)} misclassified images are not stored for the report: {problems[0]}")
    try:
        write_whole(path, safetensors.numpy.save(stored))
    except OSError as error:
        _warn(f"{path} cannot be written ({error.strerror}): the report shows no images of this run")


def _warn(sentence: str) -> None:
    _log.warning("%s", printable(sentence))


def _name(source: ImageSource, index: int) -> str:
    """An image's name as text; of an absolute path, which may contain a person's name, only the last part."""
    name = source.name(index)
    path = PurePath(name.removeprefix(HUB_PREFIX))
    return printable(path.name if path.is_absolute() else name)


def _jpeg(source: ImageSource, index: int) -> bytes:
    """A thumbnail as JPEG, cached in the process: many runs misclassify the same images."""

    def make() -> bytes:
        image = source.image(index, source.encoded(index), SIDE)
        image.thumbnail((SIDE, SIDE))  # does not enlarge
        image = _in_srgb(image)
        image.info = {}  # Pillow would copy the comment and the profile
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
        return buffer.getvalue()

    return process_cache.recent("thumbnails", (weakref.ref(source), index), make, len, _KEPT_BYTES)


def _in_srgb(image: Image.Image) -> Image.Image:
    """The image converted to sRGB, which browsers assume; unchanged if its profile is damaged or of another mode."""
    if profile := image.info.get("icc_profile"):
        with suppress(ImageCms.PyCMSError, OSError, TypeError, ValueError):
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB") or image
    return image


def load_thumbnails(folder: Path) -> dict[int, Thumbnail]:
    """The thumbnails in a run's folder by the index of their image, in ascending order; empty if there is no file.

    Raises:
        NolaVisionError: the file cannot be read, or is damaged.
    """
    path = folder / THUMBNAILS_FILE
    try:
        content = read_run_file(path, _MOST_BYTES)
    except NolaVisionError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}
        raise
    try:
        stored = safetensors.numpy.load(content)
        if len(stored) > MOST_THUMBNAILS:
            raise ValueError(f"it has {len(stored)} images")
        thumbnails = [_thumbnail(key, array) for key, array in stored.items()]
    except Exception as error:  # Pillow raises many types
        reason = printable(shortened(" ".join(str(error).split()), 100))
        raise NolaVisionError(f"{path} is damaged ({reason}): delete it") from error
    return {thumbnail.index: thumbnail for thumbnail in sorted(thumbnails, key=lambda one: one.index)}


def _thumbnail(key: str, array: npt.NDArray[np.uint8]) -> Thumbnail:
    """Validates one tensor of the file; any exception means that it is damaged."""
    named = _KEY.fullmatch(key)
    if named is None or printable(key) != key:
        raise ValueError(f"a tensor is named {key!r}")
    if array.dtype != np.uint8 or array.ndim != 1:
        raise ValueError(f"{key} is {array.dtype} of {array.ndim} dimensions")
    if array.size > _MOST_JPEG_BYTES:
        raise ValueError(f"{key} is larger than {_MOST_JPEG_BYTES // 1024} KiB")
    jpeg = array.tobytes()
    # a scan of ten bytes costs a pass over the whole image; Pillow writes the marker nowhere else
    if (scans := jpeg.count(_SCAN)) > 1:
        raise ValueError(f"{key} has {scans:,} scans, as a progressive JPEG does")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about sizes that are refused below
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            if max(image.size) > _MOST_SIDE:
                raise ValueError(f"{key} is {image.width} x {image.height} pixels")
            image.load()
            return Thumbnail(int(named[1]), named[2], jpeg, image.width, image.height)
