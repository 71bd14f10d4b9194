"""What a run trains: each method is a value with plain fields, and `make_stack` says what it means for a backbone."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nola_vision.adapters.lora import LoraFactors
from nola_vision.adapters.nola import NolaFactors, Scope, Start
from nola_vision.adapters.stack import AdapterStack
from nola_vision.adapters.target import Target
from nola_vision.backbones import find_targets
from nola_vision.errors import NolaVisionError


@dataclass(frozen=True)
class Method:
    """A way to adapt a backbone; the base of those below."""


@dataclass(frozen=True)
class NearestNeighbor(Method):
    """1-NN, no training: the label of the training image whose features have the largest cosine with the image's."""


@dataclass(frozen=True)
class LinearProbe(Method):
    """Only the head is trained, on the frozen backbone's features.

    Args:
        lr: learning rate of the head.
    """

    lr: float = 5e-3


@dataclass(frozen=True)
class FullFinetune(Method):
    """Every weight of the backbone and the head are trained.

    Args:
        lr: learning rate of the backbone.
        head_lr: learning rate of the head; the same as `lr` if not given.
    """

    lr: float = 5e-5
    head_lr: float | None = None


@dataclass(frozen=True)
class LoRA(Method):
    """LoRA (Hu et al., 2021): W + (c / rank) A B with both factors trained.

    Args:
        targets: names of the adapted weights; see `nola_vision.backbones.find_targets`.
        rank: r, the width of the factors.
        c: the scale's numerator (PEFT's `lora_alpha`); the scale is c / rank.
        lr: learning rate of the factors.
        head_lr: learning rate of the head; the same as `lr` if not given.
    """

    targets: Sequence[str] | str = ("qkv",)
    rank: int = 4
    c: float = 8.0
    lr: float = 5e-3
    head_lr: float | None = None


@dataclass(frozen=True)
class NOLA(Method):
    """NOLA (ICLR 2024, equation 1): W + (c / rank) A B, with A and B linear combinations of fixed random matrices.

    Args:
        targets: names of the adapted weights; see `nola_vision.backbones.find_targets`.
        rank: r, the width of the factors; it does not change the number of trained coefficients.
        num_basis: k, the number of random matrices, and so of coefficients, for each of A and B.
        c: the scale's numerator; the scale is c / rank.
        scope: `shared`, one basis for all weights of a shape, or `per_layer`.
        start: `a0`, a fixed random A0 and zero coefficients, so that training starts at the pretrained model exactly;
            or `released`, the authors' code, no A0 and every coefficient 1/k.
        lr: learning rate of the coefficients.
        head_lr: learning rate of the head; the same as `lr` if not given.
    """

    targets: Sequence[str] | str = ("mlp",)
    rank: int = 4
    num_basis: int = 1024
    c: float = 2.0
    scope: Scope = "shared"
    start: Start = "a0"
    lr: float = 5e-3
    head_lr: float | None = None


METHODS: dict[str, type[Method]] = {
    method.__name__: method for method in (NearestNeighbor, LinearProbe, FullFinetune, LoRA, NOLA)
}


def make_stack(
    backbone: nn.Module,
    method: Method,
    num_classes: int,
    run_seed: int = 0,
    basis_seed: int | None = None,
    num_adapters: int = 1,
) -> AdapterStack:
    """The adapter stack of a method for a backbone, not attached yet.

    Args:
        backbone: a timm model made without a head.
        method: what to train.
        num_classes: classes of the head.
        run_seed: sets the head's start and LoRA's A. The head's start is the same for every method.
        basis_seed: sets NOLA's basis; `run_seed` if not given.
        num_adapters: n, the number of adapters held.

    Raises:
        NolaVisionError: a target that the backbone lacks, or a rank or a number of basis matrices that is not possible.
    """
    _check_numbers(method)
    basis_seed = run_seed if basis_seed is None else basis_seed
    targets: list[Target] = []
    draws = _generator(run_seed, "factors")

    def make_factors(members: Sequence[Target], n: int) -> nn.Module:
        match method:
            case NOLA(rank=rank, num_basis=k, c=c, scope=scope, start=start):
                return NolaFactors(members, n, rank, k, c, basis_seed, scope, start)
            case LoRA(rank=rank, c=c):
                return LoraFactors(members, n, rank, c, draws)
        raise TypeError(f"{method} has no factors")

    if isinstance(method, NOLA | LoRA):
        targets = find_targets(backbone, method.targets)
        _check_rank(method, targets)
    width = int(backbone.num_features)  # type: ignore[arg-type]
    return AdapterStack(targets, make_factors, width, num_classes, num_adapters, _generator(run_seed, "head"))


def _check_numbers(method: Method) -> None:
    for name in ("lr", "head_lr", "c", "num_basis"):
        value = getattr(method, name, None)
        if value is not None and not 0 < value < math.inf:
            raise NolaVisionError(f"{name} of {type(method).__name__} is {value}: it must be a number above zero")


def _check_rank(method: NOLA | LoRA, targets: Sequence[Target]) -> None:
    if not targets:
        raise NolaVisionError(f"{type(method).__name__} needs at least one target, such as qkv or mlp")
    narrow = min(targets, key=lambda t: min(t.inputs, t.outputs))
    limit = min(narrow.inputs, narrow.outputs)
    if not 1 <= method.rank <= limit:
        raise NolaVisionError(
            f"rank {method.rank} is not possible for {narrow.name}, a {narrow.inputs} x {narrow.outputs} matrix: "
            f"use a rank from 1 to {limit}"
        )


def _generator(run_seed: int, purpose: str) -> torch.Generator:
    """A stream of its own for each purpose, so that no draw shifts another."""
    digest = hashlib.sha256(f"{run_seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def to_dict(method: Method) -> dict[str, Any]:
    """`{class_path, init_args}` of plain values, as in a config."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(method).items()}
    return {"class_path": type(method).__name__, "init_args": fields}


def from_dict(described: dict[str, Any]) -> Method:
    """The method that `to_dict` described.

    Raises:
        NolaVisionError: an unknown method or field.
    """
    name = str(described.get("class_path")).rpartition(".")[2]
    if name not in METHODS:
        raise NolaVisionError(f"unknown method '{name}': use one of {', '.join(METHODS)}")
    try:
        return METHODS[name](**described.get("init_args", {}))
    except TypeError as error:
        raise NolaVisionError(f"the settings of method {name} are not understood: {error}") from error
