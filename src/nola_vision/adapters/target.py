"""A target: one weight of the backbone (or some of its output rows), seen as a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Target:
    """One adapted weight.

    A change is `scale * A @ B` with A `[m, r]` and B `[r, o]` (`inputs` = m, `outputs` = o). For a linear layer m is
    its input size and o the number of adapted output rows, and the weight `[o, m]` receives the transposed product. A
    convolution's 4-D weight is reshaped into one m x o matrix as close to square as its size allows (paper, section 2,
    "Structure of the parameters"), and the product is reshaped back.

    Args:
        weight: the parameter's name in the backbone's state dict, `blocks.0.attn.qkv.weight`.
        modules: names of the modules that use it; more than one where the weight is tied.
        kind: `linear` or `conv`.
        shape: the parameter's whole shape.
        rows: first and last+1 output row that is adapted (Q or V of a fused QKV); None for all.
    """

    weight: str
    modules: tuple[str, ...]
    kind: Literal["linear", "conv"]
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The weight's name, with the adapted rows where it is a part: it keys A0 and the per-layer basis."""
        return self.weight if self.rows is None else f"{self.weight}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def inputs(self) -> int:
        return self.shape[1] if self.kind == "linear" else near_square(math.prod(self.shape))[0]

    @property
    def outputs(self) -> int:
        if self.kind == "conv":
            return near_square(math.prod(self.shape))[1]
        return self.shape[0] if self.rows is None else self.rows[1] - self.rows[0]

    @property
    def group(self) -> str:
        """Targets of one group have factors of one shape and train in the same tensors."""
        return f"{self.inputs}x{self.outputs}"

    def change(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """The change of the adapted rows, `scale * A @ B`, in the weight's layout: `[o, m]` or a convolution's 4-D."""
        if self.kind == "linear":
            return scale * (b.transpose(-1, -2) @ a.transpose(-1, -2))
        return (scale * (a @ b)).reshape(self.shape)


def near_square(size: int) -> tuple[int, int]:
    """The two factors of `size` that are closest to each other, the smaller first."""
    smaller = math.isqrt(size)
    while size % smaller:
        smaller -= 1
    return smaller, size // smaller
