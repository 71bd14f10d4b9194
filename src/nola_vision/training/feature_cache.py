"""Features of frozen backbones on disk, so that the next process does not compute them again.

One safetensors file per key in `nola-vision/features` of the user's cache folder; the key is a hash of everything that
the features depend on, so a file never becomes stale. Files are replaced atomically and need no lock. What is damaged
or not ours is ignored. The folder can be deleted at any time.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import write_whole
from nola_vision.common.hashing import sha256, sha256_of_tensors
from nola_vision.common.local_files import cache_folder, read_file, warn_not_stored

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "NOLA_VISION_CACHE_GIB"
DEFAULT_GIB = 2.0
_MOST_GIB = 10**6
_MOST_HEADER = 2**16  # bytes of a stored file besides its features
_OURS = re.compile(r"[0-9a-f]{64}\.safetensors|\.[0-9a-f]{64}\.safetensors\.[0-9a-f]{32}\.tmp")
_MOST_WRITING_SECONDS = 3600  # a temporary file that is older was left by a process that died
_FEATURES, _CHECKSUM = "features", "sha256"


def most_bytes() -> int:
    """The size limit of the folder, from the environment variable; 0 switches the cache off.

    Raises:
        NolaVisionError: the variable is not a number of GiB.
    """
    text = os.environ.get(VARIABLE) or str(DEFAULT_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    if not 0 <= gib <= _MOST_GIB:
        raise NolaVisionError(
            f"{VARIABLE} is '{text}': give the size of the feature cache in GiB, up to {_MOST_GIB:,}; 0 for no cache"
        )
    return int(gib * 2**30)


def key_of(description: Mapping[str, Any]) -> str:
    """SHA-256 over a description of features, plain values, whatever the order of its keys."""
    return sha256(json.dumps(description, sort_keys=True, separators=(",", ":")))


def load(key: str, shape: Sequence[int]) -> Tensor | None:
    """The features of a key on the CPU; None if there is no intact file of finite floats in this shape."""
    import safetensors.torch
    import torch

    if (path := _path(key)) is None:
        return None
    try:
        with torch.inference_mode(False):  # tensors made in inference mode cannot be trained on
            limit = min(most_bytes(), math.prod(shape) * 8 + _MOST_HEADER)
            stored = safetensors.torch.load(read_file(path, limit))
            features = stored[_FEATURES].clone()  # aligned in memory as computed ones are, which affects rounding
        if (
            tuple(features.shape) != tuple(shape)
            or not features.is_floating_point()
            or not features.isfinite().all()
            or not torch.equal(stored[_CHECKSUM], _checksum(key, features))
        ):
            return None
    except Exception:  # missing, or damaged: safetensors and torch raise many types
        return None
    with suppress(OSError):
        os.utime(path)  # the least recently used files are deleted first
    return features


def store(key: str, features: Tensor) -> None:
    """Writes features that are finite, then deletes the least recently used files beyond the size limit.

    Warns once per process if the folder cannot be written.
    """
    import safetensors.torch

    if not features.isfinite().all():
        return
    content = safetensors.torch.save({_FEATURES: features.contiguous(), _CHECKSUM: _checksum(key, features)})
    if len(content) > most_bytes():
        return
    if (path := _path(key)) is None:
        return warn_not_stored("there is no home folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        in_the_way = path.exists() and not path.is_file()
        return warn_not_stored(f"{path if in_the_way else path.parent}: {error.strerror}")
    _delete_least_recent(path.parent, most_bytes())


def _path(key: str) -> Path | None:
    return None if (folder := cache_folder()) is None else folder / "features" / f"{key}.safetensors"


def _checksum(key: str, features: Tensor) -> Tensor:
    """SHA-256 over the key and the features, `[32]` bytes."""
    import torch

    return torch.tensor(list(bytes.fromhex(sha256_of_tensors({_FEATURES: features}, key))), dtype=torch.uint8)


def _delete_least_recent(folder: Path, limit: int) -> None:
    """Deletes files of this cache until those that are left take at most `limit` bytes, and abandoned temporary files.

    Files that other processes delete meanwhile are skipped.
    """
    found: list[tuple[float, int, Path]] = []
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if _OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    found.append((status.st_mtime, status.st_size, Path(entry.path)))
    total, abandoned = sum(size for _, size, _ in found), time.time() - _MOST_WRITING_SECONDS
    for modified, size, path in sorted(found):
        temporary = path.name.startswith(".")
        expired = modified < abandoned if temporary else total > limit
        if expired:
            with suppress(OSError):
                path.unlink()
                total -= size
