"""An adapter file to an adapted model: parse the header, find the weights, check that all fits, assemble, fill."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from nola_vision.adapters.serialization import AdapterFile, open_adapter
from nola_vision.adapters.target import Target
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import write_file
from nola_vision.models import known_weights
from nola_vision.models.adapted_model import AdaptedModel, backbone_tensors
from nola_vision.models.assembly import assemble
from nola_vision.models.backbones.creation import skeleton
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.backbones.weights import weights_file
from nola_vision.models.building import (
    edited,
    feature_width,
    file_shapes,
    method_targets,
    selects_by_structure,
    targets_checksum,
)
from nola_vision.models.known_weights import WeightsOrigin
from nola_vision.models.metadata import AdapterMetadata, Calibrated, Header, check_calibrated, parse_header
from nola_vision.models.prediction import run_in_eval_mode

_SKETCH_TOLERANCE = 1e-3  # of the largest number: LAPACKs differ by less, other weights by more


def load_adapter(path: str | Path, weights: str | None = None) -> AdaptedModel:
    """The adapted model of an adapter file, in eval mode.

    The file is untrusted: loading does not run code that it names, and takes no more memory than its tensors and the
    backbone. Each step is checked before the next one allocates memory; see `docs/security.md`.

    Args:
        path: the adapter file.
        weights: a local file with the backbone's weights. Without it the file that the adapter was trained with is
            found by its digest (see `known_weights`); else the weights that timm names are taken.

    Raises:
        NolaVisionError: the file is damaged, states what an adapter cannot have, or was made for other weights, shapes
            or methods than are here.
    """
    file = open_adapter(path)
    header, missing = with_weights(parse_header(file.metadata, file.path, weights), path)
    names = _check_agreement(file, header)
    tensors = file.tensors()
    model = _assemble(header, names, missing, path)
    _fill(model, tensors, path)
    if header.calibrated is not None:
        model.temperature, model.calibrated_on = header.calibrated.temperature, header.calibrated.calibrated_on
        model.calibration_images = header.calibrated.images
    known_weights.remember(header.metadata.backbone)
    return model.eval()


def with_weights(header: Header, path: str | Path) -> tuple[Header, WeightsOrigin | None]:
    """The header with the local file of the backbone's weights, and that file's description if it was not found.

    Raises:
        NolaVisionError: the backbone's tag names a hub or a folder, and the user did not give the weights.
    """
    spec, wanted = header.metadata.backbone, header.weights
    if spec.base != "pretrained" or (header.metadata.method.trains_backbone and ":" not in spec.tag):
        wanted = None  # there is no such file, or the adapter file contains every weight
    if spec.file is None and wanted is not None and (found := known_weights.find(wanted, spec)) is not None:
        spec = dataclasses.replace(spec, file=found)
        header = dataclasses.replace(header, metadata=dataclasses.replace(header.metadata, backbone=spec))
    missing = wanted if spec.file is None else None
    if ":" in spec.tag and not (spec.file is not None and Path(spec.file).is_dir()):
        raise NolaVisionError(
            f"{path} names the backbone {spec.tag}, and only you may name what is fetched from a hub or read from a "
            "folder: give the folder with its config.json and weights by `weights` (--weights FOLDER)"
            + (f"; {known_weights.how_to_find(missing)}" if missing else "")
        )
    return header, missing


def _check_agreement(file: AdapterFile, header: Header) -> list[str]:
    """Compares the header with the stored tensors and with the backbone's shapes, before anything of that size is made.

    Returns:
        The names of the targets.

    Raises:
        NolaVisionError: a target, a count or a tensor that the backbone, the method or the file does not have.
    """
    metadata, path = header.metadata, file.path
    method, backbone = metadata.method, skeleton(metadata.backbone)
    targets = header_targets(header, backbone, path)
    shapes = file_shapes(method.groups(targets), len(metadata.class_names), feature_width(backbone))
    with torch.device("meta"):
        _, backbone = edited(backbone, method, metadata.run_seed)
    inside = backbone_tensors(backbone, method)
    check_shapes(file, shapes | {name: tuple(tensor.shape) for name, tensor in inside.items()})
    for name, tensor in inside.items():
        if tensor.is_floating_point() != file.floats(name):
            raise NolaVisionError(f"the tensor {name} of {path} has another dtype than the backbone's")
    return [target.name for target in targets]


def check_shapes(file: AdapterFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares a file's tensors with those that its method and backbone have.

    Args:
        file: what was opened.
        shapes: by the tensors' names in the file.

    Raises:
        NolaVisionError: a tensor too many or too few, or of another shape.
    """
    there = file.shapes
    for name in sorted(shapes.keys() | there.keys()):
        wanted, stored = shapes.get(name), there.get(name)
        if wanted != stored:
            if wanted is None or stored is None:
                fault = "does not belong there" if wanted is None else "is missing"
            else:
                fault = f"has the shape {list(stored)} and not {list(wanted)}"
            raise NolaVisionError(
                f"{file.path} does not fit its method and backbone: the tensor {name} {fault}, train again"
            )


