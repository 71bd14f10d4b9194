"""Hashes whose values are stored in files, name folders, or decide a draw: they never change.

Every function is pure. `local_files.file_digest` is the digest of a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor


def sha256(content: bytes | str) -> str:
    """SHA-256 of bytes, or of a text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def sha256_integer(text: str, size: int) -> int:
    """The first `size` bytes of a text's SHA-256 as an unsigned integer, little endian."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "little")


def sha256_of_tensors(tensors: Mapping[str, Tensor], header: str = "") -> str:
    """SHA-256 of a header and of each tensor's name, dtype, shape and bytes, in the order of the names."""
    import torch  # what checks a config must not wait for it

    hashed = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hashed.update(f"\n{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        hashed.update(tensor.flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def blake2b_integer(text: str) -> int:
    """BLAKE2b of a text with a digest of 8 bytes, as an unsigned integer, big endian."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def keyed_hash(purpose: str, *key: int) -> int:
    """An unsigned 64-bit integer that depends on its arguments and on nothing else."""
    return blake2b_integer(_keyed(purpose, key))


def keyed_hashes(count: int, purpose: str, *key: int) -> npt.NDArray[np.uint64]:
    """`[count]` integers like those of `keyed_hash`, by position: one SHAKE-256 stream, fast for a million of them."""
    stream = hashlib.shake_256(_keyed(purpose, key).encode()).digest(8 * count)
    return np.frombuffer(stream, dtype=">u8").astype(np.uint64)


def _keyed(purpose: str, key: tuple[int, ...]) -> str:
    return ":".join(["nola-vision-1", purpose, *map(str, key)])
