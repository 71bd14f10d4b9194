"""The contract of a method: what it trains, how its trained values change weights, what the program asks of it.

A method is a frozen dataclass of settings in a separate file of this folder; `registry.register` makes it known.
Importing such a file must not import torch, since settings are checked before torch is loaded: functions import what
they compute with. CONTRIBUTING.md, "A new method", is the guide; `nola.py` and `lora.py` are good examples.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from nola_vision.adapters.target import HEAD, Change, Target
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.validation import quoted

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

Base = Literal["pretrained", "random", "zero"]  # what the weights of a backbone are
Storage = Literal["cached", "streamed"]
FLOAT_BITS = (16, 32)
MOST_CACHED_ON_LOAD = 512 * 2**20  # bytes of a basis that no setting decides on; a larger one is streamed
# Far above any use, since more than rank x max(m, o) matrices of a basis depend on each other, and far below what one
# digit too many asks for
MOST_NUM_BASIS = 2**20


@dataclass(frozen=True)
class Group:
    """Targets whose trained values are stored in the same tensors.

    Args:
        name: of the group in the adapter file and the state dict, such as `768x3072`; without a dot.
        targets: in the order of the tensors' layers.
        shapes: the trained tensors of one adapter by name, such as `{"coefficients_a": (layers, k)}`. `initial` draws
            tensors of these shapes with n in front, and a file is checked against them.
        sketch: the shapes of what `Method.sketch` gives.
    """

    name: str
    targets: tuple[Target, ...]
    shapes: Mapping[str, tuple[int, ...]]
    sketch: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Source:
    """What the initial values and the fixed part of a bank are made from.

    Args:
        num_adapters: n.
        basis_seed: the seed of everything fixed and random; n adapters share it.
        base: what the weights of the backbone are; without pretrained ones trained values start random.
        draws: the generator of initial values, used by one group after the other.
        backbone: the frozen backbone.
        head: `[classes, features + 1]`, the fixed part of an adapted head.
        loading: the trained values come from an adapter file, so what only training may be refused for is not checked.
    """

    num_adapters: int
    basis_seed: int
    base: Base
    draws: torch.Generator
    backbone: nn.Module | None = None
    head: Tensor | None = None
    loading: bool = False

    @property
    def from_scratch(self) -> bool:
        """Whether the weights are not pretrained."""
        return self.base != "pretrained"

    def weight(self, target: Target) -> Tensor:
        """The frozen weight of a target as the float matrix `[m, o]` that its change `scale * A @ B` is added to."""
        from nola_vision.adapters.functional import is_quantised

        if target.name == HEAD:
            assert self.head is not None
            return self.head.t()
        assert self.backbone is not None
        stored = self.backbone.get_parameter(target.weight)
        weight: Tensor = stored.dequantize() if is_quantised(stored) else stored.detach()
        if target.kind == "conv":
            return weight.reshape(target.inputs, target.outputs)
        return (weight if target.rows is None else weight[slice(*target.rows)]).t()


@dataclass(frozen=True)
class Method:
    """A way to adapt a backbone, and everything that the program asks of one. The defaults are for a plain head.

    Attributes:
        on_frozen_features: fitted without optimizer steps, so results do not depend on `run_seed`.
        regularised: a method on frozen features whose penalty is chosen inside the training images.
        savable: an adapter file can hold what is fitted.
        trains_only_head: no weight of the backbone is adapted or trained.
        trains_backbone: every weight of the backbone is trained, and the adapter file contains all of them.
        edits_backbone: it trains parameters that it adds to the backbone itself.
        train_norms: the backbone's batch norms are trained and stored with their statistics.
        nested: training uses a random share of the coefficients, so that a file can be cut.
        quantise_from: share of the training after which passes compute with the stored bits; always with 1 bit.
        cuttable: names of trained tensors whose last axis may be cut to its first entries (`bank.using(prefix=...)`).
        uses_basis_seed: what `fixed` gives depends on the basis seed.
        size_setting: the setting that decides how large an adapter file is, such as `rank`. A byte budget (`max_bytes`)
            solves for it, so a larger value must not give a smaller file. Empty: no budget is possible.
        step_grows_with_size: the change by a step of Adam is in proportion to `size_setting` (`plan.at_its_size`).
    """

    on_frozen_features = False
    regularised = False
    savable = True
    trains_only_head = False
    trains_backbone = False
    edits_backbone = False
    train_norms = False
    nested = False
    quantise_from = 1.0
    cuttable = frozenset[str]()
    uses_basis_seed = True
    size_setting = ""
    step_grows_with_size = False

    # --- settings ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Checks values whose types are right already; an override calls `super().check()` first.

        Raises:
            NolaVisionError: a value that no backbone could take, or two settings that exclude each other.
        """

    @property
    def stored_bits(self) -> tuple[int, int]:
        """Bits per stored value of the adapter and of the head's matrix."""
        return 32, 32

    @property
    def learning_rates(self) -> tuple[float, float]:
        """Of the adapter (or of the backbone) and of the head."""
        raise NotImplementedError(f"{type(self).__name__} states no learning rates")

    def with_bits(self, bits: int, head_bits: int) -> Self:
        """The method with other bits per stored value of the adapter and of the head's matrix.

        Raises:
            NolaVisionError: its values are always stored in 32 bits.
        """
        raise NolaVisionError(f"{type(self).__name__} stores its values in 32 bits: leave --bits out")

    def cut(self, counts: Mapping[tuple[str, str], int]) -> Self:
        """The method of a file that was cut.

        Args:
            counts: the length of the last axis that each cuttable tensor has left, by names of group and tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} does not support cutting")

    def for_base(self, base: Base) -> Self:
        """The method with those settings written out that follow from what the backbone's weights are."""
        return self

    def from_file(self, path: Path) -> Self:
        """The method as the header of an adapter file states it, for loading.

        Raises:
            NolaVisionError: a setting that may be in a config and not in a file.
        """
        return self

    def for_loading(self, targets: Sequence[Target]) -> Self:
        """The method with a basis that is kept in memory only if it is small: a file does not decide on memory."""
        return self

    # --- the backbone --------------------------------------------------------------------------------------------

    def edit(self, backbone: nn.Module, seed: int) -> tuple[Self, nn.Module]:
        """The method as a file states it, and the backbone with what the method adds to it."""
        return self, backbone

    def unfreeze(self, backbone: nn.Module) -> None:
        """Sets `requires_grad` of the backbone's own parameters that are trained."""

    def trained_in_backbone(self, backbone: nn.Module) -> dict[str, Tensor]:
        """The tensors of the backbone itself that training changes, by name; statistics of batch norms included."""
        return {}

    # --- adapters ------------------------------------------------------------------------------------------------

    @property
    def target_names(self) -> tuple[str, ...] | None:
        """What the adapted weights are called in a config, see `models.targets`; None if there are never any."""
        return None

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        """The groups that targets are divided into. An adapted head is the last target.

        Raises:
            NolaVisionError: a rank or budget that these targets cannot take.
        """
        return []

    def initial(self, group: Group, source: Source) -> dict[str, Tensor]:
        """The trained tensors at the start, `[n, *shape]` for each of `group.shapes`."""
        raise NolaVisionError(f"{type(self).__name__} does not define initial(group, source): see docs/own-method.md")

    def fixed(self, group: Group, source: Source) -> Mapping[str, Any]:
        """What `changes` needs and training leaves as it is: a basis, factors of the frozen weight, a scale.

        Values with a method `to` are replaced by `value.to(device)` when the bank moves.
        """
        return {}

    def changes(
        self, group: Group, trained: Mapping[str, Tensor], fixed: Mapping[str, Any], wanted: Container[Target]
    ) -> dict[str, Change]:
        """The change of each of the group's targets that is wanted, by the target's name.

        Args:
            group: one that `groups` gave.
            trained: values `[d, *shape]` of some of the n adapters, as they are or as they would be read back from a
                file (rounded to its bits; a cuttable one may be shorter in its last axis).
            fixed: what `fixed` gave, on the device of `trained`.
            wanted: the targets to compute.

        Returns:
            `LowRank(A [d, m, r], B [d, r, o], scale)` or `Dense([d, *shape of the adapted rows])`.
        """
        raise NolaVisionError(
            f"{type(self).__name__} does not define changes(group, trained, fixed, wanted): see docs/own-method.md"
        )

    def sketch(self, group: Group, fixed: Mapping[str, Any]) -> dict[str, Tensor]:
        """A few of the values that `fixed` computed from the frozen weight, if that depends on the machine's libraries.

        The adapter file contains them; loading compares them with its own, within 1e-3 of the largest.
        """
        return {}


