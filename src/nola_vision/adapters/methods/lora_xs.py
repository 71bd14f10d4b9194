"""LoRA-XS (Balazy et al., 2024): a small matrix between fixed factors that come from the weight's own SVD."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nola_vision.adapters.methods.base import (
    Adapter,
    Group,
    Method,
    Source,
    by_shape,
    check_positive,
    check_rank,
    refuse_head,
)
from nola_vision.adapters.methods.registry import register
from nola_vision.adapters.target import Change, Target, low_rank_changes
from nola_vision.common.errors import NolaVisionError

if TYPE_CHECKING:
    from torch import Tensor

# Least gap between consecutive squared singular values, as a share of the largest. Float64 rounding turns singular
# vectors by about 1e-15 / gap: at this limit by 1e-8, which is below the rounding of the float32 factors.
_LEAST_GAP = 1e-7


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


# --- the singular vectors, which TinyLoRA has too ---------------------------------------------------------------------


def svd_factors(method: Method, rank: int, group: Group, source: Source) -> list[tuple[Tensor, Tensor]]:
    """A `[m, r]` and B `[r, o]` of each target of a group, see `LoRAXS`.

    Raises:
        NolaVisionError: the singular vectors of a target are not determined, or it has values that are not finite.
    """
    factors = [_factors(target, source.weight(target), rank) for target in group.targets]
    determined = [most for _, _, most in factors]
    if not source.loading and (most := min(determined)) < rank:
        raise NolaVisionError(
            f"rank {rank} of {type(method).__name__} is not possible for {group.targets[determined.index(most)].name}: "
            f"its singular value {most + 1} is zero or almost equal to the next, so singular vectors are not "
            f"determined: " + (f"use a rank of at most {most}" if most else "leave it out of the targets")
        )
    return [(a, b) for a, b, _ in factors]


def projected(factor: str, matrices: Tensor) -> Tensor:
    """The sketch `[layers]` of factors `[layers, r, length]`: the sum of each times one fixed random matrix."""
    import torch

    from nola_vision.adapters.random_basis import basis_bytes, basis_key, decode

    rank, length = matrices.shape[1:]
    drawn = basis_bytes(basis_key(0, "sketch", factor), 0, 1, rank, length, device=matrices.device)
    return (matrices.double() * decode(drawn, torch.float64)).sum((1, 2)).float()


def _factors(target: Target, weight: Tensor, rank: int) -> tuple[Tensor, Tensor, int]:
    """A `[m, r]` and B `[r, o]` of a weight, and the largest rank whose singular vectors are all determined.

    The smaller Gram matrix has the same singular vectors and takes a tenth of the time of `torch.linalg.svd`: 0.2
    seconds instead of 1.9 for 768 x 3072 on one core.
    """
    import torch

    weight = weight.double()
    wide = weight.shape[0] <= weight.shape[1]
    try:
        squares, vectors = torch.linalg.eigh(weight @ weight.t() if wide else weight.t() @ weight)
    except RuntimeError as error:  # torch.linalg.LinAlgError
        raise NolaVisionError(
            f"cannot compute the singular vectors of {target.name} ({weight.isfinite().logical_not().sum()} of its "
            "values are not finite): use other weights"
        ) from error
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)[:, :rank]
    # A = U S = W V and B = V^T; the vectors of unit length decide the sign
    if wide:
        u, sizes = vectors, squares[:rank].sqrt()
        a, b = u * sizes, (weight.t() @ u / sizes).t()
    else:
        a, b = weight @ vectors, vectors.t()
        u = a
    # the entries of a vector with a symmetry may be equal up to rounding: the first of them decides
    first = (u.abs() >= (1 - 1e-6) * u.abs().amax(0)).int().argmax(0)
    sign = u.gather(0, first.unsqueeze(0)).sign()
    close = squares - torch.cat([squares[1:], squares.new_zeros(1)]) <= _LEAST_GAP * squares[0]
    determined = int(close.int().argmax()) if bool(close.any()) else len(close)
    return (sign * a).float(), (sign.t() * b).float(), determined
