"""How an adapted layer computes: a low-rank change of a linear layer takes one of two paths, another change a third."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _MergedLinear(torch.autograd.Function):
    """`x (W + scale (A B)')' + bias` without a dense gradient, and no merged weight kept for the backward pass."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        return F.linear(x, torch.addmm(weight, b.t(), a.t(), alpha=scale), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, a, b, scale = inputs
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        flat_x, flat_dy = x.flatten(0, -2), dy.flatten(0, -2)
        g = (flat_dy @ b.t()).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (flat_dy @ weight).addmm_(g, a.t()).view_as(x)
        dbias = flat_dy.sum(0) if ctx.needs_input_grad[2] else None
        da = (g.t() @ flat_x).t()  # as a product with a wide result: the tall one, x' g, takes nine times as long
        db = ((flat_x @ a).t() @ flat_dy).mul_(ctx.scale)
        return dx, None, dbias, da, db, None


def merges_exactly(x: Tensor, weight: Tensor) -> bool:
    """Whether the merged path may be taken: in 16 bits a change of 1e-3 of W would mostly be rounded away."""
    exact = weight.dtype in (torch.float32, torch.float64) and not is_quantised(weight)
    return exact and not torch.is_autocast_enabled(x.device.type)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is held as integers (a tensor subclass of torchao's, which passes for a float tensor)."""
    return type(weight) not in (Tensor, nn.Parameter)


def merged_linear(x: Tensor, layer: nn.Linear, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The merged path: forward with `W + scale (A B)'` made by one small product, backward through the factors only.

    With x `[..., m]`, W `[o, m]`, A `[m, r]`, B `[r, o]`, dy the gradient of the output and g = scale dy B':
    `dA = x' g`, `dB = scale (x A)' dy`, `dx = dy W + g A'`.
    """
    out: Tensor = _MergedLinear.apply(x, layer.weight, layer.bias, a, b, scale)
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
    """The layer with its weight plus a change of the weight's shape."""
    if is_quantised(layer.weight):
        return F.linear(x, layer.weight, layer.bias) + F.linear(x, change.to(x.dtype))
    weight = layer.weight + change.to(layer.weight.dtype)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    out: Tensor = layer._conv_forward(x, weight, layer.bias)
    return out
