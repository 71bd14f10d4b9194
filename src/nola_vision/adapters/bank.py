"""The adapter stack: everything that is trained, in one object next to an untouched backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nola_vision.adapters import context
from nola_vision.adapters.context import Pass, Route, Settings
from nola_vision.adapters.functional import (
    additive_linear,
    can_recompute,
    computes_plainly,
    dense_change,
    is_quantised,
    merged_linear,
    merges_exactly,
    producer,
    record_producer,
)
from nola_vision.adapters.quantization import rounded_straight_through
from nola_vision.adapters.target import HEAD, Change, Dense, Group, LowRank, Target, dense
from nola_vision.common.errors import NolaVisionError


def is_nested(name: str) -> bool:
    """Whether a trained tensor holds coefficients, so that its first ones alone are an adapter too."""
    return name.rpartition(".")[2].startswith("coefficients")


def prefix_length(count: int, share: float) -> int:
    """How many of `count` coefficients a share of them is, at least one."""
    return max(1, round(share * count))


def _first(change: Change) -> Change:
    """The change of the only adapter."""
    return LowRank(change.a[0], change.b[0], change.scale) if isinstance(change, LowRank) else Dense(change.value[0])


_NOT_ROUTED = "this stack holds several adapters: choose one for each sample by `with stack.route(index):`"


class AdapterStack(nn.Module):
    """n adapters for one backbone: the trainable parameters of each group of targets, and the heads.

    The stack holds no part of the backbone. `attach` makes the backbone's target layers compute with the changed weight
    until `detach`; the backbone's parameters, names and state dict stay as timm made them.

    Several threads may compute with one attached stack at a time, each with its own `route` and `using`, as long as
    none of them attaches, merges or steps an optimizer. Parameters are float32 (or float64) whatever the precision of
    the backbone: a cast of the stack to 16 bits leaves them as they are.

    The head is a plain trained matrix and bias, or, where a group has the target `HEAD`, a fixed matrix
    `[classes, features + 1]` (the bias is its last column) with that group's change.

    Args:
        groups: the methods' modules by name; each holds its targets and the numbers trained for them.
        num_features: width of the backbone's features.
        num_classes: number of classes; 0 for a stack without a head.
        num_adapters: n.
        generator: draws a trained head's start, uniform in +-0.1/sqrt(features), a tenth of what `nn.Linear` takes: a
            random head's response to directions that no training image shows stays, as noise in the logits.
        head_base: `[classes, features + 1]`, what an adapted head starts from.
    """

    def __init__(
        self,
        groups: Mapping[str, nn.Module],
        num_features: int,
        num_classes: int,
        num_adapters: int = 1,
        generator: torch.Generator | None = None,
        head_base: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_adapters, self.num_features, self.num_classes = num_adapters, num_features, num_classes
        self.groups = nn.ModuleDict(groups)
        every = {target: name for name in groups for target in self._group(name).targets}
        self.group_of = {target.name: name for target, name in every.items()}
        self.targets = tuple(target for target in every if target.name != HEAD)
        self.head_target = next((target for target in every if target.name == HEAD), None)
        self.every_target = (*self.targets, *([self.head_target] if self.head_target is not None else []))
        self._head_base = head_base
        if self.head_target is None:
            bound = 0.1 * num_features**-0.5
            self.head_weight = nn.Parameter(
                (2 * torch.rand(num_adapters, num_classes, num_features, generator=generator) - 1) * bound
            )
            self.head_bias = nn.Parameter((2 * torch.rand(num_adapters, num_classes, generator=generator) - 1) * bound)

        self._backbone: list[nn.Module] = []  # in a list, so that it is no submodule
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._originals: dict[str, nn.Parameter] = {}  # weights as they were before `merge`
        self._merged_adapter: int | None = None

    # --- the trained numbers -------------------------------------------------------------------------------------

    def _group(self, name: str) -> Group:
        return cast(Group, self.groups[name])

    def members(self, group: str) -> Sequence[Target]:
        """The targets of a group, in the order of its layers."""
        return self._group(group).targets

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        def precise(tensor: Tensor) -> Tensor:
            """16 bits would round most steps of an optimizer away, and overflow in sums."""
            moved = cast(Tensor, fn(tensor))
            return moved if moved.dtype not in (torch.float16, torch.bfloat16) else tensor.to(moved.device)

        super()._apply(precise, recurse)  # type: ignore[no-untyped-call]
        if self._head_base is not None:
            self._head_base = self._head_base.to(next(self.parameters()))
        return self

    def adapter_parameters(self) -> list[nn.Parameter]:
        """What is trained besides the head; what the paper's parameter counts count."""
        return [p for name, group in self.groups.items() if name != HEAD for p in group.parameters()]

    def head_parameters(self) -> list[nn.Parameter]:
        """What is trained for the head alone; none where it shares its numbers with all other weights (PRANC)."""
        if self.head_target is None:
            return [self.head_weight, self.head_bias]
        return list(self.groups[HEAD].parameters()) if HEAD in self.groups else []

    def _values(self, name: str, parameter: Tensor, settings: Settings, adapters: Tensor | None) -> Tensor:
        """A parameter as a pass computes with it: of some adapters, rounded to a file's bits, cut to a prefix."""
        value = parameter if adapters is None else parameter[adapters]
        if bits := settings.bits.get(name):
            value = rounded_straight_through(value, bits)
        if settings.prefix < 1 and is_nested(name):
            value = value[..., : prefix_length(value.shape[-1], settings.prefix)]
        return value

    def _serving(self, settings: Settings) -> tuple[Tensor | None, Tensor | None]:
        """The adapters that passes of these settings compute with (None for the only one), and as `Pass.place`."""
        if self._merged_adapter is not None:
            return torch.tensor([self._merged_adapter], device=next(self.parameters()).device), None
        if self.num_adapters == 1:
            return None, None
        if (route := settings.route) is None:
            raise NolaVisionError(_NOT_ROUTED)
        return route.adapters, route.place if len(route.adapters) > 1 else None

    def logits(self, features: Tensor) -> Tensor:
        """Features `[batch, features]` to logits `[batch, classes]`, each sample by its own adapter's head."""
        settings = context.settings(self)
        _check_batch(settings, features)
        adapters, place = self._serving(settings)
        weight, bias = self._heads(settings, adapters)
        features = features.to(weight.dtype)
        if place is None:
            return F.linear(features, weight[0], bias[0])
        return torch.baddbmm(bias[place].unsqueeze(1), features.unsqueeze(1), weight[place].transpose(1, 2)).squeeze(1)

    def head(self) -> tuple[Tensor, Tensor]:
        """The heads' weights `[n, classes, features]` and biases `[n, classes]`."""
        every = None if self.num_adapters == 1 else torch.arange(self.num_adapters)
        return self._heads(context.settings(self), every)

    def _heads(self, settings: Settings, adapters: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.head_target is None:
            bias = self.head_bias if adapters is None else self.head_bias[adapters]
            return self._values("head_weight", self.head_weight, settings, adapters), bias
        change = self._changes([self.head_target], settings, adapters)[HEAD]
        assert self._head_base is not None
        whole = self._head_base + dense(self.head_target, change)
        whole = whole.view(-1, *whole.shape[-2:])
        return whole[..., :-1], whole[..., -1]

    def forward(self, images: Tensor) -> Tensor:
        """Images through the attached backbone and the head: logits `[batch, classes]`."""
        return self.logits(self._attached()(images))

    @torch.no_grad()
    def changes(self, adapter: int = 0) -> dict[str, Tensor]:
        """The change of every target by `Target.name`, in the weight's layout."""
        adapters = None if self.num_adapters == 1 else torch.tensor([adapter])
        made = self._changes(self.targets, context.settings(self), adapters)
        return {target.name: dense(target, made[target.name]) for target in self.targets}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _changes(self, targets: Sequence[Target], settings: Settings, adapters: Tensor | None) -> dict[str, Change]:
        """The changes of some targets by name, the adapters `[d, ...]` in front; without d where there is one."""
        made: dict[str, Change] = {}
        for name in dict.fromkeys(self.group_of[target.name] for target in targets):
            trained = {
                own: self._values(f"groups.{name}.{own}", parameter, settings, adapters)
                for own, parameter in self.groups[name].named_parameters()
            }
            # 16-bit autocast would round the factors' own product
            with torch.autocast(next(iter(trained.values())).device.type, enabled=False):
                made |= self._group(name).changes(trained, targets)
        return made if adapters is not None and len(adapters) > 1 else {n: _first(c) for n, c in made.items()}

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
            if not isinstance(layer, plain):
                raise NolaVisionError(
                    f"target {name} is a {type(layer).__name__} where a {plain.__name__} is expected: make the stack "
                    "for this backbone"
                )
            if "forward" in layer.__dict__:
                raise NolaVisionError(f"{name} has an adapter attached already: detach that stack first")
            if layer.weight.requires_grad:
                raise NolaVisionError(f"target {name} is trained itself: freeze the backbone before attaching")
        self._backbone.append(backbone)
        for name, found in parts.items():
            layer = backbone.get_submodule(name)
            # an instance attribute shadows the class's forward and leaves the state dict alone
            layer.__dict__["forward"] = _AdaptedForward(self, cast(Any, layer), found)
        if self.targets:
            backbone.__dict__["forward"] = _PassForward(self, backbone)
            modules = (module for module in backbone.modules() if can_recompute(module))
            self._hooks = [module.register_forward_hook(record_producer) for module in modules]
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
            if isinstance(forward, _AdaptedForward | _PassForward) and forward.stack is self:
                del layer.__dict__["forward"]
                if isinstance(forward, _PassForward) and forward.shadowed:
                    layer.__dict__["forward"] = forward.inner
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._backbone.clear()

    def _attached(self) -> nn.Module:
        if not self._backbone:
            raise NolaVisionError("this adapter stack is not attached to a backbone: call attach(backbone) first")
        return self._backbone[0]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def make_pass(self, targets: Sequence[Target], settings: Settings | None = None) -> Pass:
        """A new pass over some targets, with this thread's settings unless others are given."""
        settings = context.settings(self) if settings is None else settings
        adapters, place = self._serving(settings)
        return Pass(self._changes(targets, settings, adapters), place, settings)

    def _probe(self, backbone: nn.Module, probe: Tensor) -> None:
        """One pass with random A and B = 0: the features' gradient reaches each B whose change would move them."""
        generator = torch.Generator().manual_seed(0)
        made: dict[str, Change] = {}
        leaves = []
        for target in self.targets:
            a = torch.randn(target.inputs, 1, generator=generator).to(probe)
            leaves.append(torch.zeros(1, target.outputs).to(probe).requires_grad_())
            made[target.name] = LowRank(a, leaves[-1], 1.0)
        modes = {module: module.training for module in backbone.modules()}
        backbone.eval()
        try:
            with torch.enable_grad(), context.running(self, Pass(made, None)):
                features = cast(_PassForward, backbone.forward).inner(probe)
                direction = torch.randn(features.shape, generator=generator).to(features)
                reached = (features * direction).sum() + sum(0 * leaf.sum() for leaf in leaves)
                gradients = torch.autograd.grad(reached, leaves)
        finally:
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
        """Sends each sample of a batch to one adapter, in this thread; an inner `route` replaces an outer one.

        The changes are computed for the distinct adapters of the index alone, so a pass costs the same whatever n is.

        Args:
            index: `[batch]` integers from 0 to n - 1, on any device.

        Raises:
            NolaVisionError: the stack holds one adapter, an adapter is merged, a batch norm is in training mode, or the
                index is not a vector of such integers.
        """
        if self.num_adapters == 1:
            raise NolaVisionError("this stack holds one adapter, so there is nothing to route: it needs more")
        if self.merged:
            raise NolaVisionError("an adapter is merged into the backbone, so none can be routed to: unmerge() first")
        norms = (m for m in self._attached().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        if any(norm.training for norm in norms):
            raise NolaVisionError(
                "batch statistics would mix the samples of different adapters: put the backbone's batch norm in eval "
                "mode"
            )
        self._check_index(index)
        with torch.inference_mode(False):  # a later pass may need gradients
            adapters, place = index.to(next(self.parameters()).device, torch.int64).unique(return_inverse=True)
        with context.using(self, route=Route(adapters, place)):
            yield

    def _check_index(self, index: object) -> None:
        if not isinstance(index, Tensor):
            raise NolaVisionError(f"the index is a {type(index).__name__}: give a tensor, one adapter for each sample")
        whole = not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
        if not whole or index.dim() != 1 or index.device.type == "meta":
            raise NolaVisionError(
                f"the index is {index.dtype} {list(index.shape)} on {index.device}: give a vector of integers, one "
                "adapter for each sample"
            )
        wrong = index[(index < 0) | (index >= self.num_adapters)]
        if len(wrong):
            raise NolaVisionError(
                f"the index names adapter {int(wrong[0])}, but the stack holds {self.num_adapters}: use 0 to "
                f"{self.num_adapters - 1}"
            )

    def using(
        self, *, prefix: float | None = None, bits: Mapping[str, int] | None = None
    ) -> AbstractContextManager[None]:
        """Makes this thread's passes compute with what a shorter file would contain; gradients go straight through.

        Args:
            prefix: the share of the coefficients that is used, the first ones, above 0 and at most 1.
            bits: stored bits by parameter name.

        Raises:
            NolaVisionError: the share is out of range.
        """
        if prefix is not None and not 0 < prefix <= 1:
            raise NolaVisionError(f"prefix is {prefix}: it is a share of the coefficients, above 0 and at most 1")
        changes = {"prefix": prefix, "bits": bits}
        return context.using(self, **{name: value for name, value in changes.items() if value is not None})

    @torch.no_grad()
    def merge(self, adapter: int = 0, dequantise: bool = False) -> None:
        """Adds the changes to the backbone's own weights, in float32 and once; inference then costs nothing extra.

        The original weights are kept for `unmerge`, since `W + d - d` is not W in floating point.

        Args:
            adapter: which one.
            dequantise: where the backbone holds integers, make the adapted weights floats again.

        Raises:
            NolaVisionError: an adapter is merged already, or the weights are integers.
        """
        if self.merged:
            raise NolaVisionError("this adapter is merged already: call unmerge() first")
        if not 0 <= adapter < self.num_adapters:
            raise NolaVisionError(f"there is no adapter {adapter} to merge: this stack holds {self.num_adapters}")
        backbone, changes = self._attached(), self.changes(adapter)
        if not dequantise and any(is_quantised(backbone.get_parameter(target.weight)) for target in self.targets):
            raise NolaVisionError(
                "the backbone holds its weights in int8, and 8 bits would lose most of the change: leave the adapter "
                "beside it, or merge into floats (dequantise=True, --dequantise)"
            )
        self._merged_adapter = adapter
        for target in self.targets:
            for module in target.modules:
                layer = backbone.get_submodule(module)
                if f"{module}.weight" not in self._originals:
                    original = cast(nn.Parameter, layer.weight)
                    self._originals[f"{module}.weight"] = original
                    floats = original.dequantize() if is_quantised(original) else original.detach().clone()
                    layer.weight = nn.Parameter(floats, requires_grad=False)
                rows = slice(None) if target.rows is None else slice(*target.rows)
                weight, change = cast(nn.Parameter, layer.weight), changes[target.name]
                weight[rows] = (weight[rows].to(change.dtype) + change).to(weight.dtype)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the original weights back."""
        for name, original in self._originals.items():
            layer = cast(Any, self._attached().get_submodule(name.removesuffix(".weight")))
            # the backbone may have moved, or changed its dtype, since
            dtype = None if is_quantised(original) else layer.weight.dtype
            original.data = original.data.to(device=layer.weight.device, dtype=dtype)
            layer.weight = original
        self._originals, self._merged_adapter = {}, None

    @property
    def merged(self) -> bool:
        return self._merged_adapter is not None


def _check_batch(settings: Settings, batch: Tensor) -> None:
    if settings.route is not None and len(batch) != (samples := len(settings.route.place)):
        raise NolaVisionError(f"the index names adapters for {samples} samples, but the batch has {len(batch)}")


class _PassForward:
    """The forward of an attached backbone: makes the changes of a pass, then computes as the backbone does."""

    def __init__(self, stack: AdapterStack, backbone: nn.Module) -> None:
        self.stack, self.inner, self.shadowed = stack, backbone.forward, "forward" in backbone.__dict__

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **options: Any) -> Any:
        stack = self.stack
        if stack.merged:
            return self.inner(*args, **options)
        settings = None
        if context.in_backward():  # checkpointing around the whole backbone repeats it
            if (first := context.pass_in_backward(stack)) is None:
                raise NolaVisionError(
                    "the backbone runs again in a backward pass and its forward pass cannot be found: use "
                    "checkpoint(..., use_reentrant=False), or set_grad_checkpointing() of the backbone"
                )
            settings = first.settings
        current = stack.make_pass(stack.targets, settings)
        if args:
            _check_batch(current.settings, args[0])
        with context.running(stack, current):
            features = self.inner(*args, **options)
        if isinstance(features, Tensor) and features.requires_grad:
            context.begin_backward_at(features, stack, current)
        return features


class _AdaptedForward:
    """The forward of one attached layer."""

    def __init__(self, stack: AdapterStack, layer: nn.Linear | nn.Conv2d, targets: Sequence[Target]) -> None:
        self.stack, self.layer, self.targets = stack, layer, tuple(targets)

    def __call__(self, x: Tensor) -> Tensor:
        stack, layer = self.stack, self.layer
        if stack.merged:
            return cast(Tensor, cast(Any, type(layer)).forward(layer, x))
        if layer.weight.requires_grad:
            raise NolaVisionError(f"the weight of {self.targets[0].name} is trained itself: freeze the backbone")
        # without a pass a part of the backbone is called by itself, such as `forward_features`
        current = context.current_pass(stack) or stack.make_pass(self.targets)
        changes, place = [current.changes[target.name] for target in self.targets], current.place
        plain_linear = isinstance(layer, nn.Linear) and computes_plainly(layer)
        if plain_linear and all(isinstance(change, LowRank) for change in changes):
            a, b, scale = self._whole(cast(list[LowRank], changes), layer.weight.shape[0])
            linear = cast(nn.Linear, layer)
            if place is not None:
                rows = _rows_of(place, len(x))
                return additive_linear(x, linear, a[rows], b[rows], scale)
            if merges_exactly(x, layer.weight):
                return merged_linear(x, linear, a, b, scale, producer(x))
            return additive_linear(x, linear, a, b, scale)
        value = self._dense(changes, layer.weight.shape[0])
        if place is None:
            return dense_change(x, layer, value)
        # once for each distinct adapter of the batch
        members = [(_rows_of(place, len(x)) == i).nonzero().flatten() for i in range(len(value))]
        parts = [dense_change(x[rows], layer, value[i]) for i, rows in enumerate(members)]
        return torch.cat(parts)[torch.cat(members).argsort()]

    def _dense(self, changes: Sequence[Change], out_features: int) -> Tensor:
        """The layer's parts as one change of its whole weight."""
        if self.targets[0].rows is None:
            return dense(self.targets[0], changes[0])
        parts = []
        for target, change in zip(self.targets, changes, strict=True):
            first, last = cast(tuple[int, int], target.rows)
            parts.append(F.pad(dense(target, change), (0, 0, first, out_features - last)))
        return torch.stack(parts).sum(0)

    def _whole(self, changes: Sequence[LowRank], out_features: int) -> LowRank:
        """The layer's parts as one pair of factors: A side by side, each B padded with zeros to the whole width."""
        if self.targets[0].rows is None:
            return changes[0]
        rows = [cast(tuple[int, int], target.rows) for target in self.targets]
        padded = [F.pad(c.b, (first, out_features - last)) for c, (first, last) in zip(changes, rows, strict=True)]
        return LowRank(torch.cat([c.a for c in changes], dim=-1), torch.cat(padded, dim=-2), changes[0].scale)


def _rows_of(place: Tensor, rows: int) -> Tensor:
    """The adapter of each row of a module's input, which may see a multiple of the batch (Swin's windows)."""
    repeats, rest = divmod(rows, len(place))
    if rest or not repeats:
        raise NolaVisionError(
            f"a layer sees {rows} rows where the batch has {len(place)} samples, so samples cannot be told apart: "
            "route one adapter at a time"
        )
    return place.repeat_interleave(repeats)
