"""LoRA (Hu et al., 2021): both low-rank factors are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nola_vision.adapters.target import Target


class LoraFactors(nn.Module):
    """The factors of all targets of one shape, trained as they are.

    A starts uniform in (-1/sqrt(m), 1/sqrt(m)), as in PEFT (`kaiming_uniform_` with a = sqrt(5)); B starts at zero, so
    a run starts at the pretrained model exactly.

    Args:
        targets: targets of equal `inputs` (m) and `outputs` (o).
        num_adapters: n.
        rank: r.
        c: the scale's numerator (PEFT's `lora_alpha`): `scale = c / r`.
        generator: draws A.
    """

    def __init__(
        self, targets: Sequence[Target], num_adapters: int, rank: int, c: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        m, o = targets[0].inputs, targets[0].outputs
        self.scale = c / rank
        drawn = torch.rand(num_adapters, len(targets), m, rank, generator=generator)
        self.a = nn.Parameter((2 * drawn - 1) / math.sqrt(m))
        self.b = nn.Parameter(torch.zeros(num_adapters, len(targets), rank, o))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `[n, layers, m, r]` and B `[n, layers, r, o]`."""
        return self.a, self.b
