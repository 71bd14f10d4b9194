"""timm backbones: from a tag or a local file to a frozen, headless model and its image format."""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import math
import re
import sys
import textwrap
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from timm.data.config import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg
from torch import nn

import nola_vision.glyph_vit
import nola_vision.scratch_models  # noqa: F401  both register models with timm
from nola_vision import memo
from nola_vision.adapters.basis import basis_key, uniform
from nola_vision.adapters.file import add_tensor
from nola_vision.errors import NolaVisionError
from nola_vision.field_types import check_types

Base = Literal["pretrained", "random", "zero"]


@dataclass(frozen=True)
class BackboneSpec:
    """Which pretrained model to adapt.

    Args:
        tag: timm's exact name, `architecture.pretrained_tag`.
        file: local `.safetensors` or `.pth` with timm's keys; without it the weights that timm names are used.
        img_size: image side in pixels; without it the size timm's data config gives.
        base: what the weights are: `pretrained`; `random`, He's normal variance from the counter-based generator, so
            that a seed restores them; or `zero`, where all weights of linear layers and convolutions are zero.
        int8: hold the weights of linear layers in 8 bits (`pip install 'nola-vision[int8]'`).
        normalisation: mean and std of the images: the backbone's `own`, or `imagenet`'s whatever it was trained with.
    """

    tag: str
    file: str | None = None
    img_size: int | None = None
    base: Base = "pretrained"
    int8: bool = False
    normalisation: Literal["own", "imagenet"] = "own"


