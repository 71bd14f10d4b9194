"""NOLA: both low-rank factors are linear combinations of fixed random matrices (ICLR 2024, equation 1)."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from nola_vision.adapters.methods.base import (
    MOST_NUM_BASIS,
    Adapter,
    Base,
    Group,
    Source,
    Storage,
    by_shape,
    check_max_parameters,
    check_positive,
    check_rank,
    storage_by_size,
)
from nola_vision.adapters.methods.registry import register
from nola_vision.adapters.target import HEAD, Change, Target, he_scale, low_rank_changes
from nola_vision.common.errors import NolaVisionError

if TYPE_CHECKING:
    from torch import Tensor

Scope = Literal["shared", "per_layer"]
Start = Literal["a0", "released", "random"]


@register
@dataclass(frozen=True, kw_only=True)
class NOLA(Adapter):
    """NOLA (ICLR 2024, equation 1): W + (c / rank) A B, with A and B linear combinations of fixed random matrices.

        A = (A0 + sum_i alpha_i A_i) / sqrt(m)      [m, r]
        B = (sum_j beta_j B_j) / sqrt(o)            [r, o]

    The A_i, B_j and A0 come from the counter-based generator (`random_basis.py`); alpha and beta, k and l values per
    target, are all that is trained: `coefficients_a [layers, k]` and `coefficients_b [layers, l]` for the targets of
    one shape. The normalisers depend on neither, so the first k' matrices of a k-basis are the k'-basis.

    With the start `random` a change has the scale `c sqrt(2 m o / (r fan_in))` and coefficients of variance 3/k and
    3/l, so that with c = 1 it starts with He's variance 2 / fan_in.

    Args:
        rank: r, the width of the factors; it does not change the number of trained coefficients.
        num_basis: k, the number of random matrices, and so of coefficients, for each of A and B.
        num_basis_b: l, that of B where it differs.
        head_num_basis: that of the head (A and B), if `head` is a target; `num_basis` if not given.
        head_rank: r of the head; 64 if not given, at most the number of features + 1. A head starts near zero, so
            with a low rank it would only see a few random directions of the features.
        max_parameters: instead of `num_basis`, a budget of trained coefficients (without the head's) that is spread
            evenly over the targets.
        c: the scale's numerator (PEFT's `lora_alpha`); the scale is c / rank.
        scope: `shared`, one basis for all weights of a shape, or `per_layer`.
        start: `a0`, a fixed random A0 (keyed by the weight's name) and zero coefficients, so that B = 0 and training
            starts at the pretrained model exactly; `released`, as in the authors' code, no A0 and every coefficient
            1/k; `random`, for training from scratch, no A0. Default: `random` without pretrained weights, else `a0`.
        nested: train so that the first coefficients alone are a good adapter too, and a file can be cut.
        storage: `cached` keeps the basis in memory (one byte per entry), `streamed` computes it in chunks in the
            forward and again in the backward pass.
        memory_mib: working memory of one streamed chunk.
    """

    rank: int = 4
    num_basis: int = 1024
    num_basis_b: int | None = None
    head_num_basis: int | None = None
    head_rank: int | None = None
    max_parameters: int | None = None
    c: float = 2.0
    scope: Scope = "shared"
    start: Start | None = None
    nested: bool = False
    storage: Storage = "cached"
    memory_mib: float = 16.0

    cuttable = frozenset({"coefficients_a", "coefficients_b"})
    size_setting = "num_basis"
    step_grows_with_size = True

    def check(self) -> None:
        super().check()
        check_positive(self, "num_basis", "num_basis_b", "head_num_basis", most=MOST_NUM_BASIS)
        check_positive(self, "c", "head_rank", "memory_mib")
        if self.max_parameters is not None and self.max_bytes is not None:
            raise NolaVisionError("NOLA has both max_parameters and max_bytes: give one budget")
        if (self.max_parameters or self.max_bytes) and self.num_basis_b is not None:
            raise NolaVisionError("NOLA has a budget and num_basis_b: a budget is spread evenly over A and B")

    def cut(self, counts: Mapping[tuple[str, str], int]) -> Self:
        named = {"coefficients_a": "num_basis", "coefficients_b": "num_basis_b"}
        left = {"head_num_basis" if group == HEAD else named[name]: count for (group, name), count in counts.items()}
        return replace(self, max_parameters=None, **left)  # type: ignore[arg-type]

    def for_base(self, base: Base) -> Self:
        return self if self.start is not None else replace(self, start="a0" if base == "pretrained" else "random")

    def for_loading(self, targets: Sequence[Target]) -> Self:
        each = {t.name if self.scope == "per_layer" else t.group: t for t in targets}.values()
        counts = [(t, *self._num_basis(t.group, targets)) for t in each]
        size = sum(self._rank(t) * (k * t.inputs + k_b * t.outputs) for t, k, k_b in counts)
        return replace(self, **storage_by_size(size, self.memory_mib))

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        check_rank(self.rank, targets)
        return [
            Group(
                name,
                members,
                {
                    f"coefficients_{factor}": (len(members), count)
                    for factor, count in zip("ab", self._num_basis(name, targets), strict=True)
                },
            )
            for name, members in by_shape(targets).items()
        ]

    def _rank(self, target: Target) -> int:
        return self.rank if target.name != HEAD else min(self.head_rank or 64, target.inputs)

    def _num_basis(self, group: str, targets: Sequence[Target]) -> tuple[int, int]:
        """k and l of a group."""
        if group == HEAD:
            k = self.num_basis if self.head_num_basis is None else self.head_num_basis
            return k, k
        k = self.num_basis
        if self.max_parameters is not None:
            adapted = sum(target.name != HEAD for target in targets)
            check_max_parameters(self.max_parameters, 2 * adapted, "NOLA")
            k = self.max_parameters // (2 * max(1, adapted))
        return k, k if self.num_basis_b is None else self.num_basis_b

    def initial(self, group: Group, source: Source) -> dict[str, Tensor]:
        import torch

        if source.base == "zero" and self.start == "a0":
            raise NolaVisionError("NOLA's start a0 on base zero would never move: use start random")
        values = {}
        for name, (layers, count) in group.shapes.items():
            shape = source.num_adapters, layers, count
            values[name] = torch.full(shape, 1 / count if self.start == "released" else 0.0)
            if self.start == "random":
                values[name] = torch.randn(shape, generator=source.draws) * math.sqrt(3 / count)
        return values

    def fixed(self, group: Group, source: Source) -> dict[str, Any]:
        import torch

        from nola_vision.adapters.random_basis import Basis, basis_bytes, basis_key

        first, seed = group.targets[0], source.basis_seed
        rank, m, o = self._rank(first), first.inputs, first.outputs
        names = [f"shape {m}x{o}"] if self.scope == "shared" else [f"weight {t.name}" for t in group.targets]
        made: dict[str, Any] = {
            f"basis_{f.lower()}": Basis(
                [basis_key(seed, name, f) for name in names], count, rank, length, self.storage, self.memory_mib
            )
            for f, (_, count), length in zip("AB", group.shapes.values(), (m, o), strict=True)
        }
        if self.start in (None, "a0"):
            drawn = [basis_bytes(basis_key(seed, f"weight {t.name}", "A0"), 0, 1, rank, m) for t in group.targets]
            made["a0"] = torch.cat(drawn).flatten(1)
        return made | {"scale": he_scale(self.c, rank, first) if self.start == "random" else self.c / rank}

    def changes(
        self, group: Group, trained: Mapping[str, Tensor], fixed: Mapping[str, Any], wanted: Container[Target]
    ) -> dict[str, Change]:
        from nola_vision.adapters.random_basis import combine, decode

        first = group.targets[0]
        rank, m, o = self._rank(first), first.inputs, first.outputs
        a = combine(trained["coefficients_a"], fixed["basis_a"])  # one matrix product for all layers and adapters
        if "a0" in fixed:
            a = a + decode(fixed["a0"], a.dtype)
        b = combine(trained["coefficients_b"], fixed["basis_b"])
        a = a.view(*a.shape[:-1], rank, m).transpose(-1, -2) / math.sqrt(m)
        b = b.view(*b.shape[:-1], rank, o) / math.sqrt(o)
        return low_rank_changes(group.targets, a, b, fixed["scale"], wanted)
