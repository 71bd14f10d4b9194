"""PRANC (Nooralinejad et al., ICCV 2023): weights are one linear combination of fixed random vectors."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from nola_vision.adapters.methods.base import (
    MOST_NUM_BASIS,
    Adapter,
    Group,
    Source,
    Storage,
    check_positive,
    one_by_one,
    storage_by_size,
)
from nola_vision.adapters.methods.registry import register
from nola_vision.adapters.target import Change, Dense, Target
from nola_vision.common.errors import NolaVisionError

if TYPE_CHECKING:
    from torch import Tensor

_MOST_CACHED = 16 * 2**30  # bytes of a cached basis: more than a machine with one GPU has to spare


@register
@dataclass(frozen=True, kw_only=True)
class PRANC(Adapter):
    """PRANC (ICCV 2023): weights, or changes of them, are one linear combination of fixed random vectors.

        change = c sqrt(2 / fan_in) sum_i alpha_i P_i

    P_i, of the weight's size, comes from the counter-based generator (`random_basis.py`), keyed by the weight's name;
    alpha, `coefficients [k]` for all targets of a group together, is all that is trained. One group of all targets is
    PRANC's own scope (the whole model is one combination); one group per target is the scope `layer`.

    Alpha starts at zero; from scratch it starts normal with variance 3/k, so that with c = 1 a change starts with He's
    variance 2 / fan_in.

    Args:
        num_basis: k, the number of random vectors, and so of coefficients.
        scope: `model`, one combination for all targets together, or `layer`, one for each.
        c: the scale.
        nested: train so that the first coefficients alone are a good adapter too, and a file can be cut.
        storage: `cached` keeps the basis in memory (k bytes per weight), `streamed` computes it in chunks whenever it
            is used.
        memory_mib: working memory of one streamed chunk.
    """

    num_basis: int = 1024
    scope: Literal["model", "layer"] = "model"
    c: float = 1.0
    nested: bool = False
    storage: Storage = "cached"
    memory_mib: float = 16.0

    cuttable = frozenset({"coefficients"})
    size_setting = "num_basis"
    step_grows_with_size = True

    def check(self) -> None:
        super().check()
        check_positive(self, "num_basis", most=MOST_NUM_BASIS)
        check_positive(self, "c", "memory_mib")

    def cut(self, counts: Mapping[tuple[str, str], int]) -> Self:
        return replace(self, num_basis=max(counts.values()))

    def for_loading(self, targets: Sequence[Target]) -> Self:
        return replace(self, **storage_by_size(self.num_basis * sum(t.size for t in targets), self.memory_mib))

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        parts = {"model": tuple(targets)} if self.scope == "model" else one_by_one(targets)
        return [Group(name, members, {"coefficients": (self.num_basis,)}) for name, members in parts.items()]

    def initial(self, group: Group, source: Source) -> dict[str, Tensor]:
        import torch

        shape = source.num_adapters, self.num_basis
        if not source.from_scratch:
            return {"coefficients": torch.zeros(shape)}
        return {"coefficients": torch.randn(shape, generator=source.draws) * math.sqrt(3 / self.num_basis)}

    def fixed(self, group: Group, source: Source) -> dict[str, Any]:
        from nola_vision.adapters.random_basis import Basis, basis_key

        size = self.num_basis * sum(target.size for target in group.targets)
        if self.storage == "cached" and size > _MOST_CACHED:
            raise NolaVisionError(
                f"PRANC's basis of {self.num_basis} vectors would take {size / 2**30:,.0f} GiB: use storage streamed, "
                "or a smaller num_basis"
            )
        return {
            t.name: Basis(
                [basis_key(source.basis_seed, f"weight {t.name}", "P")],
                self.num_basis,
                1,
                t.size,
                self.storage,
                self.memory_mib,
            )
            for t in group.targets
        }

    def changes(
        self, group: Group, trained: Mapping[str, Tensor], fixed: Mapping[str, Any], wanted: Container[Target]
    ) -> dict[str, Change]:
        from nola_vision.adapters.random_basis import combine

        return {
            t.name: Dense(t.layout(self.c * math.sqrt(2 / t.fan_in) * combine(trained["coefficients"], fixed[t.name])))
            for t in group.targets
            if t in wanted
        }