@dataclass(frozen=True)
class FrozenMethod(Method):
    """A method on frozen features: fitted without optimizer steps, so results do not depend on `run_seed`."""

    on_frozen_features = True


@dataclass(frozen=True, kw_only=True)
class Adapter(Method):
    """The settings of all methods that change chosen weights by few trained values.

    Args:
        targets: names of the adapted weights, see `models.targets.find_targets`; `head` adds the classifier.
        lr: learning rate of the adapter's values (and of batch norms, if they are trained).
        head_lr: learning rate of the head; the same as `lr` if not given.
        train_norms: train the backbone's batch norms too, and store them with their statistics.
        bits: bits per stored value: 1 for one of two numbers per row (`quantization.rows_of`), 2 to 8 for integers with
            a scale per group of 64, 16 or 32 for floats. What is tested is what the file contains.
        head_bits: the same for the head's matrix; `bits` if not given.
        quantise_from: share of the training after which the forward pass computes with the stored bits already
            (quantisation-aware training, the gradient goes straight through); 1 is post-training quantisation. Values
            of 1 bit are trained so from the first step, whatever it is.
        max_bytes: a budget for the whole adapter file. The largest `size_setting` (`rank`, `num_basis`, ...) whose file
            is within it replaces the method's own.
    """

    targets: Sequence[str] | str = ("mlp",)
    lr: float = 5e-3
    head_lr: float | None = None
    train_norms: bool = False
    bits: int = 32
    head_bits: int | None = None
    quantise_from: float = 1.0
    max_bytes: int | None = None

    def check(self) -> None:
        name = type(self).__name__
        check_positive(self, "max_bytes")
        if self.max_bytes is not None and not self.size_setting:
            raise NolaVisionError(f"{name} has no setting that a budget could choose: leave max_bytes out")
        check_positive(self, "lr", "head_lr")
        check_bits(f"bits of {name}", self.bits)
        if self.head_bits is not None:
            check_bits(f"head_bits of {name}", self.head_bits)
        if not 0 <= self.quantise_from <= 1:
            raise NolaVisionError(
                f"quantise_from of {name} is {self.quantise_from}: it is a share of the training, from 0 to 1"
            )
        if self.quantise_from < 1 and min(self.stored_bits) == 32:
            raise NolaVisionError(
                f"quantise_from of {name} needs stored values of fewer than 32 bits: give bits (or head_bits) too"
            )

    @property
    def stored_bits(self) -> tuple[int, int]:
        return self.bits, self.bits if self.head_bits is None else self.head_bits

    @property
    def learning_rates(self) -> tuple[float, float]:
        return self.lr, self.lr if self.head_lr is None else self.head_lr

    @property
    def target_names(self) -> tuple[str, ...]:
        return (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)

    def with_count(self, count: int) -> Self:
        """The method with `count` as its `size_setting`, and without a budget."""
        changes: dict[str, Any] = {self.size_setting: count, "max_bytes": None}
        return replace(self, **changes)

    def with_bits(self, bits: int, head_bits: int) -> Self:
        return replace(self, bits=bits, head_bits=None if head_bits == bits else head_bits)

    def from_file(self, path: Path) -> Self:
        return replace(self, max_bytes=None)  # a budget is for training: a file's values are counted

    def unfreeze(self, backbone: nn.Module) -> None:
        from nola_vision.adapters.layers import batch_norms

        for norm in batch_norms(backbone).values() if self.train_norms else ():
            norm.requires_grad_(True)

    def trained_in_backbone(self, backbone: nn.Module) -> dict[str, Tensor]:
        from nola_vision.adapters.layers import batch_norms

        norms = batch_norms(backbone) if self.train_norms else {}
        whole = {f"{name}.{key}": tensor for name, norm in norms.items() for key, tensor in norm.state_dict().items()}
        return {name: tensor for name, tensor in whole.items() if not name.endswith("num_batches_tracked")}


