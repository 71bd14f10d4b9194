"""Properties of a created backbone: a probe batch of its image size, its fingerprint."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from nola_vision.common.hashing import sha256_of_tensors

_RESAMPLED = re.compile("pos_embed|relative_position")  # names of tables that depend on the image size
_EVAL_BYTES = 512 * 2**20
_MOST_DOUBLINGS = 8  # 256 images


def probe_batch(backbone: nn.Module) -> torch.Tensor:
    """Two images of noise of the backbone's image size, for `injection.attach`; the same ones every time."""
    patch_embed = getattr(backbone, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None) or backbone.pretrained_cfg["input_size"][1:]  # type: ignore[index]
    parameter = next(backbone.parameters())
    noise = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(parameter.device, parameter.dtype)


@torch.no_grad()
def input_lengths(backbone: nn.Module, images: torch.Tensor) -> dict[str, int]:
    """The length of the first dimension of what each linear layer and convolution gets, by module name.

    It is a multiple of the batch, except in layers that compute on something else than images (SwinV2's position bias).
    """
    lengths: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, args: lengths.update({name: len(args[0])})

    layers = [(name, one) for name, one in backbone.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers]
    try:
        backbone(images)
    finally:
        for one in hooks:
            one.remove()
    return lengths


def eval_batch_size(backbone: nn.Module, size: int) -> int:
    """Images per batch in evaluation: a power of two, up to 256, whose activations take at most 512 MiB.

    The activations of an image are estimated as float32 copies of the largest feature map: 12 where there are linear
    layers (the widest point of a transformer block is its MLP, whose input and output are four times as wide), else 4.
    Nothing is measured: a batch size that depended on the machine would change the rounding of results.

    Args:
        backbone: a timm model.
        size: side of its images in pixels.
    """
    stages = getattr(backbone, "feature_info", None) or []
    largest = max((stage["num_chs"] * (size / stage["reduction"]) ** 2 for stage in stages), default=3 * size**2)
    copies = 12 if any(isinstance(module, nn.Linear) for module in backbone.modules()) else 4
    images = _EVAL_BYTES // (4 * copies * largest)
    return 1 << min(_MOST_DOUBLINGS, max(0, int(images).bit_length() - 1))


def fingerprint(backbone: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 over a backbone's state dict: names, dtypes, shapes and bytes, in the order of the names.

    Position embeddings and relative-position tables are left out: timm resamples them to the image size, and
    resampling rounds differently on different machines.

    Args:
        backbone: a model.
        without: further names to leave out.
    """
    state = backbone.state_dict()
    return sha256_of_tensors({name: state[name] for name in state.keys() - set(without) if not _RESAMPLED.search(name)})


def weights_digest(backbone: nn.Module) -> str:
    """SHA-256 over every tensor of a backbone's state dict, of int8 weights too."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in backbone.state_dict(keep_vars=True).items():  # torchao's tensors cannot be detached everywhere
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        tensors |= {name: tensor} if inner is None else {f"{name}.{part}": getattr(tensor, part) for part in inner}
    return sha256_of_tensors(tensors)


def position_digest(backbone: nn.Module) -> str:
    """SHA-256 over the tables that `fingerprint` leaves out, at the backbone's image size."""
    state = backbone.state_dict(keep_vars=True)  # torchao's tensors cannot be detached in inference mode
    return sha256_of_tensors({name: state[name].detach() for name in state if _RESAMPLED.search(name)})
