"""From a decoded image to a backbone's input: the evaluation transform and three augmentations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from nola_vision.common.errors import NolaVisionError
from nola_vision.images.augment import ColorJitter, GaussianBlur, PlanarFloat
from nola_vision.images.input_config import InputConfig

Augmentation = Literal["none", "light", "released"]
Transform = Callable[[Any], torch.Tensor]


_REDUCED = 4  # least shorter side of a reduced image in backbone sides, so that a crop still has more pixels


def reduced(image: Any, size: int) -> Any:
    """Reduces the resolution of an image whose shorter side is at least 8 times the backbone's.

    With k = floor(shorter side / (4 x size)), each pixel is the exact mean of k x k pixels (Pillow's `Image.reduce`).
    With k < 2, as after a first reduction, the image is returned unchanged. All transforms start with this, and images
    are kept in memory like this: 12 megapixels are slow to crop and take 36 MB.

    Args:
        image: a PIL image or a uint8 tensor `[3, h, w]`.
        size: the backbone's image side.
    """
    sides = image.size if isinstance(image, Image.Image) else image.shape[-2:]
    if (factor := min(sides) // (_REDUCED * size)) < 2:
        return image
    return (image if isinstance(image, Image.Image) else to_pil_image(image)).reduce(factor)


def reduce_transform(size: int) -> Transform:
    """From a PIL image to a uint8 tensor `[3, h, w]`, `reduced` for a backbone of this image side."""
    transform: Transform = v2.Compose([Reduce(size), v2.PILToTensor()])
    return transform


def eval_transform(config: InputConfig) -> Transform:
    """timm's evaluation transform: `resize_transform`, then `normalise_transform`.

    Returns:
        A function from a PIL image or a uint8 tensor `[3, h, w]` to a normalised float32 tensor `[3, size, size]`.

    Raises:
        NolaVisionError: as `resize_transform`.
    """
    transform: Transform = v2.Compose([*_resizing(config), *_normalising(config)])
    return transform


def resize_transform(config: InputConfig) -> Transform:
    """The part of the evaluation transform that gives bytes: resize to `floor(size / crop_pct)`, crop the centre.

    Resizing keeps the aspect ratio, or squashes the image to a square if the backbone's `crop_mode` is squash.

    Args:
        config: the backbone's image format.

    Returns:
        A function from a PIL image or a uint8 tensor `[3, h, w]` to a uint8 tensor `[3, size, size]`.

    Raises:
        NolaVisionError: tensors cannot be resized with the interpolation, or the crop mode is unknown.
    """
    transform: Transform = v2.Compose(_resizing(config))
    return transform


def _resizing(config: InputConfig) -> list[nn.Module]:
    if config.crop_mode not in ("center", "squash"):
        raise NolaVisionError(
            f"the backbone needs crop mode {config.crop_mode!r}, which is not supported: choose another tag of it"
        )
    side = math.floor(config.size / config.crop_pct)
    resize = v2.Resize(side if config.crop_mode == "center" else (side, side), _interpolation(config), antialias=True)
    return [Reduce(config.size), v2.ToImage(), resize, v2.CenterCrop(config.size)]


def normalise_transform(config: InputConfig) -> Transform:
    """From a uint8 tensor `[3, size, size]` to a normalised float32 tensor: the evaluation transform after resizing."""
    transform: Transform = v2.Compose(_normalising(config))
    return transform


def _normalising(config: InputConfig) -> list[nn.Module]:
    return [PlanarFloat(), v2.Normalize(config.mean, config.std)]


def check_augmentation(augmentation: str, flip: bool) -> None:
    """Refuses an unknown augmentation, and a flip that would have no effect.

    Raises:
        NolaVisionError: in either case.
    """
    if augmentation not in get_args(Augmentation):
        names = ", ".join(get_args(Augmentation))
        raise NolaVisionError(f"unknown augmentation {augmentation!r}: use one of {names}")
    if flip and augmentation != "light":
        what = "flips nothing" if augmentation == "none" else "always flips"
        raise NolaVisionError(
            f"flip is a setting of augmentation 'light', and {augmentation!r} {what}: give --data.flip false"
        )


def train_transform(config: InputConfig, augmentation: str, flip: bool = False) -> Transform:
    """The transform of training images. All randomness comes from torch's CPU generator.

    - "none": the evaluation transform.
    - "light": a random crop of 60 to 100 % of the area, and with `flip` a horizontal flip with probability 1/2.
    - "released": that of the authors' released code: a crop of 20 to 100 %, colour jitter, grey, blur and a flip.
      Their code rounds to 8 bits after each step; here the steps after the crop compute in floating point.

    Args:
        config: the backbone's image format.
        augmentation: one of the names above.
        flip: add the flip to "light"; leave it off if left and right matter, as in digits.

    Returns:
        A function like that of `eval_transform`.
    """
    if augmentation == "none":
        return eval_transform(config)
    size, interpolation = config.size, _interpolation(config)
    if augmentation == "light":
        crop = v2.RandomResizedCrop(size, scale=(0.6, 1.0), interpolation=interpolation, antialias=True)
        return _compose(config, [crop, v2.RandomHorizontalFlip(0.5)] if flip else [crop])
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=interpolation, antialias=True)
    recolour = [
        v2.RandomApply([ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([GaussianBlur(kernel_size=13, sigma=(0.1, 2.0))], p=0.5),
        v2.RandomHorizontalFlip(0.5),
    ]
    return _compose(config, [crop], recolour)


def _compose(config: InputConfig, on_bytes: list[nn.Module], on_floats: Sequence[nn.Module] = ()) -> Transform:
    """Adds the common first (to a tensor), middle (to float32) and last (normalise) steps."""
    end = v2.Normalize(config.mean, config.std)
    transform: Transform = v2.Compose([Reduce(config.size), v2.ToImage(), *on_bytes, PlanarFloat(), *on_floats, end])
    return transform


class Reduce(nn.Module):
    """`reduced` as the first step of a transform."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Any) -> Any:
        return reduced(image, self.size)


def _interpolation(config: InputConfig) -> v2.InterpolationMode:
    """torchvision's name for timm's interpolation."""
    if config.interpolation not in ("nearest", "bilinear", "bicubic"):
        raise NolaVisionError(
            f"the backbone needs interpolation {config.interpolation!r}, which is not supported: "
            "choose a backbone with nearest, bilinear or bicubic"
        )
    return v2.InterpolationMode(config.interpolation)
