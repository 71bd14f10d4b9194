"""Targets by name: which weights of a backbone a method adapts, found by the structure of timm's models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from torch import nn

from nola_vision.adapters.target import Target
from nola_vision.errors import NolaVisionError

Layer = nn.Linear | nn.Conv2d

_OUTSIDE = {"head", "head_dist", "attn_pool", "fc", "classifier"}  # children of a model that come after its blocks
_MLP_LAYERS = {"fc1", "fc1_g", "fc1_x", "fc2"}
_SEPARATE = {"q_proj", "k_proj", "v_proj"}


def find_targets(backbone: nn.Module, names: Sequence[str] | str) -> list[Target]:
    """The weights that target names stand for, in the backbone's own order.

    Args:
        backbone: a timm model.
        names: one or several of
            `mlp`: the layers of every block's MLP, gated ones too (`fc1`, `fc2`; `fc1_g`, `fc1_x`, `fc2`);
            `qkv`: the fused query, key and value weight of every attention as one matrix, or the three if separate;
            `qv`: its query rows and its value rows as two matrices, or the query's and the value's own weight;
            `conv`: every convolution but a patch embedding, its weight reshaped near to square;
            `all`: every linear layer and convolution;
            `re:PATTERN`: every linear layer or convolution whose whole module name matches the regular expression.
            Pooling and head, where a model without classes still has them, are matched by `re:` alone.

    Raises:
        NolaVisionError: an unknown name, or one that matches no weight of this backbone.
    """
    layers = {name: layer for name, layer in backbone.named_modules() if isinstance(layer, Layer)}
    places = {n: _Place(n, layer, backbone.get_submodule(n.rpartition(".")[0])) for n, layer in layers.items()}
    uses: dict[int, list[str]] = {}  # tied weights: one parameter, several modules
    for name, layer in layers.items():
        uses.setdefault(id(layer.weight), []).append(name)

    chosen: dict[str, Target] = {}
    for wanted in [names] if isinstance(names, str) else names:
        found = [name for name in layers if _matches(wanted, places[name])]
        if not found:
            raise NolaVisionError(
                f"target '{wanted}' matches no weight of this {type(backbone).__name__}: it has {_known(places)}"
            )
        for name in found:
            modules = tuple(uses[id(layers[name].weight)])
            kind: Literal["linear", "conv"] = "linear" if isinstance(layers[name], nn.Linear) else "conv"
            whole = Target(f"{modules[0]}.weight", modules, kind, tuple(layers[name].weight.shape))
            fused = places[name].own not in _SEPARATE
            for target in _query_and_value(whole) if wanted == "qv" and fused else [whole]:
                chosen[target.name] = target
    _refuse_overlaps(list(chosen.values()))
    order = {name: position for position, name in enumerate(layers)}
    return sorted(chosen.values(), key=lambda t: (order[t.modules[0]], t.rows or (0, 0)))


class _Place(NamedTuple):
    """A layer and where it is."""

    name: str
    layer: Layer
    parent: nn.Module

    @property
    def own(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def inside(self) -> bool:
        """Whether it belongs to the blocks, not to pooling or head."""
        return self.name.partition(".")[0] not in _OUTSIDE

    @property
    def in_mlp(self) -> bool:
        """A module called mlp with a second layer; a squeeze-and-excitation has two layers too, under another name."""
        parent = self.name.rpartition(".")[0].rpartition(".")[2]
        return self.inside and self.own in _MLP_LAYERS and "mlp" in parent and hasattr(self.parent, "fc2")

    @property
    def in_attention(self) -> bool:
        """The fused layer of query, key and value, or one of three separate ones."""
        separate = self.own in _SEPARATE and all(hasattr(self.parent, name) for name in _SEPARATE)
        return self.inside and isinstance(self.layer, nn.Linear) and (self.own == "qkv" or separate)


def _matches(wanted: str, place: _Place) -> bool:
    if wanted.startswith("re:"):
        try:
            return re.fullmatch(wanted[3:], place.name) is not None
        except re.error as error:
            raise NolaVisionError(f"target '{wanted}' is no regular expression: {error}") from error
    if wanted not in TARGETS:
        raise NolaVisionError(
            f"unknown target '{wanted}': use {', '.join(TARGETS)}, or re:PATTERN to match module names"
        )
    return TARGETS[wanted](place)


TARGETS: dict[str, Callable[[_Place], bool]] = {
    "mlp": lambda place: place.in_mlp,
    "qkv": lambda place: place.in_attention,
    "qv": lambda place: place.in_attention and place.own != "k_proj",
    "all": lambda place: place.inside,
    "conv": lambda place: place.inside and isinstance(place.layer, nn.Conv2d) and "patch_embed" not in place.name,
}


def _query_and_value(fused: Target) -> list[Target]:
    """The query and the value rows of a fused QKV weight, which stacks query, key and value."""
    rows = fused.shape[0]
    if rows % 3:
        raise NolaVisionError(f"{fused.weight} has {rows} rows, which are no query, key and value of one size: use qkv")
    return [replace(fused, rows=(0, rows // 3)), replace(fused, rows=(2 * rows // 3, rows))]


def _refuse_overlaps(targets: Sequence[Target]) -> None:
    whole = {t.weight for t in targets if t.rows is None}
    twice = sorted({t.weight for t in targets if t.rows is not None} & whole)
    if twice:
        raise NolaVisionError(f"{twice[0]} is adapted twice, as a whole and in parts: use qkv or qv, not both")


def _known(places: Mapping[str, _Place]) -> str:
    names = [name for name, match in TARGETS.items() if any(match(place) for place in places.values())]
    example = next(iter(places), "no linear layer or convolution")
    return f"{', '.join(names) or 'none of the named targets'}, and layers such as {example}"
