"""Bytes of adapter files of ViT-B/16 with 100 classes, without training: whole files, headers and class names.

    python scripts/measure_headers.py

Only the shapes of the backbone are used, so nothing is downloaded.
"""

from __future__ import annotations

import functools
import timeit

from nola_vision import NOLA, LoRA
from nola_vision.adapters.methods import Method
from nola_vision.adapters.serialization import adapter_size
from nola_vision.adapters.stored import byte_count
from nola_vision.images.input_config import InputConfig
from nola_vision.models.adapted_model import file_bits, file_metadata
from nola_vision.models.backbones.creation import skeleton
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.models.building import feature_width, file_shapes, method_targets, names_in_bank, stated_targets
from nola_vision.models.known_weights import WeightsOrigin
from nola_vision.models.metadata import AdapterMetadata

TAG = "vit_base_patch16_224.augreg_in21k_ft_in1k"
WEIGHTS = WeightsOrigin(f"timm/{TAG}", "model.safetensors", 346_284_714, "0" * 64)
INPUT = InputConfig(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", 0.9)
NOUNS = "dog cat house tree car bird fish chair cup boat road hill lamp coat shoe book clock horse train bridge".split()
CLASSES = [f"{adjective} {noun}" for adjective in ("small", "large", "red", "old", "wild") for noun in NOUNS]
# the paper's cell of NOLA on the MLP, with its head linear or a target too, and LoRA r=4 on QKV
CASES: dict[str, Method] = {
    "NOLA k=1024 MLP, 4 bits, NOLA head": NOLA(targets=["mlp", "head"], bits=4, start="a0"),
    "NOLA k=1024 MLP, 4 bits, linear head": NOLA(targets=["mlp"], bits=4, start="a0"),
    "NOLA k=1024 MLP, 3 bits, linear head": NOLA(targets=["mlp"], bits=3, start="a0"),
    "NOLA k=1024 MLP, 16 bits, linear head": NOLA(targets=["mlp"], bits=16, start="a0"),
    "NOLA k=1024 MLP, 32 bits, linear head": NOLA(targets=["mlp"], start="a0"),
    "LoRA r=4 QKV, 32 bits": LoRA(),
    "LoRA r=4 QKV, 16 bits": LoRA(bits=16),
    "LoRA r=4 QKV, 4 bits": LoRA(bits=4),
    "LoRA r=4 QKV, 1 bit": LoRA(bits=1),
    "LoRA r=1 QKV, 1 bit": LoRA(rank=1, bits=1),
}
RIVALS = ("LoRA r=4 QKV, 16 bits", "LoRA r=4 QKV, 4 bits")  # their bytes as multiples of each file's


def main() -> None:
    spec = BackboneSpec(TAG)
    backbone = skeleton(spec)
    measured = {}
    for name, method in CASES.items():
        targets = method_targets(backbone, method, len(CLASSES))
        groups = method.groups(targets)
        shapes = file_shapes(groups, len(CLASSES), feature_width(backbone))
        bits = file_bits(shapes, method)
        stated = stated_targets(backbone, method, len(CLASSES), names_in_bank(groups))

        named, nameless = (
            file_metadata(AdapterMetadata(spec, method, tuple(names), 0, 0, INPUT), stated, None, WEIGHTS)
            for names in (CLASSES, ())
        )
        tensors = sum(byte_count(bits.get(one, 32), shape) for one, shape in shapes.items())
        whole, nameless = (adapter_size(one, shapes, bits) for one in (named, nameless))
        times = timeit.repeat(functools.partial(adapter_size, named, shapes, bits), number=1, repeat=5)
        measured[name] = whole, tensors, nameless - tensors, whole - nameless, 1e3 * min(times)
    print(f"{'file':40s}{'whole':>9s}{'tensors':>9s}{'header':>9s}{'names':>8s}{'ms':>8s}  {'   '.join(RIVALS)}")
    for name, (whole, tensors, header, names, milliseconds) in measured.items():
        ratios = "".join(f"{f'{measured[rival][0] / whole:.1f}':>{len(rival) + 2}s} " for rival in RIVALS)
        print(f"{name:40s}{whole:9,d}{tensors:9,d}{header:9,d}{names:8,d}{milliseconds:8.2f}{ratios}")


if __name__ == "__main__":
    main()
