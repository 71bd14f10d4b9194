"""The basis: fixed random numbers as a pure function of what names them.

An entry depends on (format version, basis seed, weight name or shape, factor, basis index, rank index, position) and on
nothing else: not on device, dtype, torch version, thread count, chunking or the order in which anything is built.
torch's random state is neither read nor set.

Generator: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Products of 32-bit
words are formed from 16-bit halves, so that no intermediate passes 2**49 and signed 64-bit arithmetic gives the same
bits everywhere, compiled code included.

Law: a byte q from -128 to 127 stands for (2 q + 1) / 256, uniform and symmetric in (-1, 1), variance 1/3 (1 - 2**-16).
Each value is exact in float16, bfloat16 and wider.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

FORMAT_VERSION = 1
ENTRIES_PER_COUNTER = 16
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_BLOCKS_AT_ONCE = 2**18  # about 64 MiB of int64 working words while a basis is made
_DECODE_BYTES = 16 * 2**20  # float working memory of one chunk of `combine`


def basis_key(basis_seed: int, identity: str, factor: str) -> tuple[int, int]:
    """The Philox key of one factor of one weight (or of one shape).

    The first 8 bytes, little endian, of SHA-256 over the UTF-8 text
    `nola-vision basis <version>\\n<basis_seed>\\n<identity>\\n<factor>`, as two 32-bit words.

    Args:
        basis_seed: any integer.
        identity: `shape 768x3072` in shared scope, `weight blocks.0.mlp.fc1.weight` in per-layer scope and for A0.
        factor: `A`, `B` or `A0`.
    """
    text = f"nola-vision basis {FORMAT_VERSION}\n{basis_seed}\n{identity}\n{factor}"
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `word * multiplier`, both held in int64."""
    low = word * (multiplier & 0xFFFF)
    high = word * (multiplier >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _MASK


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32 with 10 rounds: four 32-bit words (int64 tensors that broadcast together) from four and a key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def basis_bytes(
    key: tuple[int, int], start: int, stop: int, rank: int, length: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Basis matrices `start` to `stop - 1` as bytes.

    Entry (index i, rank index r, position p along the long side) is byte `p % 16`, little endian, of the 128 bits that
    Philox4x32-10 makes of the counter `(p // 16, r, i, 0)`. So the first k' matrices of a k-basis are the k'-basis, and
    the same holds for the rank.

    Returns:
        int8 tensor `[stop - start, rank, length]`; value q stands for (2 q + 1) / 256.
    """
    blocks = -(-length // ENTRIES_PER_COUNTER)
    made = torch.empty(stop - start, rank, blocks * ENTRIES_PER_COUNTER, dtype=torch.int8, device=device)
    position = torch.arange(blocks, device=device).view(1, 1, -1)
    row = torch.arange(rank, device=device).view(1, -1, 1)
    zero = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)
    step = max(1, _BLOCKS_AT_ONCE // max(1, rank * blocks))
    for first in range(start, stop, step):
        last = min(first + step, stop)
        index = torch.arange(first, last, device=device).view(-1, 1, 1)
        words = torch.stack(torch.broadcast_tensors(*philox4x32((position, row, index, zero), key)), dim=-1)
        shifts = torch.arange(0, 32, 8, device=device)
        octets = (words.unsqueeze(-1) >> shifts) & 0xFF
        made[first - start : last - start] = octets.flatten(-3).to(torch.uint8).view(torch.int8)
    return made[..., :length].contiguous()


def decode(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes to values: (2 q + 1) / 256, exact in every floating dtype of at least 8 bits of precision."""
    return stored.to(dtype).mul_(1 / 128).add_(1 / 256)


class _Combine(torch.autograd.Function):
    """`coefficients @ decode(stored)` in column chunks; only the bytes are kept for the backward pass."""

    @staticmethod
    def forward(coefficients: Tensor, stored: Tensor) -> Tensor:
        combined = coefficients.new_empty(*coefficients.shape[:-1], stored.shape[-1])
        for columns in _column_chunks(stored, coefficients.element_size()):
            combined[..., columns] = coefficients @ decode(stored[..., columns], coefficients.dtype)
        return combined

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (stored,) = ctx.saved_tensors
        total = gradient.new_zeros(*gradient.shape[:-1], stored.shape[-2])
        for columns in _column_chunks(stored, gradient.element_size()):
            total += gradient[..., columns] @ decode(stored[..., columns], gradient.dtype).transpose(-1, -2)
        return total, None


def _column_chunks(stored: Tensor, element_size: int) -> list[slice]:
    columns = stored.shape[-1]
    step = max(1, _DECODE_BYTES // (element_size * max(1, stored[..., :1].numel())))
    return [slice(first, min(first + step, columns)) for first in range(0, columns, step)]


def combine(coefficients: Tensor, stored: Tensor) -> Tensor:
    """Linear combinations of basis matrices: `sum_i coefficients[..., i] * basis[i]` (NOLA equation 1).

    Args:
        coefficients: `[..., layers, k]`, floating point.
        stored: the basis as bytes, `[k, size]` shared by all layers.

    Returns:
        `[..., layers, size]` in the dtype of the coefficients.
    """
    combined: Tensor = _Combine.apply(coefficients, stored)
    return combined
