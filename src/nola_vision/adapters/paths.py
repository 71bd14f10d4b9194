"""How an adapted layer computes: a low-rank change of a linear layer takes one of two paths, another change a third."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Origin(NamedTuple):
    """How a layer's input was made: `module(input)`, with nothing random and nothing trained in it.

    The backward pass makes it again instead of holding it: an activation or a layer norm holds its own input anyway.
    `version` is the made tensor's: one that was written to since is not what the module makes.
    """

    module: nn.Module
    input: Tensor
    version: int


class _MergedLinear(torch.autograd.Function):
    """`x (W + scale (A B)')' + bias` without a dense gradient, and no merged weight kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        origin: Origin | None,
    ) -> Tensor:
        xa = None
        if len(_rows(x)) < len(a):
            xa = _thin(x, a)
            y = F.linear(x, weight, bias)
            _rows(y).addmm_(_rows(xa), b, alpha=scale)
        else:
            y = F.linear(x, torch.addmm(weight, b.t(), a.t(), alpha=scale), bias)
        ctx.save_for_backward(x if origin is None else origin.input, weight, a, b, xa)
        ctx.scale, ctx.remake = scale, None if origin is None else origin.module
        # F.linear may give a view of its product, and autograd refuses to write to a Function's view (an in-place ReLU)
        out: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, xa = ctx.saved_tensors
        g = _thin(dy, b.t()).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            if len(_rows(dy)) < len(weight):
                dx = (_rows(dy) @ weight).addmm_(_rows(g), a.t()).view(*dy.shape[:-1], len(a))
            else:
                dx = dy @ torch.addmm(weight, b.t(), a.t(), alpha=ctx.scale)
        x = x if ctx.remake is None else type(ctx.remake).forward(ctx.remake, x)
        da = _summed_product(g, x).t()
        db = _summed_product(_thin(x, a) if xa is None else xa, dy).mul_(ctx.scale)
        dbias = _rows(dy).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, da, db, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _thin(x: Tensor, factor: Tensor) -> Tensor:
    """`x @ factor` for a factor of few columns, which BLAS multiplies fastest when it lies column by column."""
    return F.linear(x, factor.t().contiguous())


def _summed_product(left: Tensor, right: Tensor) -> Tensor:
    """`left' right` `[r, c]`, over all rows of left `[..., r]` and right `[..., c]`.

    A product a sample, and their sum: one product over all rows has too few columns to be shared out well, and took
    1.7 times as long on a ViT-B's fc2.
    """
    if left.dim() <= 2:
        return _rows(left).t() @ _rows(right)
    return (left.transpose(-1, -2) @ right).flatten(0, -3).sum(0)


def merges_exactly(x: Tensor, weight: Tensor) -> bool:
    """Whether the merged path may be taken: in 16 bits a change of 1e-3 of W would mostly be rounded away."""
    exact = weight.dtype in (torch.float32, torch.float64) and not is_quantised(weight)
    return exact and not torch.is_autocast_enabled(x.device.type)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is held as integers (a tensor subclass of torchao's, which passes for a float tensor)."""
    return type(weight) not in (Tensor, nn.Parameter)


def merged_linear(
    x: Tensor, layer: nn.Linear, a: Tensor, b: Tensor, scale: float, origin: Origin | None = None
) -> Tensor:
    """The merged path: the layer with `W + scale (A B)'`, backward through the factors only.

    With x `[..., m]`, W `[o, m]`, A `[m, r]`, B `[r, o]`, dy the gradient of the output and g = scale dy B':
    `dA = x' g`, `dB = scale (x A)' dy`, `dx = dy W + g A'`. In both directions the small product is added to whatever
    is smaller, the weight or what comes out.

    Args:
        x: the layer's input.
        layer: a frozen linear layer.
        a, b, scale: its change.
        origin: what x was made by, if the backward pass shall make it again instead of holding it.
    """
    out: Tensor = _MergedLinear.apply(x, layer.weight, layer.bias, a, b, scale, origin)
    return out


def additive_linear(x: Tensor, layer: nn.Linear, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The additive path: `x W' + bias + scale (x A) B`.

    With A `[batch, m, r]` and B `[batch, r, o]` every sample of x, whose first dimension is then the batch or a
    multiple of it in batch-major order, goes through its own factors.
    """
    y = F.linear(x, layer.weight, layer.bias)
    a, b = a.to(x.dtype), b.to(x.dtype)
    if a.dim() == 2:
        return y + scale * ((x @ a) @ b)
    routed = x.reshape(a.shape[0], -1, x.shape[-1])
    return y + scale * ((routed @ a) @ b).view_as(y)


def dense_change(x: Tensor, layer: nn.Linear | nn.Conv2d, change: Tensor) -> Tensor:
    """The layer with its weight plus a change of the weight's shape; beside it, where the sum would be rounded."""
    if merges_exactly(x, layer.weight):
        return _with_weight(x, layer, layer.weight + change.to(layer.weight.dtype), layer.bias)
    return _with_weight(x, layer, layer.weight, layer.bias) + _with_weight(x, layer, change.to(x.dtype), None)


def _with_weight(x: Tensor, layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    out: Tensor = layer._conv_forward(x, weight, bias)
    return out
