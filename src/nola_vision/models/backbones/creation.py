"""Creates a backbone: a timm model without a head, frozen, with its weights checked."""

from __future__ import annotations

import copy
import textwrap
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from nola_vision.common import process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import weights_in
from nola_vision.common.validation import check_types
from nola_vision.models.backbones.from_scratch import initialise
from nola_vision.models.backbones.image_size import check_img_size
from nola_vision.models.backbones.quiet import errors_only
from nola_vision.models.backbones.sources import Source, resolve
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.backbones.weights import LoadedTensors, announce_download, how_to_get
from nola_vision.models.zoo import mini_vit


def create_backbone(spec: BackboneSpec | str, seed: int = 0) -> nn.Module:
    """A timm model without a head, frozen and in eval mode; it returns pooled features `[batch, num_features]`.

    A local file goes through timm's own loading, which resizes position embeddings to `img_size`.

    Args:
        spec: which model.
        seed: the seed of a random base.

    Raises:
        NolaVisionError: timm does not have the model, it does not accept images of `img_size`, the file is missing,
            unreadable, of another model or contains a value that is not finite, or the pretrained weights are not on
            this machine and cannot be downloaded.
    """
    spec = check_types(BackboneSpec(spec) if isinstance(spec, str) else spec)
    key = (spec, None if spec.base == "pretrained" else seed)
    return process_cache.last("backbone", key, lambda: _create(spec, seed), copy.deepcopy)


def skeleton(spec: BackboneSpec) -> nn.Module:
    """A backbone's modules and shapes on torch's meta device: nothing is downloaded, read, drawn or stored.

    Raises:
        NolaVisionError: timm does not have this model, or not for this image size.
    """
    source = resolve(spec)
    try:
        made = source.create_shapes(num_classes=0, img_size=spec.img_size)
    except Exception as error:  # each model refuses in its own way
        raise NolaVisionError(
            f"{spec.tag} cannot be created with img_size {spec.img_size}: {_reason(error)}"
        ) from error
    return made.requires_grad_(False)


def to_int8(backbone: nn.Module) -> None:
    """Stores the weights of all linear layers as 8-bit integers with one scale per row (torchao, weights only).

    Raises:
        NolaVisionError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise NolaVisionError("an int8 backbone needs the package torchao: pip install 'nola-vision[int8]'") from error
    quantize_(backbone, Int8WeightOnlyConfig())


def _create(spec: BackboneSpec, seed: int) -> nn.Module:
    source = resolve(spec)
    if spec.file is not None:
        if spec.base != "pretrained":
            raise NolaVisionError(f"base {spec.base} does not use the weights file {spec.file}: leave one of them out")
        # `custom_load` describes the weights of the config; the file may have a head of any number of classes
        file = str(weights_in(Path(spec.file)))
        source = replace(source, cfg=replace(source.cfg, file=file, source=None, custom_load=False, num_classes=-1))
    if spec.img_size is not None:
        check_img_size(spec, source)
    if spec.base == "pretrained":
        announce_download(spec, source)
        backbone = _load(spec, source)
    else:
        backbone = _timm_model(spec, source)
        initialise(backbone, spec.base, seed)
    if sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) > 1:  # more than a ViT's patch embedding
        backbone.to(memory_format=torch.channels_last)  # 1.3 times as fast on a CPU
    for module in backbone.modules():
        # EVA-02, BEiT and SwinV2 read `self.qkv.weight` themselves and skip what is attached to `qkv`, unless timm's
        # own switch makes them compute `self.qkv(x) + bias`
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # type: ignore[assignment]
    return backbone.eval().requires_grad_(False)


def _load(spec: BackboneSpec, source: Source) -> nn.Module:
    """The model with its pretrained weights, all of them loaded and finite."""
    cfg = source.cfg
    weights = f"the weights file {cfg.file}" if cfg.file else f"the pretrained weights of {spec.tag}"
    with LoadedTensors() as loaded:
        backbone = _timm_model(spec, source)
    # a model's own reader of another format (.npz) does not go through a state dict
    has_own_reader = cfg.custom_load and (cfg.hf_hub_filename or not cfg.hf_hub_id)
    if not has_own_reader and (missing := loaded.missing_keys(backbone)):
        raise NolaVisionError(
            f"{weights} lacks {len(missing)} weights of {spec.tag}, for example {missing[0]}: use the tag of the model "
            "that it was saved from"
        )
    for name, tensor in backbone.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NolaVisionError(
                f"{weights}: {name} has a value that is not finite: download it again, or use another"
            )
    return backbone


def _timm_model(spec: BackboneSpec, source: Source) -> nn.Module:
    pretrained, file = spec.base == "pretrained", source.cfg.file
    try:
        # timm draws weights before it loads them; `errors_only` admits one thread, so that no draw is seen outside
        with errors_only("huggingface_hub", "timm.models"), torch.random.fork_rng(devices=[]):
            return source.create(num_classes=0, pretrained=pretrained, img_size=spec.img_size)
    except Exception as error:  # a file that is not a checkpoint can raise any type
        if pretrained and file is None and (isinstance(error, OSError) or "No pretrained weights" in str(error)):
            raise NolaVisionError(how_to_get(spec, source.cfg)) from error
        if file is None:
            raise NolaVisionError(f"{spec.tag} cannot be created: {_reason(error)}") from error
        if spec.file is None and Path(file).parent == mini_vit.WEIGHTS:
            raise NolaVisionError(
                f"{file}, a file of the installed package, is missing or damaged: install nola-vision again "
                f"({_reason(error)})"
            ) from error
        raise NolaVisionError(
            f"the weights file {file} cannot be loaded into {spec.tag}: give a safetensors or PyTorch file of "
            f"that model's weights and nothing else ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}, {error}", 160)
