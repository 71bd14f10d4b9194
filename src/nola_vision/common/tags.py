"""Names of backbones (timm's tags, `hf-hub:` and `local-dir:` names) and of data sets of Hugging Face's library."""

from __future__ import annotations

import os
from pathlib import PurePosixPath, PureWindowsPath

from nola_vision.common.text import last_part

HUB_PREFIX = "hf:"  # the beginning of the name of a Hugging Face data set
_SOURCES = ("hf-hub", "local-dir")


def split_tag(tag: str) -> tuple[str, str]:
    """The source of a tag (`hf-hub`, `local-dir`, or empty for timm's own tags) and the rest of it."""
    source, _, rest = tag.partition(":")
    return (source, rest) if source in _SOURCES else ("", tag)


def short_tag(tag: str) -> str:
    """A tag without the path to a local folder: a run's name and hash stay the same when the folder moves."""
    source, rest = split_tag(tag)
    return f"local-dir:{last_part(os.path.abspath(rest))}" if source == "local-dir" else tag


def short_dataset(name: str) -> str:
    """A data set's name without the path to a local folder: `hf:pets#label` of `hf:/home/me/pets#label`."""
    path, mark, columns = name.removeprefix(HUB_PREFIX).partition("#")
    local = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()
    return f"{HUB_PREFIX}{last_part(path)}{mark}{columns}" if local and name.startswith(HUB_PREFIX) else name
