"""The adapter stack: everything that is trained, in one object beside an untouched backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from nola_vision.adapters.paths import (
    Origin,
    additive_linear,
    dense_change,
    is_quantised,
    merged_linear,
    merges_exactly,
)
from nola_vision.adapters.quantise import rounded_straight_through
from nola_vision.adapters.target import HEAD, Change, Dense, Group, LowRank, Target, dense
from nola_vision.errors import NolaVisionError


def is_nested(name: str) -> bool:
    """Whether a trained tensor holds coefficients, so that its first ones alone are an adapter too."""
    return name.rpartition(".")[2].startswith("coefficients")


def prefix_length(count: int, share: float) -> int:
    """How many of `count` coefficients a share of them is, at least one."""
    return max(1, round(share * count))


_CHEAP = (nn.GELU, nn.SiLU, nn.LayerNorm)  # beside a linear layer


def _can_make_again(module: nn.Module) -> bool:
    """Whether a layer's output is a cheap function of its input alone: torch's or timm's own layer, not in place."""
    known = isinstance(module, _CHEAP) and type(module).__module__.partition(".")[0] in ("torch", "timm")
    return known and not getattr(module, "inplace", False)


def _first(change: Change) -> Change:
    """The change of the only adapter."""
    return LowRank(change.a[0], change.b[0], change.scale) if isinstance(change, LowRank) else Dense(change.value[0])


@dataclass
class _Pass:
    """What one forward pass computes with, also where activation checkpointing repeats its layers in the backward pass.

    Args:
        changes: by target name; the head's until it is used.
        index: `[batch]`, the adapter of each sample.
        head_state: what the head's change was made of; another state makes it stale.
    """

    changes: dict[str, Change]
    index: Tensor | None
    head_state: tuple[object, ...] = ()


