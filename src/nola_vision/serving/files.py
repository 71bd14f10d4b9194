"""The adapter files of a folder, without reading them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.validation import quoted
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.loading import read_header
from nola_vision.serving.adapter import BASE
from nola_vision.serving.shared_backbone import check_shareable

SUFFIX = ".safetensors"


def as_path(value: Any, what: str) -> Path:
    """A path that somebody gave; messages call it `what`.

    Raises:
        NolaVisionError: it is of another type.
    """
    try:
        return Path(value)
    except TypeError as error:
        raise NolaVisionError(f"{what} is {quoted(value)}: give a path as text or a Path") from error


def is_name(name: Any) -> bool:
    """Whether an adapter may have this name."""
    return isinstance(name, str) and bool(name) and name.isprintable() and name != BASE


def adapter_files(folder: Path) -> dict[str, Path]:
    """The adapter files of a folder by their adapters' names; hidden ones are not adapters.

    Raises:
        NolaVisionError: the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise NolaVisionError(f"the folder {folder} cannot be read ({reason}): check it") from error
    stems = {name.removesuffix(SUFFIX): folder / name for name in names if name.endswith(SUFFIX)}
    return {stem: path for stem, path in stems.items() if is_name(stem) and not stem.startswith(".")}


def file_state(path: Path) -> tuple[int, ...] | None:
    """Size, times and inode of a file, which are others when it was changed; None for what is not a regular file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def backbone_of(folder: str | Path, weights: str | None = None, tag: str | None = None) -> BackboneSpec:
    """The backbone that a folder of adapters is for: that of the first file, by name, that a bank can have.

    Args:
        folder: with adapter files.
        weights: a local file with the backbone's weights; else it is found as `load_adapter` finds it.
        tag: timm's tag of the backbone, if it is known: no file is read then.

    Raises:
        NolaVisionError: there is no adapter file, or a bank can have none of them.
    """
    if tag is not None:
        return BackboneSpec(tag, file=weights)
    problems: list[NolaVisionError] = []
    for _, path in sorted(adapter_files(as_path(folder, "folder")).items()):
        try:
            metadata = read_header(path, weights).metadata
            check_shareable(metadata, path)
            return metadata.backbone
        except NolaVisionError as error:
            problems.append(error)
    if problems:
        raise problems[0]
    raise NolaVisionError(
        f"{folder} has no adapter file ({SUFFIX}): give a folder with files that `fit` wrote, or timm's tag of the "
        "backbone (--backbone)"
    )
