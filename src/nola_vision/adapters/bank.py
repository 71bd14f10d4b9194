"""The parameter bank: everything that is trained, for n adapters, in one object next to an untouched backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nola_vision.adapters import context
from nola_vision.adapters.context import Pass, Route, Settings
from nola_vision.adapters.injection import Injection
from nola_vision.adapters.layers import batch_norms
from nola_vision.adapters.merging import Merged
from nola_vision.adapters.methods.base import Group, Method, Source
from nola_vision.adapters.methods.contract import check_change, check_initial, check_sketch
from nola_vision.adapters.quantization import rounded_straight_through
from nola_vision.adapters.target import HEAD, Change, Dense, LowRank, Target, dense
from nola_vision.common.errors import NolaVisionError


def prefix_length(count: int, share: float) -> int:
    """The number of coefficients in a share of `count`, at least one."""
    return max(1, round(share * count))


def _first(change: Change) -> Change:
    """The change of the only adapter."""
    return LowRank(change.a[0], change.b[0], change.scale) if isinstance(change, LowRank) else Dense(change.value[0])


class ParameterBank(nn.Module):
    """n adapters for one backbone: the trainable parameters of each group of targets, and the heads.

    The bank contains no part of the backbone. `attach` makes the backbone's target layers compute with the changed
    weight until `detach`; the backbone's parameters, names and state dict stay as timm made them. In the state dict a
    trained tensor `[n, ...]` is called `groups.<group>.<tensor>`, such as `groups.768x3072.coefficients_a`.

    Several threads may compute with one attached bank at a time, each with its own `route` and `using`. None of them
    may attach, merge or step an optimizer meanwhile. Parameters are float32 (or float64) whatever the precision of the
    backbone: a cast of the bank to 16 bits leaves them as they are.

    The head is a plain trained matrix and bias, or, where a group has the target `HEAD`, a fixed matrix
    `[classes, features + 1]` (the bias is its last column) with that group's change.

    Args:
        method: states the initial values, the fixed part and the changes of each group.
        groups: what `method.groups` returned; empty for a bank of heads only.
        source: what the initial values and the fixed part are computed from; an adapted head starts at `source.head`.
        num_features: width of the backbone's features.
        num_classes: number of classes, 0 for a bank without a head; or one number for each of the n adapters. The
            trained heads are then padded to the largest, and the logits of classes that an adapter lacks are -inf.
        head_draws: draws a trained head's start, uniform in +-0.1/sqrt(features), a tenth of what `nn.Linear` takes: a
            random head's response to directions that no training image shows stays, as noise in the logits.
    """

    def __init__(
        self,
        method: Method,
        groups: Sequence[Group],
        source: Source,
        num_features: int,
        num_classes: int | Sequence[int],
        head_draws: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.method, self.num_adapters, self.num_features = method, source.num_adapters, num_features
        self.class_counts = _class_counts(num_classes, self.num_adapters)
        self.num_classes = max(self.class_counts)
        self.group_settings = {group.name: group for group in groups}
        self.groups = nn.ModuleDict()
        self.fixed: dict[str, dict[str, Any]] = {}  # no buffers: these would enter state dicts and be broadcast by DDP
        for group in groups:
            values = method.initial(group, source)
            check_initial(method, group, values, self.num_adapters)
            tensors = {name: nn.Parameter(values[name].contiguous()) for name in group.shapes}
            self.groups[group.name] = nn.ParameterDict(tensors)
            self.fixed[group.name] = dict(method.fixed(group, source))
            check_sketch(method, group, self.fixed[group.name])
        every = {target: group.name for group in groups for target in group.targets}
        self.group_of = {target.name: name for target, name in every.items()}
        self.targets = tuple(target for target in every if target.name != HEAD)
        self.head_target = next((target for target in every if target.name == HEAD), None)
        self.every_target = (*self.targets, *([self.head_target] if self.head_target is not None else []))
        self._head_base = source.head
        self._lacking: Tensor | None = None  # `[n, classes]`, the classes that an adapter lacks
        if len(set(self.class_counts)) > 1:
            if self.head_target is not None:
                raise NolaVisionError(
                    "an adapted head has the same number of classes for all adapters: leave `head` out of the targets"
                )
            self._lacking = torch.arange(self.num_classes) >= torch.tensor(self.class_counts).unsqueeze(1)
        if self.head_target is None:
            bound = 0.1 * num_features**-0.5
            shape = self.num_adapters, self.num_classes
            self.head_weight = nn.Parameter((2 * torch.rand(*shape, num_features, generator=head_draws) - 1) * bound)
            self.head_bias = nn.Parameter((2 * torch.rand(shape, generator=head_draws) - 1) * bound)

        self._injection: Injection | None = None
        self._merged: Merged | None = None

    # --- the trained values --------------------------------------------------------------------------------------

    def members(self, group: str) -> Sequence[Target]:
        """The targets of a group, in the order of its layers."""
        return self.group_settings[group].targets

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        def precise(tensor: Tensor) -> Tensor:
            """Keeps parameters in their precision: in 16 bits most optimizer steps would be rounded to zero."""
            moved = cast(Tensor, fn(tensor))
            return moved if moved.dtype not in (torch.float16, torch.bfloat16) else tensor.to(moved.device)

        super()._apply(precise, recurse)  # type: ignore[no-untyped-call]
        first = next(self.parameters(), None)
        if first is not None:
            for fixed in self.fixed.values():
                fixed.update({name: one.to(first.device) for name, one in fixed.items() if hasattr(one, "to")})
            self._head_base = None if self._head_base is None else self._head_base.to(first)
            self._lacking = None if self._lacking is None else self._lacking.to(first.device)
        return self

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The trained parameters without those of the head, as the paper counts them."""
        return [p for name, group in self.groups.items() if name != HEAD for p in group.parameters()]

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the head; empty where it shares its values with all other weights (PRANC)."""
        if self.head_target is None:
            return [self.head_weight, self.head_bias]
        return list(self.groups[HEAD].parameters()) if HEAD in self.groups else []

    def _values(
        self, name: str, parameter: Tensor, settings: Settings, adapters: Tensor | None, cuttable: bool = False
    ) -> Tensor:
        """A parameter as a pass computes with it: of some adapters, rounded to a file's bits, cut to a prefix."""
        value = parameter if adapters is None else parameter[adapters]
        if bits := settings.bits.get(name):
            value = rounded_straight_through(value, bits)
        if settings.prefix < 1 and cuttable:
            value = value[..., : prefix_length(value.shape[-1], settings.prefix)]
        return value

    def _serving(self, settings: Settings) -> tuple[Tensor | None, Tensor | None]:
        """The adapters that passes of these settings compute with (None for the only one), and as `Pass.place`."""
        if self._merged is not None:
            return torch.tensor([self._merged.adapter], device=next(self.parameters()).device), None
        if self.num_adapters == 1:
            return None, None
        if (route := settings.route) is None:
            raise NolaVisionError(
                "this bank has several adapters: choose one for each sample by `with bank.route(index):`"
            )
        return route.adapters, route.place if len(route.adapters) > 1 else None

    def logits(self, features: Tensor) -> Tensor:
        """Features `[batch, features]` to logits `[batch, classes]`, each sample by its own adapter's head."""
        settings = context.settings(self)
        settings.check_batch(features)
        adapters, place = self._serving(settings)
        weight, bias = self._heads(settings, adapters)
        features = features.to(weight.dtype)
        if place is None:
            logits = F.linear(features, weight[0], bias[0])
        else:
            products = torch.baddbmm(bias[place].unsqueeze(1), features.unsqueeze(1), weight[place].transpose(1, 2))
            logits = products.squeeze(1)
        if self._lacking is None or adapters is None:
            return logits
        lacking = self._lacking[adapters]
        return logits.masked_fill(lacking[0] if place is None else lacking[place], -torch.inf)

    def head(self) -> tuple[Tensor, Tensor]:
        """The heads' weights `[n, classes, features]` and biases `[n, classes]`."""
        every = None if self.num_adapters == 1 else torch.arange(self.num_adapters)
        return self._heads(context.settings(self), every)

    def _heads(self, settings: Settings, adapters: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.head_target is None:
            bias = self.head_bias if settings.bias_change is None else self.head_bias + settings.bias_change
            bias = bias if adapters is None else bias[adapters]
            return self._values("head_weight", self.head_weight, settings, adapters), bias
        change = self._changes([self.head_target], settings, adapters)[HEAD]
        assert self._head_base is not None
        whole = self._head_base + dense(self.head_target, change)
        whole = whole.view(-1, *whole.shape[-2:])
        return whole[..., :-1], whole[..., -1]

    def forward(self, images: Tensor) -> Tensor:
        """Images through the attached backbone and the head: logits `[batch, classes]`."""
        return self.logits(self._attached().backbone(images))

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
                own: self._values(f"groups.{name}.{own}", parameter, settings, adapters, own in self.method.cuttable)
                for own, parameter in self.groups[name].named_parameters()
            }
            # 16-bit autocast would round the factors' own product
            with torch.autocast(next(iter(trained.values())).device.type, enabled=False):
                group, count = self.group_settings[name], len(next(iter(trained.values())))
                own_changes = self.method.changes(group, trained, self.fixed[name], targets)
            for target in targets:
                if self.group_of[target.name] == name:
                    check_change(self.method, target, own_changes.get(target.name), count)
            made |= own_changes
        return made if adapters is not None and len(adapters) > 1 else {n: _first(c) for n, c in made.items()}

    def sketches(self) -> dict[str, Tensor]:
        """What a file contains of the fixed part, by `<group>.<name>`; see `Method.sketch`."""
        return {
            f"{group.name}.{name}": tensor
            for group in self.group_settings.values()
            if group.sketch
            for name, tensor in self.method.sketch(group, self.fixed[group.name]).items()
        }

    # --- attaching and merging -----------------------------------------------------------------------------------

    def attach(self, backbone: nn.Module, probe: Tensor | None = None) -> None:
        """Makes the backbone compute with this bank's changes until `detach`.

        Args:
            backbone: a model whose root call gives features; its target weights must be frozen.
            probe: a batch of images. With it, a target whose change does not reach the features is refused: some
                models read `self.qkv.weight` themselves, and silently ignore an attachment to `qkv`.

        Raises:
            NolaVisionError: a target cannot be adapted, is trained itself, or does not affect the features.
        """
        if self._injection is not None:
            raise NolaVisionError("this bank is attached already: call detach() before attaching it again")
        self._injection = Injection(self, backbone)
        if probe is not None and self.targets:
            try:
                self._injection.probe(probe)
            except BaseException:
                self.detach()
                raise

    def detach(self) -> None:
        """Restores the backbone's own forward pass; after `merge`, its weights too."""
        if self.merged:
            self.unmerge()
        self._attached().remove()
        self._injection = None

    def _attached(self) -> Injection:
        if self._injection is None:
            raise NolaVisionError("this bank is not attached to a backbone: call attach(backbone) first")
        return self._injection

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def make_pass(self, targets: Sequence[Target], settings: Settings | None = None) -> Pass:
        """A new pass over some targets, with this thread's settings unless others are given."""
        settings = context.settings(self) if settings is None else settings
        adapters, place = self._serving(settings)
        return Pass(self._changes(targets, settings, adapters), place, settings)

    @torch.no_grad()
    def merge(self, adapter: int = 0, dequantise: bool = False) -> None:
        """Adds the changes to the backbone's weights once, in float32; inference then costs what the backbone costs.

        The original weights are kept for `unmerge`, since `W + d - d` is not W in floating point.

        Args:
            adapter: which one.
            dequantise: where the backbone's weights are integers, make the adapted weights floats again.

        Raises:
            NolaVisionError: an adapter is merged already, or the weights are integers.
        """
        if self.merged:
            raise NolaVisionError("this adapter is merged already: call unmerge() first")
        if not 0 <= adapter < self.num_adapters:
            raise NolaVisionError(f"there is no adapter {adapter} to merge: this bank has {self.num_adapters}")
        self._merged = Merged(self._attached().backbone, adapter, self.targets, self.changes(adapter), dequantise)

    def unmerge(self) -> None:
        """Puts the original weights back."""
        if self._merged is not None:
            self._merged.undo()
        self._merged = None

    @property
    def merged(self) -> bool:
        return self._merged is not None

    # --- routing and settings ------------------------------------------------------------------------------------

    @contextmanager
    def route(self, index: Tensor) -> Iterator[None]:
        """Sends each sample of a batch to one adapter, in this thread; an inner `route` replaces an outer one.

        The changes are computed for the distinct adapters of the index alone, so a pass costs the same whatever n is.

        Args:
            index: `[batch]` integers from 0 to n - 1, on any device.

        Raises:
            NolaVisionError: the bank has one adapter, an adapter is merged, a batch norm is in training mode, or the
                index is not a vector of such integers.
        """
        if self.num_adapters == 1:
            raise NolaVisionError("this bank has one adapter, so there is nothing to route: it needs more")
        if self.merged:
            raise NolaVisionError("cannot route while an adapter is merged into the backbone: call unmerge() first")
        if any(norm.training for norm in batch_norms(self._attached().backbone).values()):
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
                f"the index names adapter {int(wrong[0])}, but the bank has {self.num_adapters}: use 0 to "
                f"{self.num_adapters - 1}"
            )

    def using(
        self,
        *,
        prefix: float | None = None,
        bits: Mapping[str, int] | None = None,
        bias_change: Tensor | None = None,
    ) -> AbstractContextManager[None]:
        """Makes this thread's passes compute with what a shorter file would contain; gradients go straight through.

        Args:
            prefix: the share of the coefficients that is used, the first ones, above 0 and at most 1.
            bits: stored bits by parameter name.
            bias_change: `[num_adapters, classes]`, added to the biases of heads that are not targets.

        Raises:
            NolaVisionError: the share is out of range.
        """
        if prefix is not None and not 0 < prefix <= 1:
            raise NolaVisionError(f"prefix is {prefix}: it is a share of the coefficients, above 0 and at most 1")
        changes = {"prefix": prefix, "bits": bits, "bias_change": bias_change}
        return context.using(self, **{name: value for name, value in changes.items() if value is not None})


def _class_counts(num_classes: int | Sequence[int], num_adapters: int) -> tuple[int, ...]:
    """The number of classes of each adapter."""
    counts = (num_classes,) * num_adapters if isinstance(num_classes, int) else tuple(num_classes)
    if len(counts) != num_adapters:
        raise NolaVisionError(
            f"num_classes has {len(counts)} numbers, but the bank has {num_adapters} adapters: give one for each"
        )
    return counts
