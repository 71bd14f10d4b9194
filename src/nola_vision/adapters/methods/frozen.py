"""The three methods on frozen features; `training.frozen` fits them, `docs/frozen-features.md` has the formulas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from nola_vision.adapters.methods.base import FrozenMethod, check_bits
from nola_vision.adapters.methods.registry import register


@register
@dataclass(frozen=True)
class NearestNeighbor(FrozenMethod):
    """1-NN, no training: the label of the training image whose features have the largest cosine with the image's."""

    savable = False  # it compares with every training image


@dataclass(frozen=True)
class _FittedHead(FrozenMethod):
    head_bits: int = 32

    def check(self) -> None:
        check_bits(f"head_bits of {type(self).__name__}", self.head_bits)

    @property
    def stored_bits(self) -> tuple[int, int]:
        return 32, self.head_bits

    def with_bits(self, bits: int, head_bits: int) -> Self:
        return replace(self, head_bits=head_bits)


@register
@dataclass(frozen=True)
class NearestMean(_FittedHead):
    """The class whose mean of unit features has the largest cosine with the image's features.

    Args:
        head_bits: bits per stored value of the head's matrix.
    """


@register
@dataclass(frozen=True)
class LogisticRegression(_FittedHead):
    """Multinomial logistic regression on the frozen features; its penalty is chosen inside the training images.

    Args:
        head_bits: bits per stored value of the head's matrix.
    """

    regularised = True
