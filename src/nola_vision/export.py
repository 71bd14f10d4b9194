"""What an adapter file can be made into: a shorter adapter file, or a plain timm checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from torch import Tensor

from nola_vision.adapter_header import parse_header
from nola_vision.adapters.file import adapter_bytes, open_adapter
from nola_vision.adapters.paths import is_quantised
from nola_vision.adapters.quantise import check_bits
from nola_vision.adapters.stack import is_nested, prefix_length
from nola_vision.errors import NolaVisionError
from nola_vision.files import write_file
from nola_vision.methods import PEFT, from_dict, stored_bits
from nola_vision.model import AdaptedModel, file_bits, largest

_STEPS = 4096  # shares of the coefficients that a cut chooses from


def shorten(adapter: str | Path, out: str | Path, max_bytes: int | None = None, bits: int | None = None) -> int:
    """Writes an adapter file with fewer bits a number, with the first coefficients only, or both, without training.

    Args:
        adapter: an adapter file; to cut it, its method must have been trained with `nested: true`.
        out: the new file.
        max_bytes: its largest size; as many coefficients stay as fit.
        bits: 2 to 8 or 16, for the coefficients and the head's matrix; as they were if not given.

    Returns:
        The new file's size in bytes.

    Raises:
        NolaVisionError: the file was not trained for cutting, no cut is small enough, its numbers have no more bits
            than are asked for, or it would be written over.
    """
    file = open_adapter(adapter)
    parse_header(file.metadata, file.path)
    metadata, tensors = file.metadata, file.tensors()
    described = {key: value for key, value in metadata.items() if key not in ("packed", "digest")}
    if Path(out).exists() and Path(out).samefile(adapter):
        raise NolaVisionError(f"{out} is the adapter itself, and what is cut off cannot be had back: give another file")
    settings = metadata["method"]["init_args"]
    if bits is not None:
        check_bits("bits", bits)
        if bits >= max(stored_bits(from_dict(metadata["method"]))):
            raise NolaVisionError(f"the numbers of {adapter} have no more than {bits} bits: give fewer bits")
        if "head_bits" not in settings:
            name = metadata["method"]["class_path"]
            raise NolaVisionError(f"{adapter} was trained by {name}, whose numbers keep 32 bits: leave --bits out")
        new = {"bits": bits, "head_bits": None} if "bits" in settings else {"head_bits": bits}
        described["method"] = _with(metadata["method"], **new)
    widths = file_bits(tensors, from_dict(described["method"]))
    if max_bytes is None:
        content = adapter_bytes(described, tensors, widths)
    else:
        if not metadata["method"]["init_args"].get("nested"):
            raise NolaVisionError(f"{adapter} was not trained to be cut: train it with `nested: true`")

        def cut(step: int) -> bytes:
            share = step / _STEPS
            kept = {n: t[..., : prefix_length(t.shape[-1], share)] if is_nested(n) else t for n, t in tensors.items()}
            method = _with(described["method"], **_counts(kept))
            return adapter_bytes({**described, "method": method}, kept, widths)

        if len(cut(1)) > max_bytes:
            raise NolaVisionError(
                f"max_bytes is {max_bytes}, but the head and one coefficient a factor alone take {len(cut(1))}: give "
                "more, or fewer bits"
            )
        content = cut(largest(lambda step: len(cut(step)) <= max_bytes, _STEPS))
    write_file(out, content)
    return len(content)


def _floats(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if is_quantised(tensor) else tensor.detach()


def _with(method: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    known = {name: value for name, value in changes.items() if name in method["init_args"]}
    return {**method, "init_args": {**method["init_args"], **known}}


def _counts(tensors: Mapping[str, Tensor]) -> dict[str, int | None]:
    """The numbers of basis matrices that tensors of coefficients have left."""
    counts: dict[str, int | None] = {"max_parameters": None}
    for name, tensor in tensors.items():
        head, factor = name.startswith("adapter.head."), name.rpartition(".")[2]
        if head and factor != "coefficients":
            counts["head_num_basis"] = tensor.shape[-1]
        elif factor in ("coefficients", "coefficients_a"):
            counts["num_basis"] = tensor.shape[-1]
        elif factor == "coefficients_b":
            counts["num_basis_b"] = tensor.shape[-1]
    return counts


def write_merged(model: AdaptedModel, out: str | Path, dequantise: bool = False) -> str:
    """Writes the backbone with the adapter merged, and the head as its classifier: a checkpoint that timm alone loads.

    Args:
        model: an adapted model; it is left as it was.
        out: a `.safetensors` file.
        dequantise: write floats where the backbone holds integers.

    Returns:
        The Python code that loads it; a model that timm does not have itself needs this package.

    Raises:
        NolaVisionError: the model has no place for a head, or the file cannot be written.
    """
    if Path(out).suffix != ".safetensors":
        raise NolaVisionError(f"{out} would be taken for another format than it has: let its name end in .safetensors")
    spec, stack = model.card.backbone, model.stack
    if isinstance(model.card.method, PEFT):
        raise NolaVisionError("PEFT merges its own methods: in Python, model.backbone.merge_and_unload() does it")
    classifier = model.backbone.pretrained_cfg.get("classifier")  # type: ignore[union-attr, operator]
    if not isinstance(classifier, str):
        raise NolaVisionError(f"{spec.tag} has no single classifier in timm, so no checkpoint of it can hold the head")
    if spec.int8 and not dequantise:
        raise NolaVisionError(f"the weights of {spec.tag} are held in int8: ask for floats (--dequantise)")
    weight, bias = stack.head()
    stack.merge(dequantise=dequantise)
    try:
        state = {name: _floats(tensor).cpu().clone() for name, tensor in model.backbone.state_dict().items()}
    finally:
        stack.unmerge()
    state |= {f"{classifier}.weight": weight[0].detach().cpu(), f"{classifier}.bias": bias[0].detach().cpu()}
    write_file(out, safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()}))
    sized = spec.img_size is not None and model.backbone.pretrained_cfg.get("fixed_input_size")  # type: ignore[union-attr, operator]
    size = f", img_size={spec.img_size}" if sized else ""
    tag = spec.tag.partition(".")[0]
    own = "import nola_vision; " if timm.models.model_entrypoint(tag).__module__.startswith("nola_vision.") else ""
    return f"{own}timm.create_model('{tag}', num_classes={len(weight[0])}{size}, checkpoint_path='{out}')"
