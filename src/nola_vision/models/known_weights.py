"""Weights files on this machine: where a backbone came from, and the same file found again by its digest.

An adapter file names the file that its backbone was read from by name, size and SHA-256, never by a path. The file is
looked for in the folder that the environment variable NOLA_VISION_WEIGHTS names, then in a list of the local files that
backbones were read from before. The list is `weights.json` in the user's cache folder; it can be deleted at any time.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import WEIGHTS_SUFFIXES
from nola_vision.common.local_files import cache_folder, file_digest, file_digests, read_cache, write_cache
from nola_vision.common.progress import PlainLines, say_aside
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.backbones.weights import repository, weights_file

FOLDER_VARIABLE = "NOLA_VISION_WEIGHTS"
_MOST_NAME = 255  # characters
_MOST_KNOWN = 1000  # files in the list; the oldest are dropped
_MOST_ENTRIES = 10_000  # files and folders that a search looks at


@dataclass(frozen=True)
class WeightsOrigin:
    """The file that a backbone's pretrained weights were read from.

    Args:
        repository: the hub repository that it came from; None for a local file and for what the package ships.
        file: its name, without folders.
        bytes: its size.
        sha256: its digest in hexadecimal digits.
    """

    repository: str | None
    file: str
    bytes: int
    sha256: str


def origin(spec: BackboneSpec) -> WeightsOrigin | None:
    """Where the weights of a backbone that was made on this machine came from; None if no file is behind them."""
    if spec.base != "pretrained" or (path := weights_file(spec)) is None:
        return None
    digest = file_digest(path)
    return None if digest is None else WeightsOrigin(repository(spec), _name(path), path.stat().st_size, digest)


def is_file_name(name: str) -> bool:
    """Whether a text can be a file's name in an adapter file: printable, and without folders."""
    return (
        name.isprintable() and not set(name) & set("/\\:") and name not in ("", ".", "..") and len(name) <= _MOST_NAME
    )


def _name(path: Path) -> str:
    """A file's name as `is_file_name` allows it; it then serves people, the digest finds the file."""
    name = "".join(one if is_file_name(f"_{one}") else "_" for one in path.name)
    return name if is_file_name(name) else "weights"


def remember(spec: BackboneSpec) -> None:
    """Adds the file of a backbone that timm alone would not find to the list of known files."""
    if spec.base != "pretrained" or (spec.file is None and ":" not in spec.tag):
        return
    place, path = _list_file(), weights_file(spec)
    if path is None or (digest := file_digest(path)) is None:
        return
    known, key = read_cache(place), os.path.abspath(path)
    if known.get(key) != [digest]:
        known.pop(key, None)
        write_cache(place, dict([*known.items(), (key, [digest])][-_MOST_KNOWN:]))


def find(wanted: WeightsOrigin, spec: BackboneSpec) -> str | None:
    """A local file with the weights of a digest, as `BackboneSpec.file`; nothing is downloaded.

    Files of another size are not read. For a `local-dir:` or `hf-hub:` tag the result is the file's folder, which must
    have a `config.json`.

    Args:
        wanted: what an adapter file states.
        spec: the backbone, without a file.

    Returns:
        The path, or None where timm finds such a file by the tag itself, or where there is no such file.

    Raises:
        NolaVisionError: NOLA_VISION_WEIGHTS does not name a folder.
    """
    foreign = ":" in spec.tag
    if not foreign and (own := weights_file(spec)) is not None and _is_it(own, wanted):
        return None
    for paths in _candidates(wanted):
        for path, digest in zip(paths, file_digests(paths[0].parent, paths), strict=True):
            if digest == wanted.sha256:
                if not foreign:
                    return str(path)
                if (path.parent / "config.json").is_file():
                    return str(path.parent)
    return None


def how_to_find(wanted: WeightsOrigin) -> str:
    """What an error says where `find` finds nothing: the file, and the ways to name it."""
    return (
        f"it was trained on the weights file '{wanted.file}' (SHA-256 {wanted.sha256[:12]}...), which is not found: "
        f"give it by `weights` (--weights FILE), set {FOLDER_VARIABLE} to a folder that has it, or run `fit` with it "
        "once"
    )


def _candidates(wanted: WeightsOrigin) -> Iterator[list[Path]]:
    """Files that may be the wanted one, the likeliest first, in lists of files of one folder."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        if not os.path.isdir(folder):
            raise NolaVisionError(f"{FOLDER_VARIABLE} is {folder!r}, which is not a folder: set it to one, or unset it")
        paths = [path for path in _weights_under(folder) if _has_size(path, wanted.bytes)]
        paths.sort(key=lambda path: (_name(path) != wanted.file, path.parent, path))
        for _, of_folder in groupby(paths, lambda path: (_name(path) != wanted.file, path.parent)):
            yield list(of_folder)
    listed = [Path(path) for path, entry in read_cache(_list_file()).items() if entry == [wanted.sha256]]
    for _, of_folder in groupby(listed, lambda path: path.parent):
        if paths := [path for path in of_folder if _has_size(path, wanted.bytes)]:
            yield paths


def _weights_under(folder: str) -> Iterator[Path]:
    """Files named like weights in a folder and the folders in it, those nearest to it first; no link leads out of it.

    The search ends after `_MOST_ENTRIES` names, and says so: the folder may be a whole disk.
    """
    inside, pending, seen = Path(os.path.realpath(folder)), deque([folder]), 0
    lines = PlainLines(say=say_aside)
    while pending:
        with suppress(OSError), os.scandir(pending.popleft()) as entries:  # a folder that cannot be read is left out
            for entry in entries:
                if seen == _MOST_ENTRIES:
                    say_aside(
                        f"the search for weights in {folder} stops after {seen:,} files and folders: set "
                        f"{FOLDER_VARIABLE} to the folder that has the weights file"
                    )
                    return
                seen += 1
                lines.say(lambda: f"searching for weights in {folder}, which {FOLDER_VARIABLE} names")
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.name.endswith(WEIGHTS_SUFFIXES) and (
                    not entry.is_symlink() or Path(os.path.realpath(entry.path)).is_relative_to(inside)
                ):
                    yield Path(entry.path)


def _has_size(path: Path, size: int) -> bool:
    """Whether there is a regular file of a size at a path, which may be any text."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def _is_it(path: Path, wanted: WeightsOrigin) -> bool:
    return _has_size(path, wanted.bytes) and file_digest(path) == wanted.sha256


def _list_file() -> Path | None:
    return None if (folder := cache_folder()) is None else folder / "weights.json"
