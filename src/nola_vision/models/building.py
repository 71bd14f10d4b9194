"""From a method to the adapter stack that it trains for a backbone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import nn

from nola_vision.adapters.bank import AdapterStack
from nola_vision.adapters.methods.hashednet import HashedGroup
from nola_vision.adapters.methods.lora import LoraGroup
from nola_vision.adapters.methods.nola import NolaGroup
from nola_vision.adapters.methods.pranc import PrancGroup
from nola_vision.adapters.methods.registry import NOLA, PEFT, PRANC, Adapter, HashedNet, LoRA, Method, check
from nola_vision.adapters.methods.settings import Storage
from nola_vision.adapters.random_basis import basis_key, uniform
from nola_vision.adapters.target import HEAD, Target
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import sha256_integer
from nola_vision.models import peft_bridge
from nola_vision.models.backbones import Base
from nola_vision.models.targets import find_targets, named_targets

_MOST_CACHED_ON_LOAD = 512 * 2**20  # bytes of an adapter's basis in memory; a larger one is streamed
_MOST_CACHED = 16 * 2**30  # bytes of a cached basis: more than a machine with one GPU has to spare


def settle(method: Method, base: Base) -> Method:
    """The method with the settings written out that follow from what the backbone's weights are."""
    if isinstance(method, NOLA) and method.start is None:
        return dataclasses.replace(method, start="a0" if base == "pretrained" else "random")
    return method


def make_stack(
    backbone: nn.Module,
    method: Method,
    num_classes: int,
    run_seed: int = 0,
    basis_seed: int | None = None,
    num_adapters: int = 1,
    base: Base = "pretrained",
    target_names: Sequence[str] | None = None,
) -> AdapterStack:
    """The adapter stack of a method for a backbone, not attached yet.

    Args:
        backbone: a timm model made without a head.
        method: what to train.
        num_classes: classes of the head.
        run_seed: sets the head's start, LoRA's A and random coefficients. The head's start is the same for every method
            that trains a plain head.
        basis_seed: sets the basis; `run_seed` if not given.
        num_adapters: n, the number of adapters held.
        base: what the backbone's weights are; without pretrained ones the trainable parameters start random.
        target_names: the exact names of the targets, as an adapter file lists them. They replace the method's patterns,
            which are then not read, and a basis that is too large for memory is streamed.

    Raises:
        NolaVisionError: a target that the backbone lacks, or a setting that is not possible.
    """
    method = check(settle(method, base))
    basis_seed = run_seed if basis_seed is None else basis_seed
    width = feature_width(backbone)
    targets: list[Target] = []
    if isinstance(method, Adapter):
        targets = method_targets(backbone, method, num_classes, target_names)
        if target_names is not None:
            method = _stored_in_little_memory(method, targets)
    head_base = None
    if targets and targets[-1].name == HEAD:
        std = 0.0 if base == "zero" else 0.1 / math.sqrt(3 * width)
        head_base = uniform(basis_key(run_seed, HEAD, HEAD), (num_classes, width + 1), std)
    groups = _groups(method, targets, num_adapters, basis_seed, base, _generator(run_seed, "factors"))
    return AdapterStack(groups, width, num_classes, num_adapters, _generator(run_seed, "head"), head_base)


