"""The header of an adapter file, and its validation.

Adapter files are untrusted. Types, ranges and lengths of all header fields are checked here, before a backbone is
created. `adapt` accepts the same values, so that every file that is written can be read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nola_vision.adapters.methods import registry
from nola_vision.adapters.methods.base import Method
from nola_vision.adapters.methods.registry import check
from nola_vision.adapters.target import HEAD
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.validation import check_types, quoted
from nola_vision.evaluation.calibration import check_temperature
from nola_vision.images.input_config import InputConfig
from nola_vision.models.backbones.image_size import own_side
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.known_weights import WeightsOrigin, is_file_name

MAX_CLASSES = 2**16  # three times ImageNet-21k's
MAX_CLASS_TEXT = 2**20  # bytes of all class names together: ImageNet-21k's with their synonyms take 0.8 MB
MAX_TARGETS = 4096
MAX_SEED = 2**63 - 1
# pixels: attention costs the fourth power of the side, and the largest side in timm is 1,024
MAX_SIDE = 1024
# for models of a fixed size: a position embedding of one side does not carry over to a much larger one
MAX_SIDE_FACTOR = 4
_MAX_TEXT = 1000  # characters of a tag, a weight's name, a setting
_MOST_CALIBRATED_ON = 40  # characters
_FIELDS_OF_BACKBONE = ("tag", "img_size", "base", "int8")
T = TypeVar("T")


@dataclass(frozen=True)
class AdapterMetadata:
    """What an adapter file states in addition to its tensors.

    Args:
        backbone: the model it belongs to.
        method: what was trained.
        class_names: in the order of the logits; a name may occur twice, as in ImageNet.
        run_seed: seed of the head's start and of LoRA's A.
        basis_seed: seed of NOLA's basis.
        input: what images must look like.
    """

    backbone: BackboneSpec
    method: Method
    class_names: tuple[str, ...]
    run_seed: int
    basis_seed: int
    input: InputConfig


@dataclass(frozen=True)
class Calibrated:
    """How a file's logits are calibrated.

    Args:
        temperature: what divides them.
        calibrated_on: the images that it was fitted on: `folds`, `validation` or another short text.
        images: how many these are; None if that is not known.
    """

    temperature: float
    calibrated_on: str
    images: int | None = None


@dataclass(frozen=True)
class Header:
    """A file's header.

    Args:
        metadata: what it states for `adapt`.
        fingerprint: of the backbone's weights; None for a fully fine-tuned model.
        targets: the names of the adapted weights in the order of the bank, or their checksum; see `stated_targets`.
        weights: the file that the backbone's weights were read from, if it is known.
        calibrated: of the logits; None if they are not calibrated.
    """

    metadata: AdapterMetadata
    fingerprint: str | None
    targets: list[str] | str
    weights: WeightsOrigin | None = None
    calibrated: Calibrated | None = None


def check_calibrated(calibrated: Calibrated) -> Calibrated:
    """The calibration with Python's own numbers and a temperature of 6 digits, if a file can state it.

    Raises:
        NolaVisionError: a value of another type or out of range.
    """
    temperature = check_temperature(calibrated.temperature)
    calibrated = check_types(dataclasses.replace(calibrated, temperature=temperature))
    text = calibrated.calibrated_on
    if not 0 < len(text) <= _MOST_CALIBRATED_ON or not text.isprintable():
        raise NolaVisionError(
            f"calibrated_on is {quoted(text)}: give 'folds', 'validation' or up to {_MOST_CALIBRATED_ON} characters"
        )
    if calibrated.images is not None and not 0 < calibrated.images < 2**31:
        raise NolaVisionError(
            f"a temperature fitted on {quoted(calibrated.images)} images makes no sense: give their number"
        )
    return dataclasses.replace(calibrated, temperature=float(f"{calibrated.temperature:.6g}"))


def check_metadata(metadata: AdapterMetadata) -> AdapterMetadata:
    """The metadata with Python's own numbers, if a file can state it.

    Raises:
        NolaVisionError: a value of another type, a seed, a number of classes or an image side out of range, or a class
            name that is not text.
    """
    names = metadata.class_names
    if not 2 <= len(names) <= MAX_CLASSES:
        raise NolaVisionError(
            f"class_names has {len(names):,} names: give those of 2 to {MAX_CLASSES:,} classes, in the logits' order"
        )
    if not all(isinstance(name, str) for name in names):
        wrong = next(name for name in names if not isinstance(name, str))
        raise NolaVisionError(f"class_names has {quoted(wrong)}: each name must be text")
    metadata = check_types(metadata)
    try:
        length = len("".join(names).encode())
    except UnicodeEncodeError as error:
        name = next(name for name in names if any("\ud800" <= character <= "\udfff" for character in name))
        raise NolaVisionError(f"the class name {ascii(name)} is not text: rename the class") from error
    if length > MAX_CLASS_TEXT:
        raise NolaVisionError(f"the class names take {length:,} bytes: give shorter ones, of {MAX_CLASS_TEXT:,} in all")
    for name in ("run_seed", "basis_seed"):
        if not 0 <= (seed := getattr(metadata, name)) <= MAX_SEED:
            raise NolaVisionError(f"{name} is {quoted(seed)}: it must be a whole number from 0 to 2**63 - 1")
    spec, method = check_types(metadata.backbone), check(metadata.method)
    if long := [text for text in _texts(registry.to_dict(method)) if not _is_setting(text)]:
        raise NolaVisionError(f"{quoted(long[0])} is not a setting of {type(method).__name__}: give a shorter text")
    own, fixed = _own_side(spec)
    most = MAX_SIDE if own is None else max(own, min(MAX_SIDE, MAX_SIDE_FACTOR * own) if fixed else MAX_SIDE)
    if spec.img_size is not None and spec.img_size > most:
        raise NolaVisionError(
            f"img_size is {spec.img_size}, but {spec.tag} takes at most {most} pixels: give less, or a tag for larger "
            "images"
        )
    return dataclasses.replace(metadata, backbone=spec, method=method, input=check_types(metadata.input))


def _own_side(spec: BackboneSpec) -> tuple[int | None, bool]:
    """As `own_side`; the config of a foreign model is not fetched for it."""
    return (None, True) if ":" in spec.tag else own_side(spec)


def parse_header(metadata: dict[str, Any], path: Path, weights: str | None = None) -> Header:
    """The header of an adapter file from its metadata.

    Args:
        metadata: as `open_adapter` gives it.
        path: of the file, for messages.
        weights: a local file of the backbone's weights that the user named.

    Raises:
        NolaVisionError: a field that is missing, of another type, or out of range, or a pattern that would have to be
            run.
    """
    targets = metadata.get("targets")
    if not (isinstance(metadata.get("class_names"), list) and isinstance(targets, list | str)):
        raise NolaVisionError(f"the metadata of {path} is not what this release writes: it lists no classes or targets")
    if len(targets) > MAX_TARGETS:
        raise NolaVisionError(f"{path} names {len(targets):,} targets: at most {MAX_TARGETS:,} are possible")
    for text in _texts({key: value for key, value in metadata.items() if key != "class_names"}):
        if not _is_setting(text):
            raise NolaVisionError(f"the metadata of {path} has {quoted(text)}, not a name or setting: get another file")
    try:
        backbone, image = metadata["backbone"], metadata["input"]
        _checked(backbone["tag"], str)
        if unknown := backbone.keys() - {*_FIELDS_OF_BACKBONE}:
            raise NolaVisionError(f"the metadata of {path} has an unknown field of its backbone: {sorted(unknown)[0]}")
        spec = BackboneSpec(file=weights, **backbone)
        fields: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in image.items()}
        config = InputConfig(**fields)
        method = check(registry.from_dict(metadata["method"])).from_file(path)
        names = tuple(metadata["class_names"])
        seeds = metadata["run_seed"], metadata["basis_seed"]
        stated = check_metadata(AdapterMetadata(spec, method, names, *seeds, config))
        targets = targets if isinstance(targets, str) else [_checked(name, str) for name in targets]
        fingerprint = metadata["backbone_fingerprint"]
        origin = None if metadata["weights"] is None else check_types(WeightsOrigin(**metadata["weights"]))
        calibrated = (
            None if metadata["calibration"] is None else check_calibrated(Calibrated(**metadata["calibration"]))
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise NolaVisionError(f"the metadata of {path} is not what this release writes: {error!r}") from error
    if (fingerprint is None) != method.trains_backbone or not isinstance(fingerprint, str | None):
        raise NolaVisionError(f"the metadata of {path} does not state which weights it was made for: get another file")
    twice = isinstance(targets, list) and len(set(targets)) < len(targets)
    if twice or bool(targets) != (method.target_names is not None):
        raise NolaVisionError(f"the targets of {path} are not those of {type(method).__name__}: get another file")
    if isinstance(targets, list) and HEAD in targets[:-1]:
        raise NolaVisionError(f"the targets of {path} name the head before other weights: get another file")
    if origin is not None and not (
        is_file_name(origin.file) and re.fullmatch("[0-9a-f]{64}", origin.sha256) and 0 < origin.bytes < 2**63
    ):
        raise NolaVisionError(
            f"{path} names a weights file {quoted(origin.file)} of {quoted(origin.bytes)} bytes with the digest "
            f"{quoted(origin.sha256)}, which cannot be one: get another file"
        )
    _check_input(stated, path)
    return Header(stated, fingerprint, targets, origin, calibrated)


def _check_input(metadata: AdapterMetadata, path: Path) -> None:
    """Refuses an input config that no backbone of timm has: images would be nonsense, or take all memory."""
    image, (own, _) = metadata.input, _own_side(metadata.backbone)
    side = metadata.backbone.img_size or own
    fits = {
        "size": image.size == side if side is not None else 0 < image.size <= MAX_SIDE,
        "mean": all(0 <= mean <= 1 for mean in image.mean),
        "std": all(0.01 <= std <= 10 for std in image.std),
        "crop_pct": 0.5 <= image.crop_pct <= 2,
        "interpolation": image.interpolation in ("nearest", "bilinear", "bicubic"),
        "crop_mode": image.crop_mode in ("center", "squash", "border"),
    }
    if wrong := [name for name, fit in fits.items() if not fit]:
        raise NolaVisionError(
            f"{path} states {wrong[0]} {getattr(image, wrong[0])} of the images, and {metadata.backbone.tag} does not "
            "take such: get another file"
        )


def _checked(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{quoted(value)} is not {kind.__name__}")
    return value


def _is_setting(text: str) -> bool:
    """Whether a text is short and printable, so that a message may contain it."""
    return len(text) <= _MAX_TEXT and text.isprintable()


def _texts(value: Any) -> Iterator[str]:
    """Every text of nested JSON, keys included. Not recursive: the nesting may be as deep as JSON can be."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one
