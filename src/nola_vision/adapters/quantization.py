"""Quantised coefficients: integer levels with scales per group of values, and their packing.

2 to 8 bits (NOLA, section 3.2): a row of values is cut into groups of 64. In a group with scale s the level q, from
-(2**(bits-1) - 1) to 2**(bits-1) - 1, is the value q s; zero is a level, and a scale of 0 decodes to 0. Of 24
candidates, 0.3 to 1 times what the largest value needs, the scale is the one with the least squared error; it is stored
in bfloat16.

1 bit (Bi-LoRA and Bi-AdaptFormer: Jie et al., ICCV 2023, arXiv:2307.16867): a row is one group. Its values become the
nearer of two numbers,

    mean - 0.6745 std   and   mean + 0.6745 std,

the quartiles of the normal distribution with the row's mean and standard deviation (ddof 0). Both are stored in
bfloat16. A row that has only two different values keeps them. So rounding twice changes nothing, and a row of zeros
stays zero: training starts at the pretrained model exactly.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
_CLIPS = 24
_QUARTILE = 0.6744897501960817  # of the normal distribution: 3/4 of its values are below
_UNPACKED_AT_ONCE = 2**20  # levels, a multiple of 8: each takes a byte per bit meanwhile


def quantise(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels and scales of rows of values.

    Args:
        values: `[rows, count]`.
        bits: 1 to 8.

    Returns:
        int8 levels `[rows, count]` and bfloat16 scales `[rows, scales_per_row(count, bits)]`. Those of 1 bit are 0 and
        1, and their scales the two numbers that they represent, the lower one first.
    """
    if bits == 1:
        return _to_two_numbers(values.float())
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


def _to_two_numbers(values: Tensor) -> tuple[Tensor, Tensor]:
    least, most = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    only_two = ((values == least) | (values == most)).all(1, keepdim=True)
    mean, step = values.mean(1, keepdim=True), _QUARTILE * values.std(1, correction=0, keepdim=True)
    low, high = torch.where(only_two, least, mean - step), torch.where(only_two, most, mean + step)
    scales = torch.cat([low, high], 1).bfloat16()
    return (values >= scales.float().mean(1, keepdim=True)).to(torch.int8), scales


def scales_per_row(count: int, bits: int) -> int:
    """How many scales are stored for a row of `count` values: one per group of 64; with 1 bit two per row."""
    return 2 if bits == 1 else -(-count // GROUP)


def _levels(values: Tensor, scales: Tensor, most: int) -> Tensor:
    safe = torch.where(scales == 0, 1, scales).float().unsqueeze(-1)
    return (values / safe).round().clamp(-most, most) * (scales != 0).unsqueeze(-1)


def dequantise(levels: Tensor, scales: Tensor, bits: int) -> Tensor:
    """float32 `[rows, count]` of what `quantise` returned."""
    if bits == 1:
        return scales.float().gather(1, levels.long())
    return levels.float() * scales.float().repeat_interleave(GROUP, dim=1)[:, : levels.shape[1]]


def rows_of(values: Tensor) -> Tensor:
    """A trained tensor `[n, first, ...]` or `[n, k]` as rows, one per adapter and entry of the first dimension.

    That is a layer, a class of the head's matrix, or a vector of U or V or a core of FacT. A tensor `[n, k]` is one row
    per adapter: the targets of Uni-LoRA's theta, and those of PRANC's scope `model`, share its scales.
    """
    return values.flatten(2).flatten(0, 1) if values.dim() > 2 else values


def rounded(values: Tensor, bits: int) -> Tensor:
    """What a trained tensor reads back as after it was stored with these bits; idempotent."""
    if bits == 32:
        return values
    if bits == 16:
        return values.half().to(values.dtype)
    return dequantise(*quantise(rows_of(values), bits), bits).view_as(values).to(values.dtype)


def bias_correction(weight: Tensor, bits: int, mean_features: Tensor) -> Tensor:
    """What is added to a head's bias so that the logits of the mean features stay the same if its matrix is rounded.

    With W' the rounded matrix W, this is (W - W') m ("bias correction": Nagel et al., "Data-free quantization through
    weight equalization and bias correction", ICCV 2019, arXiv:1906.04721, section 4.2).

    Args:
        weight: `[n, classes, features]`, of n heads.
        bits: of the stored matrix.
        mean_features: m, `[features]`.

    Returns:
        `[n, classes]`.
    """
    # not as a product, which may be in TF32
    return ((weight - rounded(weight, bits)) * mean_features.to(weight)).sum(-1)


def rounded_straight_through(values: Tensor, bits: int) -> Tensor:
    """`rounded` in the forward pass; in the backward pass the gradient goes through unchanged.

    With 1 bit, as in Bi-LoRA, it also goes through a row's mean and standard deviation: only the sign of a value's
    distance to the mean is taken as the distance itself.
    """
    error = rounded(values.detach(), bits) - values.detach()
    if bits == 1:
        std = rows_of(values).std(1, correction=0, keepdim=True)
        error = (rows_of(error) * (std / std.detach().clamp(min=torch.finfo(std.dtype).tiny))).view_as(values)
    return values + error


def pack(levels: Tensor, bits: int) -> Tensor:
    """Levels as one uint8 stream: each as the unsigned number level + 2**(bits-1) - 1, lowest bit first, no gaps."""
    unsigned = (levels.flatten().cpu().numpy().astype(np.int16) + (2 ** (bits - 1) - 1)).astype(np.uint8)
    stream = np.unpackbits(unsigned[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(stream.ravel(), bitorder="little"))


def unpack(stream: Tensor, bits: int, rows: int, count: int) -> Tensor:
    """The int8 levels `[rows, count]` that `pack` packed.

    Raises:
        ValueError: `bits` is not 1 to 8, the stream has another length than these levels take, or contains a number
            that is not a level.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"levels have 1 to 8 bits, not {bits}")
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
        if unsigned.max() > max(1, 2**bits - 2):
            raise ValueError(f"{unsigned.max()} is not a level of {bits} bits")
        part[:] = unsigned.astype(np.int16) - (2 ** (bits - 1) - 1)
    return torch.from_numpy(levels).view(rows, count)
