"""The two networks of the paper's from-scratch experiments that timm lacks, registered with timm, without weights.

With `num_classes=0`, as adapters use them, they return features; otherwise they end in the linear classifier `head`.

`resnet20_cifar`: He et al. 2016, section 4.2: a 3x3 convolution, then three stages of three blocks with 16, 32 and 64
channels; shortcuts have no parameters (strided identity, new channels zero). 19 convolutions, 688 batch-norm channels.

`mlp_784_256`: one hidden layer of 256 units with ReLU on the 28 x 28 grey image (the mean of the three channels).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.grown = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.grown:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.grown // 2, self.grown - self.grown // 2))
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + shortcut)


class ResNet20(nn.Module):
    """ResNet-20 for 32 x 32 images, to its 64 pooled features `[batch, 64]` or to `num_classes` logits."""

    def __init__(self, num_classes: int = 0, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 64
        self.conv1, self.bn1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    _Block(before, width, 1 if before == width else 2), _Block(width, width, 1), _Block(width, width, 1)
                )
                for before, width in zip(widths, widths[1:], strict=False)
            )
        )
        self.head = _head(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(F.relu(self.bn1(self.conv1(images)))).mean((2, 3)))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """784 inputs to 256 features `[batch, 256]` after ReLU, or to `num_classes` logits."""

    def __init__(self, num_classes: int = 0, in_chans: int = 3, img_size: int | Sequence[int] = 28) -> None:
        super().__init__()
        if img_size not in (28, (28, 28), [28, 28]):  # timm passes both sides
            raise ValueError("it accepts images of 28 pixels only")
        self.num_classes, self.num_features = num_classes, 256
        self.fc1 = nn.Linear(784, 256)
        self.head = _head(256, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.fc1(images.mean(1).flatten(1))))  # type: ignore[no-any-return]


def _head(features: int, num_classes: int) -> nn.Module:
    return nn.Linear(features, num_classes) if num_classes else nn.Identity()


def _cfg(size: int, first: str, fixed: bool) -> dict[str, Any]:
    return {
        "input_size": (3, size, size), "fixed_input_size": fixed, "num_classes": 0, "pool_size": None,
        "crop_pct": 1.0, "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
        "first_conv": first, "classifier": "head",
    }  # fmt: skip


default_cfgs = generate_default_cfgs(
    {"resnet20_cifar.untrained": _cfg(32, "conv1", False), "mlp_784_256.untrained": _cfg(28, "fc1", True)}
)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(ResNet20, "resnet20_cifar", pretrained, **kwargs)
    return model


@register_model
def mlp_784_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(Mlp, "mlp_784_256", pretrained, **kwargs)
    return model
