"""From packed values to factors: what a pass computes with, made by one product per group of a layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nola_vision.adapters.functional import computes_plainly
from nola_vision.adapters.methods.base import Group, Method, Source
from nola_vision.adapters.random_basis import Basis
from nola_vision.adapters.stored import Stored, stacked_tensors
from nola_vision.adapters.target import HEAD, Change, Dense, LowRank, Target, dense, whole, whole_dense
from nola_vision.models.building import feature_width, generator, head_start
from nola_vision.serving.cache import ByteCache

_TARGET_BYTES = 512  # of memory, about


@dataclass(frozen=True, eq=False)
class Grouping:
    """What adapters share that differ in their basis seeds only.

    Args:
        method: that of one of them; settings that only training reads may differ.
        groups: of the method on this backbone; an adapted head's is the last one.
    """

    method: Method
    groups: tuple[Group, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """What adapters share whose changes one product per group makes.

    Args:
        grouping: theirs.
        basis_seed: of everything fixed and random; 0 if nothing is.
    """

    grouping: Grouping
    basis_seed: int

    @property
    def method(self) -> Method:
        return self.grouping.method

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.grouping.groups


@dataclass(frozen=True, eq=False)
class Factors:
    """What passes compute with for one adapter.

    Args:
        changes: of whole weights, by name: `LowRank(A [m, r], B [r, o], 1)` with the scale in A, or `Dense`.
        head: weight `[classes, features]` and bias `[classes]`; None for the base.
        size: bytes of all of them.
    """

    changes: Mapping[str, Change]
    head: tuple[Tensor, Tensor] | None
    size: int


def mixes(backbone: nn.Module, changes: Mapping[str, Change], odd: frozenset[str]) -> bool:
    """Whether a pass can compute with such changes for some samples and others for the rest, in one product.

    Args:
        backbone: the model.
        changes: of whole weights, by name.
        odd: weights of layers whose input does not have the batch as its first dimension.
    """
    layers = [backbone.get_submodule(weight.rpartition(".")[0]) for weight in changes]
    plain = all(isinstance(layer, nn.Linear) and computes_plainly(layer) for layer in layers)
    return plain and all(isinstance(change, LowRank) for change in changes.values()) and not odd & changes.keys()


class FactorMaker:
    """Makes the factors of adapters for one backbone; what is fixed is computed once and kept in a cache.

    Args:
        backbone: a frozen model.
        device: where the factors are made and kept.
        cache: for bases and what else is fixed. One basis serves every layout of its seed and shapes.
    """

    def __init__(self, backbone: nn.Module, device: torch.device, cache: ByteCache) -> None:
        self.backbone, self.device, self.cache = backbone, device, cache

    @torch.no_grad()
    def make(self, layout: Layout, stored: Sequence[Mapping[str, Stored]], run_seeds: Sequence[int]) -> list[Factors]:
        """The factors of adapters of one layout.

        Args:
            layout: theirs.
            stored: for each adapter the tensors of its file.
            run_seeds: for each adapter, the seed of an adapted head.
        """
        made: dict[str, Change] = {}
        for group in layout.groups:
            trained = {
                name: stacked_tensors([one[f"adapter.{group.name}.{name}"] for one in stored]).to(self.device)
                for name in group.shapes
            }
            made |= layout.method.changes(group, trained, self.fixed(layout, group), group.targets)
        parts: dict[str, list[Target]] = {}
        for group in layout.groups:
            for target in group.targets:
                parts.setdefault(target.weight, []).append(target)
        head_target = next(iter(parts.pop(HEAD, [])), None)
        changes = {weight: _whole(targets, [made[one.name] for one in targets]) for weight, targets in parts.items()}
        singly = {weight: _singly(change) for weight, change in changes.items()}
        if head_target is None:
            heads = self._heads(stored)
        else:
            heads = [
                self._adapted_head(head_target, change, run_seed)
                for change, run_seed in zip(_singly(made[HEAD]), run_seeds, strict=True)
            ]
        return [
            _factors({weight: own[position] for weight, own in singly.items()}, head)
            for position, head in enumerate(heads)
        ]

    def _adapted_head(self, target: Target, change: Change, run_seed: int) -> tuple[Tensor, Tensor]:
        start = head_start(run_seed, target.shape[0], feature_width(self.backbone), "pretrained")
        matrix = start.to(self.device) + dense(target, change)
        return matrix[:, :-1].contiguous(), matrix[:, -1].contiguous()

    def _heads(self, stored: Sequence[Mapping[str, Stored]]) -> list[tuple[Tensor, Tensor] | None]:
        """Weights and biases of the heads that files contain, those of one shape decoded together."""
        heads: list[tuple[Tensor, Tensor] | None] = [None] * len(stored)
        shapes: dict[tuple[int, ...], list[int]] = {}
        for position, one in enumerate(stored):
            if "head.weight" in one:
                shapes.setdefault(one["head.weight"].shape, []).append(position)
        for positions in shapes.values():
            weights, biases = (
                stacked_tensors([stored[position][f"head.{part}"] for position in positions]).to(self.device)
                for part in ("weight", "bias")
            )
            for position, weight, bias in zip(positions, _copies(weights), _copies(biases), strict=True):
                heads[position] = weight, bias
        return heads

    def fixed(self, layout: Layout, group: Group) -> dict[str, Any]:
        """What a group's changes need and training left as it was, from the cache where it is there."""
        key = layout, group.name
        if (found := self.cache.get(key)) is None:
            seed = layout.basis_seed
            source = Source(1, seed, "pretrained", generator(0, "factors"), self.backbone, loading=True)
            found = {
                name: one.to(self.device) if hasattr(one, "to") else one
                for name, one in layout.method.fixed(group, source).items()
            }
            tensors = sum(one.nbytes for one in found.values() if isinstance(one, Tensor))
            self.cache.put(key, found, tensors + _TARGET_BYTES * len(group.targets))  # the key keeps the group
        return {name: self._shared(one) if isinstance(one, Basis) else one for name, one in found.items()}

    def _shared(self, basis: Basis) -> Basis:
        """The longest basis of these matrices that was made so far: a shorter one is the first part of it."""
        if basis.storage != "cached":
            return basis
        key = tuple(basis.keys), basis.rank, basis.length
        kept: Basis | None = self.cache.get(key)
        if kept is None or kept.count < basis.count:
            kept = Basis(basis.keys, basis.count, basis.rank, basis.length, device=self.device)
            self.cache.put(key, kept, kept.cached().nbytes)
        return kept


