"""The adapter stack: everything that is trained, in one object beside an untouched backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nola_vision.adapters.paths import adapted_conv, additive_linear, merged_linear, merges_exactly
from nola_vision.adapters.target import Target
from nola_vision.errors import NolaVisionError


class Factors(Protocol):
    """What a low-rank method says: how its trainable numbers become the factors of one group of targets."""

    scale: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `[n, layers, m, r]` and B `[n, layers, r, o]`; a change is `scale * A @ B`."""
        ...


FactorsFactory = Callable[[Sequence[Target], int], nn.Module]


class AdapterStack(nn.Module):
    """n adapters for one backbone: the trainable numbers of each group of targets, and the heads.

    The stack holds no part of the backbone. `attach` makes the backbone's target layers compute with the changed weight
    until `detach`; the backbone's parameters, names and state dict stay as timm made them.

    Args:
        targets: the adapted weights; none for a linear probe.
        make_factors: `(targets of one group, n) -> module with Factors`; not called without targets.
        num_features: width of the backbone's features.
        num_classes: number of classes; 0 for a stack without a head.
        num_adapters: n.
        generator: draws the head's start, uniform in +-0.1/sqrt(features), a tenth of what `nn.Linear` takes: a random
            head's response to directions that no training image shows stays, as noise in the logits.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        make_factors: FactorsFactory,
        num_features: int,
        num_classes: int,
        num_adapters: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.targets = tuple(targets)
        self.num_adapters, self.num_features, self.num_classes = num_adapters, num_features, num_classes
        members: dict[str, list[Target]] = {}
        for target in self.targets:
            members.setdefault(target.group, []).append(target)
        self.members = members
        self.groups = nn.ModuleDict({group: make_factors(found, num_adapters) for group, found in members.items()})
        bound = 0.1 * num_features**-0.5
        self.head_weight = nn.Parameter(
            (2 * torch.rand(num_adapters, num_classes, num_features, generator=generator) - 1) * bound
        )
        self.head_bias = nn.Parameter((2 * torch.rand(num_adapters, num_classes, generator=generator) - 1) * bound)

        self.index: Tensor | None = None  # [batch]: the adapter of each sample, set by `route`
        self._backbone: list[nn.Module] = []  # in a list, so that it is no submodule
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._made: dict[str, tuple[Tensor, Tensor]] = {}  # the factors of the forward pass that runs or ran last
        self._probing: dict[str, tuple[Tensor, Tensor]] | None = None
        self._in_forward = False
        self._originals: dict[str, Tensor] = {}  # weights as they were before `merge`
        self._merged_adapter: int | None = None

    # --- the trained numbers -------------------------------------------------------------------------------------

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What is trained besides the head; what the paper's parameter counts count."""
        return list(self.groups.parameters())

    def head_parameters(self) -> list[nn.Parameter]:
        return [self.head_weight, self.head_bias]

    def logits(self, features: Tensor) -> Tensor:
        """Features `[batch, features]` to logits `[batch, classes]`, each sample by its own adapter's head."""
        if self.index is None:
            if self.num_adapters > 1 and self._merged_adapter is None:
                raise NolaVisionError("this stack holds several adapters: say which by `with stack.route(index):`")
            adapter = self._merged_adapter or 0
            return F.linear(features, self.head_weight[adapter], self.head_bias[adapter])
        weight, bias = self.head_weight[self.index], self.head_bias[self.index]
        return torch.baddbmm(bias.unsqueeze(1), features.unsqueeze(1), weight.transpose(1, 2)).squeeze(1)

    def forward(self, images: Tensor) -> Tensor:
        """Images through the attached backbone and the head: logits `[batch, classes]`."""
        return self.logits(self._attached()(images))

    def changes(self, adapter: int = 0) -> dict[str, Tensor]:
        """The change of every target by `Target.name`, in at least float32 and in the weight's layout."""
        with torch.no_grad():
            made = self._make_exactly()
        return {t.name: self._change(t, made[t.name], adapter) for t in self.targets}

    def _change(self, target: Target, made: tuple[Tensor, Tensor], adapter: int) -> Tensor:
        a, b = made
        if a.dim() == 3:
            a, b = a[adapter], b[adapter]
        return target.change(a, b, self._scale(target))

    def _scale(self, target: Target) -> float:
        return cast(Factors, self.groups[target.group]).scale

    def _make(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of every target: `[m, r]` and `[r, o]` for n = 1, else with n in front."""
        made = {}
        for group, members in self.members.items():
            parameter = next(self.groups[group].parameters())
            # 16-bit autocast would round the factors' own product
            with torch.autocast(parameter.device.type, enabled=False):
                a, b = cast(Factors, self.groups[group]).factors()
            if self.num_adapters == 1:
                layers = zip(a[0].unbind(0), b[0].unbind(0), strict=True)
            else:
                layers = zip(a.unbind(1), b.unbind(1), strict=True)
            made.update({target.name: pair for target, pair in zip(members, layers, strict=True)})
        return made

    def _make_exactly(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors in float32 where the trained numbers have 16 bits."""
        if all(p.dtype in (torch.float32, torch.float64) for p in self.groups.parameters()):
            return self._make()
        groups = self.groups
        try:
            self.groups = copy.deepcopy(groups).float()
            return self._make()
        finally:
            self.groups = groups

    # --- attaching -----------------------------------------------------------------------------------------------

    def attach(self, backbone: nn.Module, probe: Tensor | None = None) -> None:
        """Makes the backbone compute with this stack's changes until `detach`.

        Args:
            backbone: a model whose root call gives features; its target weights must be frozen.
            probe: a batch of images. With it, a target whose change does not reach the features is refused: some
                models read `self.qkv.weight` themselves, and an attachment to `qkv` would do nothing, silently.

        Raises:
            NolaVisionError: a target cannot be adapted, is trained itself, or has no effect on the features.
        """
        if self._backbone:
            raise NolaVisionError("this adapter stack is attached already: call detach() before attaching it again")
        parts: dict[str, list[Target]] = {}
        for target in self.targets:
            for module in target.modules:
                parts.setdefault(module, []).append(target)
        for name, found in parts.items():
            layer = backbone.get_submodule(name)
            plain = nn.Linear if found[0].kind == "linear" else nn.Conv2d
            if not isinstance(layer, plain) or type(layer).forward is not plain.forward:
                raise NolaVisionError(
                    f"target {name} is a {type(layer).__name__}, which computes in its own way, so it cannot be "
                    "adapted: leave it out of `targets`"
                )
            if "forward" in layer.__dict__:
                raise NolaVisionError(f"{name} has an adapter attached already: detach that stack first")
            if layer.weight.requires_grad:
                raise NolaVisionError(f"target {name} is trained itself: freeze the backbone before attaching")
        self._backbone.append(backbone)
        for name, found in parts.items():
            layer = backbone.get_submodule(name)
            # an instance attribute shadows the class's forward and leaves the state dict alone
            layer.__dict__["forward"] = _AdaptedForward(self, layer, found)
        self._hooks = [
            backbone.register_forward_pre_hook(self._enter),
            backbone.register_forward_hook(self._leave, always_call=True),
        ]
        if probe is not None and self.targets:
            try:
                self._probe(backbone, probe)
            except BaseException:
                self.detach()
                raise

    def detach(self) -> None:
        """Gives the backbone its own computation back; its weights never changed (or are restored, after `merge`)."""
        if self.merged:
            self.unmerge()
        backbone = self._attached()
        for layer in backbone.modules():
            forward = layer.__dict__.get("forward")
            if isinstance(forward, _AdaptedForward) and forward.stack is self:
                del layer.__dict__["forward"]
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._made = [], {}
        self._backbone.clear()

    def _attached(self) -> nn.Module:
        if not self._backbone:
            raise NolaVisionError("this adapter stack is not attached to a backbone: call attach(backbone) first")
        return self._backbone[0]

    def _enter(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if self.index is not None and (size := len(cast(Tensor, args[0]))) != len(self.index):
            raise NolaVisionError(f"the index names adapters for {len(self.index)} samples, but the batch has {size}")
        self._made = self._probing or self._make()
        self._in_forward = True

    def _leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        # the factors stay: activation checkpointing runs layers again in the backward pass and must meet the same ones
        self._in_forward = False

    def pair(self, target: Target) -> tuple[Tensor, Tensor]:
        """The factors one target computes with now."""
        recomputing = torch._C._current_graph_task_id() != -1
        if self._in_forward or (recomputing and self._made):
            return self._made[target.name]
        # a part of the backbone was called by itself, `forward_features` for one: the last pass's factors are stale
        self._made = {}
        return self._make()[target.name]

    def _probe(self, backbone: nn.Module, probe: Tensor) -> None:
        """One pass with random A and B = 0: the features' gradient reaches each B whose change would move them."""
        generator = torch.Generator().manual_seed(0)
        made = {}
        for target in self.targets:
            a = torch.randn(target.inputs, 1, generator=generator).to(probe)
            made[target.name] = (a, torch.zeros(1, target.outputs).to(probe).requires_grad_())
        modes = {module: module.training for module in backbone.modules()}
        backbone.eval()
        self._probing = made
        try:
            with torch.enable_grad():
                features = backbone(probe)
                direction = torch.randn(features.shape, generator=generator).to(features)
                leaves = [b for _, b in made.values()]
                reached = (features * direction).sum() + sum(0 * leaf.sum() for leaf in leaves)
                gradients = torch.autograd.grad(reached, leaves)
        finally:
            self._probing, self._made = None, {}
            for module, mode in modes.items():
                module.training = mode
        idle = [t.name for t, g in zip(self.targets, gradients, strict=True) if not g.any()]
        if idle:
            raise NolaVisionError(
                f"a change of {', '.join(idle[:3])}{' ...' if len(idle) > 3 else ''} does not reach the features of "
                "this backbone (it reads the weight in its own way, or multiplies the layer's output by zero), so "
                "adapting it would do nothing: leave it out of `targets`"
            )

    # --- routing and merging -------------------------------------------------------------------------------------

    @contextmanager
    def route(self, index: Tensor) -> Iterator[None]:
        """Sends each sample of a batch to one adapter.

        Args:
            index: `[batch]` integers from 0 to n - 1.
        """
        if self.num_adapters == 1:
            raise NolaVisionError("this stack holds one adapter, so there is nothing to route: it needs more")
        norms = (m for m in self._attached().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        if any(norm.training for norm in norms):
            raise NolaVisionError(
                "batch statistics would mix the samples of different adapters: put the backbone's batch norm in eval "
                "mode"
            )
        self.index = index
        try:
            yield
        finally:
            self.index = None

    @torch.no_grad()
    def merge(self, adapter: int = 0) -> None:
        """Adds the changes to the backbone's own weights, in float32 and once; inference then costs nothing extra.

        A copy of each original weight is kept for `unmerge`, since `W + d - d` is not W in floating point.
        """
        if self.merged:
            raise NolaVisionError("this adapter is merged already: call unmerge() first")
        backbone, made = self._attached(), self._make_exactly()
        self._merged_adapter = adapter
        for target in self.targets:
            weight = backbone.get_parameter(target.weight)
            if target.weight not in self._originals:
                self._originals[target.weight] = weight.detach().clone()
            change = self._change(target, made[target.name], adapter)
            rows = slice(None) if target.rows is None else slice(*target.rows)
            weight[rows] = (weight[rows].to(change.dtype) + change).to(weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the original weights back, bit for bit."""
        for name, original in self._originals.items():
            self._attached().get_parameter(name).copy_(original)
        self._originals, self._merged_adapter = {}, None

    @property
    def merged(self) -> bool:
        return self._merged_adapter is not None


class _AdaptedForward:
    """The forward pass of one attached layer."""

    def __init__(self, stack: AdapterStack, layer: nn.Module, targets: Sequence[Target]) -> None:
        self.stack, self.layer, self.targets = stack, layer, tuple(targets)

    def __deepcopy__(self, memo: object) -> _AdaptedForward:
        raise NolaVisionError("a backbone with an adapter attached cannot be copied: detach() the adapter first")

    def __reduce__(self) -> str:
        raise NolaVisionError("a backbone with an adapter attached cannot be pickled: detach() the adapter first")

    def __call__(self, x: Tensor) -> Tensor:
        stack, layer = self.stack, self.layer
        if stack.merged:
            return cast(Tensor, type(layer).forward(layer, x))
        scale = stack._scale(self.targets[0])
        if isinstance(layer, nn.Conv2d):
            return self._conv(x, layer, *stack.pair(self.targets[0]), scale)
        assert isinstance(layer, nn.Linear)
        a, b = self._whole(layer.out_features)
        if a.dim() == 3:
            index = self._index(x.shape[0])
            return additive_linear(x, layer, a[index], b[index], scale)
        path = merged_linear if merges_exactly(x, layer.weight) else additive_linear
        return path(x, layer, a, b, scale)

    def _whole(self, out_features: int) -> tuple[Tensor, Tensor]:
        """The layer's parts as one pair of factors: A side by side, each B padded with zeros to the whole width."""
        if self.targets[0].rows is None:
            return self.stack.pair(self.targets[0])
        pairs = [self.stack.pair(target) for target in self.targets]
        rows = [cast(tuple[int, int], target.rows) for target in self.targets]
        padded = [F.pad(b, (first, out_features - last)) for (_, b), (first, last) in zip(pairs, rows, strict=True)]
        return torch.cat([a for a, _ in pairs], dim=-1), torch.cat(padded, dim=-2)

    def _index(self, size: int) -> Tensor:
        """The adapter of each row of a module's input, which may see a multiple of the batch (Swin's windows)."""
        index = self.stack.index
        if index is None:
            raise NolaVisionError("this stack holds several adapters: say which by `with stack.route(index):`")
        repeats, rest = divmod(size, len(index))
        if rest or not repeats:
            raise NolaVisionError(
                f"a layer sees {size} rows where the batch has {len(index)} samples, so samples cannot be told apart: "
                "route one adapter at a time"
            )
        return index.repeat_interleave(repeats)

    def _conv(self, x: Tensor, layer: nn.Conv2d, a: Tensor, b: Tensor, scale: float) -> Tensor:
        (target,) = self.targets
        if a.dim() == 2:
            return adapted_conv(x, layer, target.change(a, b, scale))
        index = self._index(x.shape[0])
        order = torch.cat([(index == i).nonzero().flatten() for i in index.unique()])
        outs = [adapted_conv(x[index == i], layer, target.change(a[i], b[i], scale)) for i in index.unique()]
        return torch.cat(outs)[order.argsort()]
