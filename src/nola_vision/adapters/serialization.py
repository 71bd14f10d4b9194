"""Adapter files: a safetensors file with one tensor of bytes, which contains a header and all trained tensors.

`docs/adapter-format.md` specifies the bytes. `format_v1` reads the files of format version 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nola_vision.adapters import format_v1
from nola_vision.adapters.header import FORMAT_VERSION, canonical, compressed, decompressed, parsed, reason
from nola_vision.adapters.stored import INTEGERS, Stored, byte_count, check_name, is_storable, stored
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import need_adapter_file, write_file

METADATA_KEY = "nola_vision"
TENSOR = "adapter"  # the name of the tensor of bytes
MAX_HEADER = 6 * 2**20  # bytes of safetensors' own header: one of more is not an adapter's
# Trained coefficients and factors stay below 1e4; the running variance of a batch norm may reach 1e6. A product of two
# numbers of this size is far from float32's largest, 3e38.
MAX_NUMBER = 1e9
# SHA-256 of what follows, the backbone's fingerprint, SHA-256 of its weights file, temperature, images, bytes of the
# header at the end. What differs between runs is not compressed, so that a file's size can be known before training.
_PREFIX = struct.Struct("<32s32s32sfII")
_DIGEST = 32  # bytes
_NO_DIGEST = "0" * 64


def write_adapter(
    path: str | Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], bits: Mapping[str, int]
) -> int:
    """Writes an adapter file, whole or not at all.

    Args:
        path: where to; an existing file is replaced.
        metadata: plain JSON values.
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
    kept: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        if fault := _fault(tensor):
            raise NolaVisionError(f"{name} {fault}: try a smaller learning rate or scale")
        width = bits.get(name, 32)
        if width == 16 and not tensor.half().isfinite().all():
            raise NolaVisionError(f"{name} has a value that 16 bits cannot represent (above 65,504): use 32 bits")
        kept[name] = stored(tensor, width)
    return _content(metadata, kept)


def adapter_size(metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], bits: Mapping[str, int]) -> int:
    """The bytes of the file that `write_adapter` would write of float tensors with these shapes, without making any.

    The fingerprint, the digest of the weights file and a temperature take the same bytes whatever they are.
    """
    widths = {name: bits.get(name, 32) for name in shapes}
    header = compressed(_header(metadata, {name: (widths[name], shape) for name, shape in shapes.items()}))
    size = _PREFIX.size + sum(byte_count(widths[name], shape) for name, shape in shapes.items()) + len(header)
    return len(_container(size)) + size


def _content(metadata: Mapping[str, Any], tensors: Mapping[str, Stored]) -> bytes:
    """The content of a file of this format version."""
    header = compressed(_header(metadata, {name: (one.bits, one.shape) for name, one in tensors.items()}))
    calibration, weights = metadata.get("calibration") or {}, metadata.get("weights") or {}
    prefix = _PREFIX.pack(
        bytes(_DIGEST),
        bytes.fromhex(metadata.get("backbone_fingerprint") or _NO_DIGEST),
        bytes.fromhex(weights.get("sha256", _NO_DIGEST)),
        calibration.get("temperature", 0.0),
        calibration.get("images") or 0,
        len(header),
    )
    rest = b"".join([prefix[_DIGEST:], *(tensors[name].data.numpy().data for name in sorted(tensors)), header])
    return b"".join([_container(_DIGEST + len(rest)), hashlib.sha256(rest).digest(), rest])


def _header(metadata: Mapping[str, Any], table: Mapping[str, tuple[int, Sequence[int]]]) -> str:
    """The JSON of the header: the metadata without what the prefix has, and bits and shape of each tensor."""
    calibration, weights = metadata.get("calibration") or {}, metadata.get("weights")
    header = {key: value for key, value in metadata.items() if key not in ("backbone_fingerprint", "calibration")}
    header["calibrated_on"] = calibration.get("calibrated_on")
    header["weights"] = weights and {key: value for key, value in weights.items() if key != "sha256"}
    header["tensors"] = {name: [bits, *shape] for name, (bits, shape) in table.items()}
    return canonical(header)


