"""A target: one weight of the backbone (or some of its output rows), seen as a matrix; and a change of it.

It computes with tensors without importing torch, so that methods can be checked before torch is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "head"  # the name of the classifier as a target


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
        if self.name == HEAD:
            return HEAD
        return f"{self.inputs}x{self.outputs}" + (f"/{self.fan_in}" if self.kind == "conv" else "")

    @property
    def fan_in(self) -> int:
        """Inputs of one output: what He's initialisation divides by."""
        return math.prod(self.shape[1:])

    @property
    def size(self) -> int:
        """Number of values that are adapted."""
        return self.inputs * self.outputs

    def product(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """`scale * A @ B` of the adapted rows in the weight's layout: `[..., o, m]`, or a convolution's 4-D."""
        if self.kind == "linear":
            return scale * (b.transpose(-1, -2) @ a.transpose(-1, -2))
        return (scale * (a @ b)).reshape(*a.shape[:-2], *self.shape)

    def layout(self, flat: Tensor) -> Tensor:
        """Flat values `[..., size]` in the weight's layout."""
        rows = self.shape[:1] if self.rows is None else (self.outputs,)
        return flat.reshape(*flat.shape[:-1], *rows, *self.shape[1:])


class LowRank(NamedTuple):
    """A change `scale * A @ B`: A `[m, r]`, B `[r, o]`, both with n in front where there are several adapters."""

    a: Tensor
    b: Tensor
    scale: float


class Dense(NamedTuple):
    """A change in the weight's layout, with n in front where there are several adapters."""

    value: Tensor


Change = LowRank | Dense


def dense(target: Target, change: Change) -> Tensor:
    """A change in the weight's layout."""
    return target.product(*change) if isinstance(change, LowRank) else change.value


def whole(targets: Sequence[Target], changes: Sequence[LowRank]) -> LowRank:
    """The change of a linear layer from those of its parts: A side by side, each B padded with zeros to all outputs.

    Args:
        targets: one for the whole weight, or several for some rows each.
        changes: theirs, of one scale.
    """
    import torch
    import torch.nn.functional as F

    if targets[0].rows is None:
        return changes[0]
    outputs, rows = targets[0].shape[0], [cast(tuple[int, int], target.rows) for target in targets]
    padded = [F.pad(c.b, (first, outputs - last)) for c, (first, last) in zip(changes, rows, strict=True)]
    return LowRank(torch.cat([c.a for c in changes], dim=-1), torch.cat(padded, dim=-2), changes[0].scale)


def whole_dense(targets: Sequence[Target], changes: Sequence[Change]) -> Tensor:
    """The change of a layer's whole weight, in the weight's layout, from those of its parts."""
    import torch
    import torch.nn.functional as F

    if targets[0].rows is None:
        return dense(targets[0], changes[0])
    parts = []
    for target, change in zip(targets, changes, strict=True):
        first, last = cast(tuple[int, int], target.rows)
        parts.append(F.pad(dense(target, change), (0, 0, first, target.shape[0] - last)))
    return torch.stack(parts).sum(0)


def he_scale(c: float, rank: int, target: Target) -> float:
    """The scale of `A @ B` whose entries have variances 1/m and 1/o that gives He's variance 2 / fan_in for c = 1."""
    return c * math.sqrt(2 * target.inputs * target.outputs / (rank * target.fan_in))


def low_rank_changes(
    targets: Sequence[Target], a: Tensor, b: Tensor, scale: float, wanted: Container[Target]
) -> dict[str, Change]:
    """The changes of targets whose factors are stacked: A `[n, targets, m, r]`, B `[n, targets, r, o]`."""
    pairs = zip(targets, a.unbind(1), b.unbind(1), strict=True)
    return {target.name: LowRank(one, other, scale) for target, one, other in pairs if target in wanted}


def near_square(size: int) -> tuple[int, int]:
    """The two factors of `size` that are closest to each other, the smaller first."""
    smaller = math.isqrt(size)
    while size % smaller:
        smaller -= 1
    return smaller, size // smaller
