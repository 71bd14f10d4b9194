"""Pretrain `vit_mini_patch4_32` from scratch without labels, as a masked autoencoder of fractals, on a CPU.

    python scripts/pretrain_masked.py --minutes 30 --seed 0 --workers 2 --sheet sheet.png

He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022): the ViT sees 16 of the 64 patches, and a
small decoder, which is not kept, predicts the pixels of the other 48. With x_p the 16 pixels of patch p after
(x - mean) / sqrt(variance + 0.01), variance unbiased, and H the hidden patches of the batch, the loss is

    sum over p in H of |decoder(encoder(visible))_p - x_p|^2 / (16 |H|)

The images are points of iterated function systems, as in Kataoka et al., "Pre-training without Natural Images" (ACCV
2020), here 2 to 6 affine maps of the plane, of which one is chosen at random in each step of a chain:

    x <- M[i] x + s[i]        M[i] = rotation diag(a, +-b) rotation, 0.25 <= a <= 0.8, 0.1 a <= b <= a

and distorted (`pretraining.py`). A system is kept if its points cover 12 to 50 % of the image. 1,000 systems are
trained on, slightly changed for each image, and 80 others are for evaluation. The run stops by wall-clock time;
`--images N` stops it after that number of images instead (threads and library versions still move the last bits).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm import create_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from pretraining import (
    HELD_OUT,
    SIDE,
    FewShotTask,
    argument_parser,
    contact_sheet,
    distort,
    image_generator,
    spawn,
    train,
    uniform,
)

SYSTEMS = 1000
MOST_MAPS = 6
CHAINS, STEPS, FIRST_STEP = 96, 60, 12  # of an image; the first steps are not drawn, they are not at the attractor yet
PATCHES, PIXELS = 64, 16  # of an image, of a patch
VISIBLE = 16  # a quarter of the patches, as in the paper


def rotations(angle: torch.Tensor) -> torch.Tensor:
    """Matrices [..., 2, 2] of angles [...], in radians."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


@dataclass
class Systems:
    """The maps of n iterated function systems."""

    matrix: torch.Tensor  # [n, MOST_MAPS, 2, 2], M
    shift: torch.Tensor  # [n, MOST_MAPS, 2], s
    chance: torch.Tensor  # [n, MOST_MAPS], cumulative, of each map

    @classmethod
    def draw(cls, n: int, g: torch.Generator) -> Systems:
        kept: list[Systems] = []
        while sum(len(some.matrix) for some in kept) < n:
            some = cls._draw_any(256, g)
            covered = (fractals(some, torch.arange(256), g, change=0.0) > 0.3).float().mean((1, 2, 3))
            good = (covered > 0.12) & (covered < 0.5)
            kept.append(cls(some.matrix[good], some.shift[good], some.chance[good]))
        return cls(*(torch.cat([getattr(some, k) for some in kept])[:n] for k in ("matrix", "shift", "chance")))

    @classmethod
    def _draw_any(cls, n: int, g: torch.Generator) -> Systems:
        maps = n * MOST_MAPS
        first, second = (uniform(g, maps, 0, 2 * math.pi).view(n, MOST_MAPS) for _ in range(2))
        a = uniform(g, maps, 0.25, 0.8).view(n, MOST_MAPS)
        b = a * uniform(g, maps, 0.1, 1).view(n, MOST_MAPS)
        sign = torch.where(uniform(g, maps, 0, 1) < 0.5, -1.0, 1.0).view(n, MOST_MAPS)
        matrix = rotations(first) @ torch.diag_embed(torch.stack([a, b * sign], -1)) @ rotations(second)
        used = torch.arange(MOST_MAPS) < torch.randint(2, MOST_MAPS + 1, (n, 1), generator=g)
        chance = (a * b + 0.05) * used  # about the area that a map covers
        shift = uniform(g, maps * 2, -1, 1).view(n, MOST_MAPS, 2)
        return cls(matrix, shift, (chance / chance.sum(1, keepdim=True)).cumsum(1))


