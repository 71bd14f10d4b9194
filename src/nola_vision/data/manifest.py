"""A manifest: the exact images of a k-shot draw in a small file, so that two labs train on the same images."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import write_file
from nola_vision.common.hashing import sha256
from nola_vision.common.local_files import read_file
from nola_vision.common.validation import check_types
from nola_vision.data.sampling import Indices, draw
from nola_vision.data.sources import ImageSource

FORMAT = "nola-vision k-shot manifest"
FORMAT_VERSION = 1
MOST_BYTES = 2**27  # of a manifest's file: about a million images


@dataclass(frozen=True)
class Manifest:
    """A k-shot draw.

    Args:
        dataset: its name in the registry.
        shots: images per class.
        split_seed: of the draw.
        class_names: by label.
        images: `(name, label, content)` of each image in the order of the draw; the name is a path under the data
            set's root, or as in `digits[17]`; the content is SHA-256 over the file, or over the RGB pixels of images
            that are not in files.
    """

    dataset: str
    shots: int
    split_seed: int
    class_names: tuple[str, ...]
    images: tuple[tuple[str, int, str], ...]


def make_manifest(
    source: ImageSource, dataset: str, shots: int, split_seed: int, among: Indices | None = None
) -> Manifest:
    """The manifest of a draw from a data set's training images.

    Args:
        source: the training images.
        dataset: its name in the registry.
        shots: images per class.
        split_seed: of the draw.
        among: as of `draw`.

    Raises:
        NolaVisionError: as `draw`, or an image cannot be read.
    """
    indices = draw(source.labels, shots, split_seed, source.class_names, among).tolist()
    images = tuple((source.name(i), int(source.labels[i]), content(source, i)) for i in indices)
    return Manifest(dataset, shots, split_seed, source.class_names, images)


def content(source: ImageSource, index: int) -> str:
    """SHA-256 over an image's file, or over its RGB pixels if it is not in a file."""
    return sha256(source.encoded(index) or source.image(index).tobytes())


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """Writes a manifest, one image per line.

    Raises:
        NolaVisionError: the file cannot be written.
    """
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    images = head.pop("images")
    lines = ",\n".join(json.dumps(image, ensure_ascii=False) for image in images)
    text = json.dumps(head, ensure_ascii=False, indent=1)[:-2] + f',\n "images": [\n{lines}\n]\n}}\n'
    write_file(path, text.encode())


def read_manifest(path: str | Path) -> Manifest:
    """Reads a manifest.

    Raises:
        NolaVisionError: the file is missing, is not a manifest of this version, or its number of different images in
            a class is not its number of shots.
    """
    try:
        loaded: Any = json.loads(read_file(path, MOST_BYTES).decode())
    except OSError as error:
        raise NolaVisionError(f"the manifest {path} cannot be read ({error.strerror}): check its path") from error
    except (ValueError, RecursionError) as error:
        raise NolaVisionError(f"the manifest {path} is not JSON: copy it again from its source") from error
    if not isinstance(loaded, dict) or loaded.pop("format", None) != FORMAT:
        raise NolaVisionError(f"{path} is not a k-shot manifest: write one with nola-vision data manifest")
    if (version := loaded.pop("format_version", None)) != FORMAT_VERSION:
        raise NolaVisionError(
            f"the manifest {path} has version {version}, and this nola-vision reads {FORMAT_VERSION}: use the release "
            "that wrote it"
        )
    try:
        images = tuple((str(name), int(label), str(found)) for name, label, found in loaded.pop("images"))
        manifest = Manifest(**{**loaded, "class_names": tuple(loaded["class_names"]), "images": images})
        check_types(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, NolaVisionError) as error:
        raise NolaVisionError(f"the manifest {path} is not what nola-vision writes ({error}): get it again") from error
    different = Counter(label for label, _ in {(label, name) for name, label, _ in manifest.images})
    faults = [
        f"{different[label]} different images of {name!r}"
        for label, name in enumerate(manifest.class_names)
        if different[label] != manifest.shots
    ]
    if len(manifest.images) != manifest.shots * len(manifest.class_names):
        faults.append(f"{len(manifest.images)} images of {len(manifest.class_names)} classes")
    if faults:
        raise NolaVisionError(f"the manifest {path} is for {manifest.shots} shots, but has {faults[0]}: get it again")
    return manifest


def locate(manifest: Manifest, source: ImageSource) -> Indices:
    """Where the images of a manifest are in a data set's training images.

    Raises:
        NolaVisionError: the classes differ, or an image is missing or differs.
    """
    if manifest.class_names != source.class_names:
        only = {
            "the manifest": sorted({*manifest.class_names} - {*source.class_names}),
            "the data set here": sorted({*source.class_names} - {*manifest.class_names}),
        }
        odd = [f"only {where} has {', '.join(map(repr, names[:5]))}" for where, names in only.items() if names]
        raise NolaVisionError(
            f"the manifest has other classes than the data set here ({'; '.join(odd) or 'their order differs'}): give "
            "the data set that it was made of by --data.root"
        )
    places = {source.name(i): i for i in range(len(source))}
    missing = [name for name, _, _ in manifest.images if name not in places]
    if missing:
        raise NolaVisionError(
            f"the data set here lacks {len(missing)} of the manifest's {len(manifest.images)} images, for example "
            f"{missing[0]}: give the data set that it was made of by --data.root"
        )
    for name, label, expected in manifest.images:
        if source.labels[places[name]] != label:
            raise NolaVisionError(f"{name} has another label here than in the manifest: get the manifest again")
        if content(source, places[name]) != expected:
            raise NolaVisionError(
                f"{name} is another image than the manifest's: give the data set that it was made of by --data.root"
            )
    return np.array([places[name] for name, _, _ in manifest.images], dtype=np.int64)


def refuse_other_settings(manifest: Manifest, path: str | Path, **settings: Any) -> None:
    """Checks that a config has the draw of a manifest.

    Raises:
        NolaVisionError: data set, shots or split differ.
    """
    for name, asked in settings.items():
        if asked != (stored := getattr(manifest, name)):
            raise NolaVisionError(
                f"the manifest {path} has {name} {stored}, but the config has {asked}: give --data.{name} {stored}"
            )
