"""An adapter file: one safetensors file whose metadata and tensors are guarded by one digest.

The metadata has a single key, `nola_vision`, whose value is JSON with sorted keys; `docs/adapter-format.md` specifies
it.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nola_vision.adapters.methods.base import FLOAT_BITS
from nola_vision.adapters.quantization import dequantise, pack, quantise, rows_of, scales_per_row, unpack
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import need_adapter_file, write_file
from nola_vision.common.hashing import sha256_of_tensors

FORMAT = "nola-vision adapter"
FORMAT_VERSION = 2  # `random_basis.BASIS_VERSION` is another number
# What an older version lacks, with the value that means the same.
_ADDED = {1: {"calibration": None, "weights": None}}
METADATA_KEY = "nola_vision"
# A header of more is not an adapter's: the metadata of ImageNet-21k's 21,841 classes with their synonyms takes 1 MB,
# the 2,000 tensors of a fully fine-tuned model 0.3 MB. What Python makes of 2 MiB of any JSON fits in 100 MB.
MAX_METADATA = 2 * 2**20  # characters
MAX_HEADER = 6 * 2**20  # bytes
# Trained coefficients and factors stay below 1e4; the running variance of a batch norm may reach 1e6. A product of two
# numbers of this size is far from float32's largest, 3e38.
MAX_NUMBER = 1e9


def write_adapter(
    path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], bits: Mapping[str, int]
) -> int:
    """Writes an adapter file, whole or not at all.

    Args:
        path: where to; an existing file is replaced.
        metadata: plain JSON values; format, version and digest are added.
        tensors: by name.
        bits: bits per value of a tensor, by its name: 1 to 8, 16, or 32 if it is not named.

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
        if fault := _fault(tensor):
            raise NolaVisionError(f"{name} {fault}: try a smaller learning rate or scale")
        width = bits.get(name, 32)
        if width not in FLOAT_BITS:
            levels, scales = quantise(rows_of(tensor.unsqueeze(0)), width)
            kept |= {f"{name}.levels": pack(levels, width), f"{name}.scales": scales}
            packed[name] = {"bits": width, "shape": list(tensor.shape)}
        else:
            kept[name] = tensor.half() if width == 16 else tensor
            if width == 16 and not kept[name].isfinite().all():
                raise NolaVisionError(f"{name} has a value that 16 bits cannot represent (above 65,504): use 32 bits")
    return _content({**metadata, "packed": packed}, kept)


def _content(metadata: Mapping[str, Any], stored: Mapping[str, Tensor]) -> bytes:
    """The content of a file of this format version with these stored tensors."""
    described = {**metadata, "format": FORMAT, "format_version": FORMAT_VERSION}
    described["digest"] = digest(described, stored)
    content: bytes = safetensors.torch.save(dict(stored), {METADATA_KEY: _canonical(described)})
    return content


@dataclass(frozen=True)
class AdapterFile:
    """An undamaged adapter file: its digest matches. Its tensors are read only on demand.

    Args:
        path: its path.
        metadata: its JSON header, of any content but for the format, its version, the digest and `packed`; with the
            fields of the newest version.
        shapes: of the tensors that `tensors` gives, by name.
    """

    path: Path
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    _stored: dict[str, Tensor]  # as they are in the file, mapped into memory

    def floats(self, name: str) -> bool:
        """Whether a tensor contains floats, not integers."""
        return name in self.metadata["packed"] or self._stored[name].is_floating_point()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name: float32, or int64 where a backbone's buffers count. Packed levels are dequantised.

        Raises:
            NolaVisionError: a packed tensor has levels that do not exist, or a number is not finite or too large.
        """
        packed, whole = self.metadata["packed"], {}
        for name, shape in self.shapes.items():
            if name not in packed:
                tensor = self._stored[name]
                whole[name] = tensor.float() if tensor.is_floating_point() else tensor
            else:
                rows, count = _rows_and_count(shape)
                try:
                    levels = unpack(self._stored[f"{name}.levels"], packed[name]["bits"], rows, count)
                except ValueError as error:
                    raise NolaVisionError(f"the packed values of {name} in {self.path} are wrong: {error}") from error
                whole[name] = dequantise(levels, self._stored[f"{name}.scales"], packed[name]["bits"]).view(shape)
        for name, tensor in whole.items():
            if fault := _fault(tensor):
                raise NolaVisionError(f"{name} in {self.path} {fault}: train again")
        return whole

    def rewritten(self, changes: Mapping[str, Any]) -> bytes:
        """The content of the file with other fields in its metadata and the tensors as they are stored."""
        return _content({**self.metadata, **changes}, self._stored)


def open_adapter(path: str | Path) -> AdapterFile:
    """Opens an adapter file and checks that it is one and undamaged: container, JSON, format version, digest, packing.

    The file is untrusted. Checking it takes no more time and memory than reading it.

    Raises:
        NolaVisionError: no such file, not safetensors, truncated, not an adapter, of another format version, changed,
            or with tensors of other dtypes or packing than the format has.
    """
    path = Path(path)
    _refuse_other_files(path)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  not a mapping
            metadata = None if text is None else _parsed(text, path)
            if metadata is not None:
                _refuse_dtypes(kinds, metadata["packed"], path)
            stored = {name: file.get_tensor(name) for name in kinds}
    except (SafetensorError, OSError, ValueError, RuntimeError, UnicodeError) as error:
        raise NolaVisionError(
            f"{path} is truncated or not a safetensors file, so it is not an adapter ({_reason(error)}): "
            "download or copy it again"
        ) from error
    if metadata is None:
        raise NolaVisionError(
            f"{path} is a safetensors file, but not a nola-vision adapter (it lacks that metadata): give a file that "
            "`fit` wrote"
        )
    if metadata["digest"] != digest(metadata, stored):
        raise NolaVisionError(
            f"{path} was changed or damaged after it was written (its digest does not match): download or copy it again"
        )
    metadata |= _ADDED.get(metadata["format_version"], {})
    return AdapterFile(path, metadata, _shapes(metadata["packed"], stored, path), stored)


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of an adapter file. It raises what `open_adapter` and `AdapterFile.tensors` raise."""
    file = open_adapter(path)
    return file.metadata, file.tensors()


