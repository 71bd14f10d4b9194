"""The backbone of the golden adapter files: a small ViT pretrained on rendered glyphs (`golden/README.md`).

It shipped with the package when the files of format 1 and 2 were made. Importing this module registers
`vit_glyph_patch4_32.glyphs` with timm. It is a copy of `mini_vit.py` on purpose: golden files must load
whatever becomes of that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

WEIGHTS = Path(__file__).parent / "golden" / "vit_glyph_patch4_32.safetensors"

# timm looks up `default_cfgs` in the module that registers the model
default_cfgs = generate_default_cfgs(
    {
        "vit_glyph_patch4_32.glyphs": {
            "file": str(WEIGHTS),
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
    }
)


@register_model
def vit_glyph_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT for 32x32 images: 64 patches of 4x4 and a class token, width 160, 6 blocks, mean pooling; 1.9 M weights."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 160, "depth": 6, "num_heads": 5, "global_pool": "avg"}
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer,
        "vit_glyph_patch4_32",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,  # resizes the position embedding
        **{**shape, **kwargs},
    )
    return model