# --- what several methods share --------------------------------------------------------------------------------------


def check_positive(method: Method, *settings: str, most: int = 10**9) -> None:
    """Refuses a setting that is given and not above zero and at most `most` (1e9: float32's products stay finite)."""
    for setting in settings:
        value = getattr(method, setting)
        if value is not None and not 0 < value <= most:
            raise NolaVisionError(
                f"{setting} of {type(method).__name__} is {quoted(value)}: it must be above zero and at most {most:,}"
            )


def check_bits(name: str, bits: int) -> None:
    """Raises NolaVisionError unless `bits` is 1 to 8, 16 (float16) or 32 (float32)."""
    if not (1 <= bits <= 8 or bits in FLOAT_BITS):
        raise NolaVisionError(f"{name} is {bits}: use 1 to 8 for integers, 16 or 32 for floats")


def check_rank(rank: int, targets: Sequence[Target]) -> None:
    """Refuses a rank that a target (other than the head) cannot have."""
    narrow = min((t for t in targets if t.name != HEAD), key=lambda t: min(t.inputs, t.outputs), default=None)
    if narrow is not None and not 1 <= rank <= min(narrow.inputs, narrow.outputs):
        raise NolaVisionError(
            f"rank {rank} is not possible for {narrow.name}, a {narrow.inputs} x {narrow.outputs} matrix: "
            f"use a rank from 1 to {min(narrow.inputs, narrow.outputs)}"
        )


