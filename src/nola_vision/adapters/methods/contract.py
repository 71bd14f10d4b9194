"""What a method's functions return, checked against what `base` asks for, before it is trained or stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nola_vision.adapters.methods.base import Group, Method
from nola_vision.adapters.target import Dense, LowRank, Target
from nola_vision.common.errors import NolaVisionError


def check_groups(method: Method, groups: Sequence[Group], targets: Sequence[Target]) -> None:
    """Refuses groups that leave a target out or have it twice, and names that no tensor of a file can have.

    Raises:
        NolaVisionError: as above, or a group trains nothing.
    """
    method_name = type(method).__name__
    grouped = Counter(target.name for group in groups for target in group.targets)
    names = Counter(group.name for group in groups)
    if twice := [name for name, count in [*names.items(), *grouped.items()] if count > 1]:
        raise NolaVisionError(f"{method_name}.groups gives {twice[0]} twice: each group has another name and targets")
    if missing := [target.name for target in targets if target.name not in grouped]:
        raise NolaVisionError(
            f"{method_name}.groups leaves out {len(missing)} of {len(targets)} targets, such as {missing[0]}: put each "
            "in a group"
        )
    for group in groups:
        of_torch = nn.ModuleDict(), nn.ParameterDict()
        for name, kind in ((group.name, of_torch[0]), *((name, of_torch[1]) for name in group.shapes)):
            if not name or "." in name or not name.isprintable() or hasattr(kind, name):
                raise NolaVisionError(
                    f"{method_name} names a group or tensor {name!r}: use another name, without a dot"
                )
        if not group.shapes or not all(shape and min(shape) > 0 for shape in group.shapes.values()):
            raise NolaVisionError(
                f"{method_name}.groups states the shapes {dict(group.shapes)} for {group.name}: give those of what is "
                "trained, with one axis or more"
            )


def check_initial(method: Method, group: Group, values: Mapping[str, Tensor], num_adapters: int) -> None:
    """Refuses initial values that are not float tensors `[n, *shape]` of the group's shapes.

    Raises:
        NolaVisionError: as above.
    """
    method_name = type(method).__name__
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise NolaVisionError(f"{method_name}.initial gives {name} as {kind}: make it a float tensor")
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    stated = {name: (num_adapters, *shape) for name, shape in group.shapes.items()}
    if shapes != stated:
        raise NolaVisionError(
            f"{method_name}.initial gives {shapes} for group {group.name}, but its shapes are {stated}"
        )


def check_sketch(method: Method, group: Group, fixed: Mapping[str, Any]) -> None:
    """Refuses a sketch of other shapes than the group states, which a file could not be read back with.

    Raises:
        NolaVisionError: as above.
    """
    shapes, stated = {name: tuple(one.shape) for name, one in method.sketch(group, fixed).items()}, dict(group.sketch)
    if shapes != stated:
        raise NolaVisionError(
            f"{type(method).__name__}.sketch gives {shapes} for group {group.name}, but its `sketch` is {stated}"
        )


def check_change(method: Method, target: Target, change: object, adapters: int) -> None:
    """Refuses a target's change of another shape than its weight's: it would be broadcast.

    Raises:
        NolaVisionError: as above, or there is no change.
    """
    given: dict[str, Any]
    needed: dict[str, tuple[int, ...]]
    if isinstance(change, LowRank):
        rank = change.a.shape[-1]
        given = {"A": change.a.shape, "B": change.b.shape}
        needed = {"A": (adapters, target.inputs, rank), "B": (adapters, rank, target.outputs)}
    else:
        rows = target.shape[0] if target.rows is None else target.outputs
        given = {"Dense": change.value.shape if isinstance(change, Dense) else None}
        needed = {"Dense": (adapters, rows, *target.shape[1:])}
    if given != needed:
        shown = ", ".join(f"{name} {shape and list(shape)}" for name, shape in given.items())
        expected = ", ".join(f"{name} {list(shape)}" for name, shape in needed.items())
        raise NolaVisionError(
            f"{type(method).__name__}.changes gives {shown} for {target.name}: it must be {expected}, adapters first"
        )
