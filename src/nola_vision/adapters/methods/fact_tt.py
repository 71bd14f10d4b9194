"""FacT-TT (Jie & Deng, AAAI 2023): all weights share two trained factors, and each has a small trained core."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nola_vision.adapters.methods.base import Adapter, Group, Source, check_positive, refuse_head
from nola_vision.adapters.methods.registry import register
from nola_vision.adapters.target import Change, LowRank, Target
from nola_vision.common.errors import NolaVisionError

if TYPE_CHECKING:
    from torch import Tensor


@register
@dataclass(frozen=True, kw_only=True)
class FacT(Adapter):
    """FacT-TT (Jie & Deng, AAAI 2023, arXiv:2212.03145): factors shared by all layers, and a core for each piece.

        W = [W_ij], pieces of d x d                 d: the greatest common divisor of all targets' sides
        W_ij + c U Sigma_ij V                       U [d, r], Sigma_ij [r, r], V [r, d]

    As in the authors' code, a weight is divided into square pieces, so that weights of all shapes share U and V: in a
    ViT d is its width, the query, key and value are one piece each, and the weights of the MLP have four. `u [r, d]`
    (transposed), `v [r, d]` and `core [pieces, r, r]` are trained: 2 r d values, and r^2 per piece.

    V starts at zero, so training starts at the pretrained model exactly. U and the cores start uniform in
    +-1/sqrt(d) and +-1/sqrt(r), as `nn.Linear` does in the authors' code (which has 1/sqrt(4 r) for the cores of an
    MLP's second layer, and drops out a tenth of what U and the core give; dropout is left out here).

    Args:
        targets: names of the adapted weights; not `head`.
        rank: r, at most d.
        c: the scale; the authors choose it per task from 0.01, 0.1, 1, 10 and 100.
    """

    targets: Sequence[str] | str = ("qkv", "mlp")
    rank: int = 8
    c: float = 1.0

    uses_basis_seed = False
    size_setting = "rank"

    def check(self) -> None:
        super().check()
        check_positive(self, "c")

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        refuse_head(self, targets, "its shape has no divisor in common with the others")
        side = math.gcd(*(side for target in targets for side in (target.inputs, target.outputs)))
        if not 1 <= self.rank <= side:
            raise NolaVisionError(
                f"rank {self.rank} of FacT is not possible: {side} is the greatest common divisor of the targets' "
                f"sides, so use a rank from 1 to {side}, or other targets"
            )
        pieces = sum(target.inputs // side * (target.outputs // side) for target in targets)
        shapes = {"u": (self.rank, side), "v": (self.rank, side), "core": (pieces, self.rank, self.rank)}
        return [Group("model", tuple(targets), shapes)]

    def initial(self, group: Group, source: Source) -> dict[str, Tensor]:
        import torch

        if source.base == "zero":
            raise NolaVisionError("FacT on base zero would never move, since V starts at zero: use NOLA or LoRA")
        shapes = {name: (source.num_adapters, *shape) for name, shape in group.shapes.items()}
        u, core = (
            (2 * torch.rand(shapes[name], generator=source.draws) - 1) / math.sqrt(shapes[name][-1])
            for name in ("u", "core")
        )
        return {"u": u, "v": torch.zeros(shapes["v"]), "core": core}

    def changes(
        self, group: Group, trained: Mapping[str, Tensor], fixed: Mapping[str, object], wanted: Container[Target]
    ) -> dict[str, Change]:
        u, v, cores, made = trained["u"], trained["v"], trained["core"], dict[str, Change]()
        for target in group.targets:
            rows, columns = target.inputs // u.shape[-1], target.outputs // u.shape[-1]
            core, cores = cores.tensor_split((rows * columns,), 1)
            if target in wanted:
                core = core.reshape(len(u), rows, columns, *core.shape[2:])
                made[target.name] = LowRank(*_factors(u, core, v), self.c)
        return made


def _factors(u: Tensor, core: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A `[n, i d, q]` and B `[n, q, j d]` of a weight of i x j pieces, q = min(i, j) r.

    Args:
        u, v: `[n, r, d]`.
        core: `[n, i, j, r, r]`.
    """
    import torch

    rows, columns = core.shape[1:3]
    repeated = torch.eye(min(rows, columns), dtype=u.dtype, device=u.device)  # a factor, along the diagonal
    if rows <= columns:
        a, b = torch.einsum("xy,nrd->nxdyr", repeated, u), torch.einsum("nxyrs,nsd->nxryd", core, v)
    else:
        a, b = torch.einsum("nxyrs,nrd->nxdys", core, u), torch.einsum("xy,nsd->nxsyd", repeated, v)
    return a.flatten(3).flatten(1, 2), b.flatten(3).flatten(1, 2)
