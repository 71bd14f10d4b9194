"""An adapter file: one safetensors file whose metadata and tensors are guarded by one digest.

The metadata holds a single key, `nola_vision`, whose value is JSON with sorted keys; `docs/adapter-format.md` specifies
it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nola_vision.adapters.quantise import FLOAT_BITS, dequantise, pack, quantise, rows_of, unpack
from nola_vision.errors import NolaVisionError
from nola_vision.files import write_file

FORMAT = "nola-vision adapter"
FORMAT_VERSION = 1
METADATA_KEY = "nola_vision"


def write_adapter(
    path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], bits: Mapping[str, int]
) -> int:
    """Writes an adapter file, whole or not at all.

    Args:
        path: where to; an existing file is replaced.
        metadata: plain JSON values; format, version and digest are added.
        tensors: by name.
        bits: how many bits a number of a tensor takes, by its name: 2 to 8, 16, or 32 if it is not named.

    Returns:
        The file's size in bytes.

    Raises:
        NolaVisionError: the folder is missing or cannot be written.
    """
    content = adapter_bytes(metadata, tensors, bits)
    write_file(path, content)
    return len(content)


def adapter_bytes(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], bits: Mapping[str, int]) -> bytes:
    """The content of an adapter file; arguments as in `write_adapter`."""
    kept: dict[str, Tensor] = {}
    packed: dict[str, Any] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        width = bits.get(name, 32)
        if width not in FLOAT_BITS:
            levels, scales = quantise(rows_of(tensor.unsqueeze(0)), width)
            kept |= {f"{name}.levels": pack(levels, width), f"{name}.scales": scales}
            packed[name] = {"bits": width, "shape": list(tensor.shape)}
        else:
            kept[name] = tensor.half() if width == 16 else tensor
            if width == 16 and not kept[name].isfinite().all():
                raise NolaVisionError(f"{name} holds a number that 16 bits cannot hold (above 65,504): use 32 bits")
    described = {**metadata, "packed": packed, "format": FORMAT, "format_version": FORMAT_VERSION}
    described["digest"] = digest(described, kept)
    content: bytes = safetensors.torch.save(kept, {METADATA_KEY: _canonical(described)})
    return content


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of an adapter file, after its digest is checked; packed integers are numbers again.

    Raises:
        NolaVisionError: no such file, not safetensors, truncated, no adapter, of another format version, or changed.
    """
    path = Path(path)
    if not path.is_file():
        raise NolaVisionError(
            f"the adapter file {path} {'is a folder: name the file in it' if path.is_dir() else 'does not exist'}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise NolaVisionError(
            f"{path} is truncated or no safetensors file, so it is no adapter ({error}): get the file anew"
        ) from error
    if METADATA_KEY not in metadata:
        raise NolaVisionError(f"{path} is a safetensors file, but no nola-vision adapter: it lacks that metadata")
    try:
        described = json.loads(metadata[METADATA_KEY])
        version = described["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise NolaVisionError(f"the metadata of {path} is damaged: get the file anew") from error
    if version != FORMAT_VERSION:
        raise NolaVisionError(
            f"{path} has adapter format version {version} and this nola-vision reads version {FORMAT_VERSION}: "
            "use the release that wrote it, or train again"
        )
    if described.get("digest") != digest(described, tensors):
        raise NolaVisionError(
            f"{path} was changed or damaged after it was written (its digest does not match): get the file anew"
        )
    try:
        tensors = _unpacked(described["packed"], tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise NolaVisionError(f"the packed numbers of {path} are not what its metadata says: {error}") from error
    broken = sorted(name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all())
    if broken:
        raise NolaVisionError(f"{path} holds a number that is not finite, in {broken[0]}: train again")
    return described, tensors


def _unpacked(packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    whole = {
        name: t.float() if t.dtype == torch.float16 else t
        for name, t in tensors.items()
        if name.rpartition(".")[0] not in packed
    }
    for name, entry in packed.items():
        shape = torch.Size(entry["shape"])
        rows = shape[0] if len(shape) > 1 else 1
        levels = unpack(tensors[f"{name}.levels"], entry["bits"], rows, shape.numel() // max(1, rows))
        whole[name] = dequantise(levels, tensors[f"{name}.scales"]).view(shape)
    return whole


def digest(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata (without its own digest) and every tensor's name, dtype, shape and bytes."""
    hashed = hashlib.sha256(_canonical({k: v for k, v in metadata.items() if k != "digest"}).encode())
    for name in sorted(tensors):
        add_tensor(hashed, name, tensors[name])
    return hashed.hexdigest()


def add_tensor(hashed: Any, name: str, tensor: Tensor) -> None:
    """Adds a tensor's name, dtype, shape and bytes to a hash."""
    tensor = tensor.detach().cpu().contiguous()
    hashed.update(f"\n{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
    hashed.update(tensor.flatten().view(torch.uint8).numpy().data)


def _canonical(metadata: Mapping[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