def feature_width(backbone: nn.Module) -> int:
    """The number of pooled features of a backbone: some models widen them after their last block."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore[arg-type]


def method_targets(
    backbone: nn.Module, method: Adapter, num_classes: int, target_names: Sequence[str] | None = None
) -> list[Target]:
    """The weights that a method adapts, the head as the last one; arguments as in `make_stack`."""
    named = [method.targets] if isinstance(method.targets, str) else list(method.targets)
    if target_names is not None:
        named = list(target_names)
    if not named:
        raise NolaVisionError(f"{type(method).__name__} needs at least one target, such as qkv or mlp")
    targets: list[Target] = []
    if others := [name for name in named if name != HEAD]:
        targets = find_targets(backbone, others) if target_names is None else named_targets(backbone, others)
    if HEAD in named:
        targets.append(Target(HEAD, (), "linear", (num_classes, feature_width(backbone) + 1)))
    return targets


def tensor_shapes(
    method: Method, targets: Sequence[Target], num_classes: int, width: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of the adapter's and the head's tensors by their names in a file, without making any.

    Args:
        method: what is trained.
        targets: what `method_targets` gives; none for a method that adapts no weight by itself.
        num_classes: classes of the head.
        width: what `feature_width` gives.

    Raises:
        NolaVisionError: a rank or budget that these targets cannot take.
    """
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.group, []).append(target)
    single = {target.name.replace(".", "/"): target for target in targets}
    shapes: dict[str, tuple[int, ...]] = {}
    match method:
        case NOLA():
            _check_rank(method, targets)
            for name, members in groups.items():
                for factor, count in zip("ab", _num_basis(method, targets, name), strict=True):
                    shapes[f"adapter.{name}.coefficients_{factor}"] = len(members), count
        case LoRA():
            _check_rank(method, targets)
            for name, members in groups.items():
                rank = _lora_rank(method.rank, members)
                shapes[f"adapter.{name}.a"] = len(members), members[0].inputs, rank
                shapes[f"adapter.{name}.b"] = len(members), rank, members[0].outputs
        case PRANC():
            for name in ["model"] if method.scope == "model" else single:
                shapes[f"adapter.{name}.coefficients"] = (method.num_basis,)
        case HashedNet():
            _check_budget(method.max_parameters, len(targets), "HashedNet")
            total = sum(target.size for target in targets)
            for name, target in single.items():
                shapes[f"adapter.{name}.buckets"] = (max(1, method.max_parameters * target.size // total),)
    if not any(target.name == HEAD for target in targets):
        shapes |= {"head.weight": (num_classes, width), "head.bias": (num_classes,)}
    return shapes


def _stored_in_little_memory(method: Adapter, targets: Sequence[Target]) -> Adapter:
    """The method with its basis in memory if that takes little, else streamed: a file does not decide on memory.

    Streaming compiles code, so it is the exception.
    """
    if isinstance(method, NOLA):
        each = {t.name if method.scope == "per_layer" else t.group: t for t in targets}.values()
        counts = [(t, *_num_basis(method, targets, t.group)) for t in each]
        held = sum(_nola_rank(method, t) * (ka * t.inputs + kb * t.outputs) for t, ka, kb in counts)
    elif isinstance(method, PRANC):
        held = method.num_basis * sum(target.size for target in targets)
    else:
        return method
    storage: Storage = "cached" if held <= _MOST_CACHED_ON_LOAD else "streamed"
    return dataclasses.replace(method, storage=storage, memory_mib=min(method.memory_mib, 64.0))


def _nola_rank(method: NOLA, target: Target) -> int:
    return method.rank if target.name != HEAD else min(method.head_rank or 64, target.inputs)


def _groups(
    method: Method, targets: Sequence[Target], n: int, basis_seed: int, base: Base, draws: torch.Generator
) -> dict[str, nn.Module]:
    """The modules that train, by the names that their tensors have in a file."""
    scratch = base != "pretrained"
    shapes: dict[str, list[Target]] = {}
    for target in targets:
        shapes.setdefault(target.group, []).append(target)
    single = {target.name.replace(".", "/"): target for target in targets}
    match method:
        case NOLA(c=c, scope=scope, storage=storage, memory_mib=memory):
            _check_rank(method, targets)
            start = method.start or "a0"
            if base == "zero" and start == "a0":
                raise NolaVisionError("NOLA's start a0 on base zero would never move: use start random")
            return {
                name: NolaGroup(
                    members,
                    n,
                    _nola_rank(method, members[0]),
                    _num_basis(method, targets, name),
                    c,
                    basis_seed,
                    scope,
                    start,
                    draws,
                    storage,
                    memory,
                )
                for name, members in shapes.items()
            }
        case LoRA(rank=rank, c=c):
            _check_rank(method, targets)
            return {
                name: LoraGroup(members, n, _lora_rank(rank, members), c, draws, scratch)
                for name, members in shapes.items()
            }
        case PRANC(num_basis=k, c=c, storage=storage, memory_mib=memory):
            held = k * sum(target.size for target in targets)
            if storage == "cached" and held > _MOST_CACHED:
                raise NolaVisionError(
                    f"PRANC's basis of {k} vectors would hold {held / 2**30:,.0f} GiB: use storage streamed, or less "
                    "num_basis"
                )
            parts = {"model": targets} if method.scope == "model" else {name: [t] for name, t in single.items()}
            return {
                name: PrancGroup(members, n, k, c, basis_seed, draws, scratch, storage, memory)
                for name, members in parts.items()
            }
        case HashedNet(max_parameters=budget, c=c):
            _check_budget(budget, len(targets), "HashedNet")
            total = sum(target.size for target in targets)
            return {
                name: HashedGroup(target, n, max(1, budget * target.size // total), c, basis_seed, draws, scratch)
                for name, target in single.items()
            }
    return {}


def _lora_rank(rank: int, members: Sequence[Target]) -> int:
    return rank if members[0].name != HEAD else min(rank, members[0].inputs, members[0].outputs)


def _num_basis(method: NOLA, targets: Sequence[Target], group: str) -> tuple[int, int]:
    """k and l of a group."""
    if group == HEAD:
        k = method.num_basis if method.head_num_basis is None else method.head_num_basis
        return k, k
    k = method.num_basis
    if method.max_parameters is not None:
        adapted = sum(target.name != HEAD for target in targets)
        _check_budget(method.max_parameters, 2 * adapted, "NOLA")
        k = method.max_parameters // (2 * max(1, adapted))
    return k, k if method.num_basis_b is None else method.num_basis_b


def _check_budget(budget: int, least: int, method: str) -> None:
    if budget < least:
        raise NolaVisionError(
            f"max_parameters of {method} is {budget}, but its targets need {least} for one number each: give more, or "
            "fewer targets"
        )


def _check_rank(method: NOLA | LoRA, targets: Sequence[Target]) -> None:
    targets = [target for target in targets if target.name != HEAD]
    if not targets:
        return
    narrow = min(targets, key=lambda t: min(t.inputs, t.outputs))
    limit = min(narrow.inputs, narrow.outputs)
    if not 1 <= method.rank <= limit:
        raise NolaVisionError(
            f"rank {method.rank} is not possible for {narrow.name}, a {narrow.inputs} x {narrow.outputs} matrix: "
            f"use a rank from 1 to {limit}"
        )


def edited_by_peft(backbone: nn.Module, method: PEFT, run_seed: int) -> nn.Module:
    """PEFT's model around a backbone that it edits: what it adds and trains has `requires_grad`, drawn by `run_seed`.

    Raises:
        NolaVisionError: PEFT is not installed, has no such config, or refuses its settings for this backbone.
    """
    seed = _generator(run_seed, "peft").initial_seed()
    return peft_bridge.edited(backbone, method.config, method.settings, seed)


def with_module_names(method: PEFT, edited: nn.Module) -> PEFT:
    """The method with the modules that PEFT edited in place of a pattern, which a file could not restore."""
    if not peft_bridge.has_pattern(method.settings):
        return method
    settings = {**method.settings, "target_modules": peft_bridge.module_names(edited)}
    return dataclasses.replace(method, settings=settings)


def _generator(run_seed: int, purpose: str) -> torch.Generator:
    """A stream of its own for each purpose, so that no draw shifts another."""
    return torch.Generator().manual_seed(sha256_integer(f"{run_seed} {purpose}", 7))