@dataclass(frozen=True)
class InputConfig:
    """What images must look like for a backbone: timm's data config.

    `size` is the image side in pixels, `mean` and `std` are per RGB channel on a 0-1 scale, `interpolation` is
    timm's name ("bicubic"), `crop_pct` the share of the resized image that the centre crop keeps in evaluation,
    `crop_mode` timm's way to resize before it ("center", "squash").
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"


def input_config(spec: BackboneSpec) -> InputConfig:
    """The image size, normalisation and interpolation that timm's data config gives for a backbone.

    Raises:
        NolaVisionError: timm knows no such model.
    """
    config = resolve_data_config(pretrained_cfg=vars(_pretrained_cfg(spec)))
    if spec.normalisation == "imagenet":
        config |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return InputConfig(
        size=spec.img_size or config["input_size"][-1],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def create_backbone(spec: BackboneSpec | str, seed: int = 0) -> nn.Module:
    """A timm model without a head, frozen and in eval mode; it gives pooled features `[batch, num_features]`.

    A local file goes through timm's own loading, which resizes position embeddings to `img_size`.

    Args:
        spec: which model.
        seed: the seed of a random base.

    Raises:
        NolaVisionError: timm knows no such model, the file is missing, unreadable or of another model, or the
            pretrained weights are not on this machine and cannot be downloaded.
    """
    spec = BackboneSpec(spec) if isinstance(spec, str) else spec
    spec = check_types(spec)
    key = (spec, None if spec.base == "pretrained" else seed)
    return memo.once("backbone", key, lambda: _create(spec, seed), copy.deepcopy)


def _create(spec: BackboneSpec, seed: int) -> nn.Module:
    if spec.img_size is not None and spec.img_size < 1:
        raise NolaVisionError(f"img_size is {spec.img_size}: it is the image's side in pixels")
    config = _pretrained_cfg(spec)
    pretrained = spec.base == "pretrained"
    options: dict[str, Any] = {"num_classes": 0, "pretrained": pretrained}
    if spec.file is not None and not pretrained:
        raise NolaVisionError(f"a weights file ({spec.file}) and base {spec.base} exclude each other: leave one out")
    if spec.file is not None:
        options["pretrained_cfg_overlay"] = {"file": _checked_file(spec.file), "custom_load": False}
    if spec.img_size is not None and config.fixed_input_size:  # a convolutional network takes any size as it is
        options["img_size"] = spec.img_size
    try:
        with _missing_keys() as missing, torch.random.fork_rng(devices=[]):  # timm draws what a file then replaces
            backbone: nn.Module = timm.create_model(spec.tag, **options)
    except Exception as error:  # a file that is no checkpoint fails in any way
        if spec.file is None and (isinstance(error, OSError) or "No pretrained weights" in str(error)):
            raise NolaVisionError(_no_weights(spec, config)) from error
        reason = textwrap.shorten(f"{type(error).__name__}, {error}", 160)
        if spec.file is None:
            raise NolaVisionError(f"{spec.tag} cannot be made with img_size {spec.img_size}: {reason}") from error
        raise NolaVisionError(
            f"the weights file {spec.file} cannot be loaded into {spec.tag}: give a safetensors or PyTorch file of "
            f"that model's weights and nothing else ({reason})"
        ) from error
    if missing:
        raise NolaVisionError(
            f"the weights file {spec.file or config.file} lacks {len(missing)} weights of {spec.tag}, {missing[0]} for "
            "one: name the tag that it was made with"
        )
    if not pretrained:
        _start_from_nothing(backbone, spec.base, seed)
    if sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) > 1:  # more than a ViT's patch embedding
        backbone.to(memory_format=torch.channels_last)  # a convolution follows its weight: 1.3 times as fast on a CPU
    for module in backbone.modules():
        # EVA-02, BEiT and SwinV2 read `self.qkv.weight` themselves, past whatever is attached to `qkv`, unless timm's
        # own switch makes them compute `self.qkv(x) + bias`
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True  # type: ignore[assignment]
    return backbone.eval().requires_grad_(False)


@torch.no_grad()
def _start_from_nothing(backbone: nn.Module, base: Base, seed: int) -> None:
    """Weights of linear layers and convolutions from the counter-based generator, or zero.

    A weight has He's variance 2 / fan_in, another tensor of two or more dimensions (an embedding) the standard
    deviation 0.02; both are keyed by their names. Biases are zero; norms and scales stay as timm makes them.
    """
    layers = {name: m for name, m in backbone.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    weights = {f"{name}.weight".lstrip("."): layer for name, layer in layers.items()}
    biases = {f"{name}.bias".lstrip(".") for name in layers}
    for name, parameter in backbone.named_parameters():
        if name in biases:
            parameter.zero_()
        elif name in weights and base == "zero":
            parameter.zero_()
        elif parameter.dim() > 1:
            std = math.sqrt(2 / parameter[0].numel()) if name in weights else 0.02
            parameter.copy_(uniform(basis_key(seed, f"weight {name}", "base"), parameter.shape, std))


def _pretrained_cfg(spec: BackboneSpec) -> PretrainedCfg:
    try:
        return cast(PretrainedCfg, timm.models.get_pretrained_cfg(spec.tag, allow_unregistered=False))
    except RuntimeError:
        pass
    architecture, _, tag = spec.tag.partition(".")
    if timm.is_model(architecture):
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
        raise NolaVisionError(
            f"timm's {architecture} has no pretrained tag '{tag}': use one of {', '.join(tags) or '(none)'}"
        )
    close = difflib.get_close_matches(architecture, timm.list_models(), n=4)
    raise NolaVisionError(
        f"timm has no model named '{architecture}': "
        + (f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them all")
    )


def packaged_file(tag: str) -> str | None:
    """The local file that timm's own entry for a tag names, as the quick start's backbone does; else None."""
    try:
        config = timm.models.get_pretrained_cfg(tag, allow_unregistered=False)
    except RuntimeError:
        return None
    return config.file if config is not None else None


def _checked_file(path: str) -> str:
    if not Path(path).is_file():
        raise NolaVisionError(f"the weights file {path} does not exist: give the path of a .safetensors or .pth file")
    return path


def _no_weights(spec: BackboneSpec, config: PretrainedCfg) -> str:
    source = config.hf_hub_id or config.url or config.file
    if not (config.hf_hub_id or config.url):
        return f"timm has no weights for {spec.tag}: choose a tag that has, or give a file by --model.backbone.file"
    return (
        f"the weights of {spec.tag} are not on this machine and could not be downloaded from {source}: name a local "
        ".safetensors or .pth file with timm's keys (--model.backbone.file FILE; predict: --weights FILE)"
    )


@contextmanager
def _missing_keys() -> Iterator[list[str]]:
    """Collects the weights that timm did not find in a file: it drops a head by loading loosely, and only logs them."""
    missing: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = re.match(r"Missing keys \((.*?)\) discovered", record.getMessage())
            if found:
                missing.extend(found[1].split(", "))

    hub = logging.getLogger("huggingface_hub")  # offline it would tell of each of its ten attempts
    hub_level = hub.level
    hub.setLevel(logging.ERROR)
    logger, listener = logging.getLogger("timm.models._builder"), Listener()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield missing
    finally:
        hub.setLevel(hub_level)
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate


def batch_norms(backbone: nn.Module) -> dict[str, nn.Module]:
    """A backbone's batch-norm layers by name."""
    return {name: m for name, m in backbone.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def to_int8(backbone: nn.Module) -> None:
    """Holds the weights of all linear layers as integers of 8 bits with a scale a row (torchao, weights only).

    Raises:
        NolaVisionError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise NolaVisionError("an int8 backbone needs the package torchao: pip install 'nola-vision[int8]'") from error
    quantize_(backbone, Int8WeightOnlyConfig())


def probe_batch(backbone: nn.Module) -> torch.Tensor:
    """Two images of noise of the size that a backbone takes, for `AdapterStack.attach`; the same ones every time."""
    patch_embed = getattr(backbone, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None) or backbone.pretrained_cfg["input_size"][1:]  # type: ignore[index]
    parameter = next(backbone.parameters())
    noise = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(parameter.device, parameter.dtype)


def fingerprint(backbone: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 over a backbone's state dict: names, dtypes, shapes and bytes, in the order of the names.

    Position embeddings and relative-position tables stay out: timm resamples them to the image size, and resampling
    rounds differently on different machines.

    Args:
        backbone: a model.
        without: names that stay out too.
    """
    state = backbone.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state.keys() - set(without)):
        if not re.search(r"pos_embed|relative_position", name):
            add_tensor(digest, name, state[name])
    return digest.hexdigest()