def refuse_head(method: Method, targets: Sequence[Target], reason: str) -> None:
    """Refuses the head as a target of a method that cannot adapt it."""
    if any(target.name == HEAD for target in targets):
        raise NolaVisionError(f"{type(method).__name__} does not adapt the head ({reason}): leave head out of targets")


def check_max_parameters(count: int, least: int, method: str) -> None:
    """Refuses a number of trained values that is less than one per target and factor."""
    if count < least:
        raise NolaVisionError(
            f"max_parameters of {method} is {count}, but its targets need {least} for one value each: give more, or "
            "fewer targets"
        )


def by_shape(targets: Sequence[Target]) -> dict[str, tuple[Target, ...]]:
    """Targets whose factors have the same shapes, by `Target.group`."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.group, []).append(target)
    return {name: tuple(members) for name, members in groups.items()}


def one_by_one(targets: Sequence[Target]) -> dict[str, tuple[Target, ...]]:
    """Each target by itself, by its name with slashes for dots."""
    return {target.name.replace(".", "/"): (target,) for target in targets}


def storage_by_size(basis_bytes: int, memory_mib: float) -> dict[str, Any]:
    """`storage` and `memory_mib` where only the size decides. Streaming compiles code, so it is the exception."""
    storage = "cached" if basis_bytes <= MOST_CACHED_ON_LOAD else "streamed"
    return {"storage": storage, "memory_mib": min(memory_mib, 64.0)}