def _whole(targets: Sequence[Target], changes: Sequence[Change]) -> Change:
    """The changes `[d, ...]` of a weight's parts as those of the whole weight, the scale in A."""
    low_rank = [change for change in changes if isinstance(change, LowRank)]
    if len(low_rank) < len(changes):
        return Dense(whole_dense(targets, changes))
    a, b, scale = whole(targets, low_rank)
    return LowRank(a * scale, b, 1.0)


def _singly(change: Change) -> list[Change]:
    """The changes of the single adapters, each in separate memory: one in the cache does not keep the others."""
    if isinstance(change, LowRank):
        pairs = zip(_copies(change.a), _copies(change.b), strict=True)
        return [LowRank(a, b, change.scale) for a, b in pairs]
    return [Dense(value) for value in _copies(change.value)]


def _copies(stack: Tensor) -> Sequence[Tensor]:
    """The parts of a stack, each copied, in one operation: each one releases Python's lock and waits for it again."""
    made: Sequence[Tensor] = torch.ops.aten.unbind_copy(stack)
    return made


def _factors(changes: Mapping[str, Change], head: tuple[Tensor, Tensor] | None) -> Factors:
    tensors = [one for change in changes.values() for one in change if isinstance(one, Tensor)]
    return Factors(changes, head, sum(one.nbytes for one in [*tensors, *(head or ())]))


def stacked(factors: Sequence[Factors]) -> dict[str, Change]:
    """The changes of d adapters in one pass: A `[d, m, r]`, B `[d, r, o]`.

    Factors of a smaller rank, or of an adapter without a change of the weight, are padded with zeros.
    """
    made: dict[str, Change] = {}
    for weight in dict.fromkeys(weight for one in factors for weight in one.changes):
        pairs = [one.changes.get(weight) for one in factors]
        there = [pair for pair in pairs if isinstance(pair, LowRank)]
        (m, _), (_, o), rank = there[0].a.shape, there[0].b.shape, max(pair.b.shape[0] for pair in there)
        if len(there) == len(pairs) and all(pair.b.shape[0] == rank for pair in there):
            made[weight] = LowRank(
                torch.stack([pair.a for pair in there]), torch.stack([pair.b for pair in there]), 1.0
            )
            continue
        a, b = there[0].a.new_zeros(len(pairs), m, rank), there[0].b.new_zeros(len(pairs), rank, o)
        for position, pair in enumerate(pairs):
            if isinstance(pair, LowRank):
                a[position, :, : pair.a.shape[1]], b[position, : pair.b.shape[0]] = pair.a, pair.b
        made[weight] = LowRank(a, b, 1.0)
    return made