def own_side(spec: BackboneSpec) -> tuple[int, bool]:
    """The image side that timm gives for a backbone, and whether the model is made for one size only."""
    config = _pretrained_cfg(spec)
    return int(config.input_size[-1]), bool(config.fixed_input_size)


def skeleton(spec: BackboneSpec) -> nn.Module:
    """A backbone's modules and shapes on torch's meta device: nothing is downloaded, read, drawn or stored.

    Raises:
        NolaVisionError: timm does not have this model, or not for this image size.
    """
    config = _pretrained_cfg(spec)
    sized: dict[str, Any] = {}
    if spec.img_size is not None and config.fixed_input_size:
        sized = {"img_size": spec.img_size}
    try:
        with torch.device("meta"):
            made: nn.Module = timm.create_model(spec.tag, pretrained=False, num_classes=0, **sized)
    except Exception as error:  # each model refuses in its own way
        reason = textwrap.shorten(f"{type(error).__name__}, {error}", 160)
        raise NolaVisionError(f"{spec.tag} cannot be made with img_size {spec.img_size}: {reason}") from error
    return made.requires_grad_(False)


def announce_download(spec: BackboneSpec, numbers: int) -> None:
    """Prints one line to stderr if the weights that an adapter file names are not on this machine yet.

    Args:
        spec: the backbone.
        numbers: how many weights it has, of 4 bytes each.
    """
    if spec.file is not None or spec.base != "pretrained":
        return
    config = _pretrained_cfg(spec)
    if config.file or (config.hf_hub_id and _is_cached(config)):
        return
    if not config.hf_hub_id and (config.url is None or _downloaded(str(config.url)).exists()):
        return
    source = f"huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
    print(f"fetching the weights of {spec.tag} from {source} (about {4 * numbers / 1e6:.0f} MB)", file=sys.stderr)


def _is_cached(config: PretrainedCfg) -> bool:
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = str(config.hf_hub_id).partition("@")
    named = [config.hf_hub_filename] if config.hf_hub_filename else []
    files = [
        *named,
        "model.safetensors",
        "pytorch_model.bin",
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
    ]
    return any(isinstance(try_to_load_from_cache(repository, name, revision=revision or None), str) for name in files)


def _downloaded(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
