"""The basis and an adapter's changes in NumPy alone, from the format page; it shares no code with the package."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

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


def dictionary() -> bytes:
    """The preset dictionary of the header: the block of the format page, without line breaks."""
    page = (Path(__file__).parent.parent / "docs" / "adapter-format.md").read_text().partition("## The dictionary")[2]
    return "".join(line[4:] for line in page.partition("\n## ")[0].splitlines() if line.startswith("    ")).encode()


def read(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Metadata and tensors of an adapter file of version 1 or 2, by the format page and safetensors' specification."""
    with open(path, "rb") as file:
        content = file.read()
    (size,) = struct.unpack("<Q", content[:8])
    container, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = json.loads(container.pop("__metadata__")["nola_vision"])
    return _read_v2(data) if metadata == 2 else _read_v1(metadata, container, data)


def _read_v2(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    digest, fingerprint, weights, temperature, images, length = struct.unpack("<32s32s32sfII", data[:108])
    assert digest == hashlib.sha256(data[32:]).digest()
    inflated = zlib.decompressobj(-15, dictionary()).decompress(data[len(data) - length :], 2**21)
    metadata = json.loads(inflated) | {"backbone_fingerprint": fingerprint.hex(), "temperature": temperature}
    tensors, place = {}, 108
    for name, (bits, *shape) in sorted(metadata.pop("tensors").items()):
        if bits > 8:
            dtype = np.dtype({16: "<f2", 32: "<f4", 64: "<i8"}[bits])
            tensors[name] = np.frombuffer(data, dtype, math.prod(shape), place).reshape(shape)
            place += tensors[name].nbytes
            tensors[name] = tensors[name].astype(np.float32 if bits < 64 else np.int64)
            continue
        rows, count = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
        groups = 2 if bits == 1 else -(-count // 64)
        scales = _bfloat16(np.frombuffer(data, "<u2", rows * groups, place)).reshape(rows, groups)
        place += 2 * rows * groups
        stream = np.frombuffer(data, "u1", -(-rows * count * bits // 8), place)
        place += len(stream)
        tensors[name] = _dequantised(levels(stream, bits, rows * count).reshape(rows, count), scales, bits, shape)
    assert place == len(data) - length
    return metadata, tensors


def _read_v1(metadata: dict, container: dict, data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    kinds = {"F32": "<f4", "F16": "<f2", "U8": "u1", "BF16": "<u2"}
    tensors = {}
    for name, entry in container.items():
        raw = np.frombuffer(data[slice(*entry["data_offsets"])], kinds[entry["dtype"]])
        raw = _bfloat16(raw) if entry["dtype"] == "BF16" else raw
        tensors[name] = raw.astype(np.float32).reshape(entry["shape"]) if entry["dtype"] != "U8" else raw
    for name, entry in metadata["packed"].items():
        shape, bits = entry["shape"], entry["bits"]
        rows, count = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])
        whole = levels(tensors.pop(f"{name}.levels"), bits, rows * count).reshape(rows, count)
        tensors[name] = _dequantised(whole, tensors.pop(f"{name}.scales"), bits, shape)
    return metadata, tensors


def _bfloat16(upper: np.ndarray) -> np.ndarray:
    """Numbers that are the upper half of a float32."""
    return (upper.astype("<u4") << 16).view("<f4")


def _dequantised(whole: np.ndarray, scales: np.ndarray, bits: int, shape: list[int]) -> np.ndarray:
    if bits == 1:
        return np.take_along_axis(scales, whole, axis=1).reshape(shape)
    return (whole.astype(np.float32) * np.repeat(scales, 64, axis=1)[:, : whole.shape[1]]).reshape(shape)


def levels(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Integers of `bits` bits, lowest bit first, less the largest level."""
    whole = int.from_bytes(stream.tobytes(), "little")
    unsigned = [whole >> (bits * place) & (2**bits - 1) for place in range(count)]
    return np.array(unsigned) - (2 ** (bits - 1) - 1)


def changes(
    path: str, targets: list[tuple[str, tuple[int, ...], str]], weights: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """The change of every target of an adapter file, in the weight's layout, and the head as `[classes, features + 1]`.

    The head is that of a file with the target `head`: its fixed start and its change.

    Args:
        path: the adapter file.
        targets: name, shape of the whole weight, and group of each adapted weight, in the order of the bank.
        weights: of the frozen backbone by name, which LoRA-XS and TinyLoRA compute with.
    """
    metadata, tensors = read(path)
    method, fields, seed = metadata["method"]["class_path"], metadata["method"]["init_args"], metadata["basis_seed"]
    scratch = metadata["backbone"]["base"] != "pretrained"
    every_side = [side for name, shape, _ in targets for side in matrix_sides(name, shape)]
    made: dict[str, np.ndarray] = {}
    position: dict[str, int] = {}
    for name, whole, group in targets:
        shape = list(whole)
        layer = position.setdefault(group, 0)
        position[group] += 1
        own = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(f"adapter.{group}.")}
        linear = len(shape) == 2
        rows = slice(None)
        if name.endswith("]"):  # some output rows
            first, last = name[:-1].rpartition("[")[2].split(":")
            rows, shape[0] = slice(int(first), int(last)), int(last) - int(first)
        size, fan_in = math.prod(shape), math.prod(shape[1:])
        m, o = matrix_sides(name, whole)
        he = math.sqrt(2 / fan_in)
        if method in ("NOLA", "LoRA"):
            rank = fields["rank"]
            if name == "head":
                rank = min(fields["head_rank"] or 64, m) if method == "NOLA" else min(rank, m, o)
            if method == "NOLA":
                a, b = _nola_factors(own, layer, name, m, o, {**fields, "rank": rank}, seed)
            else:
                a, b = own["a"][layer].astype(np.float64), own["b"][layer].astype(np.float64)
            random = scratch if method == "LoRA" else fields["start"] == "random"
            scale = fields["c"] * (he * math.sqrt(m * o / rank) if random else 1 / rank)
            product = scale * a @ b
            made[name] = product.T if linear else product.reshape(shape)
        elif method in ("LoRAXS", "TinyLoRA"):
            rank = fields["rank"]
            weight = weights[name.partition("[")[0]].astype(np.float64)[rows]
            a, b = svd_factors(weight.T if linear else weight.reshape(m, o), rank)
            if method == "LoRAXS":
                core = own["r"][layer].astype(np.float64)
            else:
                alpha = own["coefficients"][layer if fields["scope"] == "layer" else 0].astype(np.float64)
                drawn = values(basis(seed, f"weight {name}", "R", len(alpha), rank, rank))
                core = np.einsum("k,kij->ij", alpha, drawn) / math.sqrt(rank)
            product = fields["c"] / rank * a @ core @ b
            made[name] = product.T if linear else product.reshape(shape)
        elif method == "UniLoRA":
            rank, theta = fields["rank"], own["theta"].astype(np.float64)
            if not made:  # one hash for the entries of all targets
                slots = balanced_slots(seed, rank * sum(every_side), len(theta))
                normalised = iter((theta / np.sqrt(np.bincount(slots)))[slots])
            a = np.array([next(normalised) for _ in range(rank * m)]).reshape(rank, m).T
            b = np.array([next(normalised) for _ in range(rank * o)]).reshape(rank, o)
            a0 = values(basis(seed, f"weight {name}", "A0", 1, rank, m))[0].T / math.sqrt(m)
            product = fields["c"] / rank * (a0 + a) @ b
            made[name] = product.T if linear else product.reshape(shape)
        elif method == "FacT":
            u, v = own["u"].astype(np.float64).T, own["v"].astype(np.float64)
            if not made:
                side = math.gcd(*every_side)
                cores = iter(own["core"].astype(np.float64))
            pieces = [[u @ next(cores) @ v for _ in range(o // side)] for _ in range(m // side)]
            product = fields["c"] * np.block(pieces)
            made[name] = product.T if linear else product.reshape(shape)
        elif method == "VeRA":
            rank = fields["rank"]
            a = values(basis(seed, "vera", "A", 1, rank, m))[0].T * math.sqrt(6 / m)
            b = values(basis(seed, "vera", "B", 1, rank, o))[0] * math.sqrt(6 / rank)
            d, scales = np.diag(own["d"][layer].astype(np.float64)), np.diag(own["b"][layer].astype(np.float64))
            product = fields["c"] * a @ d @ b @ scales
            made[name] = product.T if linear else product.reshape(shape)
        elif method == "PRANC":
            alpha = own["coefficients"].astype(np.float64)
            vectors = values(basis(seed, f"weight {name}", "P", len(alpha), 1, size))[:, 0]
            made[name] = (fields["c"] * he * alpha @ vectors).reshape(shape)
        elif method == "HashedNet":
            word = words(seed, f"weight {name}", "hash", 1, 1, -(-size // 2)).reshape(-1, 2)[:size].astype(np.uint64)
            bucket = (word[:, 0] * np.uint64(len(own["buckets"]))) >> np.uint64(32)
            sign = 1.0 - 2.0 * (word[:, 1] % np.uint64(2)).astype(np.float64)
            made[name] = (fields["c"] * he * sign * own["buckets"][bucket.astype(np.int64)]).reshape(shape)
    if "head" in made:
        classes, width = made["head"].shape
        start = values(basis(metadata["run_seed"], "head", "head", 1, 1, classes * width)).reshape(classes, width)
        if metadata["backbone"]["base"] != "zero":
            made["head"] = made["head"] + start * 0.1 / math.sqrt(width - 1)
    return made


def matrix_sides(name: str, shape: Sequence[int]) -> tuple[int, int]:
    """m and o of a target: of the rows that its name states, or of the whole weight."""
    rows = [int(row) for row in name[:-1].rpartition("[")[2].split(":")] if name.endswith("]") else [0, shape[0]]
    size = (rows[1] - rows[0]) * math.prod(shape[1:])
    m = shape[1] if len(shape) == 2 else next(i for i in range(math.isqrt(size), 0, -1) if size % i == 0)
    return m, size // m


def balanced_slots(seed: int, size: int, count: int) -> np.ndarray:
    """Uni-LoRA's slot of each of `size` entries."""
    drawn = words(seed, "unilora", "slots", 1, 1, -(-size // 4)).view("<i4").ravel()[:size]
    slots = np.empty(size, np.int64)
    for place, entry in enumerate(sorted(range(size), key=lambda entry: (drawn[entry], entry))):
        slots[entry] = place % count
    return slots


def targets_of(bank) -> list[tuple[str, tuple[int, ...], str]]:
    """The targets of a model's bank, as `changes` takes them."""
    return [(target.name, target.shape, bank.group_of[target.name]) for target in bank.every_target]


def svd_factors(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """LoRA-XS's A `[m, r]` and B `[r, o]` of a matrix `[m, o]`."""
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    for column, row in zip(u.T, vt, strict=True):
        decides = next(entry for entry in column if abs(entry) >= (1 - 1e-6) * np.abs(column).max())
        column *= np.sign(decides)
        row *= np.sign(decides)
    return u[:, :rank] * s[:rank], vt[:rank]


def sketch(matrices: list[np.ndarray], factor: str) -> np.ndarray:
    """LoRA-XS's sketch of matrices `[rank, length]`."""
    return np.array([np.sum(matrix * values(basis(0, "sketch", factor, 1, *matrix.shape))[0]) for matrix in matrices])


def _nola_factors(
    own: dict[str, np.ndarray], layer: int, name: str, m: int, o: int, fields: dict, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    rank = fields["rank"]
    identity = f"shape {m}x{o}" if fields["scope"] == "shared" else f"weight {name}"
    alpha = own["coefficients_a"][layer].astype(np.float64)
    beta = own["coefficients_b"][layer].astype(np.float64)
    a = np.einsum("k,krm->mr", alpha, values(basis(seed, identity, "A", len(alpha), rank, m)))
    if fields["start"] == "a0":
        a += values(basis(seed, f"weight {name}", "A0", 1, rank, m))[0].T
    b = np.einsum("k,kro->ro", beta, values(basis(seed, identity, "B", len(beta), rank, o)))
    return a / math.sqrt(m), b / math.sqrt(o)
