"""Pretrain `vit_mini_patch4_32` from scratch on shapes that a formula draws, on a CPU, without a single photo or font.

    python scripts/pretrain_contours.py --minutes 72 --seed 0 --workers 1 --sheet sheet.png

The task is to tell apart 1,000 families of concentric closed contours, as in Kataoka et al., "Replacing Labeled
Real-image Datasets with Auto-generated Contours" (CVPR 2022), here drawn from Fourier series:

    r(t) = 1 + sum over h of a[h] cos(h t + p[h])        radius at the angle t, h = 1 .. 8

A class is one draw of a and p, of the number of copies, their ratio and the line width; its images differ in small
changes of these and in the distortions of `distort`. 80 further classes are held out for evaluation. The run stops by
wall-clock time; `--images N` stops it after that number of images instead (threads and library versions still move the
last bits).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm import create_model
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

CLASSES = 1000
HARMONICS = 8
MOST_COPIES = 4


@dataclass
class Families:
    """The parameters of n classes of contours."""

    amplitude: torch.Tensor  # [n, HARMONICS], a
    phase: torch.Tensor  # [n, HARMONICS], p
    copies: torch.Tensor  # [n], 1 to MOST_COPIES
    ratio: torch.Tensor  # [n], of the radii of a copy and the next larger one
    width: torch.Tensor  # [n], of the line, in half sides of the image

    @classmethod
    def draw(cls, n: int, g: torch.Generator) -> Families:
        order = torch.arange(1, HARMONICS + 1)
        decay = order ** -uniform(g, n, 0.3, 1.3)[:, None]
        amplitude = torch.randn(n, HARMONICS, generator=g) * decay
        # the sum of |a| bounds how far the radius leaves 1: at most 0.75, so that contours rarely cross the centre
        amplitude *= uniform(g, n, 0.3, 0.75)[:, None] / amplitude.abs().sum(1, keepdim=True)
        return cls(
            amplitude,
            uniform(g, n * HARMONICS, 0, 2 * math.pi).view(n, HARMONICS),
            torch.randint(1, MOST_COPIES + 1, (n,), generator=g),
            uniform(g, n, 0.5, 0.8),
            uniform(g, n, 0.05, 0.16),
        )


def contours(families: Families, labels: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Draw one image of each label's class: [n, 1, SIDE, SIDE], lines of 1 on 0."""
    n = len(labels)
    amplitude = families.amplitude[labels] * (1 + 0.15 * torch.randn(n, HARMONICS, generator=g))
    phase = families.phase[labels] + 0.15 * torch.randn(n, HARMONICS, generator=g)
    ratio = (families.ratio[labels] + 0.03 * torch.randn(n, generator=g)).view(n, 1, 1)
    width = (families.width[labels] * uniform(g, n, 0.8, 1.25)).view(n, 1, 1)
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    radius, angle = torch.hypot(x, y).clamp(min=1e-3), torch.atan2(y, x)
    harmonic = torch.arange(1, HARMONICS + 1).view(-1, 1, 1)
    # cos(h t + p) = cos p cos h t - sin p sin h t: two products instead of a cosine per image, harmonic and pixel
    cosines, sines = (harmonic * angle).cos().flatten(1), (harmonic * angle).sin().flatten(1)
    even, odd = amplitude * phase.cos(), amplitude * phase.sin()
    r = (1 + even @ cosines - odd @ sines).view(n, SIDE, SIDE)
    order = harmonic.flatten()
    slope = (-(even * order) @ sines - (odd * order) @ cosines).view(n, SIDE, SIDE)
    largest = 0.85 / r.flatten(1).amax(1).view(n, 1, 1)
    image = torch.zeros(n, SIDE, SIDE)
    for copy in range(MOST_COPIES):
        scale = largest * ratio**copy
        # to first order, |rho - scale r(t)| / |gradient of that|, the gradient at the contour, where rho is scale r
        distance = (radius - scale * r).abs() / torch.hypot(torch.ones(()), slope / r)
        line = ((width / 2 - distance) * SIDE / 2 + 0.5).clamp(0, 1)
        image = torch.where((copy < families.copies[labels]).view(n, 1, 1), torch.maximum(image, line), image)
    return image[:, None]


def few_shot_task(seed: int) -> FewShotTask:
    """Families that are not trained on."""
    g = torch.Generator().manual_seed(seed)
    families = Families.draw(HELD_OUT, g)
    return FewShotTask.of(lambda labels: contours(families, labels, g), g)


class Classifier(nn.Module):
    """Returns the loss of a batch [n, 3, 32, 32] with labels [n]: cross-entropy with label smoothing."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.encoder(images).float(), labels, label_smoothing=0.1)


def main() -> None:
    options = argument_parser(__doc__, 72, "vit_mini_patch4_32.safetensors", "pretrain_contours.log.jsonl", workers=2)
    options.add_argument("--patch-drop", type=float, default=0.5, help="share dropped until the last quarter")
    spawn(pretrain, options.parse_args())


def pretrain(worker: int, args: argparse.Namespace) -> None:
    """The whole run, in one of the workers."""
    families = Families.draw(CLASSES, torch.Generator().manual_seed(args.seed))
    task = few_shot_task(seed=args.seed + 1)
    torch.manual_seed(args.seed)
    encoder = create_model(
        "vit_mini_patch4_32", patch_drop_rate=args.patch_drop, num_classes=CLASSES, drop_path_rate=0.05
    )
    model = Classifier(encoder)
    g = image_generator(worker, args)
    torch.manual_seed(args.seed * args.workers + worker)  # other dropped patches in each worker
    if worker == 0 and args.sheet:
        contact_sheet(distort(contours(families, torch.arange(480) // 6, g), g), args.sheet)

    def draw(n: int, strength: float) -> tuple[torch.Tensor, ...]:
        labels = torch.randint(CLASSES, (n,), generator=g)
        return distort(contours(families, labels, g), g, strength), labels

    def before_step(done: float) -> None:
        if done > 0.75:
            encoder.patch_drop.prob = 0.0  # whole images at the end, as in use

    train(worker, args, model, encoder, draw, task, before_step, classes=CLASSES)


if __name__ == "__main__":
    main()
