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

from nola_vision.errors import NolaVisionError
from nola_vision.files import write_whole

FORMAT = "nola-vision adapter"
FORMAT_VERSION = 1
METADATA_KEY = "nola_vision"


def write_adapter(path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Writes an adapter file, whole or not at all.

    Args:
        path: where to; an existing file is replaced.
        metadata: plain JSON values; format, version and digest are added.
        tensors: by name.

    Returns:
        The file's size in bytes.

    Raises:
        NolaVisionError: the folder is missing or cannot be written.
    """
    path = Path(path)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {**metadata, "format": FORMAT, "format_version": FORMAT_VERSION}
    described["digest"] = digest(described, kept)
    content = safetensors.torch.save(kept, {METADATA_KEY: _canonical(described)})
    try:
        write_whole(path, content)
    except OSError as error:
        raise NolaVisionError(f"the adapter file {path} cannot be written: {error.strerror or error}") from error
    return len(content)


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of an adapter file, after its digest is checked.

    Raises:
        NolaVisionError: no such file, not safetensors, truncated, no adapter, of another format version, or changed.
    """
    path = Path(path)
    if not path.is_file():
        raise NolaVisionError(f"the adapter file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise NolaVisionError(f"{path} is truncated or no safetensors file, so it is no adapter: {error}") from error
    if METADATA_KEY not in metadata:
        raise NolaVisionError(f"{path} is a safetensors file, but no nola-vision adapter: it lacks that metadata")
    try:
        described = json.loads(metadata[METADATA_KEY])
        version = described["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise NolaVisionError(f"the metadata of {path} is damaged: get the file anew from where it was made") from error
    if version != FORMAT_VERSION:
        raise NolaVisionError(
            f"{path} has adapter format version {version} and this nola-vision reads version {FORMAT_VERSION}: "
            "use the release that wrote it, or train again"
        )
    if described.get("digest") != digest(described, tensors):
        raise NolaVisionError(f"{path} was changed or damaged after it was written: its digest does not match it")
    return described, tensors


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
