"""TinyLoRA (Morris et al., 2026): NOLA's linear combination of fixed random matrices as the core of LoRA-XS."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nola_vision.adapters.methods.base import (
    MOST_NUM_BASIS,
    Adapter,
    Group,
    Source,
    check_positive,
    check_rank,
    refuse_head,
    storage_by_size,
)
from nola_vision.adapters.methods.registry import register
from nola_vision.adapters.methods.svd import projected, svd_factors
from nola_vision.adapters.target import Change, LowRank, Target
from nola_vision.common.errors import NolaVisionError

if TYPE_CHECKING:
    from torch import Tensor

_MEMORY_MIB = 16.0  # of one chunk of a basis that is too large to be kept


@register
@dataclass(frozen=True, kw_only=True)
class TinyLoRA(Adapter):
    """TinyLoRA (Morris et al., 2026, arXiv:2602.04118): W + (c / rank) A R B, with NOLA's coefficients for R.

        A = U_r S_r, B = V_r^T                      [m, r], [r, o], of the frozen weight: see `LoRAXS`
        R = (sum_i alpha_i P_i) / sqrt(r)           [r, r]

    The P_i come from the counter-based generator (`random_basis.py`), keyed by the weight's name, so that targets with
    the same coefficients change differently. Only alpha is trained: `coefficients [targets, k]`, or `[1, k]` if all
    targets share one vector (the paper ties any number of them; its 13 parameters are shared). The normaliser does not
    depend on k, so the first k' matrices of a k-basis are the k'-basis. The paper does not state the distribution of
    P_i.

    alpha starts at zero, so training starts at the pretrained model exactly; the gradient there is not zero, because A
    and B are not. What `LoRAXS` says of singular vectors that are not determined holds here too.

    Args:
        targets: names of the adapted weights; not `head`: it starts random, so its singular vectors are not useful.
        rank: r, the number of singular vectors. The paper has 2, with which more than 4 coefficients per target are of
            no use: R has r^2 entries.
        num_basis: k, the number of random matrices, and so of coefficients.
        scope: `layer`, k coefficients for each target, or `model`, k for all together.
        c: the scale's numerator (PEFT's `lora_alpha`); the scale is c / rank.
    """

    targets: Sequence[str] | str = ("qkv",)
    rank: int = 16
    num_basis: int = 64
    scope: Literal["layer", "model"] = "layer"
    c: float = 16.0

    size_setting = "num_basis"
    step_grows_with_size = True

    def check(self) -> None:
        super().check()
        check_positive(self, "num_basis", most=MOST_NUM_BASIS)
        check_positive(self, "c")

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        refuse_head(self, targets, "it starts random, so its singular vectors are not useful")
        check_rank(self.rank, targets)
        vectors = len(targets) if self.scope == "layer" else 1
        if self.num_basis > (most := self.rank**2 * len(targets) // vectors):
            raise NolaVisionError(
                f"num_basis of TinyLoRA is {self.num_basis}, but {most} matrices span all that rank {self.rank} can "
                f"give: use at most {most}, or a larger rank"
            )
        sketch = {"a": (len(targets),), "b": (len(targets),)}
        return [Group("model", tuple(targets), {"coefficients": (vectors, self.num_basis)}, sketch)]

    def initial(self, group: Group, source: Source) -> dict[str, Tensor]:
        import torch

        return {"coefficients": torch.zeros(source.num_adapters, *group.shapes["coefficients"])}

    def fixed(self, group: Group, source: Source) -> dict[str, Any]:
        from nola_vision.adapters.random_basis import Basis, basis_key

        keys = [basis_key(source.basis_seed, f"weight {target.name}", "R") for target in group.targets]
        storage = storage_by_size(len(keys) * self.num_basis * self.rank**2, _MEMORY_MIB)
        made: dict[str, Any] = {"basis": Basis(keys, self.num_basis, self.rank, self.rank, **storage)}
        for target, (a, b) in zip(group.targets, svd_factors(self, self.rank, group, source), strict=True):
            made |= {f"a {target.name}": a, f"b {target.name}": b}
        return made

    def changes(
        self, group: Group, trained: Mapping[str, Tensor], fixed: Mapping[str, Any], wanted: Container[Target]
    ) -> dict[str, Change]:
        from nola_vision.adapters.random_basis import combine

        alpha = trained["coefficients"].expand(-1, len(group.targets), -1)
        cores = combine(alpha, fixed["basis"]).view(*alpha.shape[:2], self.rank, self.rank) / math.sqrt(self.rank)
        made: dict[str, Change] = {}
        for target, core in zip(group.targets, cores.unbind(1), strict=True):
            if target in wanted:
                a, b = (fixed[f"{factor} {target.name}"].to(core.dtype) for factor in "ab")
                made[target.name] = LowRank(a @ core, b.expand(len(core), *b.shape), self.c / self.rank)
        return made

    def sketch(self, group: Group, fixed: Mapping[str, Any]) -> dict[str, Tensor]:
        import torch

        names = [target.name for target in group.targets]
        return {
            "a": torch.cat([projected("A", fixed[f"a {name}"].t()[None]) for name in names]),
            "b": torch.cat([projected("B", fixed[f"b {name}"][None]) for name in names]),
        }
