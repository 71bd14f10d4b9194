"""LoRA (Hu et al., 2021): both low-rank factors are trained."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nola_vision.adapters.methods.base import Adapter, Group, Source, by_shape, check_positive, check_rank
from nola_vision.adapters.methods.registry import register
from nola_vision.adapters.target import HEAD, Change, Target, he_scale, low_rank_changes

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """LoRA (Hu et al., 2021): W + (c / rank) A B with both factors trained: `a [layers, m, r]`, `b [layers, r, o]`.

    A starts uniform in (-1/sqrt(m), 1/sqrt(m)), as in PEFT (`kaiming_uniform_` with a = sqrt(5)); B starts at zero, so
    training starts at the pretrained model exactly. Without pretrained weights both start normal, of variance 1/m and
    1/o, and the scale is `c sqrt(2 m o / (r fan_in))`, so that with c = 1 a change starts with He's variance
    2 / fan_in.

    Args:
        targets: names of the adapted weights.
        rank: r, the width of the factors; that of the head is at most the number of classes.
        c: the scale's numerator (PEFT's `lora_alpha`); the scale is c / rank.
    """

    targets: Sequence[str] | str = ("qkv",)
    rank: int = 4
    c: float = 8.0

    uses_basis_seed = False
    size_setting = "rank"

    def check(self) -> None:
        super().check()
        check_positive(self, "c")

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        check_rank(self.rank, targets)
        made = []
        for name, members in by_shape(targets).items():
            layers, m, o = len(members), members[0].inputs, members[0].outputs
            rank = self.rank if name != HEAD else min(self.rank, m, o)
            made.append(Group(name, members, {"a": (layers, m, rank), "b": (layers, rank, o)}))
        return made

    def initial(self, group: Group, source: Source) -> dict[str, Tensor]:
        import torch

        shapes = {name: (source.num_adapters, *shape) for name, shape in group.shapes.items()}
        m, o = group.targets[0].inputs, group.targets[0].outputs
        if source.from_scratch:
            a, b = (torch.randn(shape, generator=source.draws) for shape in shapes.values())
            return {"a": a / math.sqrt(m), "b": b / math.sqrt(o)}
        drawn = torch.rand(shapes["a"], generator=source.draws)
        return {"a": (2 * drawn - 1) / math.sqrt(m), "b": torch.zeros(shapes["b"])}

    def fixed(self, group: Group, source: Source) -> dict[str, Any]:
        rank = group.shapes["a"][-1]
        return {"scale": he_scale(self.c, rank, group.targets[0]) if source.from_scratch else self.c / rank}

    def changes(
        self, group: Group, trained: Mapping[str, Tensor], fixed: Mapping[str, Any], wanted: Container[Target]
    ) -> dict[str, Change]:
        return low_rank_changes(group.targets, trained["a"], trained["b"], fixed["scale"], wanted)
