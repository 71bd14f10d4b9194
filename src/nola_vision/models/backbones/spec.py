"""Which backbone to use; importing it imports neither torch nor timm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nola_vision.adapters.methods.base import Base


@dataclass(frozen=True)
class BackboneSpec:
    """Which pretrained model to adapt.

    Args:
        tag: timm's exact name, `architecture.pretrained_tag`; or `local-dir:FOLDER`, a folder such as
            `export --merged` writes; or `hf-hub:OWNER/NAME`, a repository of that form.
        file: local `.safetensors` or `.pth` file with timm's keys, or a folder with `model.safetensors`. Default: the
            weights that the tag names. With a `local-dir:` or `hf-hub:` tag, a folder replaces the tag's.
        img_size: image side in pixels. Default: the size in timm's data config.
        base: the weights: `pretrained`; `random`, He's normal variance from the counter-based generator, so that a
            seed restores them; or `zero`, where all weights of linear layers and convolutions are zero.
        int8: store the weights of linear layers in 8 bits (`pip install 'nola-vision[int8]'`).
        normalisation: mean and std of the images: the backbone's `own`, or always `imagenet`'s.
        crop: how images become square: the backbone's `own` way, or `none`: all of the image, squashed.
    """

    tag: str
    file: str | None = None
    img_size: int | None = None
    base: Base = "pretrained"
    int8: bool = False
    normalisation: Literal["own", "imagenet"] = "own"
    crop: Literal["own", "none"] = "own"
