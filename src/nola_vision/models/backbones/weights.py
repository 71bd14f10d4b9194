"""Pretrained weights: the file that they are read from, their download, and whether they are complete."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import weights_in
from nola_vision.common.text import printable
from nola_vision.models.backbones.quiet import errors_only
from nola_vision.models.backbones.sources import Source, resolve
from nola_vision.models.backbones.spec import BackboneSpec

_logger = logging.getLogger(__name__)
_TIMEOUT = 5.0  # seconds for the hub's first answer


def weights_file(spec: BackboneSpec) -> Path | None:
    """The file on this machine that a pretrained backbone's weights are read from; None if it would be downloaded.

    Raises:
        NolaVisionError: as `resolve`, or there are no weights at the given path.
    """
    if spec.file is not None:
        return weights_in(Path(spec.file))
    cfg = resolve(spec).cfg
    return Path(cfg.file) if cfg.file else _downloaded(cfg)


def possible_file_names(spec: BackboneSpec) -> list[str]:
    """The names that the file of a pretrained backbone's weights may have, whether it is on this machine or not.

    Raises:
        NolaVisionError: as `weights_file`.
    """
    if spec.file is not None:
        return [weights_in(Path(spec.file)).name]
    cfg = resolve(spec).cfg
    if cfg.file:
        return [Path(cfg.file).name]
    if cfg.hf_hub_id:
        return _hub_files(cfg)
    return [_name_at(cfg)] if cfg.url else []


def repository(spec: BackboneSpec) -> str | None:
    """The hub repository of a backbone's weights; None for a local file and for weights in the package."""
    if spec.file is not None or not (name := resolve(spec).cfg.hf_hub_id) or resolve(spec).cfg.file:
        return None
    return str(name).partition("@")[0]


class LoadedTensors(TorchFunctionMode):
    """Records which tensors are copied into while a model is created in this thread.

    timm loads pretrained weights with `strict=False`, after renaming and resizing them for the architecture, and does
    not return the keys that it misses. `nn.Module.load_state_dict` copies every weight that it finds into the model's
    own tensor, so the others are missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loaded: dict[int, Tensor] = {}  # the reference keeps an id from being used again

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.copy_:
            self._loaded[id(args[0])] = args[0]
        return func(*args, **(kwargs or {}))

    def missing_keys(self, model: nn.Module) -> list[str]:
        """The keys of a model's state dict that were not loaded."""
        return [name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in self._loaded]


def announce_download(spec: BackboneSpec, source: Source) -> None:
    """Logs what timm will download, from where, its size, and where it is stored; silent if it is stored already.

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
        about, size = "about ", 4 * sum(p.numel() for p in source.create_shapes(cfg.num_classes).parameters())
    where = f"{_address(cfg)} ({about}{size / 1e6:.0f} MB, once; kept in {_from_home(cache)})"
    _logger.warning("%s", printable(f"downloading {spec.tag} from {where}"))


def how_to_get(spec: BackboneSpec, cfg: PretrainedCfg) -> str:
    """The message where weights are neither on this machine nor can be downloaded."""
    if not (cfg.hf_hub_id or cfg.url):
        return f"timm provides no weights for {spec.tag}: use another tag, or give a file by --model.backbone.file"
    copy = ""
    if cfg.hf_hub_id:
        folder = f"models--{cfg.hf_hub_id.partition('@')[0].replace('/', '--')}"
        cache = _from_home(huggingface_hub.constants.HF_HUB_CACHE)
        copy = f", or copy the folder {folder} of that machine's cache into {cache}"
    return (
        f"the weights of {spec.tag} are not on this machine and could not be downloaded from {_address(cfg)}: fetch "
        f"the file on another machine and give it by --weights FILE (with a config, --model.backbone.file FILE){copy}; "
        "or use the small model in the package: fit PHOTOS --backbone quickstart"
    )


def _hub_files(cfg: PretrainedCfg) -> list[str]:
    """The names that timm tries for the weights in a repository, in its order: safetensors first."""
    file = cfg.hf_hub_filename or "pytorch_model.bin"
    if not file.endswith(".bin"):
        return [file]
    stem = {"pytorch_model.bin": "model", "open_clip_pytorch_model.bin": "open_clip_model"}.get(file, file[:-4])
    return [f"{stem}.safetensors", file]


def _downloaded(cfg: PretrainedCfg) -> Path | None:
    """The file of a config's weights in the download caches of the hub and of torch, if it is there."""
    if cfg.hf_hub_id:
        name, _, revision = cfg.hf_hub_id.partition("@")
        found = (huggingface_hub.try_to_load_from_cache(name, f, revision=revision or None) for f in _hub_files(cfg))
        return next((Path(path) for path in found if isinstance(path, str)), None)
    if not cfg.url:
        return None
    path = Path(torch.hub.get_dir(), "checkpoints", _name_at(cfg))
    return path if path.is_file() else None


def _name_at(cfg: PretrainedCfg) -> str:
    """The name of the file that a config's `url` gives."""
    return os.path.basename(cfg.url) if isinstance(cfg.url, str) else str(cfg.url[1])  # type: ignore[index]


def _size_on_hub(spec: BackboneSpec, cfg: PretrainedCfg) -> int | None:
    """The bytes of the weights file that timm will download from the hub.

    The hub's own client tries for a minute, or for several where packets are dropped. This one request finds out
    within `_TIMEOUT` seconds that there is no network.

    Raises:
        NolaVisionError: the hub cannot be reached, or does not answer.
    """
    name, _, revision = str(cfg.hf_hub_id).partition("@")
    for file in _hub_files(cfg):
        url = huggingface_hub.hf_hub_url(name, file, revision=revision or None)
        try:
            with errors_only("huggingface_hub"):
                return huggingface_hub.get_hf_file_metadata(url, timeout=_TIMEOUT).size
        except EntryNotFoundError:
            continue
        except Exception as error:  # the client's HTTP library has its own types
            raise NolaVisionError(how_to_get(spec, cfg)) from error
    return None


def _address(cfg: PretrainedCfg) -> str:
    """Where timm downloads a config's weights from."""
    if cfg.hf_hub_id:
        host = huggingface_hub.constants.ENDPOINT.partition("://")[2]
        return f"{host}/{cfg.hf_hub_id.partition('@')[0]}"
    return str(cfg.url if isinstance(cfg.url, str) else cfg.url[0])  # type: ignore[index]


def _from_home(path: str) -> str:
    home = os.path.expanduser("~") + os.sep
    return f"~{os.sep}{path.removeprefix(home)}" if path.startswith(home) else path
