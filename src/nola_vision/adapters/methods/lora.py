"""LoRA (Hu et al., 2021): both low-rank factors are trained."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor, nn

from nola_vision.adapters.target import Change, Target, low_rank_changes


class LoraGroup(nn.Module):
    """The changes of all targets of one shape, their factors trained as they are.

    A starts uniform in (-1/sqrt(m), 1/sqrt(m)), as in PEFT (`kaiming_uniform_` with a = sqrt(5)); B starts at zero, so
    a run starts at the pretrained model exactly. With `from_scratch` both start normal, of variance 1/m and 1/o, and
    the scale is `c sqrt(2 m o / (r fan_in))`, so that with c = 1 a change starts with He's variance 2 / fan_in.

    Args:
        targets: targets of equal `inputs` (m) and `outputs` (o).
        num_adapters: n.
        rank: r.
        c: the scale's numerator (PEFT's `lora_alpha`): `scale = c / r`.
        generator: draws A.
        from_scratch: the weights start from nothing.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        num_adapters: int,
        rank: int,
        c: float,
        generator: torch.Generator,
        from_scratch: bool = False,
    ) -> None:
        super().__init__()
        self.targets = tuple(targets)
        m, o = targets[0].inputs, targets[0].outputs
        self.scale = c * math.sqrt(2 * m * o / (rank * targets[0].fan_in)) if from_scratch else c / rank
        shape_a, shape_b = (num_adapters, len(targets), m, rank), (num_adapters, len(targets), rank, o)
        if from_scratch:
            a, b = (torch.randn(shape, generator=generator) for shape in (shape_a, shape_b))
            self.a, self.b = nn.Parameter(a / math.sqrt(m)), nn.Parameter(b / math.sqrt(o))
        else:
            drawn = torch.rand(shape_a, generator=generator)
            self.a, self.b = nn.Parameter((2 * drawn - 1) / math.sqrt(m)), nn.Parameter(torch.zeros(shape_b))

    def changes(self, trained: Mapping[str, Tensor], wanted: Container[Target]) -> dict[str, Change]:
        return low_rank_changes(self.targets, trained["a"], trained["b"], self.scale, wanted)
