"""Whether images can be decoded, before hours of training depend on them."""

from __future__ import annotations

from pathlib import Path

from nola_vision.common.local_files import read_file, remembered
from nola_vision.common.stopwatch import timed
from nola_vision.data.sampling import Indices
from nola_vision.data.sources import FileSource, ImageSource
from nola_vision.images.decoding import MOST_BYTES, decode_image, decoder_versions, to_rgb


@timed("images")
def refuse_unreadable(source: ImageSource, indices: Indices) -> None:
    """Decodes image files in full; files that were decoded before and have not changed are not read again.

    Images of sources without separate files are not decoded: opening such a source checks what it can.

    Args:
        source: of the images. Its labels are not used.
        indices: which ones.

    Raises:
        NolaVisionError: the message of the first image that cannot be decoded, as reading it would raise.
    """
    if not isinstance(source, FileSource):
        return
    paths = [source.paths[index] for index in indices]
    readable = remembered(f"decoded by {decoder_versions()}", source.base, paths, _decodes)
    for index, found in zip(indices.tolist(), readable, strict=True):
        if found is None:
            source.image(index)


def _decodes(path: Path) -> str | None:
    try:
        to_rgb(decode_image(read_file(path, MOST_BYTES)))
    except Exception:  # Pillow raises many types
        return None
    return ""
