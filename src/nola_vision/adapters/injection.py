"""How a backbone computes with a bank's changes: the `forward` of its target layers and of its root is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from nola_vision.adapters import context
from nola_vision.adapters.context import Pass, Settings
from nola_vision.adapters.functional import (
    additive_linear,
    can_recompute,
    computes_plainly,
    dense_change,
    merged_linear,
    merges_exactly,
    producer,
    record_producer,
)
from nola_vision.adapters.target import Change, LowRank, Target, whole, whole_dense
from nola_vision.common.errors import NolaVisionError


class Bank(Protocol):
    """What an attached backbone asks of a `ParameterBank`."""

    targets: tuple[Target, ...]

    @property
    def merged(self) -> bool: ...

    def make_pass(self, targets: Sequence[Target], settings: Settings | None = None) -> Pass: ...


class Injection:
    """A backbone that computes with a bank's changes, until `remove`.

    Args:
        bank: it makes the changes of each pass.
        backbone: its target weights must be frozen.

    Raises:
        NolaVisionError: a target is not a plain layer, is trained itself, or has an adapter attached already.
    """

    def __init__(self, bank: Bank, backbone: nn.Module) -> None:
        parts: dict[str, list[Target]] = {}
        for target in bank.targets:
            for module in target.modules:
                parts.setdefault(module, []).append(target)
        for name, found in parts.items():
            layer = backbone.get_submodule(name)
            plain = nn.Linear if found[0].kind == "linear" else nn.Conv2d
            if not isinstance(layer, plain):
                raise NolaVisionError(
                    f"target {name} is a {type(layer).__name__} where a {plain.__name__} is expected: make the bank "
                    "for this backbone"
                )
            if "forward" in layer.__dict__:
                raise NolaVisionError(f"{name} has an adapter attached already: detach that bank first")
            if layer.weight.requires_grad:
                raise NolaVisionError(f"target {name} is trained itself: freeze the backbone before attaching")
        self.bank, self.backbone = bank, backbone
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        for name, found in parts.items():
            layer = backbone.get_submodule(name)
            # an instance attribute shadows the class's forward and leaves the state dict alone
            layer.__dict__["forward"] = _AdaptedForward(bank, cast(Any, layer), found)
        if bank.targets:
            backbone.__dict__["forward"] = _PassForward(bank, backbone)
            modules = (module for module in backbone.modules() if can_recompute(module))
            self._hooks = [module.register_forward_hook(record_producer) for module in modules]

    def remove(self) -> None:
        """Restores the backbone's own forward pass."""
        for layer in self.backbone.modules():
            forward = layer.__dict__.get("forward")
            if isinstance(forward, _AdaptedForward | _PassForward) and forward.bank is self.bank:
                del layer.__dict__["forward"]
                if isinstance(forward, _PassForward) and forward.shadowed:
                    layer.__dict__["forward"] = forward.inner
        for hook in self._hooks:
            hook.remove()

    def run(self, images: Tensor, current: Pass) -> Tensor:
        """The features of a pass that the caller made.

        A target that has no change in it computes as the backbone does.
        """
        inner = cast(_PassForward, self.backbone.forward).inner
        with context.running(self.bank, current):
            return cast(Tensor, inner(images))

    def probe(self, images: Tensor) -> None:
        """Refuses targets whose change would have no effect.

        Raises:
            NolaVisionError: a target whose change does not reach the features.
        """
        if idle := self.idle(images):
            raise NolaVisionError(
                f"a change of {', '.join(idle[:3])}{' ...' if len(idle) > 3 else ''} does not reach the features of "
                "this backbone (it reads the weight in its own way, or multiplies the layer's output by zero), so "
                "it cannot be adapted: leave it out of `targets`"
            )

    def idle(self, images: Tensor) -> list[str]:
        """The names of the targets whose change does not reach the features.

        One pass with random A and B = 0: the features' gradient reaches each B whose change would move them.
        """
        generator = torch.Generator().manual_seed(0)
        made: dict[str, Change] = {}
        leaves = []
        for target in self.bank.targets:
            a = torch.randn(target.inputs, 1, generator=generator).to(images)
            leaves.append(torch.zeros(1, target.outputs).to(images).requires_grad_())
            made[target.name] = LowRank(a, leaves[-1], 1.0)
        modes = {module: module.training for module in self.backbone.modules()}
        self.backbone.eval()
        try:
            with torch.enable_grad():
                features = self.run(images, Pass(made, None))
                direction = torch.randn(features.shape, generator=generator).to(features)
                reached = (features * direction).sum() + sum(0 * leaf.sum() for leaf in leaves)
                gradients = torch.autograd.grad(reached, leaves)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return [t.name for t, g in zip(self.bank.targets, gradients, strict=True) if not g.any()]


