"""From a `BackboneSpec` to timm's architecture, config and arguments. Weights are neither read nor downloaded."""

from __future__ import annotations

import functools
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data.config import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, load_model_config_from_hf
from timm.models._hub import load_model_config_from_path
from torch import nn
from torch.overrides import TorchFunctionMode

import nola_vision.models.zoo.mini_vit
import nola_vision.models.zoo.scratch  # noqa: F401  both register models with timm
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import weights_in
from nola_vision.common.suggestions import did_you_mean
from nola_vision.common.tags import split_tag
from nola_vision.images.input_config import InputConfig
from nola_vision.models.backbones.quiet import errors_only
from nola_vision.models.backbones.spec import BackboneSpec


@dataclass(frozen=True)
class Source:
    """What timm needs to create the model of a spec.

    Args:
        architecture: timm's name for it.
        tag: timm's own tag, or None where the config comes from a folder or a repository.
        cfg: timm's config; `cfg.file` is the local file with the weights, if there is one.
        model_args: further arguments of the model.
    """

    architecture: str
    tag: str | None
    cfg: PretrainedCfg
    model_args: dict[str, Any]

    def create(self, num_classes: int, pretrained: bool = False, img_size: int | None = None) -> nn.Module:
        """The timm model, with `img_size` if it is made for one size; a convolutional network takes any size."""
        options = self.options(img_size) | {"num_classes": num_classes, "pretrained": pretrained}
        if self.tag is not None:  # some of timm's functions look at the tag
            overlay = {name: getattr(self.cfg, name) for name in ("file", "custom_load", "num_classes")}
            model: nn.Module = timm.create_model(self.tag, pretrained_cfg_overlay=overlay, **options)
        else:
            model = timm.create_model(self.architecture, pretrained_cfg=self.cfg, **options)
        return model

    def create_shapes(self, num_classes: int, img_size: int | None = None) -> nn.Module:
        """The timm model on torch's meta device: modules and shapes; no value is drawn, read or stored."""
        with torch.device("meta"), _NoFilling():
            return self.create(num_classes, img_size=img_size)

    def options(self, img_size: int | None) -> dict[str, Any]:
        """The model's arguments for an image side in pixels."""
        return self.model_args | ({"img_size": img_size} if img_size and self.cfg.fixed_input_size else {})


class _NoFilling(TorchFunctionMode):
    """Leaves tensors as they are where a model would draw its initial values.

    On the meta device these operations are Python code, and take two thirds of the time of making a model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _FILLING and args and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


_FILLING = {"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"}


def resolve(spec: BackboneSpec) -> Source:
    """What timm needs to create the model of a spec.

    Raises:
        NolaVisionError: timm does not have the model, or the folder or repository of the tag does not contain one.
    """
    kind, name = _located(spec.tag, spec.file)
    model_args: dict[str, Any] = {}
    if kind == "local-dir":
        cfg, architecture, model_args = _read_folder(name)
    elif kind == "hf-hub":
        cfg, architecture, model_args = _read_repository(name)
    else:
        cfg, architecture = _registered_cfg(name), name.partition(".")[0]
    model_args = {key: value for key, value in model_args.items() if key != "num_classes"}
    return Source(architecture, None if kind else spec.tag, cfg, model_args)


def input_config(spec: BackboneSpec) -> InputConfig:
    """The image size, normalisation, interpolation and crop in timm's data config of a backbone.

    Raises:
        NolaVisionError: as `resolve`.
    """
    config = resolve_data_config(pretrained_cfg=vars(resolve(spec).cfg))
    if spec.normalisation == "imagenet":
        config |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    if spec.crop == "none":
        config |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return InputConfig(
        size=spec.img_size or config["input_size"][-1],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def local_files(tag: str, file: str | None) -> dict[str, Path]:
    """The local files of a backbone: `weights`, and `config`, the `config.json` of a `local-dir:` tag.

    Raises:
        NolaVisionError: there are no weights at the given path.
    """
    kind, name = _located(tag, file)
    found: dict[str, Path] = {}
    if kind == "local-dir":
        found["config"] = Path(name, "config.json")
    if file is not None or kind == "local-dir":
        found["weights"] = weights_in(Path(name if file is None else file))
    elif not kind:  # the quick start's weights come with the package
        config = _registered_cfg(tag)
        found |= {"weights": Path(config.file)} if config.file else {}
    return {key: path for key, path in found.items() if path.is_file()}


def _located(tag: str, file: str | None) -> tuple[str, str]:
    """The source of a tag and the rest of it; a folder given as `file` replaces a `local-dir:` or `hf-hub:` tag."""
    kind, name = split_tag(tag)
    return ("local-dir", file) if kind and file is not None and Path(file).is_dir() else (kind, name)


def _registered_cfg(name: str) -> PretrainedCfg:
    try:
        return cast(PretrainedCfg, timm.models.get_pretrained_cfg(name, allow_unregistered=False))
    except RuntimeError:
        pass
    architecture, _, tag = name.partition(".")
    if timm.is_model(architecture):
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
        fix = f"use one of {', '.join(tags)}" if tags else "timm provides no weights for it"
        raise NolaVisionError(f"unknown pretrained tag '{tag}' of timm's {architecture}: {fix}")
    hint = did_you_mean(architecture, timm.list_models(), "timm.list_models() lists them all")
    if architecture == "quickstart":
        hint = "the tag of `--backbone quickstart` is vit_mini_patch4_32.contours"
    raise NolaVisionError(f"unknown timm model '{architecture or name}': {hint}")


def _read_folder(name: str) -> tuple[PretrainedCfg, str, dict[str, Any]]:
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise NolaVisionError(
            f"local-dir:{name} does not contain a config.json: give a folder that `export --merged` or timm's "
            "save_for_hf wrote (predict: --weights FOLDER)"
        )
    return _parsed(f"local-dir:{name}", load_model_config_from_path, name, file=str(weights_in(folder)), source=None)


@functools.lru_cache  # each call asks the hub whether the repository has changed
def _read_repository(name: str) -> tuple[PretrainedCfg, str, dict[str, Any]]:
    return _parsed(f"hf-hub:{name}", load_model_config_from_hf, name)


def _parsed(tag: str, read: Any, name: str, **changes: Any) -> tuple[PretrainedCfg, str, dict[str, Any]]:
    """A `config.json` as timm reads it.

    Raises:
        NolaVisionError: it cannot be downloaded, or does not describe a timm model.
    """
    try:
        with errors_only("huggingface_hub"):
            cfg, architecture, model_args = read(name)
        parsed = PretrainedCfg(**{**cfg, **changes})
        known = timm.is_model(architecture)
    except OSError as error:
        raise NolaVisionError(
            f"{tag} is not on this machine and its config.json could not be downloaded: check the name and the "
            "network, or use a local folder (local-dir:FOLDER)"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        reason = textwrap.shorten(f"{type(error).__name__}, {error}", 160)
        raise NolaVisionError(f"the config.json of {tag} does not describe a timm model ({reason})") from error
    if not known:
        raise NolaVisionError(f"the config.json of {tag} names the architecture '{architecture}', which timm lacks")
    return parsed, architecture, dict(model_args)
