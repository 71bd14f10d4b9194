"""The running mean of what a head takes, from which its bias is corrected when its matrix is rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nola_vision.common.errors import NolaVisionError


class MeanFeatures:
    """The mean `[features]` over about the last n training batches, where an epoch has n.

    With t the number of batches so far, the mean m and a batch's mean x:

        m += (x - m) / min(t, n)

    which is the mean of all batches in the first epoch. Before the first batch it is 0. Everything stays on the device
    of the features; a batch that is not finite, as where a loss scale is too large, is left out.
    """

    def __init__(self, width: int) -> None:
        self.value, self.count = torch.zeros(width), torch.zeros(())

    def update(self, features: Tensor, n: int) -> None:
        """Adds a batch `[batch, features]`."""
        batch = features.detach().float().mean(0)
        value, count, finite = self.value.to(batch.device), self.count.to(batch.device), batch.isfinite().all()
        self.count = count + finite
        share = finite / self.count.clamp(1, n)
        self.value = value + share * (batch.nan_to_num(0.0, 0.0, 0.0) - value)

    def clear(self) -> None:
        """Starts again."""
        self.value, self.count = torch.zeros_like(self.value), torch.zeros_like(self.count)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint stores."""
        return {"value": self.value, "count": self.count}

    def load(self, state: Any) -> None:
        """Takes what a checkpoint stored; None, of an earlier version, starts again.

        Raises:
            NolaVisionError: it is not what `state` returns.
        """
        if state is None:
            return self.clear()
        for name, own in self.state().items():
            stored = state.get(name) if isinstance(state, dict) else None
            if (
                not isinstance(stored, Tensor)
                or (stored.dtype, stored.layout, stored.shape) != (own.dtype, torch.strided, own.shape)
                or stored.is_meta
                or not stored.isfinite().all()
            ):
                raise NolaVisionError(f"the checkpoint is damaged (its mean_features.{name}): give another one")
        self.value, self.count = state["value"].detach().clone(), state["count"].detach().clone()
