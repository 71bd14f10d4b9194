"""Faster colour jitter and blur than torchvision's, on float32 images with contiguous planes.

Only the arithmetic differs: torchvision's own classes draw the parameters, from the same random numbers in the same
order, and the results equal torchvision's on float images up to rounding. On uint8 images torchvision converts to float
and back, and rounds, at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional


class PlanarFloat(nn.Module):
    """From a uint8 image to float32 in [0, 1] with contiguous channels. A decoded image is stored pixel by pixel; the
    later steps are several times as fast on planes."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        planes = image.as_subclass(torch.Tensor).contiguous()
        scaled: torch.Tensor = functional.to_dtype(planes, torch.float32, scale=True)
        return scaled


class ColorJitter(v2.ColorJitter):
    """torchvision's, with `adjust_hue` below. Requires a float image and all four ranges."""

    def transform(self, image: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation, adjust_hue)
        factors = [params[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue")]
        for step in params["fn_idx"].tolist():
            image = adjust[step](image, factors[step])
        return image


class GaussianBlur(v2.GaussianBlur):
    """torchvision's, with `gaussian_blur` below. Requires a float image, a square kernel and one sigma."""

    def transform(self, image: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        return gaussian_blur(image, self.kernel_size[0], params["sigma"][0])


def adjust_hue(image: torch.Tensor, hue_factor: float) -> torch.Tensor:
    """Rotates the hue of a float image `[3, h, w]` by a fraction of the circle, from -1/6 to 1/6.

    HSV without divisions. On a circle of length 6, red is at 0, green at 2, blue at 4. With V the largest channel,
    C the difference of the largest and the smallest, and d the distance of the hue from a channel's position, the
    channel is V - C clamp(d - 1, 0, 1). Everything is multiplied by C: the hue is then a sum of channels, and grey
    pixels (C = 0) need no special case.
    """
    red, green, blue = image.unbind(-3)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    near_green, near_blue = (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)
    hue = torch.where(value == red, green - blue, torch.where(value == green, near_green, near_blue))
    hue.add_(chroma, alpha=6 * hue_factor)
    turned = torch.empty_like(image)
    for place, channel in zip((0, 2, 4), turned.unbind(-3), strict=True):
        torch.sub(hue, chroma, alpha=place, out=channel)  # from -6 to 6 times C: the distance round the circle is next
        channel.abs_().sub_(chroma, alpha=3).abs_().sub_(chroma, alpha=2).neg_().clamp_(min=0)  # d - 1 = 2 - ||x| - 3|
        torch.minimum(channel, chroma, out=channel)
        torch.sub(value, channel, out=channel)
    return turned


def gaussian_blur(image: torch.Tensor, kernel_size: int, sigma: float) -> torch.Tensor:
    """Blurs a float image `[3, h, w]`, reflected at its edges: first along columns, then along rows.

    Two passes have 2 x 13 taps, torchvision's single pass has 13 x 13; a sum of shifted images is faster here than
    torch's depthwise convolution.
    """
    reach = kernel_size // 2
    weights = torch.arange(reach + 1).div(sigma).square().mul(-0.5).exp()
    weights = weights / (2 * weights.sum() - weights[0])
    centre, *others = weights.tolist()
    for dim, margins in ((-2, (0, 0, reach, reach)), (-1, (reach, reach, 0, 0))):
        length, padded = image.shape[dim], nn.functional.pad(image, margins, mode="reflect")
        image = padded.narrow(dim, reach, length) * centre
        for far, weight in enumerate(others, 1):
            pair = padded.narrow(dim, reach - far, length) + padded.narrow(dim, reach + far, length)
            image.add_(pair, alpha=weight)
    return image
