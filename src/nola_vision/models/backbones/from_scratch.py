"""Backbones without pretrained weights: random or zero ones."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from nola_vision.adapters.layers import batch_norms
from nola_vision.adapters.methods.base import Base
from nola_vision.adapters.random_basis import basis_key, uniform
from nola_vision.common.errors import NolaVisionError
from nola_vision.models.backbones.properties import probe_batch

_WITH_FAN_IN = (
    nn.Linear,
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


@torch.no_grad()
def initialise(backbone: nn.Module, base: Base, seed: int) -> None:
    """Fills the weights of linear layers and convolutions from the counter-based generator, or with zeros.

    A weight has He's variance 2 / fan_in, any other tensor of two or more dimensions (an embedding) the standard
    deviation 0.02; both are keyed by their names. Biases are zero; norms and scales keep timm's values.

    Args:
        backbone: a timm model; it is changed in place.
        base: "random" or "zero".
        seed: of the random weights.
    """
    layers = {name: module for name, module in backbone.named_modules() if isinstance(module, _WITH_FAN_IN)}
    weights = {f"{name}.weight".lstrip(".") for name in layers}
    biases = {f"{name}.bias".lstrip(".") for name in layers}
    for name, parameter in backbone.named_parameters():
        if name in biases or (name in weights and base == "zero"):
            parameter.zero_()
        elif parameter.dim() > 1:
            std = math.sqrt(2 / parameter[0].numel()) if name in weights else 0.02
            parameter.copy_(uniform(basis_key(seed, f"weight {name}", "base"), parameter.shape, std))


@torch.no_grad()
def open_branches(backbone: nn.Module) -> None:
    """Sets the weight of each of the L residual branches that timm starts at zero, or close to it, to 1/sqrt(L).

    The last norm of a branch (ResNet, RegNet, SwinV2, LeViT) or its layer scale (ConvNeXt, CaiT, DINOv2) is meant to
    grow in training. Where it stays frozen on random weights, the branch would add nothing and its layers could not be
    trained. With 1/sqrt(L) the variance grows by at most e over all branches.
    """
    scales = [
        parameter
        for name, parameter in backbone.named_parameters()
        if parameter.dim() == 1 and re.fullmatch(r"weight|gamma\w*", name.rpartition(".")[2])
        if (parameter == parameter[0]).all() and abs(float(parameter[0])) <= 0.1
    ]
    for parameter in scales:
        parameter.fill_(len(scales) ** -0.5)


@torch.no_grad()
def check_random_features(backbone: nn.Module, tag: str) -> None:
    """Refuses random weights with which the features vanish or explode: frozen batch norms do not normalise.

    Raises:
        NolaVisionError: the root mean square of the features of two images of noise is not between 1e-3 and 1e3.
    """
    size = float(backbone(probe_batch(backbone)).square().mean().sqrt())
    if not 1e-3 <= size <= 1e3:
        norms = "train the batch norms too (train_norms: true), or " if batch_norms(backbone) else ""
        raise NolaVisionError(
            f"with random weights the features of {tag} start at a size of {size:.0e}, too far from 1 to train, since "
            f"nothing normalises its layers: {norms}use base: pretrained"
        )
