"""timm backbones: from a tag or a local file to a frozen, headless model and its image format."""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
import re
import textwrap
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.data.config import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg
from timm.models._hub import (
    HF_WEIGHTS_NAME,
    _get_safe_alternatives,
    load_model_config_from_hf,
    load_model_config_from_path,
)
from torch import nn

import nola_vision.models.zoo.glyph_vit
import nola_vision.models.zoo.scratch  # noqa: F401  both register models with timm
from nola_vision.adapters.random_basis import basis_key, uniform
from nola_vision.common import process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import weights_in
from nola_vision.common.hashing import sha256_of_tensors
from nola_vision.common.suggestions import did_you_mean
from nola_vision.common.tags import split_tag
from nola_vision.common.text import printable
from nola_vision.common.validation import check_types
from nola_vision.images.input_config import InputConfig

_logger = logging.getLogger(__name__)
_PATIENCE = 5.0  # seconds for the hub's first answer
_loading = threading.Lock()  # of `_missing_keys`, which replaces a function of timm's

Base = Literal["pretrained", "random", "zero"]


@dataclass(frozen=True)
class BackboneSpec:
    """Which pretrained model to adapt.

    Args:
        tag: timm's exact name, `architecture.pretrained_tag`; or `local-dir:FOLDER`, a folder such as
            `export --merged` writes; or `hf-hub:OWNER/NAME`, a repository of that form.
        file: local `.safetensors` or `.pth` with timm's keys, or a folder with `model.safetensors`; without it the
            weights that the tag names are used. With a `local-dir:` or `hf-hub:` tag a folder replaces the tag's.
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


def input_config(spec: BackboneSpec) -> InputConfig:
    """The image size, normalisation and interpolation that timm's data config gives for a backbone.

    Raises:
        NolaVisionError: timm knows no such model, or the folder or repository of the tag holds none.
    """
    config = resolve_data_config(pretrained_cfg=vars(resolve(spec).cfg))
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
        NolaVisionError: timm knows no such model, it does not take images of `img_size`, the file is missing,
            unreadable, of another model or holds a number that is not finite, or the pretrained weights are not on
            this machine and cannot be downloaded.
    """
    spec = BackboneSpec(spec) if isinstance(spec, str) else spec
    spec = check_types(spec)
    key = (spec, None if spec.base == "pretrained" else seed)
    return process_cache.once("backbone", key, lambda: _create(spec, seed), copy.deepcopy)


def _create(spec: BackboneSpec, seed: int) -> nn.Module:
    pretrained = spec.base == "pretrained"
    if spec.img_size is not None and spec.img_size < 1:
        raise NolaVisionError(f"img_size is {spec.img_size}: it is the image's side in pixels")
    if spec.file is not None and not pretrained:
        raise NolaVisionError(f"a weights file ({spec.file}) and base {spec.base} exclude each other: leave one out")
    source = resolve(spec)
    if spec.file is not None:
        # `custom_load` is about the weights that the config names; the file may have a head of any number of classes
        file = str(weights_in(Path(spec.file)))
        cfg = replace(source.cfg, file=file, source=None, custom_load=False, num_classes=-1)
        source = replace(source, cfg=cfg)
    if spec.img_size is not None:
        _check_img_size(spec, source)
    if pretrained:
        _announce_download(spec, source)
    given = source.cfg.file
    try:
        with _missing_keys() as missing, torch.random.fork_rng(devices=[]):  # timm draws what a file then replaces
            backbone = source.create(num_classes=0, pretrained=pretrained, img_size=spec.img_size)
    except Exception as error:  # a file that is not a checkpoint fails in any way
        if given is None and (isinstance(error, OSError) or "No pretrained weights" in str(error)):
            raise NolaVisionError(_no_weights(spec, source.cfg)) from error
        reason = textwrap.shorten(f"{type(error).__name__}, {error}", 160)
        if given is None:
            raise NolaVisionError(f"{spec.tag} cannot be made: {reason}") from error
        raise NolaVisionError(
            f"the weights file {given} cannot be loaded into {spec.tag}: give a safetensors or PyTorch file of "
            f"that model's weights and nothing else ({reason})"
        ) from error
    weights = f"the weights file {given}" if given else f"the pretrained weights of {spec.tag}"
    if missing:
        raise NolaVisionError(
            f"{weights} lacks {len(missing)} weights of {spec.tag}, for example {missing[0]}: use the tag that it was "
            "made with"
        )
    if not pretrained:
        _start_from_nothing(backbone, spec.base, seed)
    elif broken := [n for n, t in backbone.state_dict().items() if t.is_floating_point() and not t.isfinite().all()]:
        raise NolaVisionError(
            f"{weights}: {broken[0]} holds a number that is not finite: get the file again, or use another"
        )
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


