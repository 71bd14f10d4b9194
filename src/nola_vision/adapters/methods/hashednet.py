"""HashedNet (Chen et al., ICML 2015): weights share trained values, the buckets, that a hash assigns."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nola_vision.adapters.methods.base import Adapter, Group, Source, check_max_parameters, check_positive, one_by_one
from nola_vision.adapters.methods.registry import register
from nola_vision.adapters.target import Change, Dense, Target

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True, kw_only=True)
class HashedNet(Adapter):
    """HashedNet (Chen et al., ICML 2015): weights, or changes of them, share trained values that a hash assigns.

        change_p = c sqrt(2 / fan_in) s(p) w[h(p)]

    Bucket h(p) and sign s(p) of weight p come from the counter-based generator (`random_basis.buckets`), keyed by the
    weight's name; w, `buckets [k]` per target, is all that is trained. w starts at zero; from scratch it starts normal
    with variance 1, so that with c = 1 a change starts with He's variance 2 / fan_in.

    The hash is kept as 4 bytes per adapted weight, whatever k is: as much memory as the weights themselves take.

    Args:
        max_parameters: trained values of all targets together, spread in proportion to their sizes.
        c: the scale.
    """

    max_parameters: int = 10_000
    c: float = 1.0

    size_setting = "max_parameters"

    def check(self) -> None:
        super().check()
        check_positive(self, "max_parameters", "c")

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        check_max_parameters(self.max_parameters, len(targets), "HashedNet")
        total = sum(target.size for target in targets)
        return [
            Group(name, members, {"buckets": (max(1, self.max_parameters * members[0].size // total),)})
            for name, members in one_by_one(targets).items()
        ]

    def initial(self, group: Group, source: Source) -> dict[str, Tensor]:
        import torch

        shape = source.num_adapters, *group.shapes["buckets"]
        first = torch.randn(shape, generator=source.draws) if source.from_scratch else torch.zeros(shape)
        return {"buckets": first}

    def fixed(self, group: Group, source: Source) -> dict[str, Any]:
        import torch

        from nola_vision.adapters.random_basis import basis_key, buckets

        (target,), (count,) = group.targets, group.shapes["buckets"]
        bucket, sign = buckets(basis_key(source.basis_seed, f"weight {target.name}", "hash"), target.size, count)
        # of each weight, in w or in -w, which follows it
        return {"place": (bucket + count * (sign < 0)).to(torch.int32)}

    def changes(
        self, group: Group, trained: Mapping[str, Tensor], fixed: Mapping[str, Any], wanted: Container[Target]
    ) -> dict[str, Change]:
        import torch

        (target,) = group.targets
        w = trained["buckets"] * (self.c * math.sqrt(2 / target.fan_in))
        return {target.name: Dense(target.layout(torch.cat([w, -w], 1)[:, fixed["place"]]))}
