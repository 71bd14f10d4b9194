"""Weights files on this machine: the origin of a backbone's weights, and finding the same file by its digest.

An adapter file identifies the file that its backbone was read from by name, size and SHA-256, never by a path. The
search looks in the folder of the environment variable NOLA_VISION_WEIGHTS, then in a list of the local files that
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
from nola_vision.models.backbones.weights import possible_file_names, repository, weights_file

FOLDER_VARIABLE = "NOLA_VISION_WEIGHTS"
_MOST_NAME = 255  # characters
_LONG_SIZE = 73_920_561_843  # bytes, more than any file of timm's, with digits that hardly compress
_MOST_KNOWN = 1000  # files in the list; the oldest are dropped
_MOST_ENTRIES = 10_000  # files and folders that a search reads


@dataclass(frozen=True)
class WeightsOrigin:
    """The file that a backbone's pretrained weights were read from.

    Args:
        repository: the hub repository that it came from; None for a local file and for weights in the package.
        file: its name, without folders.
        bytes: its size.
        sha256: its digest in hexadecimal digits.
    """

    repository: str | None
    file: str
    bytes: int
    sha256: str


def origin(spec: BackboneSpec) -> WeightsOrigin | None:
    """The origin of a backbone's weights on this machine; None if they were not read from a file."""
    if spec.base != "pretrained" or (path := weights_file(spec)) is None:
        return None
    digest = file_digest(path)
    return None if digest is None else WeightsOrigin(repository(spec), _name(path), path.stat().st_size, digest)


def longest_origins(spec: BackboneSpec) -> list[WeightsOrigin | None]:
    """What `origin` may give on any machine, as long as it can be: the longest file states one of them.

    They follow from the spec alone, so that a size which is counted with them does not depend on what is downloaded.
    """
    if spec.base != "pretrained":
        return [None]
    names = possible_file_names(spec)
    return [WeightsOrigin(repository(spec), _name(Path(one)), _LONG_SIZE, "") for one in names] or [None]


def is_file_name(name: str) -> bool:
    """Whether a text can be a file's name in an adapter file: printable, and without folders."""
    return (
        name.isprintable() and not set(name) & set("/\\:") and name not in ("", ".", "..") and len(name) <= _MOST_NAME
    )


def _name(path: Path) -> str:
    """A file's name, changed to what `is_file_name` allows; it is for people, and the digest finds the file."""
    name = "".join(one if is_file_name(f"_{one}") else "_" for one in path.name)
    return name if is_file_name(name) else "weights"


def remember(spec: BackboneSpec) -> None:
    """Adds a backbone's file to the list of known files, unless timm finds it by the tag."""
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
    """A local file with the wanted digest, as `BackboneSpec.file`; does not download.

    Files of another size are not read. For a `local-dir:` or `hf-hub:` tag the result is the file's folder, which must
    have a `config.json`.

    Args:
        wanted: what an adapter file states.
        spec: the backbone, without a file.

    Returns:
        The path, or None if timm finds the file by the tag, or if there is no such file.

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
    """The part of an error message for a file that `find` does not find: its name, and how to give it."""
    return (
        f"it was trained on the weights file '{wanted.file}' (SHA-256 {wanted.sha256[:12]}...), which was not found: "
        f"give it by `weights` (--weights FILE), set {FOLDER_VARIABLE} to a folder that has it, or run `fit` with it "
        "once"
    )


def _candidates(wanted: WeightsOrigin) -> Iterator[list[Path]]:
    """Candidates for the wanted file, the likeliest first, one list per folder."""
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
    """Weights files in a folder and its subfolders, by depth; links out of it are not followed.

    The search stops after `_MOST_ENTRIES` names, with a message: the folder may be a whole disk.
    """
    inside, pending, seen = Path(os.path.realpath(folder)), deque([folder]), 0
    lines = PlainLines(say=say_aside)
    while pending:
        with suppress(OSError), os.scandir(pending.popleft()) as entries:  # a folder that cannot be read is skipped
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
    """Whether a path, which may be any text, is a regular file of this size."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size


def _is_it(path: Path, wanted: WeightsOrigin) -> bool:
    return _has_size(path, wanted.bytes) and file_digest(path) == wanted.sha256


def _list_file() -> Path | None:
    return None if (folder := cache_folder()) is None else folder / "weights.json"
