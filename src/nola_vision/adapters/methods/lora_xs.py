"""LoRA-XS (Balazy et al., 2024): a small matrix between fixed factors that come from the weight's own SVD."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nola_vision.adapters.methods.base import (
    Adapter,
    Group,
    Source,
    by_shape,
    check_positive,
    check_rank,
    refuse_head,
)
from nola_vision.adapters.methods.registry import register
from nola_vision.adapters.methods.svd import projected, svd_factors
from nola_vision.adapters.target import Change, Target, low_rank_changes

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True, kw_only=True)
class LoRAXS(Adapter):
    """LoRA-XS (Balazy et al., 2024, arXiv:2405.17604): W + (c / rank) A R B, where only R is trained.

        W = U S V^T, as the matrix [m, o]
        A = U_r S_r                                 [m, r]
        B = V_r^T                                   [r, o]

    A and B are the truncated SVD of the frozen weight, computed in float64 when an adapter is created or loaded from a
    file; n adapters share them. `r [layers, r, r]` is trained: r^2 values per target, whatever its size. The sign of a
    pair of singular vectors is chosen so that the first entry of the largest magnitude in U's column is positive.

    R starts at zero, so training starts at the pretrained model exactly. The authors draw R from a normal
    distribution with standard deviation 1e-5, which is far below the first step of Adam. The gradient at R = 0 is not
    zero, because A and B are not.

    Singular vectors are only determined if their singular values differ: with equal ones, another machine could find
    other vectors, and R is only valid for the ones it was trained with. So training is refused if two consecutive
    singular values of the first r + 1 have squares that differ by less than 1e-7 of the largest square. The file
    contains a sketch of A and B, one projection per target, and loading compares it.

    An int8 base has the A and B of its float weights: they are computed before rounding.

    Args:
        targets: names of the adapted weights; not `head`: it starts random, so its singular vectors are not useful.
        rank: r, the number of singular vectors.
        c: the scale's numerator (PEFT's `lora_alpha`); the scale is c / rank.
    """

    targets: Sequence[str] | str = ("qkv",)
    rank: int = 16
    c: float = 16.0

    uses_basis_seed = False
    size_setting = "rank"

    def check(self) -> None:
        super().check()
        check_positive(self, "c")

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        refuse_head(self, targets, "it starts random, so its singular vectors are not useful")
        check_rank(self.rank, targets)
        return [
            Group(
                name,
                members,
                {"r": (len(members), self.rank, self.rank)},
                sketch={"a": (len(members),), "b": (len(members),)},
            )
            for name, members in by_shape(targets).items()
        ]

    def initial(self, group: Group, source: Source) -> dict[str, Tensor]:
        import torch

        return {"r": torch.zeros(source.num_adapters, *group.shapes["r"])}

    def fixed(self, group: Group, source: Source) -> dict[str, Any]:
        import torch

        factors = svd_factors(self, self.rank, group, source)
        return {
            "a": torch.stack([a for a, _ in factors]),
            "b": torch.stack([b for _, b in factors]),
            "scale": self.c / self.rank,
        }

    def changes(
        self, group: Group, trained: Mapping[str, Tensor], fixed: Mapping[str, Any], wanted: Container[Target]
    ) -> dict[str, Change]:
        r = trained["r"]
        a, b = fixed["a"].to(r.dtype), fixed["b"].to(r.dtype)
        return low_rank_changes(group.targets, a @ r, b.expand(len(r), *b.shape), fixed["scale"], wanted)

    def sketch(self, group: Group, fixed: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"a": projected("A", fixed["a"].transpose(1, 2)), "b": projected("B", fixed["b"])}
