"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nola_vision.adapters.methods.base import Method, check_positive
from nola_vision.adapters.methods.registry import register

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
@dataclass(frozen=True)
class FullFinetune(Method):
    """Every weight of the backbone and the head are trained; the adapter file contains all of them.

    Args:
        lr: learning rate of the backbone.
        head_lr: learning rate of the head; the same as `lr` if not given.
    """

    lr: float = 5e-5
    head_lr: float | None = None

    trains_backbone = True

    def check(self) -> None:
        check_positive(self, "lr", "head_lr")

    @property
    def learning_rates(self) -> tuple[float, float]:
        return self.lr, self.lr if self.head_lr is None else self.head_lr

    def unfreeze(self, backbone: nn.Module) -> None:
        backbone.requires_grad_(True)

    def trained_in_backbone(self, backbone: nn.Module) -> dict[str, Tensor]:
        return backbone.state_dict()
