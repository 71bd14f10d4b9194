"""An adapted model: a backbone, the stack attached to it, and what its adapter file says. The Python interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from nola_vision import methods
from nola_vision.adapters.file import read_adapter, write_adapter
from nola_vision.adapters.stack import AdapterStack
from nola_vision.backbones import (
    BackboneSpec,
    InputConfig,
    create_backbone,
    fingerprint,
    input_config,
    probe_batch,
)
from nola_vision.errors import NolaVisionError
from nola_vision.methods import FullFinetune, Method, make_stack


@dataclass(frozen=True)
class Card:
    """What an adapter file tells besides its numbers.

    Args:
        backbone: the model it belongs to.
        method: what was trained.
        class_names: in the order of the logits.
        run_seed: seed of the head's start and of LoRA's A.
        basis_seed: seed of NOLA's basis.
        input: what images must look like.
    """

    backbone: BackboneSpec
    method: Method
    class_names: tuple[str, ...]
    run_seed: int
    basis_seed: int
    input: InputConfig


class AdaptedModel(nn.Module):
    """A backbone with an adapter stack attached: images `[batch, 3, size, size]` to logits `[batch, classes]`.

    Made by `adapt` or `load_adapter`. `stack.parameters()` are the adapter's and the head's; the backbone's own are
    frozen unless the method is `FullFinetune`.
    """

    def __init__(self, backbone: nn.Module, stack: AdapterStack, card: Card) -> None:
        super().__init__()
        self.backbone, self.stack, self.card = backbone, stack, card
        # taken now: a run may cast the backbone to another precision, or train all of it
        # a fully fine-tuned model's file holds every weight, so it fits any of the shape
        self.fingerprint = None if isinstance(card.method, FullFinetune) else fingerprint(backbone)

    def forward(self, images: Tensor) -> Tensor:
        return self.stack.logits(self.backbone(images))

    def train(self, mode: bool = True) -> Self:
        """As usual, but a batch norm whose weights are frozen keeps its running statistics."""
        super().train(mode)
        for module in self.backbone.modules():
            frozen = not any(p.requires_grad for p in module.parameters(recurse=False))
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and frozen:
                module.training = False
        return self

    def trained_tensors(self) -> dict[str, Tensor]:
        """What training changed, by its name in the adapter file."""
        stack = self.stack
        tensors = {f"adapter.{name}": parameter[0] for name, parameter in stack.groups.named_parameters()}
        tensors |= {"head.weight": stack.head_weight[0], "head.bias": stack.head_bias[0]}
        if isinstance(self.card.method, FullFinetune):
            tensors |= {f"backbone.{name}": tensor for name, tensor in self.backbone.state_dict().items()}
        return tensors

    def save(self, path: str | Path) -> int:
        """Writes the adapter file and returns its size in bytes.

        Raises:
            NolaVisionError: the path cannot be written, or the adapter is merged into the backbone.
        """
        if self.stack.merged:
            raise NolaVisionError("a merged adapter cannot be saved: unmerge() it first")
        tensors = self.trained_tensors().items()
        stored = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors}
        return write_adapter(path, self.metadata(), stored)

    def metadata(self) -> dict[str, Any]:
        """What the adapter file says besides its tensors, as plain values."""
        card = self.card
        kept = {name: getattr(card.backbone, name) for name in ("tag", "img_size", "pretrained")}
        return {
            "backbone": kept,
            "backbone_fingerprint": self.fingerprint,
            "method": methods.to_dict(card.method),
            "run_seed": card.run_seed,
            "basis_seed": card.basis_seed,
            "targets": [{"name": t.name, "shape": list(t.shape), "group": t.group} for t in self.stack.targets],
            "class_names": list(card.class_names),
            "input": dataclasses.asdict(card.input),
        }


def adapt(
    backbone: str | BackboneSpec,
    method: Method,
    class_names: Sequence[str],
    run_seed: int = 0,
    basis_seed: int | None = None,
) -> AdaptedModel:
    """A pretrained backbone with a new adapter and a new head, ready to train.

    Args:
        backbone: timm's tag, or a `BackboneSpec` for a local file or another image size.
        method: what to train, such as `NOLA(targets=["mlp"], rank=4, num_basis=1024)`.
        class_names: the classes, in the order of the logits.
        run_seed: sets the head's start and LoRA's A.
        basis_seed: sets NOLA's basis; `run_seed` if not given.

    Raises:
        NolaVisionError: the backbone or a target is not there, or a target has no effect on the features.
    """
    spec = BackboneSpec(backbone) if isinstance(backbone, str) else backbone
    basis_seed = run_seed if basis_seed is None else basis_seed
    card = Card(spec, method, tuple(class_names), run_seed, basis_seed, input_config(spec))
    return _assemble(spec, card)


def _assemble(spec: BackboneSpec, card: Card) -> AdaptedModel:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(card.run_seed)  # what random weights, if any, come from
        backbone = create_backbone(spec)
    stack = make_stack(backbone, card.method, len(card.class_names), card.run_seed, card.basis_seed)
    stack.attach(backbone, probe_batch(backbone))
    if isinstance(card.method, FullFinetune):
        backbone.requires_grad_(True)
    return AdaptedModel(backbone, stack, card)


def load_adapter(path: str | Path, weights: str | None = None) -> AdaptedModel:
    """The adapted model of an adapter file, in eval mode.

    Args:
        path: the adapter file.
        weights: a local file with the backbone's weights; without it the weights that timm names.

    Raises:
        NolaVisionError: the file is damaged, or was made for other weights, shapes or methods than are here.
    """
    metadata, tensors = read_adapter(path)
    try:
        spec = BackboneSpec(file=weights, **metadata["backbone"])
        image: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["input"].items()}
        card = Card(
            spec,
            methods.from_dict(metadata["method"]),
            tuple(metadata["class_names"]),
            metadata["run_seed"],
            metadata["basis_seed"],
            InputConfig(**image),
        )
        expected = metadata["backbone_fingerprint"]
        shapes = {t["name"]: tuple(t["shape"]) for t in metadata["targets"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise NolaVisionError(f"the metadata of {path} is not what this release writes: {error}") from error
    # a fully fine-tuned model's file holds every weight, so none needs to be at hand
    model = _assemble(spec if expected is not None else dataclasses.replace(spec, pretrained=False), card)
    here = {target.name: target.shape for target in model.stack.targets}
    if list(here.items()) != list(shapes.items()):  # in this order: coefficients are stored by position
        name = next((n for n in here.keys() | shapes.keys() if here.get(n) != shapes.get(n)), "their order")
        raise NolaVisionError(
            f"{path} was made for other weight shapes: {name} is {shapes.get(name, 'different')} there and "
            f"{here.get(name, 'different')} in {spec.tag} here"
        )
    if expected is not None and expected != model.fingerprint:
        raise NolaVisionError(
            f"{path} was made for other weights of {spec.tag} than those at hand: give the file it was trained with by "
            "`weights` (--weights FILE)"
        )
    own = model.trained_tensors()
    wrong = [name for name in own.keys() | tensors.keys() if name not in own or name not in tensors]
    wrong = wrong or [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        raise NolaVisionError(f"the tensor {sorted(wrong)[0]} of {path} does not fit this backbone and method")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    return model.eval()
