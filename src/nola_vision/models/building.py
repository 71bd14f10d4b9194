"""From a method to the parameter bank that it trains for a backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nola_vision.adapters.bank import ParameterBank
from nola_vision.adapters.methods.base import Base, Group, Method, Source
from nola_vision.adapters.methods.contract import check_groups
from nola_vision.adapters.methods.registry import check
from nola_vision.adapters.random_basis import basis_key, uniform
from nola_vision.adapters.target import HEAD, Target
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import sha256, sha256_integer
from nola_vision.models.targets import TARGETS, find_targets, named_targets


def make_bank(
    backbone: nn.Module,
    method: Method,
    num_classes: int | Sequence[int],
    run_seed: int = 0,
    basis_seed: int | None = None,
    num_adapters: int = 1,
    base: Base = "pretrained",
    target_names: Sequence[str] | None = None,
) -> ParameterBank:
    """The parameter bank of a method for a backbone, not attached yet.

    Args:
        backbone: a timm model made without a head.
        method: what to train.
        num_classes: classes of the head; one number for each adapter where they differ.
        run_seed: sets the head's start, LoRA's A and random coefficients. The head's start is the same for every method
            that trains a plain head.
        basis_seed: sets the basis; `run_seed` if not given.
        num_adapters: n.
        base: what the backbone's weights are; without pretrained ones the trainable parameters start random.
        target_names: the exact names of the targets, as an adapter file lists them. They replace the method's patterns,
            which are then not read, and a basis that is too large for memory is streamed.

    Raises:
        NolaVisionError: a target that the backbone lacks, or a setting that is not possible.
    """
    method = check(method.for_base(base))
    width = feature_width(backbone)
    classes = num_classes if isinstance(num_classes, int) else max(num_classes, default=0)
    targets = method_targets(backbone, method, classes, target_names)
    if target_names is not None:
        method = method.for_loading(targets)
    head = None
    if targets and targets[-1].name == HEAD:
        head = head_start(run_seed, classes, width, base)
    draws = generator(run_seed, "factors")
    seed = run_seed if basis_seed is None else basis_seed
    source = Source(num_adapters, seed, base, draws, backbone, head, loading=target_names is not None)
    groups = method.groups(targets)
    check_groups(method, groups, targets)
    return ParameterBank(method, groups, source, width, num_classes, generator(run_seed, "head"))


def head_start(run_seed: int, classes: int, width: int, base: Base) -> Tensor:
    """The fixed matrix `[classes, width + 1]` of an adapted head; the bias is its last column."""
    std = 0.0 if base == "zero" else 0.1 / math.sqrt(3 * width)
    return uniform(basis_key(run_seed, HEAD, HEAD), (classes, width + 1), std)


def feature_width(backbone: nn.Module) -> int:
    """The number of pooled features of a backbone: some models widen them after their last block."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore[arg-type]


def method_targets(
    backbone: nn.Module, method: Method, num_classes: int, target_names: Sequence[str] | None = None
) -> list[Target]:
    """The weights that a method adapts, the head as the last one; arguments as in `make_bank`."""
    if (named := method.target_names) is None:
        return []
    if target_names is not None:
        named = tuple(target_names)
    if not named:
        raise NolaVisionError(f"{type(method).__name__} needs at least one target, such as qkv or mlp")
    targets: list[Target] = []
    if others := [name for name in named if name != HEAD]:
        targets = find_targets(backbone, others) if target_names is None else named_targets(backbone, others)
    if HEAD in named:
        targets.append(Target(HEAD, (), "linear", (num_classes, feature_width(backbone) + 1)))
    return targets


def stated_targets(backbone: nn.Module, method: Method, num_classes: int, names: Sequence[str]) -> list[str] | str:
    """What a file states of its targets: a checksum where the method's own names select them, else their names.

    Args:
        backbone: what they are weights of.
        method: what adapts them.
        num_classes: classes of the head.
        names: the exact names of the targets, in the order of the bank or in that of `method_targets`.
    """
    if not names or not selects_by_structure(method):
        return list(names)
    try:
        found = method_targets(backbone, method, num_classes)
        orders = [target.name for target in found], names_in_bank(method.groups(found))
    except NolaVisionError:  # the targets of a loaded file were not found by its method's names
        return list(names)
    return targets_checksum(orders[0]) if list(names) in orders else list(names)


def names_in_bank(groups: Sequence[Group]) -> list[str]:
    """The names of the targets in the order of the bank: group by group, the head last."""
    return sorted((target.name for group in groups for target in group.targets), key=lambda name: name == HEAD)


def selects_by_structure(method: Method) -> bool:
    """Whether a method's targets are names such as `mlp` only, without patterns: a file's patterns are not run."""
    return set(method.target_names or ["none"]) <= {*TARGETS, HEAD}


def targets_checksum(names: Sequence[str]) -> str:
    """The first 8 hexadecimal digits of SHA-256 over the names, separated by line breaks."""
    return sha256("\n".join(names))[:8]


def file_shapes(groups: Sequence[Group], num_classes: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the adapter's and the head's tensors by their names in a file, without making any.

    Args:
        groups: what the method makes of its targets.
        num_classes: classes of the head.
        width: what `feature_width` gives.
    """
    shapes = {f"adapter.{group.name}.{name}": shape for group in groups for name, shape in group.shapes.items()}
    shapes |= {f"sketch.{group.name}.{name}": shape for group in groups for name, shape in group.sketch.items()}
    if not any(target.name == HEAD for group in groups for target in group.targets):
        shapes |= {"head.weight": (num_classes, width), "head.bias": (num_classes,)}
    return shapes


def edited(backbone: nn.Module, method: Method, run_seed: int) -> tuple[Method, nn.Module]:
    """The method as a file states it, and the backbone with what the method adds to it, drawn by `run_seed`."""
    return method.edit(backbone, generator(run_seed, "peft").initial_seed())


def generator(run_seed: int, purpose: str) -> torch.Generator:
    """A separate stream for each purpose, so that no draw shifts another."""
    return torch.Generator().manual_seed(sha256_integer(f"{run_seed} {purpose}", 7))
