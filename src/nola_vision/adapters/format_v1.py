"""Reads adapter files of format version 1: a safetensors entry per tensor, and the header as JSON in its metadata.

`docs/adapter-format.md` specifies it. Such files are read indefinitely and no longer written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nola_vision.adapters.header import FORMAT_VERSION, canonical, parsed
from nola_vision.adapters.quantization import scales_per_row
from nola_vision.adapters.stored import Stored, as_bytes, check_name, is_storable, rows_and_count
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import sha256_of_tensors

FORMAT = "nola-vision adapter"
_BITS = {"F32": 32, "F16": 16, "I64": 64}


def read(
    text: str, kinds: Mapping[str, str], tensor: Callable[[str], Tensor], path: Path
) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The metadata of a file with the fields of the newest version, and its tensors.

    Args:
        text: the metadata's JSON.
        kinds: the types of the tensors, such as `F32`, by name.
        tensor: gives one by its name.
        path: of the file, for messages.

    Raises:
        NolaVisionError: the file is damaged, of a newer version, or has tensors of other dtypes or packing than the
            format has.
    """
    metadata = parsed(text, path)
    version, packed = metadata.get("format_version"), metadata.get("packed")
    if metadata.get("format") != FORMAT or type(version) is not int:
        raise NolaVisionError(f"the metadata of {path} is damaged (it does not name its format): get another file")
    if version != 1:
        raise other_version(path, version)
    if not isinstance(metadata.get("digest"), str) or not isinstance(packed, dict):
        raise NolaVisionError(
            f"the metadata of {path} is damaged (no digest, or no list of packed tensors): get another file"
        )
    _refuse_dtypes(kinds, packed, path)
    tensors = {name: tensor(name) for name in kinds}
    if metadata["digest"] != digest(metadata, tensors):
        raise damaged(path)
    targets = metadata.get("targets")
    if isinstance(targets, list):  # shape and group of a target follow from the backbone
        metadata["targets"] = [one.get("name") if isinstance(one, dict) else one for one in targets]
    for name in ("format", "format_version", "packed", "digest"):
        del metadata[name]
    return metadata | {"calibration": None, "weights": None}, _stored(tensors, kinds, packed, path)


def digest(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata (without its own digest) and every tensor's name, dtype, shape and bytes."""
    return sha256_of_tensors(tensors, canonical({k: v for k, v in metadata.items() if k != "digest"}))


def other_version(path: Path, version: int) -> NolaVisionError:
    """The error for a file that states another version than the one it has the form of."""
    if version <= FORMAT_VERSION:
        return NolaVisionError(f"{path} is damaged (it states version {version}, in another form): get another file")
    return NolaVisionError(
        f"{path} has adapter format version {version} and this nola-vision reads versions 1 to {FORMAT_VERSION}: "
        "use the release that wrote it, or train again"
    )


def damaged(path: Path) -> NolaVisionError:
    """The error for a file whose digest does not match."""
    return NolaVisionError(
        f"{path} was changed or damaged after it was written (its digest does not match): download or copy it again"
    )


def _refuse_dtypes(kinds: Mapping[str, str], packed: Mapping[str, Any], path: Path) -> None:
    parts = {f"{name}.{part}": kind for name in packed for part, kind in (("levels", "U8"), ("scales", "BF16"))}
    for name, kind in kinds.items():
        check_name(name, path)
        allowed = (parts[name],) if name in parts else ("F32", "F16")
        if name.startswith("backbone."):
            allowed = *allowed, "I64"  # a batch norm's count of batches
        if kind not in allowed:
            raise NolaVisionError(f"the tensor {name} of {path} is of type {kind}: it must be {' or '.join(allowed)}")


def _stored(
    tensors: Mapping[str, Tensor], kinds: Mapping[str, str], packed: Mapping[str, Any], path: Path
) -> dict[str, Stored]:
    """All tensors, if the packed ones are what the metadata states."""
    parts = {f"{name}.{part}" for name in packed for part in ("levels", "scales")}
    whole = {name: tensor for name, tensor in tensors.items() if name not in parts}
    found = {name: Stored(_BITS[kinds[name]], tuple(t.shape), as_bytes(t)) for name, t in whole.items()}
    for name, entry in packed.items():
        scales, levels = tensors.get(f"{name}.scales"), tensors.get(f"{name}.levels")
        if name in found or scales is None or levels is None or not _fits(entry, scales, levels):
            raise NolaVisionError(
                f"the packed tensor {ascii(name[:80])} of {path} does not have the bytes that its shape and bits take: "
                "get another file"
            )
        data = torch.cat([as_bytes(scales), as_bytes(levels)])
        found[name] = Stored(entry["bits"], tuple(entry["shape"]), data)
    return found


def _fits(entry: Any, scales: Tensor, levels: Tensor) -> bool:
    """Whether two stored tensors are what an entry of `packed` describes."""
    shape, bits = (entry.get("shape"), entry.get("bits")) if isinstance(entry, dict) else (None, None)
    if not (isinstance(shape, list) and type(bits) is int and 2 <= bits <= 8 and is_storable(bits, shape)):
        return False
    rows, count = rows_and_count(shape)
    return levels.shape == (-(-rows * count * bits // 8),) and scales.shape == (rows, scales_per_row(count, bits))
