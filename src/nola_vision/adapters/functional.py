"""How an adapted layer computes: a low-rank change of a linear layer takes one of two paths, another change a third."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_CHEAP = (nn.GELU, nn.SiLU, nn.LayerNorm)  # next to a linear layer


class Producer(NamedTuple):
    """The op that produced a layer's input, so that the backward pass can recompute it: `module(input)`.

    The op is deterministic and its parameters are frozen. Recomputing costs no extra memory: an activation or a layer
    norm keeps its input anyway. Invalid if the produced tensor was modified in place: `version` is its version when it
    was produced.
    """

    module: nn.Module
    input: Tensor
    version: int


def can_recompute(module: nn.Module) -> bool:
    """Whether a layer's output is a cheap function of its input alone: torch's or timm's own layer, not in place."""
    known = isinstance(module, _CHEAP) and type(module).__module__.partition(".")[0] in ("torch", "timm")
    return known and not getattr(module, "inplace", False)


def record_producer(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """A forward hook that records on a layer's output how to recompute it."""
    if torch.compiler.is_compiling():  # a compiler decides itself what to recompute
        return
    alone = len(module._forward_hooks) == 1 and not module._forward_pre_hooks  # other hooks may change the output
    if alone and len(args) == 1 and output.requires_grad:
        output._nola_vision_producer = Producer(module, args[0], output._version)  # type: ignore[attr-defined]


def producer(x: Tensor) -> Producer | None:
    """What produced a layer's input, if the backward pass can recompute it."""
    found: Producer | None = None if torch.compiler.is_compiling() else getattr(x, "_nola_vision_producer", None)
    return found if found is not None and found.version == x._version else None


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
        made_by: Producer | None,
    ) -> Tensor:
        xa = None
        if len(_rows(x)) < len(a):
            xa = _thin(x, a)
            y = F.linear(x, weight, bias)
            _rows(y).addmm_(_rows(xa), b, alpha=scale)
        else:
            y = F.linear(x, torch.addmm(weight, b.t(), a.t(), alpha=scale), bias)
        ctx.save_for_backward(x if made_by is None else made_by.input, weight, a, b, xa)
        ctx.scale, ctx.recompute = scale, None if made_by is None else made_by.module
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
        x = x if ctx.recompute is None else type(ctx.recompute).forward(ctx.recompute, x)
        da = _summed_product(g, x).t()
        db = _summed_product(_thin(x, a) if xa is None else xa, dy).mul_(ctx.scale)
        dbias = _rows(dy).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, da, db, None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _column_major(factor: Tensor) -> Tensor:
    """A factor of few columns, `[..., m, r]`, in the order in which `x @ factor` is fastest: in 16 bits, in any."""
    return factor.mT.contiguous().mT if factor.dtype == torch.float32 else factor


def _thin(x: Tensor, factor: Tensor) -> Tensor:
    """`x @ factor` for a factor of few columns."""
    return F.linear(x, factor.t().contiguous())


def _summed_product(left: Tensor, right: Tensor) -> Tensor:
    """`left' right` `[r, c]`, over all rows of left `[..., r]` and right `[..., c]`.

    Sums the products of the single samples. One product over all rows has too few columns to parallelise well, and took
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
    """Whether a weight is stored as integers (torchao's tensor subclass, whose dtype is a float one)."""
    return type(weight) not in (Tensor, nn.Parameter)


def merged_linear(
    x: Tensor, layer: nn.Linear, a: Tensor, b: Tensor, scale: float, made_by: Producer | None = None
) -> Tensor:
    """The merged path: the layer with `W + scale (A B)'`, backward through the factors only.

    With x `[..., m]`, W `[o, m]`, A `[m, r]`, B `[r, o]`, dy the gradient of the output and g = scale dy B':
    `dA = x' g`, `dB = scale (x A)' dy`, `dx = dy W + g A'`. In both directions the small product is added to whatever
    is smaller, the weight or the output.

    Args:
        x: the layer's input.
        layer: a frozen linear layer.
        a, b, scale: its change.
        made_by: what produced x, if the backward pass is to recompute it instead of keeping it.
    """
    a, b = a.to(layer.weight.dtype), b.to(layer.weight.dtype)
    out: Tensor = _MergedLinear.apply(x, layer.weight, layer.bias, a, b, scale, made_by)
    return out


def additive_linear(x: Tensor, layer: nn.Linear, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The additive path: `x W' + bias + (x scale A) B`, the last product added into the layer's output in place.

    With A `[batch, m, r]` and B `[batch, r, o]` every sample of x, whose first dimension is then the batch or a
    multiple of it in batch-major order, goes through its own factors.
    """
    if torch.is_autocast_enabled(x.device.type):  # cast once, where each of the two products would do it
        x = x.to(torch.get_autocast_dtype(x.device.type))
    # scaled before the products: unscaled ones may be too large for float16
    a, b = _column_major((scale * a).to(x.dtype)), b.to(x.dtype)
    routed = x.reshape(*a.shape[:-2], -1, x.shape[-1])
    y = F.linear(routed, layer.weight, layer.bias)
    # F.linear may give a view of its product, and autograd would copy the gradient of a view that is written to
    y = torch.ops.aten._unsafe_view(y, y.shape)
    added = y.addmm_ if a.dim() == 2 else y.baddbmm_
    out: Tensor = added(routed @ a, b).view(*x.shape[:-1], -1)
    return out


def computes_plainly(layer: nn.Module) -> bool:
    """Whether a layer has torch's own `forward`; other layers standardise the weight, or pad as in TensorFlow."""
    return type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward)


def dense_change(x: Tensor, layer: nn.Linear | nn.Conv2d, change: Tensor) -> Tensor:
    """The layer with its weight plus a change of the weight's shape.

    Where 16 bits would round the sum, a layer that is linear in its weight computes the change's part next to its own,
    and any other computes in the change's precision.
    """
    if not computes_plainly(layer):
        return _own_forward(x, layer, change)
    if merges_exactly(x, layer.weight):
        return _with_weight(x, layer, layer.weight + change.to(layer.weight.dtype), layer.bias)
    return _with_weight(x, layer, layer.weight, layer.bias) + _with_weight(x, layer, change.to(x.dtype), None)


def _with_weight(x: Tensor, layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    out: Tensor = layer._conv_forward(x, weight, bias)
    return out


def _own_forward(x: Tensor, layer: nn.Linear | nn.Conv2d, change: Tensor) -> Tensor:
    """The forward of the layer's class, on a stand-in that shares all with the layer but the weight."""
    weight = layer.weight + change
    parameters = {name: None if p is None else p.to(weight.dtype) for name, p in layer._parameters.items()}
    stand_in = type(layer).__new__(type(layer))
    stand_in.__dict__.update(layer.__dict__)
    del stand_in.__dict__["forward"]
    stand_in.__dict__["_parameters"] = {**parameters, "weight": weight}
    if torch.is_autocast_enabled(x.device.type):
        return stand_in.forward(x)
    return stand_in.forward(x.to(weight.dtype)).to(x.dtype)