@torch.no_grad()
def open_branches(backbone: nn.Module) -> None:
    """Gives the L residual branches that timm starts at zero, or close to it, the weight 1/sqrt(L) each.

    The last norm of a branch (ResNet, RegNet, SwinV2, LeViT) or its layer scale (ConvNeXt, CaiT, DINOv2) is meant to
    grow in training. Where it stays frozen on random weights, the branch would add nothing and its layers could not be
    trained. With 1/sqrt(L) the variance grows by at most e over all branches.
    """
    scales = [
        parameter
        for name, parameter in backbone.named_parameters()
        if parameter.dim() == 1 and re.fullmatch(r"weight|gamma\w*", name.rpartition(".")[2])
        if (parameter == parameter[0]).all() and abs(float(parameter[0])) <= 0.1
    ]
    for parameter in scales:
        parameter.fill_(len(scales) ** -0.5)


@torch.no_grad()
def check_random_features(backbone: nn.Module, tag: str) -> None:
    """Refuses a start from random weights where features vanish or explode: frozen batch norms do not normalise.

    Raises:
        NolaVisionError: the features of two images of noise are not of a size between 1e-3 and 1e3.
    """
    size = float(backbone(probe_batch(backbone)).square().mean().sqrt())
    if not 1e-3 <= size <= 1e3:
        norms = "train the batch norms too (train_norms: true), or " if batch_norms(backbone) else ""
        raise NolaVisionError(
            f"from random weights {tag} starts with features of size {size:.0e}, too far from 1 to train, since "
            f"nothing normalises its layers: {norms}use base: pretrained"
        )


@dataclass(frozen=True)
class Source:
    """What a spec refers to.

    Args:
        architecture: timm's name for it.
        tag: timm's own tag, or None where the config comes from a folder or a repository.
        cfg: timm's config; `cfg.file` is the local file with the weights, if there is one.
        model_args: further arguments that the model is made with.
    """

    architecture: str
    tag: str | None
    cfg: PretrainedCfg
    model_args: dict[str, Any]

    def create(self, num_classes: int, pretrained: bool = False, img_size: int | None = None) -> nn.Module:
        """The timm model, with `img_size` where timm fixes it: a convolutional network takes any size as it is."""
        options = self.options(img_size) | {"num_classes": num_classes, "pretrained": pretrained}
        if self.tag is not None:  # some of timm's functions look at the tag
            overlay = {name: getattr(self.cfg, name) for name in ("file", "custom_load", "num_classes")}
            model: nn.Module = timm.create_model(self.tag, pretrained_cfg_overlay=overlay, **options)
        else:
            model = timm.create_model(self.architecture, pretrained_cfg=self.cfg, **options)
        return model

    def options(self, img_size: int | None) -> dict[str, Any]:
        return self.model_args | ({"img_size": img_size} if img_size and self.cfg.fixed_input_size else {})


def resolve(spec: BackboneSpec) -> Source:
    """What a spec refers to; of the weights nothing is read or fetched.

    Raises:
        NolaVisionError: timm knows no such model, or the folder or repository of the tag holds none.
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


def local_files(tag: str, file: str | None) -> dict[str, Path]:
    """The local files that a backbone is made of: `weights`, and `config`, the `config.json` of a `local-dir:` tag.

    Raises:
        NolaVisionError: there are no weights at the path that is given.
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
    """The source of a tag and the rest of it; a folder given as `file` replaces that of a tag which is not timm's."""
    kind, name = split_tag(tag)
    return ("local-dir", file) if kind and file is not None and Path(file).is_dir() else (kind, name)


def _registered_cfg(tag: str) -> PretrainedCfg:
    try:
        return cast(PretrainedCfg, timm.models.get_pretrained_cfg(tag, allow_unregistered=False))
    except RuntimeError:
        pass
    architecture, _, tag = tag.partition(".")
    if timm.is_model(architecture):
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
        raise NolaVisionError(
            f"timm's {architecture} has no pretrained tag '{tag}': use one of {', '.join(tags) or '(none)'}"
        )
    hint = did_you_mean(architecture, timm.list_models(), "timm.list_models() lists them all")
    raise NolaVisionError(f"timm has no model named '{architecture}': {hint}")


def _read_folder(name: str) -> tuple[PretrainedCfg, str, dict[str, Any]]:
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise NolaVisionError(
            f"local-dir:{name} has no config.json: give a folder that `export --merged` or timm's save_for_hf wrote "
            "(predict: --weights FOLDER)"
        )
    return _parsed(f"local-dir:{name}", load_model_config_from_path, name, file=str(weights_in(folder)), source=None)


