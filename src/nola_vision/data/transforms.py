"""From a decoded image to what a backbone takes: the evaluation transform and three ways to augment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from nola_vision.backbones import InputConfig
from nola_vision.errors import NolaVisionError

Augmentation = Literal["none", "light", "released"]
Transform = Callable[[Any], torch.Tensor]


def eval_transform(config: InputConfig) -> Transform:
    """timm's evaluation transform: resize to `floor(size / crop_pct)`, crop the centre, normalise.

    Resizing keeps the ratio of the sides, or makes a square of the image where the backbone's `crop_mode` is squash.

    Args:
        config: what the backbone takes.

    Returns:
        A function from a PIL image or a uint8 tensor `[3, h, w]` to a normalised float32 tensor `[3, size, size]`.

    Raises:
        NolaVisionError: the interpolation is one that tensors cannot be resized with, or the crop mode is not known.
    """
    if config.crop_mode not in ("center", "squash"):
        raise NolaVisionError(
            f"the backbone asks for crop mode {config.crop_mode!r}, which cannot be had here: choose another tag of it"
        )
    side = math.floor(config.size / config.crop_pct)
    resize = v2.Resize(side if config.crop_mode == "center" else (side, side), _interpolation(config), antialias=True)
    return _compose(config, [resize, v2.CenterCrop(config.size)])


def check_augmentation(augmentation: str, flip: bool) -> None:
    """Refuses an unknown augmentation, and a flip that would have no effect.

    Raises:
        NolaVisionError: one of them.
    """
    if augmentation not in get_args(Augmentation):
        names = ", ".join(get_args(Augmentation))
        raise NolaVisionError(f"there is no augmentation {augmentation!r}: choose one of {names}")
    if flip and augmentation != "light":
        what = "flips nothing" if augmentation == "none" else "always flips"
        raise NolaVisionError(
            f"flip is a setting of augmentation 'light', and {augmentation!r} {what}: give --data.flip false"
        )


def train_transform(config: InputConfig, augmentation: str, flip: bool = False) -> Transform:
    """The transform of training images. All randomness comes from torch's CPU generator.

    - "none": the evaluation transform.
    - "light": a random crop of 60 to 100 % of the area, and with `flip` a horizontal flip of every second image.
    - "released": what the authors' released code does: a crop of 20 to 100 %, colour jitter, grey, blur and a flip.

    Args:
        config: what the backbone takes.
        augmentation: one of the names above.
        flip: add the flip to "light"; leave it off where left and right carry meaning, as in digits.

    Returns:
        A function as of `eval_transform`.
    """
    if augmentation == "none":
        return eval_transform(config)
    size, interpolation = config.size, _interpolation(config)
    if augmentation == "light":
        crop = v2.RandomResizedCrop(size, scale=(0.6, 1.0), interpolation=interpolation, antialias=True)
        return _compose(config, [crop, v2.RandomHorizontalFlip(0.5)] if flip else [crop])
    return _compose(
        config,
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=interpolation, antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([_GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(0.5),
        ],
    )


class _GaussianBlur(v2.GaussianBlur):
    """torchvision's, by `separable_blur`: its own takes a 13 x 13 kernel's 169 products a pixel."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tv_tensors.wrap(separable_blur(inpt, self.kernel_size[0], params["sigma"][0]), like=inpt)


def separable_blur(pixels: torch.Tensor, size: int, sigma: float) -> torch.Tensor:
    """A Gaussian blur with mirrored edges, along the rows and then along the columns, as sums of shifted images.

    Args:
        pixels: uint8 `[3, h, w]`, h and w more than half the kernel's size.
        size: of the kernel, odd.
        sigma: its standard deviation in pixels.

    Returns:
        uint8 `[3, h, w]`; within one level of torchvision's, which rounds another sum.
    """
    middle = size // 2
    weights = torch.softmax(-0.5 * (torch.arange(-middle, middle + 1) / sigma) ** 2, dim=0).tolist()
    blurred = torch.nn.functional.pad(pixels.float(), [middle] * 4, mode="reflect")
    for dim in (-1, -2):
        length = blurred.shape[dim] - 2 * middle
        total = blurred.narrow(dim, middle, length) * weights[middle]
        for step in range(1, middle + 1):
            total.add_(blurred.narrow(dim, middle - step, length), alpha=weights[middle - step])
            total.add_(blurred.narrow(dim, middle + step, length), alpha=weights[middle + step])
        blurred = total
    return blurred.round_().to(torch.uint8)


def _compose(config: InputConfig, steps: list[torch.nn.Module]) -> Transform:
    """Puts the common beginning (to a tensor) and end (to normalised float32) around the steps."""
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std), v2.ToPureTensor()]
    transform: Transform = v2.Compose([v2.ToImage(), *steps, *end])
    return transform


def _interpolation(config: InputConfig) -> v2.InterpolationMode:
    """timm's name of an interpolation as torchvision's."""
    if config.interpolation not in ("nearest", "bilinear", "bicubic"):
        raise NolaVisionError(
            f"the backbone asks for interpolation {config.interpolation!r}, which cannot be had here: "
            "choose a backbone with nearest, bilinear or bicubic"
        )
    return v2.InterpolationMode(config.interpolation)
