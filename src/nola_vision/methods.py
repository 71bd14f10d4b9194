"""What a run trains: each method is a value with plain fields, and `make_stack` says what it means for a backbone."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from nola_vision import peft_bridge
from nola_vision.adapters.basis import Storage, basis_key, uniform
from nola_vision.adapters.hashed import HashedGroup
from nola_vision.adapters.lora import LoraGroup
from nola_vision.adapters.nola import NolaGroup, Scope, Start
from nola_vision.adapters.pranc import PrancGroup
from nola_vision.adapters.quantise import check_bits
from nola_vision.adapters.stack import AdapterStack
from nola_vision.adapters.target import HEAD, Target
from nola_vision.backbones import Base
from nola_vision.errors import NolaVisionError
from nola_vision.field_types import check_types, quoted
from nola_vision.targets import find_targets, named_targets

# Far above any use, since more than rank x max(m, o) matrices of a basis depend on each other, and far below what one
# digit too many asks for
_MOST_BASIS = 2**20
_MOST_NUMBER = 1e9  # of a setting: a scale of 1e38 has no float32 for what it multiplies
_MOST_CACHED_ON_LOAD = 512 * 2**20  # bytes of an adapter's basis in memory; a larger one is streamed
_MOST_CACHED = 16 * 2**30  # bytes of a cached basis: more than a machine with one GPU has to spare


@dataclass(frozen=True)
class Method:
    """A way to adapt a backbone; the base of those below."""


@dataclass(frozen=True)
class NearestNeighbor(Method):
    """1-NN, no training: the label of the training image whose features have the largest cosine with the image's."""


@dataclass(frozen=True)
class NearestMean(Method):
    """The class whose mean of unit features has the largest cosine with the image's features.

    Args:
        head_bits: bits per stored value of the head's matrix.
    """

    head_bits: int = 32


@dataclass(frozen=True)
class LogisticRegression(Method):
    """Multinomial logistic regression on the frozen features; its penalty is chosen inside the training images.

    Args:
        head_bits: bits per stored value of the head's matrix.
    """

    head_bits: int = 32


@dataclass(frozen=True)
class LinearProbe(Method):
    """Only the head is trained, on the frozen backbone's features.

    Args:
        lr: learning rate of the head.
        head_bits: bits a stored number of the head's matrix.
    """

    lr: float = 5e-3
    head_bits: int = 32


@dataclass(frozen=True)
class FullFinetune(Method):
    """Every weight of the backbone and the head are trained.

    Args:
        lr: learning rate of the backbone.
        head_lr: learning rate of the head; the same as `lr` if not given.
    """

    lr: float = 5e-5
    head_lr: float | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter(Method):
    """What all methods that change chosen weights by few numbers have in common.

    Args:
        targets: names of the adapted weights, see `nola_vision.targets.find_targets`; `head` adds the classifier.
        lr: learning rate of the adapter's numbers (and of batch norms, if they are trained).
        head_lr: learning rate of the head; the same as `lr` if not given.
        train_norms: train the backbone's batch norms too, and store them with their statistics.
        bits: bits a stored number: 2 to 8 for integers with a scale a group, 16 or 32 for floats. What is tested is
            what the file holds.
        head_bits: the same for the head's matrix; `bits` if not given.
        quantise_from: share of the training after which the forward pass computes with the stored bits already
            (quantisation-aware training, the gradient goes straight through); 1 is post-training quantisation.
    """

    targets: Sequence[str] | str = ("mlp",)
    lr: float = 5e-3
    head_lr: float | None = None
    train_norms: bool = False
    bits: int = 32
    head_bits: int | None = None
    quantise_from: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """LoRA (Hu et al., 2021): W + (c / rank) A B with both factors trained.

    Args:
        targets: names of the adapted weights.
        rank: r, the width of the factors; that of the head is at most the number of classes.
        c: the scale's numerator (PEFT's `lora_alpha`); the scale is c / rank.
    """

    targets: Sequence[str] | str = ("qkv",)
    rank: int = 4
    c: float = 8.0