def fractals(systems: Systems, labels: torch.Tensor, g: torch.Generator, change: float = 1.0) -> torch.Tensor:
    """Draw one image of each label's system: [n, 1, SIDE, SIDE], a pixel is 1 if two points or more are in it."""
    n = len(labels)
    matrix = systems.matrix[labels] * (1 + change * 0.08 * torch.randn(n, MOST_MAPS, 2, 2, generator=g))
    shift = systems.shift[labels] + change * 0.05 * torch.randn(n, MOST_MAPS, 2, generator=g)
    draws = torch.rand(n, STEPS * CHAINS, generator=g)
    chosen = torch.searchsorted(systems.chance[labels], draws).clamp(max=MOST_MAPS - 1)
    maps = torch.cat([matrix.flatten(2), shift], -1).flatten(0, 1)  # [n * MOST_MAPS, 6]
    index = (chosen + torch.arange(n)[:, None] * MOST_MAPS).view(n, STEPS, CHAINS)
    x = y = torch.zeros(n, CHAINS)
    points = []
    for step in range(STEPS):
        m = maps[index[:, step]]
        x, y = m[..., 0] * x + m[..., 1] * y + m[..., 4], m[..., 2] * x + m[..., 3] * y + m[..., 5]
        if step >= FIRST_STEP:
            points.append(torch.stack([x, y], -1))
    p = torch.cat(points, 1).nan_to_num(0.0, 0.0, 0.0)  # a changed map may not be a contraction
    low, high = p.amin(1, keepdim=True), p.amax(1, keepdim=True)
    p = (p - (low + high) / 2) / ((high - low) / 2).amax(-1, keepdim=True).clamp(min=1e-4) * 0.85
    pixel = ((p + 1) / 2 * SIDE).long().clamp(0, SIDE - 1)
    image = torch.zeros(n, SIDE * SIDE)
    image.scatter_add_(1, pixel[..., 1] * SIDE + pixel[..., 0], torch.ones(n, p.shape[1]))
    return (image / 2).clamp(max=1).view(n, 1, SIDE, SIDE)


class MaskedAutoencoder(nn.Module):
    """Returns the loss of a batch [n, 3, 32, 32]: mean squared error over the pixels of hidden patches."""

    width, heads, depth = 96, 3, 2  # of the decoder

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder
        self.embed = nn.Linear(encoder.embed_dim, self.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.position = nn.Parameter(torch.randn(1, PATCHES, self.width) * 0.02)
        self.blocks = nn.Sequential(*[Block(self.width, self.heads) for _ in range(self.depth)])
        self.predict = nn.Sequential(nn.LayerNorm(self.width), nn.Linear(self.width, PIXELS))

    def forward(self, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """`visible` [n, VISIBLE]: the indices of the patches that the encoder sees."""
        n, encoder = len(images), self.encoder
        patches = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
        seen = patches.gather(1, visible[..., None].expand(-1, -1, encoder.embed_dim))
        first = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(n, -1, -1)
        features = self.embed(encoder.fc_norm(encoder.norm(encoder.blocks(torch.cat([first, seen], 1)))))
        tokens = self.mask_token.to(features.dtype).expand(n, PATCHES, -1)
        tokens = tokens.scatter(1, visible[..., None].expand(-1, -1, self.width), features[:, 1:]) + self.position
        predicted = self.predict(self.blocks(torch.cat([features[:, :1], tokens], 1)))[:, 1:]
        target = F.unfold(images[:, :1], 4, stride=4).transpose(1, 2)  # the three channels are equal
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-2).sqrt()
        hidden = torch.ones(n, PATCHES).scatter(1, visible, 0.0)
        return ((predicted.float() - target).square().mean(-1) * hidden).sum() / hidden.sum()


def few_shot_task(seed: int) -> FewShotTask:
    """Systems that are not trained on."""
    g = torch.Generator().manual_seed(seed)
    systems = Systems.draw(HELD_OUT, g)
    return FewShotTask.of(lambda labels: fractals(systems, labels, g), g)


def main() -> None:
    weights, log = "vit_mini_patch4_32_mae.safetensors", "pretrain_masked.log.jsonl"
    spawn(pretrain, argument_parser(__doc__, 30, weights, log, workers=2).parse_args())


def pretrain(worker: int, args: argparse.Namespace) -> None:
    """The whole run, in one of the workers."""
    systems = Systems.draw(SYSTEMS, torch.Generator().manual_seed(args.seed))
    task = few_shot_task(args.seed + 1)
    torch.manual_seed(args.seed)
    model = MaskedAutoencoder(create_model("vit_mini_patch4_32", num_classes=0))
    g = image_generator(worker, args)

    def inputs(labels: torch.Tensor, strength: float) -> torch.Tensor:
        return distort(fractals(systems, labels, g), g, strength)

    def draw(n: int, strength: float) -> tuple[torch.Tensor, ...]:
        labels = torch.randint(SYSTEMS, (n,), generator=g)
        return inputs(labels, strength), torch.rand(n, PATCHES, generator=g).argsort(1)[:, :VISIBLE]

    if worker == 0 and args.sheet:
        contact_sheet(inputs(torch.arange(480) // 6, 1.0), args.sheet)
    train(worker, args, model, model.encoder, draw, task, systems=SYSTEMS)


if __name__ == "__main__":
    main()
