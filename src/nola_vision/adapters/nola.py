"""NOLA: both low-rank factors are linear combinations of fixed random matrices (ICLR 2024, equation 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nola_vision.adapters.basis import basis_bytes, basis_key, combine, decode
from nola_vision.adapters.target import Target

Scope = Literal["shared", "per_layer"]
Start = Literal["a0", "released"]


class NolaFactors(nn.Module):
    """The factors of all targets of one shape.

        A = (A0 + sum_i alpha_i A_i) / sqrt(m)      [m, r]
        B = (sum_j beta_j B_j) / sqrt(o)            [r, o]

    The A_i, B_j and A0 come from the counter-based generator (`basis.py`); alpha and beta, k numbers each, are all that
    is trained. The normalisers do not depend on k, so the first k' matrices of a k-basis are the k'-basis.

    Start: `a0` draws the fixed A0, keyed by the weight's name, and sets every coefficient to zero, so that B = 0 and a
    run starts at the pretrained model exactly. `released` is the authors' code: no A0 and every coefficient 1/k.

    Args:
        targets: targets of equal `inputs` (m) and `outputs` (o).
        num_adapters: n.
        rank: r.
        num_basis: k, for each of the two factors.
        c: the scale's numerator: `scale = c / r`.
        basis_seed: the seed of the basis; a bank of n adapters shares one.
        scope: `shared`: one basis for the shape; `per_layer`: each target has its own, keyed by its name.
        start: `a0` or `released`.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        num_adapters: int,
        rank: int,
        num_basis: int,
        c: float,
        basis_seed: int,
        scope: Scope,
        start: Start,
    ) -> None:
        super().__init__()
        m, o = targets[0].inputs, targets[0].outputs
        self.rank, self.scale = rank, c / rank
        self.inputs, self.outputs = m, o
        first = 0.0 if start == "a0" else 1 / num_basis
        shape = (num_adapters, len(targets), num_basis)
        self.coefficients_a = nn.Parameter(torch.full(shape, first))
        self.coefficients_b = nn.Parameter(torch.full(shape, first))

        identities = [f"shape {m}x{o}"] if scope == "shared" else [f"weight {t.name}" for t in targets]
        # plain attributes: buffers would enter state dicts and be broadcast by DDP
        self._basis_a = self._cached(identities, "A", num_basis, m, basis_seed)
        self._basis_b = self._cached(identities, "B", num_basis, o, basis_seed)
        self._a0: Tensor | None = None
        if start == "a0":
            drawn = [basis_bytes(basis_key(basis_seed, f"weight {t.name}", "A0"), 0, 1, rank, m) for t in targets]
            self._a0 = torch.cat(drawn).flatten(1)

    def _cached(self, identities: Sequence[str], factor: str, num_basis: int, length: int, seed: int) -> Tensor:
        """The basis as bytes: `[k, r * length]` when shared, `[layers, k, r * length]` when each layer has its own."""
        made = [basis_bytes(basis_key(seed, i, factor), 0, num_basis, self.rank, length).flatten(1) for i in identities]
        return made[0] if len(identities) == 1 else torch.stack(made)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Moves the basis along with the parameters; its bytes keep their dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.coefficients_a.device
        self._basis_a, self._basis_b = self._basis_a.to(device), self._basis_b.to(device)
        self._a0 = None if self._a0 is None else self._a0.to(device)
        return self

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `[n, layers, m, r]` and B `[n, layers, r, o]`: one matrix product each for all layers and adapters."""
        a = _mix(self.coefficients_a, self._basis_a)
        if self._a0 is not None:
            a = a + decode(self._a0, a.dtype)
        b = _mix(self.coefficients_b, self._basis_b)
        a = a.view(*a.shape[:-1], self.rank, self.inputs).transpose(-1, -2) / math.sqrt(self.inputs)
        return a, b.view(*b.shape[:-1], self.rank, self.outputs) / math.sqrt(self.outputs)


def _mix(coefficients: Tensor, stored: Tensor) -> Tensor:
    """`[n, layers, k]` coefficients and the stored basis to `[n, layers, size]`."""
    if stored.dim() == 2:
        return combine(coefficients, stored)
    return combine(coefficients.transpose(0, 1), stored).transpose(0, 1).contiguous()
