"""NOLA: both low-rank factors are linear combinations of fixed random matrices (ICLR 2024, equation 1)."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from nola_vision.adapters.methods.settings import Scope, Start, Storage
from nola_vision.adapters.random_basis import Basis, basis_bytes, basis_key, combine, decode
from nola_vision.adapters.target import Change, Target, low_rank_changes


class NolaGroup(nn.Module):
    """The changes of all targets of one shape.

        A = (A0 + sum_i alpha_i A_i) / sqrt(m)      [m, r]
        B = (sum_j beta_j B_j) / sqrt(o)            [r, o]

    The A_i, B_j and A0 come from the counter-based generator (`basis.py`); alpha and beta, k and l numbers a target,
    are all that is trained. The normalisers depend on neither, so the first k' matrices of a k-basis are the k'-basis.

    Start: `a0` draws the fixed A0, keyed by the weight's name, and sets every coefficient to zero, so that B = 0 and a
    run starts at the pretrained model exactly. `released` is the authors' code: no A0 and every coefficient 1/k.
    `random` is for weights that start from nothing: no A0, normal coefficients of variance 3/k and 3/l, and a scale of
    `c sqrt(2 m o / (r fan_in))`, so that with c = 1 a change starts with He's variance 2 / fan_in.

    Args:
        targets: targets of equal `inputs` (m) and `outputs` (o).
        num_adapters: n.
        rank: r.
        num_basis: k and l, the matrices that A and B are made of.
        c: the scale's numerator: `scale = c / r`.
        basis_seed: the seed of the basis; a bank of n adapters shares one.
        scope: `shared`: one basis for the shape; `per_layer`: each target has its own, keyed by its name.
        start: `a0`, `released` or `random`.
        generator: draws the coefficients of a random start.
        storage: `cached` keeps the basis as bytes, `streamed` makes it in chunks in forward and again in backward.
        memory_mib: working memory of a streamed chunk.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        num_adapters: int,
        rank: int,
        num_basis: tuple[int, int],
        c: float,
        basis_seed: int,
        scope: Scope,
        start: Start,
        generator: torch.Generator,
        storage: Storage = "cached",
        memory_mib: float = 16.0,
    ) -> None:
        super().__init__()
        self.targets = tuple(targets)
        m, o = targets[0].inputs, targets[0].outputs
        self.rank, self.inputs, self.outputs = rank, m, o
        he = math.sqrt(2 * m * o / (rank * targets[0].fan_in))
        self.scale = c * he if start == "random" else c / rank
        for factor, count in zip("ab", num_basis, strict=True):
            shape = (num_adapters, len(targets), count)
            first = torch.full(shape, 1 / count if start == "released" else 0.0)
            if start == "random":
                first = torch.randn(shape, generator=generator) * math.sqrt(3 / count)
            self.register_parameter(f"coefficients_{factor}", nn.Parameter(first))

        names = [f"shape {m}x{o}"] if scope == "shared" else [f"weight {t.name}" for t in targets]
        # plain attributes: buffers would enter state dicts and be broadcast by DDP
        self.basis_a, self.basis_b = (
            Basis([basis_key(basis_seed, name, f) for name in names], count, rank, length, storage, memory_mib)
            for f, count, length in (("A", num_basis[0], m), ("B", num_basis[1], o))
        )
        self._a0: Tensor | None = None
        if start == "a0":
            drawn = [basis_bytes(basis_key(basis_seed, f"weight {t.name}", "A0"), 0, 1, rank, m) for t in targets]
            self._a0 = torch.cat(drawn).flatten(1)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Moves the basis along with the parameters; its bytes keep their dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = next(self.parameters()).device
        self.basis_a.to(device)
        self.basis_b.to(device)
        self._a0 = None if self._a0 is None else self._a0.to(device)
        return self

    def factors(self, trained: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A `[n, layers, m, r]` and B `[n, layers, r, o]`: one matrix product each for all layers and adapters."""
        a = combine(trained["coefficients_a"], self.basis_a)
        if self._a0 is not None:
            a = a + decode(self._a0, a.dtype)
        b = combine(trained["coefficients_b"], self.basis_b)
        a = a.view(*a.shape[:-1], self.rank, self.inputs).transpose(-1, -2) / math.sqrt(self.inputs)
        return a, b.view(*b.shape[:-1], self.rank, self.outputs) / math.sqrt(self.outputs)

    def changes(self, trained: Mapping[str, Tensor], wanted: Container[Target]) -> dict[str, Change]:
        return low_rank_changes(self.targets, *self.factors(trained), self.scale, wanted)