def _container(size: int) -> bytes:
    """What safetensors writes before the bytes of one tensor of `size` bytes."""
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {METADATA_KEY: str(FORMAT_VERSION)}, TENSOR: entry}, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text.encode()


@dataclass(frozen=True)
class AdapterFile:
    """An undamaged adapter file: its digest matches. Its tensors are decoded only on demand.

    Args:
        path: its path.
        version: of its format.
        metadata: plain JSON values of any content, with the fields of the newest version.
        stored: its tensors by name, as they are in the file, mapped into memory.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    stored: dict[str, Stored]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that `tensors` gives, by name."""
        return {name: one.shape for name, one in self.stored.items()}

    def floats(self, name: str) -> bool:
        """Whether a tensor contains floats, not integers."""
        return self.stored[name].bits != INTEGERS

    def tensor(self, name: str) -> Tensor:
        """One tensor: float32, or int64 where a backbone's buffers count. Packed levels are dequantised.

        Raises:
            NolaVisionError: a packed tensor has levels that do not exist, or a number is not finite or too large.
        """
        try:
            whole = self.stored[name].tensor()
        except ValueError as error:
            raise NolaVisionError(f"the packed values of {name} in {self.path} are wrong: {error}") from error
        if fault := _fault(whole):
            raise NolaVisionError(f"{name} in {self.path} {fault}: train again")
        return whole

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, as `tensor` gives them."""
        return {name: self.tensor(name) for name in self.stored}

    def rewritten(self, changes: Mapping[str, Any]) -> bytes:
        """The content of the file with other fields in its metadata and the tensors as they are stored."""
        return _content({**self.metadata, **changes}, self.stored)


def open_adapter(path: str | Path) -> AdapterFile:
    """Opens an adapter file and checks that it is one and undamaged: container, version, digest, header, bytes.

    The file is untrusted. Checking it takes no more time and memory than reading it and a header of 2 MiB.

    Raises:
        NolaVisionError: no such file, not safetensors, truncated, not an adapter, of another format version, changed,
            or with tensors of other types or sizes than the format has.
    """
    path = Path(path)
    need_adapter_file(path)
    try:
        with open(path, "rb") as file:
            _check_start(file.read(8), path.stat().st_size, path)
    except OSError as error:
        raise NolaVisionError(f"the adapter file {path} cannot be read ({error.strerror}): check its rights") from error
    with _readable(path), safe_open(path, framework="pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  not a mapping
        return _adapter(file.metadata() or {}, kinds, file.get_tensor, path)


def adapter_from_bytes(content: bytes, path: Path) -> AdapterFile:
    """The adapter file of a content in memory, checked as by `open_adapter`. Its tensors are copies.

    Args:
        content: of the file.
        path: for messages and the result.

    Raises:
        NolaVisionError: the content is not that of an adapter file, as for `open_adapter`.
    """
    _check_start(content[:8], len(content), path)
    with _readable(path):
        tensors = safetensors.torch.load(content)
        # safetensors gives metadata and types of files only; it has checked the JSON
        entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        kinds = {name: entries[name]["dtype"] for name in tensors}
        return _adapter(entries.get("__metadata__") or {}, kinds, tensors.__getitem__, path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises NolaVisionError for what the block raises if a file is not a valid safetensors file."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise NolaVisionError(
            f"{path} is truncated or not a safetensors file, so it is not an adapter ({reason(error)}): "
            "download or copy it again"
        ) from error


def _adapter(
    metadata: Mapping[str, str], kinds: Mapping[str, str], tensor: Callable[[str], Tensor], path: Path
) -> AdapterFile:
    """The adapter file that a safetensors file contains.

    Args:
        metadata: of the safetensors file.
        kinds: the types of its tensors, such as `U8`, by name.
        tensor: gives one by its name.
        path: for messages and the result.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise NolaVisionError(
            f"{path} is a safetensors file, but not a nola-vision adapter (it lacks that metadata): give a file that "
            "`fit` wrote"
        )
    if not (text.isdecimal() and len(text) < 10):
        return AdapterFile(path, 1, *format_v1.read(text, kinds, tensor, path))
    if int(text) != FORMAT_VERSION:
        raise format_v1.other_version(path, int(text))
    if dict(kinds) != {TENSOR: "U8"}:
        raise _damaged(path, "it has other tensors than the format")
    return AdapterFile(path, FORMAT_VERSION, *_read(tensor(TENSOR).flatten(), path))


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of an adapter file. It raises what `open_adapter` and `AdapterFile.tensors` raise."""
    file = open_adapter(path)
    return file.metadata, file.tensors()


def _check_start(start: bytes, size: int, path: Path) -> None:
    """Refuses a file whose first 8 bytes state a header larger than an adapter's, before safetensors parses it."""
    header = int.from_bytes(start, "little")
    if MAX_HEADER < header <= size:  # a header larger than the file is not safetensors at all
        raise NolaVisionError(
            f"{path} has a header of {header:,} bytes, and an adapter's has at most {MAX_HEADER:,}: get another file"
        )


