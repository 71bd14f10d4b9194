"""Targets by name: the weights that `mlp`, `qkv` and the others select, found from the backbone's structure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Literal, cast

from torch import nn

from nola_vision.adapters.target import Target
from nola_vision.common.errors import NolaVisionError

TARGETS = ("mlp", "qkv", "qv", "all", "conv")
# a timm model's own children after its last block: `attn_pool` (SigLIP), `global_pool`, `head` (ConvNeXt), `head_dist`
_AFTER_BLOCKS = re.compile(r"(head|\w*pool)\w*(\.|$)")
_FUSED, _SPLIT = "qkv", ("q_proj", "k_proj", "v_proj")


def find_targets(backbone: nn.Module, names: Sequence[str] | str) -> list[Target]:
    """The weights that target names select, in the backbone's own order; `docs/backbones.md` lists them by family.

    Args:
        backbone: a timm model.
        names: one or several of
            `mlp`: the linear layers and 1 x 1 convolutions of every block's MLP, including the three of a gated MLP;
            `qkv`: query, key and value of every attention: the fused weight as one matrix, or the three layers;
            `qv`: query and value only: two thirds of the fused weight's rows as two matrices, or the two layers;
            `conv`: every convolution except the patch embedding, its weight reshaped to be nearly square;
            `all`: every linear layer and convolution;
            `re:PATTERN`: every linear layer or convolution whose whole module name matches the regular expression.
            Only `re:` selects layers of the pooling and the head.

    Raises:
        NolaVisionError: an unknown name, one that matches no weight of this backbone, or a fused weight that
            does not have three equal parts.
    """
    layers = {name: layer for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    roles = {name: _roles(backbone, name) for name in layers}
    uses: dict[int, list[str]] = {}  # tied weights: one parameter, several modules
    for name, layer in layers.items():
        uses.setdefault(id(layer.weight), []).append(name)

    chosen: dict[str, Target] = {}
    for wanted in [names] if isinstance(names, str) else names:
        found = [name for name in layers if _matches(wanted, name, roles[name])]
        if not found:
            raise NolaVisionError(
                f"target '{wanted}' matches no weight of this {type(backbone).__name__}: it has {_known(roles)}"
            )
        for name in found:
            modules = tuple(uses[id(layers[name].weight)])
            kind: Literal["linear", "conv"] = "linear" if isinstance(layers[name], nn.Linear) else "conv"
            targets = [Target(f"{modules[0]}.weight", modules, kind, tuple(layers[name].weight.shape))]
            if wanted == "qv" and name.endswith(_FUSED):
                targets = _query_and_value(targets[0], backbone.get_submodule(name.rpartition(".")[0]))
            chosen.update({target.name: target for target in targets})
    _refuse_overlaps(list(chosen.values()))
    order = {name: position for position, name in enumerate(layers)}
    return sorted(chosen.values(), key=lambda t: (order[t.modules[0]], t.rows or (0, 0)))


def named_targets(backbone: nn.Module, names: Sequence[str]) -> list[Target]:
    """The targets that an adapter file lists, by exact name and in its order. Patterns are not interpreted.

    Args:
        backbone: a timm model, possibly on the meta device.
        names: as `Target.name` gives them: a weight's name, with `[first:last]` where only those rows are adapted.

    Raises:
        NolaVisionError: a weight that this backbone does not have or that is not of a linear layer or convolution,
            rows that do not exist, or rows that occur twice.
    """
    uses: dict[int, list[str]] = {}
    for name, layer in backbone.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            uses.setdefault(id(layer.weight), []).append(name)
    known = {f"{modules[0]}.weight": tuple(modules) for modules in uses.values()}
    targets = []
    for name in names:
        weight, bracket, part = name.partition("[")
        if weight not in known:
            raise NolaVisionError(
                f"the adapter's target {weight} is not a weight of this {type(backbone).__name__}: use the backbone "
                "that it was trained with"
            )
        layer = backbone.get_submodule(known[weight][0])
        kind: Literal["linear", "conv"] = "linear" if isinstance(layer, nn.Linear) else "conv"
        shape, rows = tuple(cast(nn.Linear, layer).weight.shape), None
        if bracket:
            found = re.fullmatch(r"(\d{1,9}):(\d{1,9})\]", part, re.ASCII)
            rows = (int(found[1]), int(found[2])) if found else (0, 0)
            if kind == "conv" or not rows[0] < rows[1] <= shape[0]:
                raise NolaVisionError(f"the adapter's target {name} is not a part of a weight of shape {list(shape)}")
        targets.append(Target(weight, known[weight], kind, shape, rows))
    rows_of: dict[str, list[tuple[int, int]]] = {}
    for target in targets:
        rows_of.setdefault(target.weight, []).append(target.rows or (0, target.shape[0]))
    for weight, parts in rows_of.items():
        parts.sort()
        if any(before[1] > after[0] for before, after in pairwise(parts)):
            raise NolaVisionError(f"{weight} is adapted twice in the adapter's list of targets: train it again")
    return targets


def _matches(wanted: str, name: str, roles: set[str]) -> bool:
    if wanted.startswith("re:"):
        try:
            return re.fullmatch(wanted[3:], name) is not None
        except re.error as error:
            raise NolaVisionError(f"target '{wanted}' is not a regular expression ({error}): fix its syntax") from error
    if wanted not in TARGETS:
        raise NolaVisionError(
            f"unknown target '{wanted}': use {', '.join(TARGETS)}, or re:PATTERN to match module names"
        )
    return wanted in roles


def _roles(backbone: nn.Module, name: str) -> set[str]:
    """The target names that select a layer."""
    if _AFTER_BLOCKS.match(name):
        return set()
    roles, layer = {"all"}, backbone.get_submodule(name)
    path, _, own = name.rpartition(".")
    if isinstance(layer, nn.Conv2d) and "patch_embed" not in name:
        roles.add("conv")
    around = [backbone.get_submodule(outer) for outer in accumulate(path.split("."), "{}.{}".format)]
    if isinstance(layer, nn.Linear) and _is_attention(around[-1]) and own in (_FUSED, *_SPLIT):
        roles |= {"qkv"} if own == "k_proj" else {"qkv", "qv"}
    # an MLP inside an attention computes its position bias
    mlp = path.rpartition(".")[2].startswith("mlp") and not any(_is_attention(module) for module in around)
    if mlp and (isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)):
        roles.add("mlp")
    return roles


def _is_attention(module: nn.Module) -> bool:
    parts = {name for name, _ in module.named_children()}
    return _FUSED in parts or parts.issuperset(_SPLIT)


def _query_and_value(fused: Target, attention: nn.Module) -> list[Target]:
    """The query and the value rows of a fused QKV weight `[3 * width, m]`, which stacks query, key and value."""
    rows, width = fused.shape[0], getattr(getattr(attention, "proj", None), "in_features", fused.shape[1])
    if rows != 3 * width:
        raise NolaVisionError(
            f"target 'qv' takes thirds of a fused weight, but {fused.weight} has {rows} rows where query, key and "
            f"value of width {width} have {3 * width}: use qkv"
        )
    return [replace(fused, rows=(0, width)), replace(fused, rows=(2 * width, rows))]


def _refuse_overlaps(targets: Sequence[Target]) -> None:
    whole = {t.weight for t in targets if t.rows is None}
    twice = sorted({t.weight for t in targets if t.rows is not None} & whole)
    if twice:
        raise NolaVisionError(f"{twice[0]} is adapted twice, as a whole and in parts: use qkv or qv, not both")


def _known(roles: Mapping[str, set[str]]) -> str:
    names = [name for name in TARGETS if any(name in found for found in roles.values())]
    example = next(iter(roles), "no linear layer or convolution")
    return f"{', '.join(names) or 'none of the named targets'}, and layers such as {example}"
