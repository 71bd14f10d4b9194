"""The linear probe: only the head is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from nola_vision.adapters.methods.base import Method, check_bits, check_positive
from nola_vision.adapters.methods.registry import register


@register
@dataclass(frozen=True)
class LinearProbe(Method):
    """Only the head is trained, on the frozen backbone's features: `head.weight [classes, features]` and its bias.

    Args:
        lr: learning rate of the head.
        head_bits: bits per stored value of the head's matrix.
    """

    lr: float = 5e-3
    head_bits: int = 32

    trains_only_head = True
    uses_basis_seed = False

    def check(self) -> None:
        check_positive(self, "lr")
        check_bits("head_bits of LinearProbe", self.head_bits)

    @property
    def stored_bits(self) -> tuple[int, int]:
        return 32, self.head_bits

    @property
    def learning_rates(self) -> tuple[float, float]:
        return self.lr, self.lr

    def with_bits(self, bits: int, head_bits: int) -> Self:
        return replace(self, head_bits=head_bits)