@functools.lru_cache  # each look asks the network whether the repository has changed
def _read_repository(name: str) -> tuple[PretrainedCfg, str, dict[str, Any]]:
    return _parsed(f"hf-hub:{name}", load_model_config_from_hf, name)


def _parsed(tag: str, read: Any, name: str, **changes: Any) -> tuple[PretrainedCfg, str, dict[str, Any]]:
    """A `config.json` as timm reads it.

    Raises:
        NolaVisionError: it cannot be fetched, or does not describe a timm model.
    """
    try:
        with _quiet("huggingface_hub"):
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


def _check_img_size(spec: BackboneSpec, source: Source) -> None:
    """Refuses an image side that the architecture does not take, before weights are fetched.

    The model is made, and run, on torch's meta device, which has shapes and no numbers.

    Raises:
        NolaVisionError: with the nearest sides that work.
    """
    own, side = source.cfg.input_size[-1], cast(int, spec.img_size)
    if side == own or _takes(source, side) or not _takes(source, own):  # a model that cannot run there is not judged
        return
    grid = [n for n in range(max(1, side - 256), side + 257) if n % 8 == 0 or n % 14 == 0]
    below = next((n for n in reversed(grid) if n < side and _takes(source, n)), None)
    above = next((n for n in grid if n > side and _takes(source, n)), None)
    near = [n for n in (below, above) if n is not None] or [own]
    raise NolaVisionError(
        f"{spec.tag} does not take images of {side} pixels (img_size): use {' or '.join(map(str, near))}"
        + ("" if own in near else f", or its own {own}")
    )


def _takes(source: Source, side: int) -> bool:
    """Whether a model computes features of images of a side, and of all their pixels."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = source.create(num_classes=0, img_size=side).eval()
            model(torch.empty(2, 3, side, side))
    except Exception:  # an assertion, a shape, an operation without a meta version: any
        return False
    patches = getattr(model, "patch_embed", None)  # timm's cuts off the pixels that fill no patch
    patch = getattr(patches, "patch_size", None)
    cuts = isinstance(patch, tuple) and side % patch[0] != 0 and not getattr(patches, "dynamic_img_pad", False)
    return not cuts


def weights_file(spec: BackboneSpec) -> Path | None:
    """The file on this machine that a pretrained backbone's weights are read from; None if it would be downloaded.

    Raises:
        NolaVisionError: as `resolve`, or there are no weights at the path that is given.
    """
    if spec.file is not None:
        return weights_in(Path(spec.file))
    cfg = resolve(spec).cfg
    return Path(cfg.file) if cfg.file else _downloaded(cfg)


def repository(spec: BackboneSpec) -> str | None:
    """The hub repository that a backbone's weights come from; None for a local file and for what the package ships."""
    if spec.file is not None or not (name := resolve(spec).cfg.hf_hub_id) or resolve(spec).cfg.file:
        return None
    return str(name).partition("@")[0]


def _downloaded(cfg: PretrainedCfg) -> Path | None:
    """The file of a config's weights in the download caches of the hub and of torch, if it is there."""
    if cfg.hf_hub_id:
        name, _, revision = cfg.hf_hub_id.partition("@")
        file = cfg.hf_hub_filename or HF_WEIGHTS_NAME
        files = [*_get_safe_alternatives(file), file]  # timm's order
        found = (huggingface_hub.try_to_load_from_cache(name, one, revision=revision or None) for one in files)
        return next((Path(path) for path in found if isinstance(path, str)), None)
    if not cfg.url:
        return None
    file = os.path.basename(cfg.url) if isinstance(cfg.url, str) else cfg.url[1]
    path = Path(torch.hub.get_dir(), "checkpoints", file)
    return path if path.is_file() else None


def _announce_download(spec: BackboneSpec, source: Source) -> None:
    """Logs what timm is about to download, from where, its size, and where it is kept; nothing if it is there.

    Raises:
        NolaVisionError: the hub cannot be reached.
    """
    cfg = source.cfg
    if cfg.file or not (cfg.hf_hub_id or cfg.url) or _downloaded(cfg) or huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    if cfg.hf_hub_id:
        size, cache = _size_on_hub(spec, cfg), huggingface_hub.constants.HF_HUB_CACHE
    else:
        size, cache = None, torch.hub.get_dir()
    about = ""
    if size is None:
        with torch.device("meta"):
            about, size = "about ", 4 * sum(p.numel() for p in source.create(cfg.num_classes).parameters())
    where = f"{_origin(cfg)} ({about}{size / 1e6:.0f} MB, once; kept in {_from_home(cache)})"
    _logger.warning("%s", printable(f"downloading {spec.tag} from {where}"))