@dataclass(frozen=True, kw_only=True)
class NOLA(Adapter):
    """NOLA (ICLR 2024, equation 1): W + (c / rank) A B, with A and B linear combinations of fixed random matrices.

    Args:
        rank: r, the width of the factors; it does not change the number of trained coefficients.
        num_basis: k, the number of random matrices, and so of coefficients, for each of A and B.
        num_basis_b: l, that of B where it differs.
        head_num_basis: that of the head (A and B), if `head` is a target; `num_basis` if not given.
        head_rank: r of the head; 64 if not given, at most the number of features + 1. A head starts from almost
            nothing: of a low rank, it would see a few random directions of the features only.
        max_parameters: instead of `num_basis`, a budget of trained coefficients (without the head's) that is spread
            evenly over the targets.
        max_bytes: instead of `num_basis`, a budget for the adapter file.
        c: the scale's numerator; the scale is c / rank.
        scope: `shared`, one basis for all weights of a shape, or `per_layer`.
        start: `a0`, a fixed random A0 and zero coefficients, so that training starts at the pretrained model exactly;
            `released`, the authors' code, no A0 and every coefficient 1/k; `random`, for weights that start from
            nothing; by default `random` without pretrained weights, else `a0`.
        nested: train so that the first coefficients alone are a good adapter too, and a file can be cut.
        storage: `cached` holds the basis (a byte an entry), `streamed` makes it in chunks whenever it is used.
        memory_mib: working memory of one streamed chunk.
    """

    rank: int = 4
    num_basis: int = 1024
    num_basis_b: int | None = None
    head_num_basis: int | None = None
    head_rank: int | None = None
    max_parameters: int | None = None
    max_bytes: int | None = None
    c: float = 2.0
    scope: Scope = "shared"
    start: Start | None = None
    nested: bool = False
    storage: Storage = "cached"
    memory_mib: float = 16.0


@dataclass(frozen=True, kw_only=True)
class PRANC(Adapter):
    """PRANC (ICCV 2023): weights, or changes of them, are one linear combination of fixed random vectors.

    Args:
        num_basis: k, the number of random vectors, and so of coefficients.
        scope: `model`, one combination for all targets together, or `layer`, one for each.
        c: the scale.
        nested: train so that the first coefficients alone are a good adapter too, and a file can be cut.
        storage: `cached` holds the basis (k bytes a weight), `streamed` makes it in chunks whenever it is used.
        memory_mib: working memory of one streamed chunk.
    """

    num_basis: int = 1024
    scope: Literal["model", "layer"] = "model"
    c: float = 1.0
    nested: bool = False
    storage: Storage = "cached"
    memory_mib: float = 16.0


@dataclass(frozen=True, kw_only=True)
class HashedNet(Adapter):
    """HashedNet (Chen et al., ICML 2015): weights, or changes of them, share trained numbers that a hash assigns.

    Args:
        max_parameters: trained numbers of all targets together, spread in proportion to their sizes.
        c: the scale.
    """

    max_parameters: int = 10_000
    c: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PEFT(Method):
    """A method of Hugging Face's PEFT (`pip install 'nola-vision[peft]'`), which edits the backbone in its own way.

    Args:
        config: the class of its config, such as `peft.VeraConfig`: one of `peft_bridge.CONFIGS`.
        settings: that config's fields, such as `{r: 256, target_modules: [qkv]}`; module names are timm's.
        lr: learning rate of what PEFT trains.
        head_lr: learning rate of the head; the same as `lr` if not given.
    """

    config: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    lr: float = 5e-3
    head_lr: float | None = None


METHODS: dict[str, type[Method]] = {
    method.__name__: method
    for method in (
        NearestNeighbor,
        NearestMean,
        LogisticRegression,
        LinearProbe,
        FullFinetune,
        LoRA,
        NOLA,
        PRANC,
        HashedNet,
        PEFT,
    )
}


def settle(method: Method, base: Base) -> Method:
    """The method with the settings written out that follow from what the backbone's weights are."""
    if isinstance(method, NOLA) and method.start is None:
        return dataclasses.replace(method, start="a0" if base == "pretrained" else "random")
    return method