def _read(content: Tensor, path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Metadata and tensors of the bytes of a file of this format version."""
    if len(content) < _PREFIX.size:
        raise _damaged(path, "it is too short")
    read = content.numpy().data
    digest, fingerprint, weights, temperature, images, length = _PREFIX.unpack(read[: _PREFIX.size])
    if hashlib.sha256(read[_DIGEST:]).digest() != digest:
        raise format_v1.damaged(path)
    start = len(content) - length
    if start < _PREFIX.size:
        raise _damaged(path, "its header is longer than the file")
    metadata = parsed(decompressed(bytes(read[start:]), path), path)
    tensors = _tensors(metadata.pop("tensors", None), content[_PREFIX.size : start], path)
    metadata["backbone_fingerprint"] = fingerprint.hex() if any(fingerprint) else None
    if isinstance(stated := metadata.get("weights"), dict):
        metadata["weights"] = {**stated, "sha256": weights.hex()}
    calibration = {
        "temperature": float(f"{temperature:.6g}"),
        "calibrated_on": metadata.pop("calibrated_on", None),
        "images": images or None,
    }
    metadata["calibration"] = calibration if temperature else None
    return metadata, tensors


def _tensors(table: Any, data: Tensor, path: Path) -> dict[str, Stored]:
    """The tensors that a header lists, if they are what the file contains; nothing of their size is made."""
    if not isinstance(table, dict):
        raise _damaged(path, "its header lists no tensors")
    found, start = {}, 0
    for name in sorted(table):
        entry = table[name]
        check_name(name, path)
        bits, *shape = entry if isinstance(entry, list) and entry else (0,)  # which no tensor has
        # only a batch norm counts
        if not is_storable(bits, shape) or (bits == INTEGERS and not name.startswith("backbone.")):
            raise _damaged(path, f"bits and shape of the tensor {name} do not exist")
        end = start + byte_count(bits, shape)
        if end > len(data):
            break
        found[name] = Stored(bits, tuple(shape), data[start:end])
        start = end
    if len(found) < len(table) or start < len(data):
        raise _damaged(path, "its tensors do not have the bytes that their shapes and bits take")
    return found


def _damaged(path: Path, cause: str) -> NolaVisionError:
    return NolaVisionError(f"{path} is damaged ({cause}): get another file")


def _fault(tensor: Tensor) -> str | None:
    """What is wrong with a tensor of trained values, or None."""
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    largest = float(tensor.abs().max())
    if not math.isfinite(largest):
        return "has a value that is not finite"
    return f"has the value {largest:.3g}, above the maximum of {MAX_NUMBER:.0e}" if largest > MAX_NUMBER else None