def header_targets(header: Header, backbone: nn.Module, path: Path) -> list[Target]:
    """The targets of a file: those that its header names, or those that the method selects, if the checksum fits.

    Args:
        header: of the file.
        backbone: what it belongs to, possibly on the meta device.
        path: of the file, for messages.

    Raises:
        NolaVisionError: a target that the backbone does not have, or another selection than when it was trained.
    """
    method, classes = header.metadata.method, len(header.metadata.class_names)
    if isinstance(header.targets, list):
        return method_targets(backbone, method, classes, header.targets)
    if not selects_by_structure(method):
        raise NolaVisionError(f"{path} does not name its targets, and a file's patterns are not run: get another file")
    targets = method_targets(backbone, method, classes)
    if targets_checksum([target.name for target in targets]) != header.targets:
        raise NolaVisionError(
            f"{path} was trained with other targets than {', '.join(method.target_names or ())} selects in "
            f"{header.metadata.backbone.tag} here: use the release that it was trained with"
        )
    return targets


def _assemble(header: Header, names: list[str], missing: WeightsOrigin | None, path: str | Path) -> AdaptedModel:
    """The model that the header describes, with the weights that it was made for."""
    metadata, spec = header.metadata, header.metadata.backbone
    try:
        model = assemble(_to_fill(metadata), metadata, names, header.weights)
    except NolaVisionError as error:
        if missing is None or weights_file(spec) is not None:
            raise
        raise NolaVisionError(f"{path}: {known_weights.how_to_find(missing)} ({error})") from error
    if header.fingerprint != model.fingerprint:
        raise NolaVisionError(
            f"{path} was made for other weights of {spec.tag} than the ones here: "
            + (known_weights.how_to_find(missing) if missing else "give the file it was trained with by `weights` ")
            + ("" if missing else "(--weights FILE)")
        )
    return model


def _to_fill(metadata: AdapterMetadata) -> BackboneSpec:
    """The backbone that a file's tensors are copied into: a Full-FT file contains every weight."""
    if not metadata.method.trains_backbone:
        return metadata.backbone
    return dataclasses.replace(metadata.backbone, base="zero", file=None)


@torch.no_grad()
def _fill(model: AdaptedModel, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Copies the tensors of an adapter file into a model, and compares the sketches."""
    own, trained = model.file_tensors(), model.trained_tensors().keys()
    if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
        method = type(model.metadata.method).__name__
        raise NolaVisionError(f"the tensors of {path} are not those of {method}: train again")
    for name, tensor in own.items():
        if name in trained:
            tensor.copy_(tensors[name])
        else:
            check_sketch(name, tensor, tensors[name], path)


def check_sketch(name: str, own: Tensor, stored: Tensor, path: str | Path) -> None:
    """Compares a sketch that this machine computes with the one in a file.

    Args:
        name: of the tensor in the file, `sketch.<group>.<name>`.
        own, stored: the two.
        path: of the file, for messages.

    Raises:
        NolaVisionError: they differ by more than 1e-3 of the largest number.
    """
    if not float((own - stored).abs().max()) <= _SKETCH_TOLERANCE * float(own.abs().max()):
        raise NolaVisionError(
            f"{path} was trained with another {name.removeprefix('sketch.')} than this machine computes from the "
            "backbone's weights: use the weights and the release that it was trained with"
        )


@torch.no_grad()
def check_saved(model: AdaptedModel, path: str | Path, images: Tensor) -> None:
    """Checks that an adapter file restores the model, by comparing the logits of a new model on some images.

    Args:
        model: what was trained.
        path: a file that its `save` wrote.
        images: `[batch, 3, size, size]`, on the model's device.

    Raises:
        NolaVisionError: the logits differ, so something that training changed is not in the file.
    """
    restored = assemble(_to_fill(model.metadata), model.metadata, verify=False)
    _fill(restored, open_adapter(path).tensors(), path)
    restored.to(images.device, model.dtype(images.dtype))
    expected = run_in_eval_mode(model, model, images).float()
    found = restored.eval()(images).float()
    exact = model.dtype(images.dtype) in (torch.float32, torch.float64)
    tolerance = (1e-3 if exact else 5e-2) * max(1.0, float(expected.abs().max()))
    if not bool(((found - expected).abs() <= tolerance).all()):
        raise NolaVisionError(
            f"{path} does not give the trained model back (logits differ by up to "
            f"{float((found - expected).abs().max()):.3g}): {type(model.metadata.method).__name__} changes something "
            "that an adapter file does not contain; use other settings for it"
        )


def set_temperature(path: str | Path, temperature: float, calibrated_on: str | None, images: int | None = None) -> None:
    """Writes a temperature into an adapter file; what was trained stays as it is.

    Args:
        path: the adapter file. It is replaced, whole or not at all, and gets the newest format version.
        temperature: as `calibration.fit_temperature` gives it.
        calibrated_on: the images that it was fitted on, `folds`, `validation` or another short text; None marks the
            file as uncalibrated, and the temperature must be 1.
        images: how many images these were.

    Raises:
        NolaVisionError: the file is damaged, or cannot state these values.
    """
    file = open_adapter(path)
    parse_header(file.metadata, file.path)
    if calibrated_on is None and temperature != 1:
        raise NolaVisionError(f"the temperature is {temperature} and calibrated_on None: state what it was fitted on")
    calibrated = (
        None
        if calibrated_on is None
        else dataclasses.asdict(check_calibrated(Calibrated(temperature, calibrated_on, images)))
    )
    write_file(path, file.rewritten({"calibration": calibrated}))


def read_header(path: str | Path, weights: str | None = None) -> Header:
    """The header of an adapter file, with the local file of its backbone's weights.

    Args:
        path: the adapter file.
        weights: a local file with the weights; else it is found as `load_adapter` finds it.

    Raises:
        NolaVisionError: the file is damaged, or names weights that only the user may name.
    """
    header, _ = with_weights(parse_header(open_adapter(path).metadata, Path(path), weights), path)
    return header
