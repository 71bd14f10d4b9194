"""The image format that a backbone expects; importing it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InputConfig:
    """The image format of a backbone, as in timm's data config.

    Args:
        size: image side in pixels.
        mean: per RGB channel, on a 0-1 scale.
        std: per RGB channel, on a 0-1 scale.
        interpolation: timm's name, for example "bicubic".
        crop_pct: share of the resized image that the centre crop keeps in evaluation.
        crop_mode: how timm resizes before the crop: "center" or "squash".
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"
