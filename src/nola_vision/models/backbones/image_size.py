"""Which image sides an architecture accepts. Models are created on torch's meta device: shapes without values."""

from __future__ import annotations

from typing import cast

import torch

from nola_vision.common.errors import NolaVisionError
from nola_vision.models.backbones.sources import Source, resolve
from nola_vision.models.backbones.spec import BackboneSpec


def own_side(spec: BackboneSpec) -> tuple[int, bool]:
    """The image side in timm's config of a backbone, and whether the model is made for one size only."""
    config = resolve(spec).cfg
    return int(config.input_size[-1]), bool(config.fixed_input_size)


def largest_side(spec: BackboneSpec, most: int) -> int | None:
    """`most` if timm's own image side is larger and the model accepts `most`; None if its own is to be used."""
    source = resolve(spec)
    return most if source.cfg.input_size[-1] > most and accepts(source, most) else None


def check_img_size(spec: BackboneSpec, source: Source) -> None:
    """Refuses an image side that the architecture does not accept, before weights are downloaded.

    Raises:
        NolaVisionError: with the nearest sides that work.
    """
    own, side = source.cfg.input_size[-1], cast(int, spec.img_size)
    if side < 1:
        raise NolaVisionError(f"img_size is {side}: it must be the image's side in pixels")
    # a model that does not run on the meta device at all cannot be checked
    if side == own or accepts(source, side) or not accepts(source, own):
        return
    grid = [n for n in range(max(1, side - 256), side + 257) if n % 8 == 0 or n % 14 == 0]
    below = next((n for n in reversed(grid) if n < side and accepts(source, n)), None)
    above = next((n for n in grid if n > side and accepts(source, n)), None)
    near = [n for n in (below, above) if n is not None] or [own]
    raise NolaVisionError(
        f"{spec.tag} does not accept images of {side} pixels (img_size): use {' or '.join(map(str, near))}"
        + ("" if own in near else f", or its own {own}")
    )


def accepts(source: Source, side: int) -> bool:
    """Whether a model computes features of images of a side, and of all their pixels."""
    try:
        model = source.create_shapes(num_classes=0, img_size=side).eval()
        with torch.device("meta"), torch.no_grad():
            model(torch.empty(2, 3, side, side))
    except Exception:  # an assertion, a shape, an operation without a meta version: any
        return False
    patches = getattr(model, "patch_embed", None)  # timm's cuts off the pixels that fill no patch
    patch = getattr(patches, "patch_size", None)
    cuts = isinstance(patch, tuple) and side % patch[0] != 0 and not getattr(patches, "dynamic_img_pad", False)
    return not cuts
