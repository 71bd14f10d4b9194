"""The basis and an adapter's changes in NumPy alone, from the format page; it shares no code with the package."""

from __future__ import annotations

import hashlib
import json
import math
import struct

import numpy as np


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 on `[..., 4]` uint32 counters, with NumPy's 64-bit products."""
    c = counter.astype(np.uint64)
    k = [np.uint64(key[0]), np.uint64(key[1])]
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c[..., 0]
        p1 = np.uint64(0xCD9E8D57) * c[..., 2]
        c = np.stack(
            [(p1 >> np.uint64(32)) ^ c[..., 1] ^ k[0], p1 & mask, (p0 >> np.uint64(32)) ^ c[..., 3] ^ k[1], p0 & mask],
            axis=-1,
        )
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    return c.astype(np.uint32)


def words(seed: int, identity: str, factor: str, count: int, rank: int, blocks: int) -> np.ndarray:
    """`[count, rank, blocks, 4]` uint32: the generator at the counters (block, row, index, 0)."""
    digest = hashlib.sha256(f"nola-vision basis 1\n{seed}\n{identity}\n{factor}".encode()).digest()
    key = struct.unpack("<2I", digest[:8])
    counter = np.zeros((count, rank, blocks, 4), np.uint32)
    counter[..., 0] = np.arange(blocks)
    counter[..., 1] = np.arange(rank)[:, None]
    counter[..., 2] = np.arange(count)[:, None, None]
    return philox(counter, key).astype("<u4")


def basis(seed: int, identity: str, factor: str, count: int, rank: int, length: int) -> np.ndarray:
    """`[count, rank, length]` int8, entry by entry as the format page defines it."""
    blocks = -(-length // 16)
    return (
        words(seed, identity, factor, count, rank, blocks)
        .view(np.uint8)
        .view(np.int8)
        .reshape(count, rank, blocks * 16)[..., :length]
    )


def values(stored: np.ndarray) -> np.ndarray:
    return (2 * stored.astype(np.float64) + 1) / 256


def read(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Metadata and tensors of a safetensors file, by its own specification."""
    with open(path, "rb") as file:
        content = file.read()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    metadata = json.loads(header.pop("__metadata__")["nola_vision"])
    kinds = {"F32": "<f4", "F16": "<f2"}
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        raw = np.frombuffer(content[8 + size + first : 8 + size + last], kinds[entry["dtype"]])
        tensors[name] = raw.reshape(entry["shape"])
    return metadata, tensors


def nola_changes(path: str) -> dict[str, np.ndarray]:
    """The change of every target of a NOLA adapter file, in the weight's layout."""
    metadata, tensors = read(path)
    fields, seed = metadata["method"]["init_args"], metadata["basis_seed"]
    rank, k = fields["rank"], fields["num_basis"]
    changes = {}
    position: dict[str, int] = {}
    for target in metadata["targets"]:
        group, name = target["group"], target["name"]
        layer = position.setdefault(group, 0)
        position[group] += 1
        m, o = (int(side) for side in group.partition("/")[0].split("x"))
        identity = f"shape {m}x{o}" if fields["scope"] == "shared" else f"weight {name}"
        alpha = tensors[f"adapter.{group}.coefficients_a"][layer].astype(np.float64)
        beta = tensors[f"adapter.{group}.coefficients_b"][layer].astype(np.float64)
        a = np.einsum("k,krm->mr", alpha, values(basis(seed, identity, "A", k, rank, m)))
        if fields["start"] == "a0":
            a += values(basis(seed, f"weight {name}", "A0", 1, rank, m))[0].T
        b = np.einsum("k,kro->ro", beta, values(basis(seed, identity, "B", k, rank, o)))
        product = fields["c"] / rank * (a / math.sqrt(m)) @ (b / math.sqrt(o))
        changes[name] = product.T if len(target["shape"]) == 2 else product.reshape(target["shape"])
    return changes