class AdapterStack(nn.Module):
    """n adapters for one backbone: the trainable numbers of each group of targets, and the heads.

    The stack holds no part of the backbone. `attach` makes the backbone's target layers compute with the changed weight
    until `detach`; the backbone's parameters, names and state dict stay as timm made them.

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

        self.index: Tensor | None = None  # [batch]: the adapter of each sample, set by `route`
        self.bits: dict[str, int] = {}  # by parameter name: train and evaluate with what a file of so many bits holds
        self.prefix: float = 1.0  # the share of the coefficients that is used, the first ones
        self._backbone: list[nn.Module] = []  # in a list, so that it is no submodule
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._pass: _Pass | None = None  # the one that runs, ran last, or whose backward pass runs
        self._in_forward = False
        self._probing: dict[str, Change] | None = None  # what a pass computes with instead of the adapters
        self._origins = WeakTensorKeyDictionary()  # of the outputs of cheap layers, as long as they live
        self._originals: dict[str, nn.Parameter] = {}  # weights as they were before `merge`
        self._merged_adapter: int | None = None

    # --- the trained numbers -------------------------------------------------------------------------------------

    def _group(self, name: str) -> Group:
        return cast(Group, self.groups[name])

    def members(self, group: str) -> Sequence[Target]:
        """The targets of a group, in the order of its layers."""
        return self._group(group).targets

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
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

    def _seen(self, name: str, parameter: Tensor) -> Tensor:
        """A trained tensor as the model computes with it: rounded to a file's bits, cut to a prefix."""
        if bits := self.bits.get(name):
            parameter = rounded_straight_through(parameter, bits)
        if self.prefix < 1 and is_nested(name):
            parameter = parameter[..., : prefix_length(parameter.shape[-1], self.prefix)]
        return parameter

    def logits(self, features: Tensor) -> Tensor:
        """Features `[batch, features]` to logits `[batch, classes]`, each sample by its own adapter's head."""
        weight, bias = self.head()
        if self.index is None:
            if self.num_adapters > 1 and self._merged_adapter is None:
                raise NolaVisionError("this stack holds several adapters: say which by `with stack.route(index):`")
            adapter = self._merged_adapter or 0
            return F.linear(features, weight[adapter], bias[adapter])
        return torch.baddbmm(
            bias[self.index].unsqueeze(1), features.unsqueeze(1), weight[self.index].transpose(1, 2)
        ).squeeze(1)

    def head(self) -> tuple[Tensor, Tensor]:
        """The heads' weights `[n, classes, features]` and biases `[n, classes]`."""
        if self.head_target is None:
            return self._seen("head_weight", self.head_weight), self.head_bias
        # each change serves one backward pass
        made = self._pass.changes if self._pass is not None and self._pass.head_state == self._head_state() else {}
        change = made.pop(HEAD) if HEAD in made else self._make([self.group_of[HEAD]])[HEAD]
        assert self._head_base is not None
        whole = self._head_base + dense(self.head_target, change)
        if self.num_adapters == 1:
            whole = whole.unsqueeze(0)
        return whole[..., :-1], whole[..., -1]

    def _head_state(self) -> tuple[object, ...]:
        """What an adapted head's change depends on."""
        if self.head_target is None:
            return ()
        versions = (parameter._version for parameter in self.groups[self.group_of[HEAD]].parameters())
        return torch.is_grad_enabled(), self.prefix, *self.bits.items(), *versions

    def forward(self, images: Tensor) -> Tensor:
        """Images through the attached backbone and the head: logits `[batch, classes]`."""
        return self.logits(self._attached()(images))

    @torch.no_grad()
    def changes(self, adapter: int = 0) -> dict[str, Tensor]:
        """The change of every target by `Target.name`, in at least float32 and in the weight's layout."""
        made = self._make(exactly=True)
        return {t.name: self._one(dense(t, made[t.name]), adapter) for t in self.targets}

    def _one(self, value: Tensor, adapter: int) -> Tensor:
        return value if self.num_adapters == 1 else value[adapter]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _make(self, groups: Sequence[str] | None = None, exactly: bool = False) -> dict[str, Change]:
        """The changes of every target by name; without n in front where there is one adapter.

        Args:
            groups: only these.
            exactly: in float32 where the trained numbers have 16 bits.
        """
        made: dict[str, Change] = {}
        for name in self.groups if groups is None else groups:
            module = self.groups[name]
            trained = {n: self._seen(f"groups.{name}.{n}", p) for n, p in module.named_parameters()}
            if exactly:
                trained = {n: p if p.dtype == torch.float64 else p.float() for n, p in trained.items()}
            # 16-bit autocast would round the factors' own product
            with torch.autocast(next(iter(trained.values())).device.type, enabled=False):
                changes = self._group(name).changes(trained)
            for target, change in zip(self._group(name).targets, changes, strict=True):
                made[target.name] = _first(change) if self.num_adapters == 1 else change
        return made

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
            layer.__dict__["forward"] = _AdaptedForward(self, cast(Any, layer), found)
        self._hooks = [
            backbone.register_forward_pre_hook(self._enter),
            backbone.register_forward_hook(self._leave, always_call=True),
            *(
                m.register_forward_hook(self._remember)
                for m in backbone.modules()
                if self.targets and _can_make_again(m)
            ),
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
        self._hooks, self._pass = [], None
        self._backbone.clear()

    def _attached(self) -> nn.Module:
        if not self._backbone:
            raise NolaVisionError("this adapter stack is not attached to a backbone: call attach(backbone) first")
        return self._backbone[0]

    def _enter(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if self.index is not None and (size := len(cast(Tensor, args[0]))) != len(self.index):
            raise NolaVisionError(f"the index names adapters for {len(self.index)} samples, but the batch has {size}")
        self._pass = None if self.merged else _Pass(self._probing or self._make(), self.index, self._head_state())
        self._in_forward = True

    def _leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        # the pass stays: activation checkpointing runs layers again in the backward pass, which begins at the features
        self._in_forward = False
        if isinstance(output, Tensor) and output.requires_grad and not torch.compiler.is_compiling():
            of_this = self._pass

            def begin(gradient: Tensor) -> None:
                self._pass = of_this

            output.register_hook(begin)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if torch.compiler.is_compiling():  # a compiler decides itself what to make again
            return
        alone = len(module._forward_hooks) == 1 and not module._forward_pre_hooks  # others may change what is made
        if alone and len(args) == 1 and output.requires_grad:
            self._origins[output] = Origin(module, args[0], output._version)

    def origin(self, x: Tensor) -> Origin | None:
        """What made a layer's input, if the backward pass can make it again."""
        found = None if torch.compiler.is_compiling() else cast(Origin | None, self._origins.get(x))
        return found if found is not None and found.version == x._version else None

    def change(self, target: Target) -> Change:
        """The change that one target computes with now."""
        if self._pass is not None and (self._in_forward or _in_backward()):
            return self._pass.changes[target.name]
        # a part of the backbone was called by itself, `forward_features` for one: the last pass's changes are stale
        self._pass = None
        made: dict[str, Change] = self._make([self.group_of[target.name]])
        return made[target.name]

    def adapter_of_each(self) -> Tensor:
        """The adapter of each sample of the batch that is computed now, `[batch]`."""
        repeated = self._pass is not None and _in_backward()
        index = self._pass.index if repeated and self._pass is not None else self.index
        if index is None:
            raise NolaVisionError("this stack holds several adapters: say which by `with stack.route(index):`")
        return index

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
        self._probing = made
        try:
            with torch.enable_grad():
                features = backbone(probe)
                direction = torch.randn(features.shape, generator=generator).to(features)
                reached = (features * direction).sum() + sum(0 * leaf.sum() for leaf in leaves)
                gradients = torch.autograd.grad(reached, leaves)
        finally:
            self._probing, self._pass = None, None
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
        if self.merged:
            raise NolaVisionError("an adapter is merged into the backbone, so none can be routed to: unmerge() first")
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


def _in_backward() -> bool:
    """Whether autograd runs: a layer that computes then is repeated by activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


class _AdaptedForward:
    """The forward pass of one attached layer."""

    def __init__(self, stack: AdapterStack, layer: nn.Linear | nn.Conv2d, targets: Sequence[Target]) -> None:
        self.stack, self.layer, self.targets = stack, layer, tuple(targets)

    def __deepcopy__(self, memo: object) -> _AdaptedForward:
        raise NolaVisionError("a backbone with an adapter attached cannot be copied: detach() the adapter first")

    def __reduce__(self) -> str:
        raise NolaVisionError("a backbone with an adapter attached cannot be pickled: detach() the adapter first")

    def __call__(self, x: Tensor) -> Tensor:
        stack, layer = self.stack, self.layer
        if stack.merged:
            return cast(Tensor, cast(Any, type(layer)).forward(layer, x))
        if layer.weight.requires_grad:
            raise NolaVisionError(f"the weight of {self.targets[0].name} is trained itself: freeze the backbone")
        changes = [stack.change(target) for target in self.targets]
        if isinstance(layer, nn.Linear) and all(isinstance(change, LowRank) for change in changes):
            a, b, scale = self._whole(cast(list[LowRank], changes), layer.out_features)
            if a.dim() == 3:
                index = self._index(x.shape[0])
                return additive_linear(x, layer, a[index], b[index], scale)
            if merges_exactly(x, layer.weight):
                return merged_linear(x, layer, a, b, scale, stack.origin(x))
            return additive_linear(x, layer, a, b, scale)
        value = self._dense(changes, layer.weight.shape[0])
        if value.dim() == layer.weight.dim():
            return dense_change(x, layer, value)
        # once for each distinct adapter of the batch
        index = self._index(x.shape[0])
        order = torch.cat([(index == i).nonzero().flatten() for i in index.unique()])
        return torch.cat([dense_change(x[index == i], layer, value[i]) for i in index.unique()])[order.argsort()]

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

    def _index(self, size: int) -> Tensor:
        """The adapter of each row of a module's input, which may see a multiple of the batch (Swin's windows)."""
        index = self.stack.adapter_of_each()
        repeats, rest = divmod(size, len(index))
        if rest or not repeats:
            raise NolaVisionError(
                f"a layer sees {size} rows where the batch has {len(index)} samples, so samples cannot be told apart: "
                "route one adapter at a time"
            )
        return index.repeat_interleave(repeats)
