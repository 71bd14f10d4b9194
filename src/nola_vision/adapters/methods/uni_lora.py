"""Uni-LoRA (Li et al., 2025): every entry of all low-rank factors is one of the values of one trained vector."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nola_vision.adapters.methods.base import Adapter, Group, Source, check_positive, check_rank, refuse_head
from nola_vision.adapters.methods.registry import register
from nola_vision.adapters.target import Change, LowRank, Target
from nola_vision.common.errors import NolaVisionError

if TYPE_CHECKING:
    from torch import Tensor

_MOST_ENTRIES = 2**24  # of all factors: a file does not decide on memory, and sorting these takes a few seconds


@register
@dataclass(frozen=True, kw_only=True)
class UniLoRA(Adapter):
    """Uni-LoRA (Li et al., NeurIPS 2025, arXiv:2506.00799): all low-rank factors share one trained vector theta.

        W + (c / rank) A B
        A = A0 / sqrt(m) + E_A                      [m, r]
        B = E_B                                     [r, o]
        E[p] = theta[h(p)] / sqrt(n_h(p))

    p runs through the entries of E_A and E_B of all targets. h(p) is the value of theta that entry p takes, and n_h(p)
    the number of entries that take the same. These numbers differ by at most one: the hash h sorts the entries by words
    of the counter-based generator (`random_basis.balanced_slots`). The normaliser makes the projection from theta to
    the entries an isometry (the paper's section 3.3). `theta [d]`, one vector for all targets, is all that is trained.

    theta starts at zero. The fixed random A0 (NOLA's) makes training start at the pretrained model exactly with a
    gradient that is not zero: there, theta moves B through A0, and A only once B is not zero. The paper has no A0 and
    starts theta uniform in +-0.02, so that it starts a little off the pretrained model; its scale is c = rank.

    Args:
        targets: names of the adapted weights; not `head`.
        rank: r, the width of the factors; it does not change the number of trained values.
        max_parameters: d, the length of theta; it has at most as many values as the factors have entries.
        c: the scale's numerator (PEFT's `lora_alpha`); the scale is c / rank.
    """

    targets: Sequence[str] | str = ("qkv",)
    rank: int = 4
    max_parameters: int = 10_000
    c: float = 4.0

    size_setting = "max_parameters"
    step_grows_with_size = True

    def check(self) -> None:
        super().check()
        check_positive(self, "max_parameters", "c")

    def groups(self, targets: Sequence[Target]) -> list[Group]:
        refuse_head(self, targets, "it would see `rank` fixed random directions of the features")
        check_rank(self.rank, targets)
        if (entries := self._entries(targets)) > _MOST_ENTRIES:
            raise NolaVisionError(
                f"rank {self.rank} of UniLoRA gives factors of {entries:,} entries, more than {_MOST_ENTRIES:,}: use a "
                "smaller rank, or fewer targets"
            )
        return [Group("model", tuple(targets), {"theta": (min(self.max_parameters, entries),)})]

    def _entries(self, targets: Sequence[Target]) -> int:
        return sum(self.rank * (target.inputs + target.outputs) for target in targets)

    def initial(self, group: Group, source: Source) -> dict[str, Tensor]:
        import torch

        if source.base == "zero":
            raise NolaVisionError("UniLoRA on base zero would never move, since B starts at zero: use NOLA or LoRA")
        return {"theta": torch.zeros(source.num_adapters, *group.shapes["theta"])}

    def fixed(self, group: Group, source: Source) -> dict[str, Any]:
        import torch

        from nola_vision.adapters.random_basis import balanced_slots, basis_bytes, basis_key, decode

        (count,), rank, seed = group.shapes["theta"], self.rank, source.basis_seed
        slots = balanced_slots(basis_key(seed, "unilora", "slots"), self._entries(group.targets), count)
        made = {"normaliser": torch.bincount(slots, minlength=count).rsqrt()}
        for target in group.targets:
            m, o = target.inputs, target.outputs
            a0 = basis_bytes(basis_key(seed, f"weight {target.name}", "A0"), 0, 1, rank, m)[0]
            made[f"a0 {target.name}"] = decode(a0, torch.float32).t() / math.sqrt(m)
            a, b, slots = slots.tensor_split((rank * m, rank * (m + o)))
            made |= {f"a {target.name}": a.view(rank, m).t(), f"b {target.name}": b.view(rank, o)}
        return made

    def changes(
        self, group: Group, trained: Mapping[str, Tensor], fixed: Mapping[str, Any], wanted: Container[Target]
    ) -> dict[str, Change]:
        theta, made = trained["theta"] * fixed["normaliser"], dict[str, Change]()
        for target in group.targets:
            if target in wanted:
                a0, a, b = (fixed[f"{part} {target.name}"] for part in ("a0", "a", "b"))
                made[target.name] = LowRank(a0 + theta[:, a], theta[:, b], self.c / self.rank)
        return made