class _PassForward:
    """The forward of an attached backbone: makes the changes of a pass, then computes as the backbone does."""

    def __init__(self, bank: Bank, backbone: nn.Module) -> None:
        self.bank, self.inner, self.shadowed = bank, backbone.forward, "forward" in backbone.__dict__

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **options: Any) -> Any:
        bank = self.bank
        if bank.merged:
            return self.inner(*args, **options)
        settings = None
        if context.in_backward():  # checkpointing around the whole backbone repeats it
            if (first := context.pass_in_backward(bank)) is None:
                raise NolaVisionError(
                    "the backbone runs again in a backward pass and its forward pass cannot be found: use "
                    "checkpoint(..., use_reentrant=False), or set_grad_checkpointing() of the backbone"
                )
            settings = first.settings
        current = bank.make_pass(bank.targets, settings)
        if args:
            current.settings.check_batch(args[0])
        with context.running(bank, current):
            features = self.inner(*args, **options)
        if isinstance(features, Tensor) and features.requires_grad:
            context.begin_backward_at(features, bank, current)
        return features


class _AdaptedForward:
    """The forward of one attached layer."""

    def __init__(self, bank: Bank, layer: nn.Linear | nn.Conv2d, targets: Sequence[Target]) -> None:
        self.bank, self.layer, self.targets = bank, layer, tuple(targets)

    def __call__(self, x: Tensor) -> Tensor:
        bank, layer = self.bank, self.layer
        if bank.merged:
            return self._plain(x)
        if layer.weight.requires_grad:
            raise NolaVisionError(f"the weight of {self.targets[0].name} is trained itself: freeze the backbone")
        # there is no pass where a part of the backbone is called by itself, such as `forward_features`
        current = context.current_pass(bank) or bank.make_pass(self.targets)
        if self.targets[0].name not in current.changes:
            return self._plain(x)
        changes, place = [current.changes[target.name] for target in self.targets], current.place
        plain_linear = isinstance(layer, nn.Linear) and computes_plainly(layer)
        if plain_linear and all(isinstance(change, LowRank) for change in changes):
            a, b, scale = whole(self.targets, cast(list[LowRank], changes))
            linear = cast(nn.Linear, layer)
            if place is not None:
                rows = _rows_of(place, len(x))
                return additive_linear(x, linear, a[rows], b[rows], scale)
            if merges_exactly(x, layer.weight):
                return merged_linear(x, linear, a, b, scale, producer(x))
            return additive_linear(x, linear, a, b, scale)
        value = whole_dense(self.targets, changes)
        if place is None:
            return dense_change(x, layer, value)
        # once for each distinct adapter of the batch
        members = [(_rows_of(place, len(x)) == i).nonzero().flatten() for i in range(len(value))]
        parts = [dense_change(x[rows], layer, value[i]) for i, rows in enumerate(members)]
        return torch.cat(parts)[torch.cat(members).argsort()]

    def _plain(self, x: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, type(self.layer)).forward(self.layer, x))


def _rows_of(place: Tensor, rows: int) -> Tensor:
    """The adapter of each row of a module's input, which may see a multiple of the batch (Swin's windows)."""
    repeats, rest = divmod(rows, len(place))
    if rest or not repeats:
        raise NolaVisionError(
            f"a layer's input has {rows} rows for a batch of {len(place)} samples, so rows cannot be matched to "
            "samples: route one adapter at a time"
        )
    return place.repeat_interleave(repeats)
