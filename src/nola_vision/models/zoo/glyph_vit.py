"""The quick-start backbone: a small ViT pretrained on rendered glyphs, whose weights ship inside the package.

Importing this module registers `vit_glyph_patch4_32.glyphs` with timm. How the weights were made, and what they have
and have not seen, is told in `weights/README.md`; `scripts/pretrain_glyphs.py` is the recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer

WEIGHTS = Path(__file__).parent / "weights" / "vit_glyph_patch4_32.safetensors"

# timm looks default_cfgs up in the module that registers the model.
default_cfgs = generate_default_cfgs(
    {
        "vit_glyph_patch4_32.glyphs": {
            "file": str(WEIGHTS),
            "num_classes": 0,  # the file holds no head
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
    }
)


@register_model
def vit_glyph_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT for 32x32 images: 64 patches of 4x4 and a class token, width 160, 6 blocks, mean pooling; 1.9 M weights."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 160, "depth": 6, "num_heads": 5, "global_pool": "avg"}
    return _create_vision_transformer("vit_glyph_patch4_32", pretrained=pretrained, **{**shape, **kwargs})
