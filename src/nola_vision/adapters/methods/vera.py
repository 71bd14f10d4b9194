"""VeRA (Kopiczko et al., ICLR 2024): two trained vectors scale a fixed random pair of factors."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nola_vision.adapters.methods.base import Adapter, Group, Source, by_shape, check_positive, refuse_head
from nola_vision.adapters.methods.registry import register
from nola_vision.adapters.target import Change, Dense, Target, low_rank_changes
from nola_vision.common.errors import NolaVisionError

if TYPE_CHECKING:
    from torch import Tensor

_START_OF_D = 0.1  # the paper's, and PEFT's `d_initial`
_MOST_RANK = 4096  # four times the paper's largest


@register
@dataclass(frozen=True, kw_only=True)
class VeRA(Adapter):
    """VeRA (Kopiczko et al., ICLR 2024, arXiv:2310.11454): W + c A diag(d) B diag(b), where d and b are trained.

        A [m, r], entries uniform with variance 2 / m
        B [r, o], entries uniform with variance 2 / r

    A and B are fixed and come from the counter-based generator (`random_basis.py`). One pair serves all targets: a
    smaller weight uses the first m rows of A and the first o columns of B, as in PEFT, scaled to the variances for its
    shape (Kaiming's, as in the paper). `d [layers, r]` and `b [layers, o]` are trained: r + o values per target. d
    starts at 0.1 and b at zero, so training starts at the pretrained model exactly.

    A rank above m o / (m + o) makes the factors of a target larger than the target itself. Then they are multiplied,
    one target after the other, so that changes never take more memory than the weights that they are added to.

    Args:
        targets: names of the adapted weights; not `head`, whose logits would each have one fixed random direction.
        rank: r, the width of the factors; it may be larger than the weight's sides (the paper uses 1024 for 768).
        c: the scale; the paper and PEFT have 1.
    """

    targets: Sequence[str] | str = ("qkv",)
    rank: int = 256
    c: float = 1.0

    size_setting = "rank"

    def check(self) -> None:
        super().check()
        check_positive(self, "rank", "c")
        if self.rank > _MOST_RANK:
            raise NolaVisionError(f"rank of VeRA is {self.rank}: it must be at most {_MOST_RANK:,}")

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        refuse_head(self, targets, "each logit would see one fixed random direction of the features")
        return [
            Group(name, members, {"d": (len(members), self.rank), "b": (len(members), members[0].outputs)})
            for name, members in by_shape(targets).items()
        ]

    def initial(self, group: Group, source: Source) -> dict[str, Tensor]:
        import torch

        if source.base == "zero":
            raise NolaVisionError("VeRA on base zero would never move, since b starts at zero: use NOLA or LoRA")
        d, b = ((source.num_adapters, *shape) for shape in group.shapes.values())
        return {"d": torch.full(d, _START_OF_D), "b": torch.zeros(b)}

    def fixed(self, group: Group, source: Source) -> dict[str, Any]:
        import torch

        from nola_vision.adapters.random_basis import basis_bytes, basis_key, decode

        def drawn(factor: str, length: int) -> Tensor:
            key = basis_key(source.basis_seed, "vera", factor)
            return decode(basis_bytes(key, 0, 1, self.rank, length)[0], torch.float32)

        m, o = group.targets[0].inputs, group.targets[0].outputs
        return {"a": drawn("A", m).t() * math.sqrt(6 / m), "b": drawn("B", o) * math.sqrt(6 / self.rank)}

    def changes(
        self, group: Group, trained: Mapping[str, Tensor], fixed: Mapping[str, Any], wanted: Container[Target]
    ) -> dict[str, Change]:
        a, b, first = fixed["a"], fixed["b"], group.targets[0]
        d, scales = trained["d"].unsqueeze(-2), trained["b"].unsqueeze(-2)
        if self.rank * (first.inputs + first.outputs) <= first.size:
            return low_rank_changes(group.targets, a * d, b * scales, self.c, wanted)
        return {
            target.name: Dense(target.product(a * d[:, place], b * scales[:, place], self.c))
            for place, target in enumerate(group.targets)
            if target in wanted
        }
