"""What a run trains: each method is a value with plain fields. No torch here: `stacks` builds what a method trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nola_vision.adapters.methods.settings import Scope, Start, Storage, check_bits
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.suggestions import did_you_mean
from nola_vision.common.validation import check_types, quoted
from nola_vision.models import peft_bridge

# Far above any use, since more than rank x max(m, o) matrices of a basis depend on each other, and far below what one
# digit too many asks for
_MOST_BASIS = 2**20
_MOST_NUMBER = 1e9  # of a setting: a scale of 1e38 has no float32 for what it multiplies


@dataclass(frozen=True)
class Method:
    """A way to adapt a backbone; the base of those below."""


@dataclass(frozen=True)
class FrozenMethod(Method):
    """A way to use the features of a frozen backbone: nothing is trained by steps, so nothing depends on `run_seed`."""


@dataclass(frozen=True)
class NearestNeighbor(FrozenMethod):
    """1-NN, no training: the label of the training image whose features have the largest cosine with the image's."""


@dataclass(frozen=True)
class NearestMean(FrozenMethod):
    """The class whose mean of unit features has the largest cosine with the image's features.

    Args:
        head_bits: bits per stored value of the head's matrix.
    """

    head_bits: int = 32


@dataclass(frozen=True)
class LogisticRegression(FrozenMethod):
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
        targets: names of the adapted weights, see `models.targets.find_targets`; `head` adds the classifier.
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


def stored_bits(method: Method) -> tuple[int, int]:
    """Bits a stored number of the adapter and of the head's matrix."""
    bits: int = getattr(method, "bits", 32)
    head_bits: int | None = getattr(method, "head_bits", None)
    return bits, bits if head_bits is None else head_bits


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
        raise NolaVisionError(f"{name} has no setting '{wrong[0]}': {did_you_mean(wrong[0], known)}")
    return METHODS[name](**given)