def make_stack(
    backbone: nn.Module,
    method: Method,
    num_classes: int,
    run_seed: int = 0,
    basis_seed: int | None = None,
    num_adapters: int = 1,
    base: Base = "pretrained",
    target_names: Sequence[str] | None = None,
) -> AdapterStack:
    """The adapter stack of a method for a backbone, not attached yet.

    Args:
        backbone: a timm model made without a head.
        method: what to train.
        num_classes: classes of the head.
        run_seed: sets the head's start, LoRA's A and random coefficients. The head's start is the same for every method
            that trains a plain head.
        basis_seed: sets the basis; `run_seed` if not given.
        num_adapters: n, the number of adapters held.
        base: what the backbone's weights are; without pretrained ones the trained numbers start random.
        target_names: the exact names of the targets, as an adapter file lists them. They replace the method's patterns,
            which are then not read, and a basis that is too large for memory is streamed.

    Raises:
        NolaVisionError: a target that the backbone lacks, or a setting that is not possible.
    """
    method = check(settle(method, base))
    basis_seed = run_seed if basis_seed is None else basis_seed
    width = feature_width(backbone)
    targets: list[Target] = []
    if isinstance(method, Adapter):
        targets = method_targets(backbone, method, num_classes, target_names)
        if target_names is not None:
            method = _stored_in_little_memory(method, targets)
    head_base = None
    if targets and targets[-1].name == HEAD:
        std = 0.0 if base == "zero" else 0.1 / math.sqrt(3 * width)
        head_base = uniform(basis_key(run_seed, HEAD, HEAD), (num_classes, width + 1), std)
    groups = _groups(method, targets, num_adapters, basis_seed, base, _generator(run_seed, "factors"))
    return AdapterStack(groups, width, num_classes, num_adapters, _generator(run_seed, "head"), head_base)


def feature_width(backbone: nn.Module) -> int:
    """The number of pooled features of a backbone: some models widen them after their last block."""
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)  # type: ignore[arg-type]


def method_targets(
    backbone: nn.Module, method: Adapter, num_classes: int, target_names: Sequence[str] | None = None
) -> list[Target]:
    """The weights that a method adapts, the head as the last one; arguments as in `make_stack`."""
    named = [method.targets] if isinstance(method.targets, str) else list(method.targets)
    if target_names is not None:
        named = list(target_names)
    if not named:
        raise NolaVisionError(f"{type(method).__name__} needs at least one target, such as qkv or mlp")
    targets: list[Target] = []
    if others := [name for name in named if name != HEAD]:
        targets = find_targets(backbone, others) if target_names is None else named_targets(backbone, others)
    if HEAD in named:
        targets.append(Target(HEAD, (), "linear", (num_classes, feature_width(backbone) + 1)))
    return targets


