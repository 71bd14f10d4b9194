"""Quantised coefficients: symmetric integer levels with one scale per group (paper, section 3.2), and their packing.

A row of values is cut into groups of 64. In a group with scale s the level q, from -(2**(bits-1) - 1) to
2**(bits-1) - 1, is the value q s; zero is a level, and a scale of 0 decodes to 0. Of 24 candidates, 0.3 to 1 times what
the largest value needs, the scale is the one with the least squared error; it is stored in bfloat16.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
_CLIPS = 24
_UNPACKED_AT_ONCE = 2**20  # levels, a multiple of 8: each takes a byte per bit meanwhile


def quantise(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels and scales of rows of values.

    Args:
        values: `[rows, count]`.
        bits: 2 to 8.

    Returns:
        int8 levels `[rows, count]` and bfloat16 scales `[rows, groups]`.
    """
    rows, count = values.shape
    most = 2 ** (bits - 1) - 1
    groups = -(-count // GROUP)
    padded = F.pad(values.float(), (0, groups * GROUP - count)).view(rows, groups, GROUP)
    clips = torch.linspace(0.3, 1.0, _CLIPS, device=values.device).view(-1, 1, 1)
    scales = (padded.abs().amax(-1) * clips / most).bfloat16()  # [clips, rows, groups]
    best, least = scales[-1], torch.full((rows, groups), torch.inf, device=values.device)
    for candidate in scales:
        error = (_levels(padded, candidate, most) * candidate.float().unsqueeze(-1) - padded).square().sum(-1)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return _levels(padded, best, most).to(torch.int8).view(rows, -1)[:, :count], best


def _levels(values: Tensor, scales: Tensor, most: int) -> Tensor:
    safe = torch.where(scales == 0, 1, scales).float().unsqueeze(-1)
    return (values / safe).round().clamp(-most, most) * (scales != 0).unsqueeze(-1)


def dequantise(levels: Tensor, scales: Tensor) -> Tensor:
    """float32 `[rows, count]` of int8 levels `[rows, count]` and scales `[rows, groups]`."""
    return levels.float() * scales.float().repeat_interleave(GROUP, dim=1)[:, : levels.shape[1]]


def rows_of(values: Tensor) -> Tensor:
    """A trained tensor `[n, layers, ...]` or `[n, k]` as rows: a scale never spans two layers or two adapters."""
    return values.flatten(2).flatten(0, 1) if values.dim() > 2 else values


def rounded(values: Tensor, bits: int) -> Tensor:
    """What a trained tensor reads back as after it was stored with these bits; idempotent."""
    if bits == 32:
        return values
    if bits == 16:
        return values.half().to(values.dtype)
    return dequantise(*quantise(rows_of(values), bits)).view_as(values).to(values.dtype)


def rounded_straight_through(values: Tensor, bits: int) -> Tensor:
    """`rounded` in the forward pass; in the backward pass the gradient goes through unchanged."""
    return values + (rounded(values.detach(), bits) - values.detach())


def pack(levels: Tensor, bits: int) -> Tensor:
    """Levels as one uint8 stream: each as the unsigned number level + 2**(bits-1) - 1, lowest bit first, no gaps."""
    unsigned = (levels.flatten().cpu().numpy().astype(np.int16) + (2 ** (bits - 1) - 1)).astype(np.uint8)
    stream = np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.ravel(), bitorder="little"))


def unpack(stream: Tensor, bits: int, rows: int, count: int) -> Tensor:
    """The int8 levels `[rows, count]` that `pack` packed.

    Raises:
        ValueError: `bits` is not 2 to 8, the stream has another length than these levels take, or contains a number
            that is not a level.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"levels have 2 to 8 bits, not {bits}")
    packed = stream.numpy()
    if packed.shape != (-(-rows * count * bits // 8),):
        raise ValueError(f"{rows} x {count} levels of {bits} bits are not {packed.size} bytes")
    levels = np.empty(rows * count, np.int8)
    for first in range(0, levels.size, _UNPACKED_AT_ONCE):
        part = levels[first : first + _UNPACKED_AT_ONCE]
        start = first * bits // 8
        stored = packed[start : start + -(-part.size * bits // 8)]
        flags = np.unpackbits(stored, count=part.size * bits, bitorder="little").reshape(-1, bits)
        unsigned = np.packbits(flags, axis=1, bitorder="little")[:, 0]
        if unsigned.max() > 2**bits - 2:
            raise ValueError(f"{unsigned.max()} is not a level of {bits} bits")
        part[:] = unsigned.astype(np.int16) - (2 ** (bits - 1) - 1)
    return torch.from_numpy(levels).view(rows, count)
