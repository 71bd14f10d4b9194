"""How much of the space of weights a parameterisation reaches (paper, Figure 2)."""

from __future__ import annotations

from typing import Literal

import torch

from nola_vision.adapters.methods.nola import NolaGroup
from nola_vision.adapters.methods.pranc import PrancGroup
from nola_vision.adapters.target import Target, dense


def coverage(
    method: Literal["nola", "pranc"], side: int, parameters: int, rank: int = 4, basis_seed: int = 0, seed: int = 0
) -> float:
    """Rank of the covariance of sampled changes of a d x d weight, over d*d: 1 where they span the whole space.

    PRANC's n coefficients reach an n-dimensional subspace, min(n, d*d) / (d*d). NOLA's changes are products, and
    reach more dimensions than they have parameters.

    Args:
        method: `nola`, with k = l = n / 2, or `pranc`.
        side: d.
        parameters: n, an even number for NOLA.
        rank: NOLA's r.
        basis_seed: the seed of the basis.
        seed: draws the coefficients of the samples, d*d + d of them, normal.
    """
    target = Target("weight", (), "linear", (side, side))
    draws = torch.Generator().manual_seed(seed)
    samples = side * side + side
    group: NolaGroup | PrancGroup
    if method == "nola":
        k = parameters // 2
        group = NolaGroup([target], samples, rank, (k, k), 1.0, basis_seed, "shared", "random", draws)
    else:
        group = PrancGroup([target], samples, parameters, 1.0, basis_seed, draws, from_scratch=True)
    trained = {name: p.detach().double() for name, p in group.named_parameters()}
    sampled = dense(target, group.changes(trained, [target])[target.name]).flatten(1)
    return int(torch.linalg.matrix_rank(sampled - sampled.mean(0))) / side**2
