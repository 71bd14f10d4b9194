"""One tensor of an adapter file: a trained tensor to the bytes that a file contains of it, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nola_vision.adapters.quantization import dequantise, pack, quantise, rows_of, scales_per_row, unpack
from nola_vision.common.errors import NolaVisionError

_WHOLE = {16: torch.float16, 32: torch.float32, 64: torch.int64}  # what is not quantised, by its bits
INTEGERS = 64
_MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Stored:
    """A tensor as an adapter file contains it.

    Args:
        bits: per value: 1 to 8 for quantised ones, 16 (float16), 32 (float32), or 64 for integers.
        shape: of the tensor.
        data: `[byte_count(bits, shape)]` of uint8. Quantised values are bfloat16 scales and packed levels.
    """

    bits: int
    shape: tuple[int, ...]
    data: Tensor

    def tensor(self) -> Tensor:
        """The tensor in float32, or in int64.

        Raises:
            ValueError: quantised values have levels that do not exist.
        """
        return stacked_tensors([self])[0]


def stacked_tensors(several: Sequence[Stored]) -> Tensor:
    """Tensors of one shape as one, `[d, *shape]`; those of the same bits are decoded together.

    Raises:
        ValueError: as `Stored.tensor`.
    """
    bits, shape = several[0].bits, several[0].shape
    rows, count = rows_and_count(shape) if bits not in _WHOLE else (0, 0)
    # levels of several tensors are one stream if each ends with a whole byte
    if len(several) > 1 and (any(one.bits != bits for one in several) or rows * count * bits % 8):
        return torch.stack([one.tensor() for one in several])
    # a single tensor is not copied: it may be a whole backbone's
    data = torch.stack([one.data for one in several]) if len(several) > 1 else several[0].data.unsqueeze(0)
    if bits in _WHOLE:
        whole = _viewed(data, _WHOLE[bits]).view(len(several), *shape)
        return whole if bits == INTEGERS else whole.float()
    scales, packed = data.tensor_split([2 * rows * scales_per_row(count, bits)], 1)
    levels = unpack(packed.flatten(), bits, len(several) * rows, count)
    scales = _viewed(scales, torch.bfloat16).view(len(levels), -1)
    return dequantise(levels, scales, bits).view(len(several), *shape)


def stored(tensor: Tensor, bits: int) -> Stored:
    """A tensor of floats as bytes; one of integers is stored as it is."""
    bits = bits if tensor.is_floating_point() else INTEGERS
    shape = tuple(tensor.shape)
    if bits in _WHOLE:
        return Stored(bits, shape, as_bytes(tensor.to(_WHOLE[bits])))
    levels, scales = quantise(rows_of(tensor.unsqueeze(0)), bits)
    return Stored(bits, shape, torch.cat([as_bytes(scales), pack(levels, bits)]))


def check_name(name: str, path: Path) -> None:
    """Refuses a tensor's name that is not short and printable, so that messages may contain it.

    Raises:
        NolaVisionError: as above; `path` is that of the file.
    """
    if not (name.isprintable() and len(name) <= 300):
        raise NolaVisionError(
            f"a tensor of {path} has a name that no weight has ({ascii(name[:80])}): get another file"
        )


def is_storable(bits: int, shape: Sequence[int]) -> bool:
    """Whether a file may state these bits and this shape."""
    if not (all(type(one) is int for one in (bits, *shape)) and len(shape) <= _MOST_DIMENSIONS):
        return False
    if bits in _WHOLE:
        return all(0 <= side < 2**31 for side in shape)
    return 1 <= bits <= 8 and 1 <= len(shape) <= 4 and all(0 < side < 2**31 for side in shape)


def byte_count(bits: int, shape: Sequence[int]) -> int:
    """The bytes of a tensor in a file."""
    if bits in _WHOLE:
        return math.prod(shape) * bits // 8
    rows, count = rows_and_count(shape)
    return 2 * rows * scales_per_row(count, bits) + -(-rows * count * bits // 8)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, `[count]` of uint8."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _viewed(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers `[count]`, without a copy where they are aligned."""
    data = data.flatten()
    aligned = data.storage_offset() % dtype.itemsize == 0
    return (data if aligned else data.clone()).view(dtype)


def rows_and_count(shape: Sequence[int]) -> tuple[int, int]:
    """A quantised tensor as rows of values: the first dimension; a vector is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // rows
