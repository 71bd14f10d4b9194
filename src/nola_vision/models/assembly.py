"""A backbone and a method to an adapted model: `adapt`, and what loading shares with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from nola_vision.adapters.methods.base import Adapter, Method
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.validation import check_types, plain_number, quoted
from nola_vision.models import known_weights
from nola_vision.models.adapted_model import AdaptedModel
from nola_vision.models.backbones.creation import create_backbone, to_int8
from nola_vision.models.backbones.from_scratch import check_random_features, open_branches
from nola_vision.models.backbones.properties import fingerprint, probe_batch
from nola_vision.models.backbones.sources import input_config
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.budget_solver import solve_budget
from nola_vision.models.building import edited, make_bank
from nola_vision.models.known_weights import WeightsOrigin
from nola_vision.models.metadata import AdapterMetadata, check_metadata


def adapt(
    backbone: str | BackboneSpec,
    method: Method,
    class_names: Iterable[str],
    run_seed: int = 0,
    basis_seed: int | None = None,
) -> AdaptedModel:
    """A pretrained backbone with a new adapter and a new head, ready to train.

    Args:
        backbone: timm's tag, or a `BackboneSpec` for a local file or another image size.
        method: what to train, such as `NOLA(targets=["mlp"], rank=4, num_basis=1024)`.
        class_names: the classes, in the order of the logits; two may have the same name.
        run_seed: sets the head's start and LoRA's A.
        basis_seed: sets NOLA's basis; `run_seed` if not given.

    Raises:
        NolaVisionError: the backbone or a target does not exist, a target does not affect the features, or an argument
            is invalid.
    """
    if not isinstance(method, Method):
        raise NolaVisionError(f"the method is {method!r}: give a value such as NOLA(targets=['mlp'])")
    names = () if isinstance(class_names, str) or not isinstance(class_names, Iterable) else tuple(class_names)
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise NolaVisionError(f"class_names is {quoted(names or class_names)}: give the names of two classes or more")
    spec = check_types(BackboneSpec(backbone) if isinstance(backbone, str) else backbone)
    run_seed = plain_number(run_seed)
    basis_seed = run_seed if basis_seed is None else plain_number(basis_seed)
    metadata = check_metadata(AdapterMetadata(spec, method, names, run_seed, basis_seed, input_config(spec)))
    model = assemble(spec, metadata)
    if spec.base == "random" and not _trains_norms(method):
        check_random_features(model.backbone, spec.tag)
    known_weights.remember(spec)
    return model


def _trains_norms(method: Method) -> bool:
    return method.trains_backbone or method.train_norms


@torch.inference_mode(False)  # whoever loads an adapter while predicting: the probe needs gradients
def assemble(
    spec: BackboneSpec,
    metadata: AdapterMetadata,
    target_names: Sequence[str] | None = None,
    weights: WeightsOrigin | None = None,
    verify: bool = True,
) -> AdaptedModel:
    """The model that metadata describes, with the values that training starts from.

    Args:
        spec: what its backbone is made from.
        metadata: which model.
        target_names: the targets by exact name, as a file lists them; else the method's patterns find them.
        weights: the file of the backbone's weights, if it is known.
        verify: compute the fingerprint of the weights, and probe that each target has an effect.
    """
    method = metadata.method.for_base(metadata.backbone.base)
    metadata = dataclasses.replace(metadata, method=method)
    backbone = create_backbone(spec, metadata.basis_seed)
    if spec.base != "pretrained" and not _trains_norms(method):
        open_branches(backbone)
    if verify and weights is None:
        weights = known_weights.origin(spec)
    # a file's values are counted already
    if isinstance(method, Adapter) and method.max_bytes is not None and target_names is None:
        metadata = dataclasses.replace(metadata, method=solve_budget(metadata, backbone))
    bank = make_bank(
        backbone,
        metadata.method,
        len(metadata.class_names),
        metadata.run_seed,
        metadata.basis_seed,
        base=metadata.backbone.base,
        target_names=target_names,
    )
    if spec.int8 and (method.trains_backbone or method.edits_backbone):
        raise NolaVisionError(f"{type(method).__name__} needs float weights: leave int8 out")
    method, backbone = edited(backbone, metadata.method, metadata.run_seed)
    metadata = dataclasses.replace(metadata, method=method)
    frozen = _fingerprint(backbone, method) if verify else None
    if spec.int8:
        to_int8(backbone)
    # with all weights zero no change reaches the features, and norms that train may start at zero
    alive = spec.base == "pretrained" or (spec.base == "random" and not _trains_norms(method))
    bank.attach(backbone, probe_batch(backbone) if verify and alive else None)
    method.unfreeze(backbone)
    return AdaptedModel(backbone, bank, metadata, frozen, weights)


def _fingerprint(backbone: nn.Module, method: Method) -> str | None:
    """Of the weights that the file does not contain: what PEFT adds and does not train is guarded too."""
    if method.trains_backbone:
        return None
    return fingerprint(backbone, method.trained_in_backbone(backbone) if method.edits_backbone else ())