def _refuse_other_files(path: Path) -> None:
    need_adapter_file(path)
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        small = header <= MAX_HEADER or path.stat().st_size < header  # the latter is not safetensors at all
    except OSError as error:
        raise NolaVisionError(f"the adapter file {path} cannot be read ({error.strerror}): check its rights") from error
    if not small:
        raise NolaVisionError(
            f"{path} has a header of {header:,} bytes, and an adapter's has at most {MAX_HEADER:,}: get another file"
        )


def _parsed(text: str, path: Path) -> dict[str, Any]:
    """The metadata: strict JSON, of this format and version, with the fields that this module reads."""
    if len(text) > MAX_METADATA:
        raise NolaVisionError(
            f"the metadata of {path} has {len(text):,} characters, and an adapter's has at most {MAX_METADATA:,}: get "
            "another file"
        )
    try:
        metadata = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_object)
        version = metadata["format_version"]
        text.encode(), _canonical(metadata).encode()  # a lone surrogate is not text
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise NolaVisionError(f"the metadata of {path} is damaged ({_reason(error)}): get another file") from error
    if metadata.get("format") != FORMAT or isinstance(version, bool) or not isinstance(version, int):
        raise NolaVisionError(f"the metadata of {path} is damaged (it does not name its format): get another file")
    if version != FORMAT_VERSION and version not in _ADDED:
        raise NolaVisionError(
            f"{path} has adapter format version {version} and this nola-vision reads versions 1 to {FORMAT_VERSION}: "
            "use the release that wrote it, or train again"
        )
    if not isinstance(metadata.get("digest"), str) or not isinstance(metadata.get("packed"), dict):
        raise NolaVisionError(
            f"the metadata of {path} is damaged (no digest, or no list of packed tensors): get another file"
        )
    return metadata  # type: ignore[no-any-return]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key occurs twice")
    return made


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse("a number above 1.8e308")


def _reason(error: Exception) -> str:
    """What a library reports, on one line of printable characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten("".join(c if c.isprintable() else "?" for c in text), 160)


def _refuse_dtypes(kinds: Mapping[str, str], packed: Mapping[str, Any], path: Path) -> None:
    parts = {f"{name}.{part}": kind for name in packed for part, kind in (("levels", "U8"), ("scales", "BF16"))}
    for name, kind in kinds.items():
        if not (name.isprintable() and len(name) <= 300):
            raise NolaVisionError(
                f"a tensor of {path} has a name that no weight has ({ascii(name[:80])}): get another file"
            )
        allowed = (parts[name],) if name in parts else ("F32", "F16")
        if name.startswith("backbone."):
            allowed = *allowed, "I64"  # a batch norm's count of batches
        if kind not in allowed:
            raise NolaVisionError(f"the tensor {name} of {path} is of type {kind}: it must be {' or '.join(allowed)}")


def _shapes(packed: Mapping[str, Any], stored: Mapping[str, Tensor], path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, if the packed ones are what the metadata states."""
    parts = {f"{name}.{part}" for name in packed for part in ("levels", "scales")}
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items() if name not in parts}
    for name, entry in packed.items():
        if name in shapes or not _fits(entry, stored.get(f"{name}.levels"), stored.get(f"{name}.scales")):
            raise NolaVisionError(
                f"the packed tensor {ascii(name[:80])} of {path} does not have the bytes that its shape and bits take: "
                "get another file"
            )
        shapes[name] = tuple(entry["shape"])
    return shapes


def _fits(entry: Any, levels: Tensor | None, scales: Tensor | None) -> bool:
    """Whether two stored tensors are what an entry of `packed` describes."""
    shape, bits = (entry.get("shape"), entry.get("bits")) if isinstance(entry, dict) else (None, None)
    if not (isinstance(shape, list) and 1 <= len(shape) <= 4 and levels is not None and scales is not None):
        return False
    if not (all(type(side) is int and 0 < side < 2**31 for side in shape) and type(bits) is int and 1 <= bits <= 8):
        return False
    rows, count = _rows_and_count(shape)
    return levels.shape == (-(-rows * count * bits // 8),) and scales.shape == (rows, scales_per_row(count, bits))


def _rows_and_count(shape: Sequence[int]) -> tuple[int, int]:
    """A packed tensor as rows of values: the first dimension; a vector is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // rows


def _fault(tensor: Tensor) -> str | None:
    """What is wrong with a tensor of trained values, or None."""
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    largest = float(tensor.abs().max())
    if not math.isfinite(largest):
        return "has a value that is not finite"
    return f"has the value {largest:.3g}, above the maximum of {MAX_NUMBER:.0e}" if largest > MAX_NUMBER else None


def digest(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata (without its own digest) and every tensor's name, dtype, shape and bytes."""
    return sha256_of_tensors(tensors, _canonical({k: v for k, v in metadata.items() if k != "digest"}))


def _canonical(metadata: Mapping[str, Any]) -> str:
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
