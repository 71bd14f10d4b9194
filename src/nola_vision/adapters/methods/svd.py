"""Fixed factors from the SVD of a frozen weight, and their sketch in a file: for LoRA-XS and TinyLoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nola_vision.adapters.methods.base import Group, Method, Source
from nola_vision.adapters.target import Target
from nola_vision.common.errors import NolaVisionError

if TYPE_CHECKING:
    from torch import Tensor

# Least gap between consecutive squared singular values, as a share of the largest. Float64 rounding turns singular
# vectors by about 1e-15 / gap: at this limit by 1e-8, which is below the rounding of the float32 factors.
_LEAST_GAP = 1e-7


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
