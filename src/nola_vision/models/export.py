"""Exports an adapter file: to a smaller adapter file, or merged into a plain timm model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import textwrap
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nola_vision.adapters.bank import prefix_length
from nola_vision.adapters.functional import is_quantised
from nola_vision.adapters.methods.base import check_bits
from nola_vision.adapters.methods.registry import from_dict, to_dict
from nola_vision.adapters.serialization import adapter_bytes, open_adapter
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import write_file
from nola_vision.common.integer_search import largest
from nola_vision.models.adapted_model import AdaptedModel, file_bits
from nola_vision.models.backbones.sources import Source, resolve
from nola_vision.models.metadata import parse_header
from nola_vision.models.prediction import run_in_eval_mode

_STEPS = 4096  # a cut keeps a multiple of 1/4096 of the coefficients


def shorten(adapter: str | Path, out: str | Path, max_bytes: int | None = None, bits: int | None = None) -> int:
    """Writes an adapter file with fewer bits per value, with the first coefficients only, or both, without training.

    Args:
        adapter: an adapter file; to cut it, its method must have been trained with `nested: true`.
        out: the new file.
        max_bytes: its largest size; as many coefficients are kept as fit.
        bits: 1 to 8 or 16, for the coefficients and the head's matrix; values with fewer keep theirs. Default:
            unchanged.

    Returns:
        The new file's size in bytes.

    Raises:
        NolaVisionError: the file was not trained for cutting, no cut is small enough, its values have no more bits
            than requested, or it would be overwritten.
    """
    file = open_adapter(adapter)
    parse_header(file.metadata, file.path)
    metadata, tensors = file.metadata, file.tensors()
    if Path(out).exists() and Path(out).samefile(adapter):
        raise NolaVisionError(f"{out} is the adapter itself, and a cut cannot be undone: give another file")
    method = from_dict(metadata["method"])
    if bits is not None:
        check_bits("bits", bits)
        fewer = method.with_bits(*(min(own, bits) for own in method.stored_bits))
        if fewer.stored_bits == method.stored_bits:
            raise NolaVisionError(f"the values of {adapter} have no more than {bits} bits: give fewer bits")
        method = fewer
    widths = file_bits(tensors, method)
    if max_bytes is None:
        content = adapter_bytes({**metadata, "method": to_dict(method)}, tensors, widths)
    else:
        if not method.nested:
            raise NolaVisionError(f"{adapter} was not trained to be cut: train it with `nested: true`")

        def cut(step: int) -> bytes:
            kept, counts = dict(tensors), {}
            for name, tensor in tensors.items():
                group, _, own = name.removeprefix("adapter.").rpartition(".")
                if name.startswith("adapter.") and own in method.cuttable:
                    counts[group, own] = prefix_length(tensor.shape[-1], step / _STEPS)
                    kept[name] = tensor[..., : counts[group, own]]
            return adapter_bytes({**metadata, "method": to_dict(method.cut(counts))}, kept, widths)

        if len(cut(1)) > max_bytes:
            raise NolaVisionError(
                f"max_bytes is {max_bytes}, but the head and one coefficient per factor alone take {len(cut(1))}: give "
                "more, or fewer bits"
            )
        content = cut(largest(lambda step: len(cut(step)) <= max_bytes, _STEPS))
    write_file(out, content)
    return len(content)


_NOT_LINEAR = ("use_mlp_head", "use_aux_head")  # timm's options (MetaFormer, VOLO) for a head that is not linear


def write_merged(model: AdaptedModel, out: str | Path, dequantise: bool = False) -> str:
    """Writes the backbone with the adapter merged, and the head as its classifier: a folder that timm alone loads.

    The folder has `model.safetensors` and `config.json`: architecture, number and names of the classes, image size,
    mean, std, interpolation and crop, and `temperature` if the adapter is calibrated: the probabilities are
    softmax(logits / temperature). Before the folder gets its name, timm loads it, and its logits are compared with the
    adapted model's.

    Args:
        model: an adapted model; it is unchanged.
        out: a new folder.
        dequantise: write floats where the backbone stores integers.

    Returns:
        The Python code that loads it; a model that is not in timm needs this package.

    Raises:
        NolaVisionError: timm's model lacks a linear classifier on its features, the folder exists or cannot be written,
            or timm computes different logits. No files remain.
    """
    out, spec, bank = Path(out), model.metadata.backbone, model.bank
    if model.metadata.method.edits_backbone:
        raise NolaVisionError("PEFT merges its own methods: in Python, model.backbone.merge_and_unload() does it")
    if spec.int8 and not dequantise:
        raise NolaVisionError(f"the weights of {spec.tag} are stored in int8: request floats (--dequantise)")
    if out.suffix in (".safetensors", ".pth", ".bin"):
        raise NolaVisionError(f"{out} looks like a file, and a merged model is a folder: name it without {out.suffix}")
    if out.exists():
        raise NolaVisionError(f"{out} exists already: name a new folder for the merged model")
    source, plain, classifiers = with_classifier(
        resolve(spec), model.backbone, len(model.metadata.class_names), spec.img_size
    )
    probe, expected = _probe(model)
    bank.merge(dequantise=dequantise)
    try:
        state = {name: _float32(tensor) for name, tensor in model.backbone.state_dict().items()}
    finally:
        bank.unmerge()
    plain.load_state_dict(state, strict=False)  # all but the head
    weight, bias = (_float32(tensor[0]) for tensor in bank.head())
    _place_head(plain, classifiers, weight, bias, probe)

    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir()
        state = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in plain.state_dict().items()}
        safetensors.torch.save_file(state, temporary / "model.safetensors")
        config = _config(model, source, classifiers)
        (temporary / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        _compare(temporary, probe, expected, model)
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NolaVisionError(f"{out} cannot be written ({reason}): make room, or give another path") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    own = timm.models.model_entrypoint(source.architecture).__module__.startswith("nola_vision.")
    return f"{'import nola_vision; ' if own else ''}timm.create_model({f'local-dir:{out}'!r}, pretrained=True)"


def _float32(tensor: Tensor) -> Tensor:
    tensor = tensor.dequantize() if is_quantised(tensor) else tensor.detach()
    return tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu()


def with_classifier(
    source: Source, backbone: nn.Module, num_classes: int, img_size: int | None = None
) -> tuple[Source, nn.Module, list[str]]:
    """timm's model with new weights and a classifier.

    Batch norms between the features and the classifier become the identity.

    Returns:
        The model's source, the model, and the names of its layers that compute the classes.

    Raises:
        NolaVisionError: it lacks a linear classifier, or differs from the backbone in more than that.
    """
    with torch.random.fork_rng(devices=[]):
        plain = source.create(num_classes, img_size=img_size).eval()
        if options := {name: False for name in _NOT_LINEAR if getattr(plain, name, False)}:
            source = replace(source, model_args=source.model_args | options)
            plain = source.create(num_classes, img_size=img_size).eval()
    tag = source.architecture
    own, there = plain.state_dict(), backbone.state_dict()
    layers = {name.rpartition(".")[0]: plain.get_submodule(name.rpartition(".")[0]) for name in own.keys() - there}
    classifiers = []
    for name, layer in plain.named_modules():
        if name not in layers:
            continue
        if isinstance(layer, nn.BatchNorm1d):
            layer.reset_running_stats()
            nn.init.constant_(layer.weight, math.sqrt(1 + layer.eps))
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[0] == plain.num_classes:
            classifiers.append(name)
        else:
            raise NolaVisionError(
                f"timm's classifier of {tag} is not linear in its features (it has {name}), so it cannot store "
                "the head: use the adapter file"
            )
    if not classifiers:
        raise NolaVisionError(f"timm's {tag} lacks a classifier to store the head in: use the adapter file")
    if there.keys() - own or any(there[name].shape != own[name].shape for name in there):
        raise NolaVisionError(
            f"timm's {tag} with a classifier has other weights than without, so it cannot be merged: use "
            "the adapter file"
        )
    return source, plain, classifiers


@torch.no_grad()
def _place_head(plain: nn.Module, classifiers: Sequence[str], weight: Tensor, bias: Tensor, probe: Tensor) -> None:
    """Sets the classifiers so that together they compute `weight @ features + bias`.

    A single classifier gets all weights. Several each get a slice of the features (the stages of a network: CrossViT,
    EfficientViM), or each gets all of them (those for distillation: DeiT, LeViT); timm then adds their outputs with
    factors, which are measured here.
    """
    layers = [cast("nn.Linear | nn.Conv2d", plain.get_submodule(name)) for name in classifiers]
    shares = [1.0] if len(layers) == 1 else _shares(plain, layers, probe)
    columns, first = [], 0
    for layer in layers:
        last = first + layer.weight.shape[1]
        columns.append((first, last))
        first = last % weight.shape[1]
    for layer, (first, last) in zip(layers, columns, strict=True):
        share = sum(s for s, c in zip(shares, columns, strict=True) if c == (first, last))
        layer.weight.copy_((weight[:, first:last] / share).view_as(layer.weight))
        cast(Tensor, layer.bias).copy_(bias / sum(shares))


def _shares(plain: nn.Module, layers: Sequence[nn.Linear | nn.Conv2d], probe: Tensor) -> list[float]:
    for layer in layers:
        nn.init.zeros_(layer.weight)
    found = []
    for layer in layers:
        for other in layers:
            nn.init.constant_(cast(Tensor, other.bias), 1.0 if other is layer else 0.0)
        found.append(float(plain(probe)[0, 0]))
    return found


def _config(model: AdaptedModel, source: Source, classifiers: Sequence[str]) -> dict[str, Any]:
    """timm's `config.json`: architecture and arguments, image format, class names."""
    metadata = model.metadata
    image = {**dataclasses.asdict(metadata.input), "input_size": [3, metadata.input.size, metadata.input.size]}
    del image["size"]
    cfg = source.cfg.to_dict(remove_source=True)
    for key in ("architecture", "state_dict", "label_offset", "label_names", "label_descriptions", "test_input_size",
                "test_crop_pct", "test_pool_size"):  # fmt: skip
        cfg.pop(key, None)
    cfg |= {"num_classes": len(metadata.class_names), "pool_size": None, "custom_load": False}
    cfg["classifier"] = classifiers[0] if len(classifiers) == 1 else classifiers
    # timm ignores it: its logits are those of the adapted model
    scale = {} if model.calibrated_on is None else {"temperature": model.temperature}
    return {
        "architecture": source.architecture,
        "num_classes": len(metadata.class_names),
        "label_names": list(metadata.class_names),
        "model_args": source.options(metadata.backbone.img_size),
        "pretrained_cfg": cfg | image,
        **scale,
    }


def _probe(model: AdaptedModel) -> tuple[Tensor, Tensor]:
    """Two images of noise, and the model's logits for them."""
    size, parameter = model.metadata.input.size, next(model.backbone.parameters())
    probe = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return probe, run_in_eval_mode(model, model, probe.to(parameter.dtype)).float().cpu()


@torch.no_grad()
def _compare(folder: Path, probe: Tensor, expected: Tensor, model: AdaptedModel) -> None:
    """Loads a folder with timm and compares its logits with those of the adapted model."""
    tag = model.metadata.backbone.tag
    try:
        with torch.random.fork_rng(devices=[]):
            logits = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(probe)
    except Exception as error:  # timm raises many types
        reason = textwrap.shorten(f"{type(error).__name__}, {error}", 160)
        raise NolaVisionError(f"timm cannot load the merged {tag}, so it was not written ({reason})") from error
    exact = next(model.backbone.parameters()).dtype == torch.float32
    difference = float((logits - expected).abs().max() / expected.abs().max())
    if not difference < (1e-3 if exact else 0.1):
        raise NolaVisionError(
            f"the merged {tag} computes different logits in timm (they differ by {difference:.2g} of the largest), so "
            "nothing is written: use the adapter file"
        )
