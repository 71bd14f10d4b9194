"""Writes the golden adapter files of the present format version that do not exist yet into `tests/golden/`.

They are committed once per version and must load indefinitely; `tests/test_golden.py` reads them. Version 2 is frozen
(decision 0025), so a file that exists is left as it is.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from nola_vision import NOLA, PEFT, PRANC, BackboneSpec, HashedNet, LinearProbe, LoRA, adapt, load_adapter
from nola_vision.adapters.methods import (
    FacT,
    LogisticRegression,
    LoRAXS,
    Method,
    NearestMean,
    TinyLoRA,
    UniLoRA,
    VeRA,
)
from nola_vision.adapters.serialization import FORMAT_VERSION

FOLDER = Path(__file__).parent.parent / "tests" / "golden"
NAMES = ["null", "eins", "zwei", "drei", "vïer"]
GLYPHS = BackboneSpec("vit_glyph_patch4_32.glyphs")
SCRATCH = BackboneSpec("resnet20_cifar.untrained", base="random")
CASES: dict[str, tuple[BackboneSpec, Method]] = {
    "nola": (GLYPHS, NOLA(targets=["mlp", "qv"], rank=3, num_basis=6, num_basis_b=5)),
    "nola-per-layer-4bit-head": (
        GLYPHS, NOLA(targets=["qkv", "head"], num_basis=70, head_num_basis=9, scope="per_layer", bits=4, nested=True)
    ),
    "nola-released": (GLYPHS, NOLA(targets=["qkv"], rank=2, num_basis=4, start="released", bits=16)),
    "nola-scratch": (SCRATCH, NOLA(targets=["conv"], rank=2, num_basis=5, train_norms=True)),
    "lora-8bit": (GLYPHS, LoRA(targets=["re:blocks.0.attn.qkv"], rank=1, bits=8)),
    "pranc": (GLYPHS, PRANC(targets=["re:blocks.0.*"], num_basis=20, scope="layer", bits=3)),
    "pranc-model-zero": (
        BackboneSpec("mlp_784_256.untrained", base="zero"), PRANC(targets=["all", "head"], num_basis=32)
    ),
    "hashednet": (GLYPHS, HashedNet(targets=["qkv"], max_parameters=100)),
    "lora-xs": (GLYPHS, LoRAXS(targets=["qv"], rank=5)),
    "tiny-lora": (GLYPHS, TinyLoRA(targets=["qv", "re:blocks.0.mlp.fc1"], rank=5, num_basis=9)),
    "tiny-lora-model": (GLYPHS, TinyLoRA(targets=["qkv"], rank=4, num_basis=20, scope="model")),
    "uni-lora-4bit": (GLYPHS, UniLoRA(targets=["qv", "re:blocks.0.mlp.fc1"], rank=2, max_parameters=200, bits=4)),
    "fact": (GLYPHS, FacT(targets=["qkv", "re:blocks.0.*fc."], rank=3)),
    "vera-8bit": (GLYPHS, VeRA(targets=["re:blocks.0.*"], rank=60, bits=8)),
    "linear": (GLYPHS, LinearProbe()),
    "lora-1bit": (GLYPHS, LoRA(targets=["qkv"], rank=1, bits=1)),
    "linear-1bit": (GLYPHS, LinearProbe(head_bits=1)),
    "nearest-mean": (GLYPHS, NearestMean()),
    "logistic-4bit": (GLYPHS, LogisticRegression(head_bits=4)),
    "peft-lora": (GLYPHS, PEFT(config="LoraConfig", settings={"r": 1, "target_modules": ["blocks.0.attn.qkv"]})),
    "lora-int8": (BackboneSpec(GLYPHS.tag, int8=True), LoRA(targets=["re:blocks.0.attn.qkv"], rank=1, bits=4)),
    "lora-64px": (BackboneSpec(GLYPHS.tag, img_size=64), LoRA(targets=["re:blocks.0.attn.qkv"], rank=1, bits=4)),
}  # fmt: skip
CALIBRATED = {"logistic-4bit": (1.25, "folds", 40), "lora-64px": (0.75, "validation", None)}


def image(size: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)


def main() -> None:
    page = FOLDER / f"v{FORMAT_VERSION}.json"
    expected = json.loads(page.read_text()) if page.exists() else {}
    for name, (spec, method) in CASES.items():
        path = FOLDER / f"v{FORMAT_VERSION}-{name}.safetensors"
        if path.exists():
            continue
        model = adapt(spec, method, NAMES, run_seed=3, basis_seed=4).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in [*model.bank.parameters(), *(p for p in model.backbone.parameters() if p.requires_grad)]:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.round_to_stored_bits()
        calibration = CALIBRATED.get(name, (1.0, None, None))
        model.temperature, model.calibrated_on, model.calibration_images = calibration
        model.save(path)
        loaded = load_adapter(path)
        logits = loaded(image(loaded.metadata.input.size))[0].tolist()
        expected[path.name] = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "logits": logits}
        if name in CALIBRATED:
            expected[path.name]["calibration"] = calibration
    page.write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