def tensor_shapes(
    method: Method, targets: Sequence[Target], num_classes: int, width: int
) -> dict[str, tuple[int, ...]]:
    """The shapes of the adapter's and the head's tensors by their names in a file, without making any.

    Args:
        method: what is trained.
        targets: what `method_targets` gives; none for a method that adapts no weight by itself.
        num_classes: classes of the head.
        width: what `feature_width` gives.

    Raises:
        NolaVisionError: a rank or budget that these targets cannot take.
    """
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target.group, []).append(target)
    single = {target.name.replace(".", "/"): target for target in targets}
    shapes: dict[str, tuple[int, ...]] = {}
    match method:
        case NOLA():
            _check_rank(method, targets)
            for name, members in groups.items():
                for factor, count in zip("ab", _num_basis(method, targets, name), strict=True):
                    shapes[f"adapter.{name}.coefficients_{factor}"] = len(members), count
        case LoRA():
            _check_rank(method, targets)
            for name, members in groups.items():
                rank = _lora_rank(method.rank, members)
                shapes[f"adapter.{name}.a"] = len(members), members[0].inputs, rank
                shapes[f"adapter.{name}.b"] = len(members), rank, members[0].outputs
        case PRANC():
            for name in ["model"] if method.scope == "model" else single:
                shapes[f"adapter.{name}.coefficients"] = (method.num_basis,)
        case HashedNet():
            _check_budget(method.max_parameters, len(targets), "HashedNet")
            total = sum(target.size for target in targets)
            for name, target in single.items():
                shapes[f"adapter.{name}.buckets"] = (max(1, method.max_parameters * target.size // total),)
    if not any(target.name == HEAD for target in targets):
        shapes |= {"head.weight": (num_classes, width), "head.bias": (num_classes,)}
    return shapes


def _stored_in_little_memory(method: Adapter, targets: Sequence[Target]) -> Adapter:
    """The method with its basis in memory if that takes little, else streamed: a file does not decide on memory.

    Streaming compiles code, so it is the exception.
    """
    if isinstance(method, NOLA):
        each = {t.name if method.scope == "per_layer" else t.group: t for t in targets}.values()
        counts = [(t, *_num_basis(method, targets, t.group)) for t in each]
        held = sum(_nola_rank(method, t) * (ka * t.inputs + kb * t.outputs) for t, ka, kb in counts)
    elif isinstance(method, PRANC):
        held = method.num_basis * sum(target.size for target in targets)
    else:
        return method
    storage: Storage = "cached" if held <= _MOST_CACHED_ON_LOAD else "streamed"
    return dataclasses.replace(method, storage=storage, memory_mib=min(method.memory_mib, 64.0))


def _nola_rank(method: NOLA, target: Target) -> int:
    return method.rank if target.name != HEAD else min(method.head_rank or 64, target.inputs)


def _groups(
    method: Method, targets: Sequence[Target], n: int, basis_seed: int, base: Base, draws: torch.Generator
) -> dict[str, nn.Module]:
    """The modules that train, by the names that their tensors have in a file."""
    scratch = base != "pretrained"
    shapes: dict[str, list[Target]] = {}
    for target in targets:
        shapes.setdefault(target.group, []).append(target)
    single = {target.name.replace(".", "/"): target for target in targets}
    match method:
        case NOLA(c=c, scope=scope, storage=storage, memory_mib=memory):
            _check_rank(method, targets)
            start = method.start or "a0"
            if base == "zero" and start == "a0":
                raise NolaVisionError("NOLA's start a0 on base zero would never move: use start random")
            return {
                name: NolaGroup(
                    members,
                    n,
                    _nola_rank(method, members[0]),
                    _num_basis(method, targets, name),
                    c,
                    basis_seed,
                    scope,
                    start,
                    draws,
                    storage,
                    memory,
                )
                for name, members in shapes.items()
            }
        case LoRA(rank=rank, c=c):
            _check_rank(method, targets)
            return {
                name: LoraGroup(members, n, _lora_rank(rank, members), c, draws, scratch)
                for name, members in shapes.items()
            }
        case PRANC(num_basis=k, c=c, storage=storage, memory_mib=memory):
            held = k * sum(target.size for target in targets)
            if storage == "cached" and held > _MOST_CACHED:
                raise NolaVisionError(
                    f"PRANC's basis of {k} vectors would hold {held / 2**30:,.0f} GiB: use storage streamed, or less "
                    "num_basis"
                )
            parts = {"model": targets} if method.scope == "model" else {name: [t] for name, t in single.items()}
            return {
                name: PrancGroup(members, n, k, c, basis_seed, draws, scratch, storage, memory)
                for name, members in parts.items()
            }
        case HashedNet(max_parameters=budget, c=c):
            _check_budget(budget, len(targets), "HashedNet")
            total = sum(target.size for target in targets)
            return {
                name: HashedGroup(target, n, max(1, budget * target.size // total), c, basis_seed, draws, scratch)
                for name, target in single.items()
            }
    return {}


def _lora_rank(rank: int, members: Sequence[Target]) -> int:
    return rank if members[0].name != HEAD else min(rank, members[0].inputs, members[0].outputs)


def _num_basis(method: NOLA, targets: Sequence[Target], group: str) -> tuple[int, int]:
    """k and l of a group."""
    if group == HEAD:
        k = method.num_basis if method.head_num_basis is None else method.head_num_basis
        return k, k
    k = method.num_basis
    if method.max_parameters is not None:
        adapted = sum(target.name != HEAD for target in targets)
        _check_budget(method.max_parameters, 2 * adapted, "NOLA")
        k = method.max_parameters // (2 * max(1, adapted))
    return k, k if method.num_basis_b is None else method.num_basis_b


def _check_budget(budget: int, least: int, method: str) -> None:
    if budget < least:
        raise NolaVisionError(
            f"max_parameters of {method} is {budget}, but its targets need {least} for one number each: give more, or "
            "fewer targets"
        )


def check(method: Method) -> Method:
    """The method with Python's own numbers; settings that no backbone could take are refused.

    Raises:
        NolaVisionError: a value of another type, a number out of range, two settings that exclude each other, or a
            config or setting of PEFT that needs more than numbers.
    """
    name = type(method).__name__
    method = check_types(method)
    for setting in ("lr", "head_lr", "c", "num_basis", "num_basis_b", "head_num_basis", "head_rank", "memory_mib"):
        value = getattr(method, setting, None)
        if value is not None and not 0 < value <= _MOST_NUMBER:
            raise NolaVisionError(f"{setting} of {name} is {quoted(value)}: it must be above zero and at most 1e9")
    for setting in ("num_basis", "num_basis_b", "head_num_basis"):
        if (getattr(method, setting, None) or 0) > _MOST_BASIS:
            raise NolaVisionError(
                f"{setting} of {name} is {getattr(method, setting)}: it must be at most {_MOST_BASIS:,}"
            )
    for setting in ("bits", "head_bits"):
        if (bits := getattr(method, setting, None)) is not None:
            check_bits(f"{setting} of {name}", bits)
    if not 0 <= (share := getattr(method, "quantise_from", 1.0)) <= 1:
        raise NolaVisionError(f"quantise_from of {name} is {share}: it is a share of the training, from 0 to 1")
    if getattr(method, "quantise_from", 1.0) < 1 and min(stored_bits(method)) == 32:
        raise NolaVisionError(f"quantise_from of {name} has no effect on 32-bit numbers: give bits (or head_bits) too")
    if isinstance(method, NOLA) and method.max_parameters is not None and method.max_bytes is not None:
        raise NolaVisionError("NOLA has both max_parameters and max_bytes: give one budget")
    if isinstance(method, NOLA) and (method.max_parameters or method.max_bytes) and method.num_basis_b is not None:
        raise NolaVisionError("NOLA has a budget and num_basis_b: a budget is spread evenly over A and B")
    if isinstance(method, PEFT):
        peft_bridge.check(method.config, method.settings)
    return method


def _check_rank(method: NOLA | LoRA, targets: Sequence[Target]) -> None:
    targets = [target for target in targets if target.name != HEAD]
    if not targets:
        return
    narrow = min(targets, key=lambda t: min(t.inputs, t.outputs))
    limit = min(narrow.inputs, narrow.outputs)
    if not 1 <= method.rank <= limit:
        raise NolaVisionError(
            f"rank {method.rank} is not possible for {narrow.name}, a {narrow.inputs} x {narrow.outputs} matrix: "
            f"use a rank from 1 to {limit}"
        )


def edited_by_peft(backbone: nn.Module, method: PEFT, run_seed: int) -> nn.Module:
    """PEFT's model around a backbone that it edits: what it adds and trains has `requires_grad`, drawn by `run_seed`.

    Raises:
        NolaVisionError: PEFT is not installed, has no such config, or refuses its settings for this backbone.
    """
    seed = _generator(run_seed, "peft").initial_seed()
    return peft_bridge.edited(backbone, method.config, method.settings, seed)


def with_module_names(method: PEFT, edited: nn.Module) -> PEFT:
    """The method with the modules that PEFT edited in place of a pattern, which a file could not restore."""
    if not peft_bridge.has_pattern(method.settings):
        return method
    settings = {**method.settings, "target_modules": peft_bridge.module_names(edited)}
    return dataclasses.replace(method, settings=settings)


def stored_bits(method: Method) -> tuple[int, int]:
    """Bits a stored number of the adapter and of the head's matrix."""
    bits: int = getattr(method, "bits", 32)
    head_bits: int | None = getattr(method, "head_bits", None)
    return bits, bits if head_bits is None else head_bits


def _generator(run_seed: int, purpose: str) -> torch.Generator:
    """A stream of its own for each purpose, so that no draw shifts another."""
    digest = hashlib.sha256(f"{run_seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def to_dict(method: Method) -> dict[str, Any]:
    """`{class_path, init_args}` of plain values, as in a config."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(method).items()}
    return {"class_path": type(method).__name__, "init_args": fields}


def from_dict(described: dict[str, Any]) -> Method:
    """The method that `to_dict` described.

    Raises:
        NolaVisionError: an unknown method or field.
    """
    if not isinstance(described, dict):
        raise NolaVisionError(f"the method is {quoted(described)}: write it as class_path and init_args")
    path = described.get("class_path")
    name = path.rpartition(".")[2] if isinstance(path, str) else None
    if name not in METHODS:
        raise NolaVisionError(f"unknown method {quoted(name or path)}: use one of {', '.join(METHODS)}")
    given = described.get("init_args")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise NolaVisionError(f"init_args of {name} is {quoted(given)}: it must be a mapping")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    if wrong := [key for key in given if key not in known]:
        close = difflib.get_close_matches(wrong[0], known) or known
        raise NolaVisionError(f"{name} has no setting '{wrong[0]}': did you mean {' or '.join(close)}?")
    return METHODS[name](**given)
