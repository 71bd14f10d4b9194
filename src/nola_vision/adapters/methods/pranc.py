"""PRANC (Nooralinejad et al., ICCV 2023): weights are one linear combination of fixed random vectors."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from nola_vision.adapters.methods.settings import Storage
from nola_vision.adapters.random_basis import Basis, basis_key, combine
from nola_vision.adapters.target import Change, Dense, Target


class PrancGroup(nn.Module):
    """The changes of some targets that share one vector of coefficients.

        change = c sqrt(2 / fan_in) sum_i alpha_i P_i

    P_i, of the weight's size, comes from the counter-based generator (`basis.py`), keyed by the weight's name; alpha, k
    numbers for all targets of the group together, is all that is trained. One group of all targets is PRANC's own
    scope (the whole model is one combination); a group for each target is scope `layer`.

    Alpha starts at zero; from scratch it starts normal with variance 3/k, so that with c = 1 a change starts with He's
    variance 2 / fan_in.

    Args:
        targets: any targets.
        num_adapters: n.
        num_basis: k.
        c: the scale.
        basis_seed: the seed of the basis.
        generator: draws alpha from scratch.
        from_scratch: the weights start from nothing.
        storage: `cached` keeps the basis as bytes (k times the weights), `streamed` makes it in chunks at every use.
        memory_mib: working memory of a streamed chunk.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        num_adapters: int,
        num_basis: int,
        c: float,
        basis_seed: int,
        generator: torch.Generator,
        from_scratch: bool = False,
        storage: Storage = "cached",
        memory_mib: float = 16.0,
    ) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.scales = [c * math.sqrt(2 / target.fan_in) for target in targets]
        first = torch.zeros(num_adapters, num_basis)
        if from_scratch:
            first = torch.randn(first.shape, generator=generator) * math.sqrt(3 / num_basis)
        self.coefficients = nn.Parameter(first)
        self.bases = [
            Basis([basis_key(basis_seed, f"weight {t.name}", "P")], num_basis, 1, t.size, storage, memory_mib)
            for t in targets
        ]

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for basis in self.bases:
            basis.to(self.coefficients.device)
        return self

    def changes(self, trained: Mapping[str, Tensor], wanted: Container[Target]) -> dict[str, Change]:
        return {
            target.name: Dense(target.layout(scale * combine(trained["coefficients"], basis)))
            for target, scale, basis in zip(self.targets, self.scales, self.bases, strict=True)
            if target in wanted
        }
