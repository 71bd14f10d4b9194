"""How much of the space of weights a parameterisation reaches (paper, Figure 2)."""

from __future__ import annotations

from typing import Literal

import torch

from nola_vision.adapters.methods.base import Method, Source
from nola_vision.adapters.methods.nola import NOLA
from nola_vision.adapters.methods.pranc import PRANC
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
    source = Source(side * side + side, basis_seed, "random", torch.Generator().manual_seed(seed))
    settings: Method = PRANC(num_basis=parameters)
    if method == "nola":
        settings = NOLA(rank=rank, num_basis=parameters // 2, c=1.0, start="random")
    (group,) = settings.groups([target])
    trained = {name: values.double() for name, values in settings.initial(group, source).items()}
    change = settings.changes(group, trained, settings.fixed(group, source), [target])[target.name]
    sampled = dense(target, change).flatten(1)
    return int(torch.linalg.matrix_rank(sampled - sampled.mean(0))) / side**2
