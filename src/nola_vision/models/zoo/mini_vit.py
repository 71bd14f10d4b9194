"""Three small ViTs of one architecture, whose weights ship with the package.

Importing this module registers them with timm; `weights/README.md` describes them:

- `vit_mini_patch4_32.mae`, the quick start's: a masked autoencoder of fractals, trained without labels
  (`scripts/pretrain_masked.py`).
- `vit_mini_patch4_32.contours`, trained to tell apart shapes that a formula draws (`scripts/pretrain_contours.py`).
- `vit_glyph_patch4_32.glyphs`, trained to classify letters and signs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

WEIGHTS = Path(__file__).parent / "weights"


def _config(file: str) -> dict[str, Any]:
    return {
        "file": str(WEIGHTS / file),
        "num_classes": 0,  # the file is without a head
        "input_size": (3, 32, 32),
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


# timm looks up `default_cfgs` in the module that registers the model
# `vit_mini_patch4_32` without a tag means the first of its entries
default_cfgs = generate_default_cfgs(
    {
        "vit_mini_patch4_32.contours": _config("vit_mini_patch4_32.safetensors"),
        "vit_mini_patch4_32.mae": _config("vit_mini_patch4_32_mae.safetensors"),
        "vit_glyph_patch4_32.glyphs": _config("vit_glyph_patch4_32.safetensors"),
    }
)


def _create(architecture: str, pretrained: bool, options: dict[str, Any]) -> VisionTransformer:
    """ViT for 32x32 images: 64 patches of 4x4 and a class token, width 160, 6 blocks, mean pooling; 1.9 M weights."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 160, "depth": 6, "num_heads": 5, "global_pool": "avg"}
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer,
        architecture,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,  # resizes the position embedding
        **{**shape, **options},
    )
    return model


@register_model
def vit_mini_patch4_32(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Pretrained as a masked autoencoder, or on contours."""
    return _create("vit_mini_patch4_32", pretrained, options)


@register_model
def vit_glyph_patch4_32(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """The same architecture, pretrained to classify letters."""
    return _create("vit_glyph_patch4_32", pretrained, options)
