"""HashedNet (Chen et al., ICML 2015): weights share trained numbers, the buckets, that a hash assigns."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from nola_vision.adapters.random_basis import basis_key, buckets
from nola_vision.adapters.target import Change, Dense, Target


class HashedGroup(nn.Module):
    """The change of one target whose weights share k numbers.

        change_p = c sqrt(2 / fan_in) s(p) w[h(p)]

    Bucket h(p) and sign s(p) of weight p come from the counter-based generator (`basis.buckets`), keyed by the
    weight's name; w, k numbers, is all that is trained. w starts at zero; from scratch it starts normal with variance
    1, so that with c = 1 a change starts with He's variance 2 / fan_in.

    Args:
        target: the target.
        num_adapters: n.
        num_buckets: k.
        c: the scale.
        basis_seed: the seed of the hash.
        generator: draws w from scratch.
        from_scratch: the weights start from nothing.
    """

    def __init__(
        self,
        target: Target,
        num_adapters: int,
        num_buckets: int,
        c: float,
        basis_seed: int,
        generator: torch.Generator,
        from_scratch: bool = False,
    ) -> None:
        super().__init__()
        self.targets = (target,)
        self.scale = c * math.sqrt(2 / target.fan_in)
        shape = num_adapters, num_buckets
        first = torch.randn(shape, generator=generator) if from_scratch else torch.zeros(shape)
        self.buckets = nn.Parameter(first)
        key = basis_key(basis_seed, f"weight {target.name}", "hash")
        self._bucket, sign = buckets(key, target.size, num_buckets)
        self._sign = sign * self.scale

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._bucket, self._sign = self._bucket.to(self.buckets.device), self._sign.to(self.buckets.device)
        return self

    def changes(self, trained: Mapping[str, Tensor], wanted: Container[Target]) -> dict[str, Change]:
        (target,) = self.targets
        return {target.name: Dense(target.layout(trained["buckets"][:, self._bucket] * self._sign))}
