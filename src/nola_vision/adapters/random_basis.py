"""The basis: fixed random numbers as a pure function of what names them.

An entry depends on (format version, basis seed, weight name or shape, factor, basis index, rank index, position) and on
nothing else: not on device, dtype, torch version, thread count, chunking or the order in which anything is built.
torch's random state is neither read nor set.

Generator: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Products of 32-bit
words are formed from 16-bit halves, so that no intermediate passes 2**49 and signed 64-bit arithmetic gives the same
bits everywhere, compiled code included.

Distribution: a byte q from -128 to 127 is the value (2 q + 1) / 256, uniform and symmetric in (-1, 1), variance
1/3 (1 - 2**-16). Each value is exact in float16, bfloat16 and wider.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nola_vision.adapters.methods.base import Storage
from nola_vision.common.hashing import sha256_integer

BASIS_VERSION = 1  # part of every key: a new adapter format does not change it
ENTRIES_PER_COUNTER = 16
_MASK = 0xFFFFFFFF
_SIGN = 0x80000000
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_BLOCKS_AT_ONCE = 2**17  # about 32 MiB of int64 working words while a basis is made by plain torch
# float working memory of one chunk of a cached basis: what fits in a CPU's cache; elsewhere enough work for a kernel
_DECODE_BYTES = {"cpu": 2 * 2**20}
_DECODE_BYTES_ELSEWHERE = 64 * 2**20
_STREAM_BYTES_PER_ENTRY = 7  # its byte and the word it came from, its float, and what concatenates them

Key = tuple[int, int]


def basis_key(basis_seed: int, identity: str, factor: str) -> Key:
    """The Philox key of one factor of one weight (or of one shape).

    The first 8 bytes, little endian, of SHA-256 over the UTF-8 text
    `nola-vision basis <version>\\n<basis_seed>\\n<identity>\\n<factor>`, as two 32-bit words.

    Args:
        basis_seed: any integer.
        identity: `shape 768x3072` in shared scope, `weight blocks.0.mlp.fc1.weight` in per-layer scope and for A0.
        factor: `A`, `B`, `A0` (NOLA); `P` (PRANC), `R` (TinyLoRA), `hash` (HashedNet), `slots` (Uni-LoRA), `base`
            (random weights), `head` (its start).
    """
    text = f"nola-vision basis {BASIS_VERSION}\n{basis_seed}\n{identity}\n{factor}"
    number = sha256_integer(text, 8)
    return number & _MASK, number >> 32


# --- the generator ---------------------------------------------------------------------------------------------------


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `word * multiplier`, both in int64."""
    low = word * (multiplier & 0xFFFF)
    high = word * (multiplier >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _MASK


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Philox4x32 with 10 rounds: four 32-bit words (int64 tensors that broadcast together) from four and a key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _words(index: Tensor, row: Tensor, block: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """The four words of every counter (block, row, index, 0), as int32 of the same bits: `[indices, rows, blocks]`."""
    c0, c1, c2 = torch.broadcast_tensors(block.view(1, 1, -1), row.view(1, -1, 1), index.view(-1, 1, 1))
    made = philox4x32((c0, c1, c2, torch.zeros_like(c0)), (key[0], key[1]))
    return tuple(((word ^ _SIGN) - _SIGN).to(torch.int32) for word in made)


@cache
def _compiled_words(device_type: str) -> Callable[..., tuple[Tensor, ...]]:
    """`_words` through `torch.compile`, or plain where there is no compiler: the same bits."""
    if device_type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return _words
    compiled = torch.compile(_words, dynamic=True)
    try:
        some = torch.arange(3, device=device_type)
        compiled(some, some, some, some)
    except Exception:  # a compiler that does not work fails in any way
        return _words
    return compiled


def basis_words(
    key: Key,
    indices: tuple[int, int],
    rows: tuple[int, int],
    blocks: tuple[int, int],
    device: torch.device | str = "cpu",
    compiled: bool = False,
) -> Tensor:
    """The generator's output for a box of counters (block, row, index, 0), each range as (first, last + 1).

    Returns:
        int32 `[indices, rows, blocks, 4]`.
    """
    index, row, block = (torch.arange(*range_, device=device) for range_ in (indices, rows, blocks))
    make = _compiled_words(torch.device(device).type) if compiled else _words
    step = max(1, _BLOCKS_AT_ONCE // max(1, len(row) * len(block)))
    keys = torch.tensor(key, device=device)
    made = torch.empty(len(index), len(row), len(block), 4, dtype=torch.int32, device=device)
    for part, place in zip(index.split(step), made.split(step), strict=True):
        torch.stack(make(part, row, block, keys), dim=-1, out=place)
    return made


def basis_bytes(
    key: Key,
    start: int,
    stop: int,
    rank: int,
    length: int,
    device: torch.device | str = "cpu",
    rows: tuple[int, int] | None = None,
    positions: tuple[int, int] | None = None,
    compiled: bool = False,
) -> Tensor:
    """Basis matrices `start` to `stop - 1` as bytes.

    Entry (index i, rank index r, position p along the long side) is byte `p % 16`, little endian, of the 128 bits that
    Philox4x32-10 makes of the counter `(p // 16, r, i, 0)`. So the first k' matrices of a k-basis are the k'-basis, and
    the same holds for the rank.

    Args:
        key: what `basis_key` gives.
        start, stop: which matrices.
        rank: r, the number of rows.
        length: the long side.
        device: where they are made.
        rows: only these rows (first, last + 1).
        positions: only these positions (first, last + 1); the first is a multiple of 16.
        compiled: make them by compiled code, which takes some seconds the first time.

    Returns:
        int8 tensor `[stop - start, rows, positions]`; value q represents (2 q + 1) / 256.
    """
    rows, positions = rows or (0, rank), positions or (0, length)
    first, last = positions[0] // ENTRIES_PER_COUNTER, -(-positions[1] // ENTRIES_PER_COUNTER)
    words = basis_words(key, (start, stop), rows, (first, last), device, compiled)
    return words.view(torch.int8).flatten(-2)[..., : positions[1] - positions[0]]


def decode(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes to values: (2 q + 1) / 256, exact in every floating dtype of at least 8 bits of precision."""
    return stored.to(dtype).mul_(1 / 128).add_(1 / 256)


# --- linear combinations ---------------------------------------------------------------------------------------------


@dataclass
class Basis:
    """k fixed matrices `[rank, length]`, shared by all layers or one set per layer.

    Args:
        keys: one key for all layers, or one per layer.
        count: k.
        rank: rows of a matrix.
        length: columns of a matrix.
        storage: `cached` keeps the bytes; `streamed` makes them in chunks at every use, the same bits.
        memory_mib: working memory of one streamed chunk.
        device: where the matrices are made and used.
    """

    keys: Sequence[Key]
    count: int
    rank: int
    length: int
    storage: Storage = "cached"
    memory_mib: float = 16.0
    device: torch.device | str = "cpu"
    _kept: Tensor | None = None

    @property
    def size(self) -> int:
        """Entries of one matrix."""
        return self.rank * self.length

    def to(self, device: torch.device | str) -> Basis:
        """Moves it, in place; a basis is the same on every device."""
        self.device = device
        self._kept = None if self._kept is None else self._kept.to(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a pickled basis is recomputed from its keys

    def __deepcopy__(self, memo: object) -> Basis:
        return replace(self)  # the bytes never change, so copies share them

    def cached(self) -> Tensor:
        """All bytes, `[keys, k, size]`, made at the first use."""
        if self._kept is None:
            made = [basis_bytes(key, 0, self.count, self.rank, self.length, self.device) for key in self.keys]
            self._kept = torch.stack(made).flatten(2)
        return self._kept

    def chunks(self, count: int, element_size: int) -> Iterator[tuple[int, slice, Tensor]]:
        """Yields (key index, columns, bytes `[count, columns]`) of the first `count` matrices, all columns in turn."""
        if self.storage == "cached":
            kept = self.cached()
            memory = _DECODE_BYTES.get(kept.device.type, _DECODE_BYTES_ELSEWHERE)
            step = max(1, memory // (element_size * max(1, count)))
            for layer in range(len(self.keys)):
                for first in range(0, self.size, step):
                    columns = slice(first, min(first + step, self.size))
                    yield layer, columns, kept[layer, :count, columns]
            return
        entries = int(self.memory_mib * 2**20) // ((_STREAM_BYTES_PER_ENTRY + element_size) * max(1, count))
        step = max(ENTRIES_PER_COUNTER, entries // ENTRIES_PER_COUNTER * ENTRIES_PER_COUNTER)
        rows_at_once = max(1, step // self.length)
        for layer, key in enumerate(self.keys):
            for row in range(0, self.rank, rows_at_once):
                rows = row, min(row + rows_at_once, self.rank)
                width = self.length if step >= self.length else step
                for first in range(0, self.length, width):
                    positions = first, min(first + width, self.length)
                    made = basis_bytes(
                        key, 0, count, self.rank, self.length, self.device, rows, positions, compiled=True
                    )
                    start = row * self.length + first
                    yield layer, slice(start, start + made[0].numel()), made.flatten(1)


def _levels(basis: Basis, like: Tensor, count: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields (layers, columns, q) of all chunks, q `[count, columns]` in the dtype of `like`.

    All chunks are written to one buffer: memory that is new for each would take longer to get than to fill.
    """
    buffer = like.new_empty(0)
    for layer, columns, stored in basis.chunks(count, like.element_size()):
        if buffer.numel() < stored.numel():
            buffer = like.new_empty(stored.numel())
        layers = slice(None) if len(basis.keys) == 1 else slice(layer, layer + 1)
        yield layers, columns, buffer[: stored.numel()].view(stored.shape).copy_(stored)


class _Combine(torch.autograd.Function):
    """Sums of `coefficient * (2 q + 1) / 256`, as `(coefficients @ q) / 128 + sum(coefficients) / 256`, chunk by chunk.

    Only the shape of the coefficients is kept for the backward pass.
    """

    @staticmethod
    def forward(coefficients: Tensor, basis: Basis) -> Tensor:
        count = coefficients.shape[-1]
        combined = coefficients.new_empty(*coefficients.shape[:-1], basis.size)
        for layers, columns, levels in _levels(basis, coefficients, count):
            combined[..., layers, columns] = coefficients[..., layers, :] @ levels
        return combined.mul_(1 / 128).add_(coefficients.sum(-1, keepdim=True), alpha=1 / 256)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Basis], output: Tensor) -> None:
        ctx.basis, ctx.count = inputs[1], inputs[0].shape[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        basis, count = ctx.basis, ctx.count
        total = gradient.new_zeros(*gradient.shape[:-1], count)
        for layers, columns, levels in _levels(basis, gradient, count):
            total[..., layers, :] += gradient[..., layers, columns] @ levels.t()
        return total.mul_(1 / 128).add_(gradient.sum(-1, keepdim=True), alpha=1 / 256), None


def combine(coefficients: Tensor, basis: Basis) -> Tensor:
    """Linear combinations of basis matrices: `sum_i coefficients[..., i] * basis[i]` (NOLA equation 1).

    Args:
        coefficients: `[..., layers, k']`, floating point; the first k' matrices of the basis are combined.
        basis: for all layers, or one per layer.

    Returns:
        `[..., layers, size]` in the dtype of the coefficients; in float32 for those of 16 bits, whose sums overflow.
    """
    exact = coefficients.float() if coefficients.element_size() < 4 else coefficients
    combined: Tensor = _Combine.apply(exact, basis)
    return combined


# --- single draws ----------------------------------------------------------------------------------------------------


def uniform(key: Key, shape: Sequence[int], std: float) -> Tensor:
    """float32 values of the distribution (variance 1/3 to 16 bits), scaled to a standard deviation."""
    drawn = basis_bytes(key, 0, 1, 1, math.prod(shape)).reshape(*shape)
    return decode(drawn, torch.float32) * (std * math.sqrt(3))


def buckets(key: Key, size: int, count: int) -> tuple[Tensor, Tensor]:
    """A bucket from 0 to count - 1 and a sign for each of `size` weights (HashedNet's keyed hash).

    Weight p takes two words of the counter `(p // 2, 0, 0, 0)`, u = word `2 (p % 2)` and v = word `2 (p % 2) + 1`, as
    unsigned numbers: its bucket is `u * count // 2**32`, its sign + where v is even.

    Returns:
        int64 `[size]` buckets, and float32 `[size]` signs.
    """
    words = basis_words(key, (0, 1), (0, 1), (0, -(-size // 2))).flatten().view(-1, 2)[:size].to(torch.int64) & _MASK
    return (words[:, 0] * count) >> 32, 1.0 - 2.0 * (words[:, 1] & 1)


def balanced_slots(key: Key, size: int, count: int) -> Tensor:
    """A slot from 0 to count - 1 for each of `size` entries, each slot equally often up to one (Uni-LoRA's hash).

    Entry p draws word `p % 4` of the counter `(p // 4, 0, 0, 0)`, as a signed integer. In ascending order of their
    words, equal ones in the order of p, the entries get the slots 0, 1, ..., count - 1, 0, 1, ... in turn.

    Returns:
        int64 `[size]`.
    """
    drawn = basis_words(key, (0, 1), (0, 1), (0, -(-size // 4))).flatten()[:size]
    slots = torch.empty(size, dtype=torch.int64)
    slots[drawn.argsort(stable=True)] = torch.arange(size) % count
    return slots