def _size_on_hub(spec: BackboneSpec, cfg: PretrainedCfg) -> int | None:
    """The bytes of the weights file that timm will download from the hub.

    The hub's own client tries for a minute, or for several where packets are dropped. This one request finds out
    within `_PATIENCE` seconds that there is no network.

    Raises:
        NolaVisionError: the hub cannot be reached, or does not answer.
    """
    name, _, revision = str(cfg.hf_hub_id).partition("@")
    file = cfg.hf_hub_filename or HF_WEIGHTS_NAME
    for one in (*_get_safe_alternatives(file), file):
        url = huggingface_hub.hf_hub_url(name, one, revision=revision or None)
        try:
            with _quiet("huggingface_hub"):
                return huggingface_hub.get_hf_file_metadata(url, timeout=_PATIENCE).size
        except EntryNotFoundError:
            continue
        except Exception as error:  # of the client's HTTP library, whatever it is
            raise NolaVisionError(_no_weights(spec, cfg)) from error
    return None


def _origin(cfg: PretrainedCfg) -> str:
    """Where timm downloads a config's weights from."""
    if cfg.hf_hub_id:
        host = huggingface_hub.constants.ENDPOINT.partition("://")[2]
        return f"{host}/{cfg.hf_hub_id.partition('@')[0]}"
    return str(cfg.url if isinstance(cfg.url, str) else cfg.url[0])  # type: ignore[index]


def _no_weights(spec: BackboneSpec, cfg: PretrainedCfg) -> str:
    if not (cfg.hf_hub_id or cfg.url):
        return f"timm has no weights for {spec.tag}: choose a tag that has, or give a file by --model.backbone.file"
    copy = ""
    if cfg.hf_hub_id:
        folder = f"models--{cfg.hf_hub_id.partition('@')[0].replace('/', '--')}"
        cache = _from_home(huggingface_hub.constants.HF_HUB_CACHE)
        copy = f", or copy the folder {folder} of that machine's cache into {cache}"
    return (
        f"the weights of {spec.tag} are not on this machine and could not be downloaded from {_origin(cfg)}: fetch the "
        f"file on another machine and give it by --weights FILE (with a config, --model.backbone.file FILE){copy}; or "
        "use the small model that ships: fit PHOTOS --backbone quickstart"
    )


def _from_home(path: str) -> str:
    home = os.path.expanduser("~") + os.sep
    return f"~{os.sep}{path.removeprefix(home)}" if path.startswith(home) else path


@contextmanager
def _missing_keys() -> Iterator[list[str]]:
    """Collects the names of the weights that timm does not find in a file: it loads loosely, to drop a head."""
    missing: list[str] = []
    builder = timm.models._builder

    def load_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        hook = model.register_load_state_dict_post_hook(lambda _, found: missing.extend(found.missing_keys))
        try:
            original(model, *args, **kwargs)
        finally:
            hook.remove()

    with _loading, _quiet("huggingface_hub", "timm.models._builder"):
        original, builder.load_pretrained = builder.load_pretrained, load_pretrained
        try:
            yield missing
        finally:
            builder.load_pretrained = original


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keeps back what is not an error: each of ten attempts without a network; a head that is dropped."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
    resampled = [name for name in state if re.search(r"pos_embed|relative_position", name)]
    return sha256_of_tensors({name: state[name] for name in state.keys() - set(without) - set(resampled)})


def own_side(spec: BackboneSpec) -> tuple[int, bool]:
    """The image side that timm gives for a backbone, and whether the model is made for one size only."""
    config = resolve(spec).cfg
    return int(config.input_size[-1]), bool(config.fixed_input_size)


def largest_side(spec: BackboneSpec, most: int) -> int | None:
    """`most` where timm's own image side is larger and the model takes `most`; None where its own is to be used."""
    source = resolve(spec)
    return most if source.cfg.input_size[-1] > most and _takes(source, most) else None


def skeleton(spec: BackboneSpec) -> nn.Module:
    """A backbone's modules and shapes on torch's meta device: nothing is downloaded, read, drawn or stored.

    Raises:
        NolaVisionError: timm does not have this model, or not for this image size.
    """
    source = resolve(spec)
    try:
        with torch.device("meta"):
            made = source.create(num_classes=0, img_size=spec.img_size)
    except Exception as error:  # each model refuses in its own way
        reason = textwrap.shorten(f"{type(error).__name__}, {error}", 160)
        raise NolaVisionError(f"{spec.tag} cannot be made with img_size {spec.img_size}: {reason}") from error
    return made.requires_grad_(False)
