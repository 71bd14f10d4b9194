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
import hashlib
import json
import math
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from timm import create_model

import nola_vision.models.zoo.mini_vit  # noqa: F401  (registers the model)

HERE = Path(__file__).parent
SIDE = 48  # pixels of a drawn shape, before it is distorted to 32
CLASSES, HELD_OUT = 1000, 80
HARMONICS = 8
MOST_COPIES = 4


def uniform(g: torch.Generator, n: int, low: float, high: float) -> torch.Tensor:
    return torch.rand(n, generator=g) * (high - low) + low


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


def distort(x: torch.Tensor, g: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """Turn drawn shapes [n, 1, SIDE, SIDE] into distorted inputs [n, 3, 32, 32], normalised to -1..1.

    A `strength` below 1 distorts less: strong distortions slow down the first steps.
    """
    n = len(x)

    # Stroke width: towards the minimum or the maximum of the neighbourhood.
    t = uniform(g, n, -0.5 * strength, strength).view(-1, 1, 1, 1)
    thin, thick = -F.max_pool2d(-x, 3, 1, 1), F.max_pool2d(x, 3, 1, 1)
    x = torch.where(t < 0, torch.lerp(x, thin, -t), torch.lerp(x, thick, t.clamp(0, 1)))

    # Place: the matrix maps output to input coordinates, so a factor above 1 makes the shape smaller.
    angle = uniform(g, n, -1, 1) * math.radians(20) * strength
    size, aspect, shear = uniform(g, n, 0.82, 1.35), uniform(g, n, -0.2, 0.2).exp(), uniform(g, n, -0.3, 0.3)
    size, shear, shift = (size - 1) * strength + 1, shear * strength, 0.12 * strength
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([cos * size * aspect, (shear * cos - sin) * size * aspect, uniform(g, n, -shift, shift)], 1),
            torch.stack([sin * size / aspect, (shear * sin + cos) * size / aspect, uniform(g, n, -shift, shift)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [n, 1, 32, 32], align_corners=False)
    # Smooth random displacement, coarse and fine.
    for cells, amount in ((3, 0.1), (6, 0.04)):
        wobble = torch.randn(n, 2, cells, cells, generator=g) * uniform(g, n, 0, amount * strength).view(-1, 1, 1, 1)
        grid = grid + F.interpolate(wobble, (32, 32), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    # Blur, then tone.
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, uniform(g, n, -1, 1).clamp(min=0).view(-1, 1, 1, 1))
    x = x.clamp(1e-4, 1) ** uniform(g, n, -0.5, 0.3).exp().view(-1, 1, 1, 1)

    # Low resolution: half of each batch keeps 32 pixels, half has 12 to 25; images come in random order.
    whole, coarse = x.tensor_split(2)
    if torch.rand((), generator=g) <= strength:
        side = int(torch.randint(12, 26, (), generator=g))
        coarse = F.interpolate(F.adaptive_avg_pool2d(coarse, side), (32, 32), mode="bilinear", align_corners=False)
    x = torch.cat([whole, coarse])

    noise = uniform(g, n, -0.05, 0.05 * strength).clamp(min=0).view(-1, 1, 1, 1)
    gain, floor = uniform(g, n, 0.7, 1.1).view(-1, 1, 1, 1), uniform(g, n, -0.15, 0.15).clamp(min=0).view(-1, 1, 1, 1)
    x = (x * gain + floor + torch.randn(x.shape, generator=g) * noise).clamp(0, 1)
    x = torch.where(uniform(g, n, 0, 1).view(-1, 1, 1, 1) < 0.25 * strength, 1 - x, x)
    return ((x - 0.5) / 0.5).expand(-1, 3, -1, -1)


class FewShotTask:
    """5 of 15 images per class of classes that are not trained on: one fixed set of distorted images."""

    shots, queries = 5, 10

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        families = Families.draw(HELD_OUT, g)
        self.labels = torch.arange(HELD_OUT).repeat(self.shots + self.queries)
        order = torch.randperm(len(self.labels), generator=g)  # `distort` picks the resolution by place in the batch
        self.labels = self.labels[order]
        parts = [distort(contours(families, part, g), g) for part in self.labels.split(240)]
        self.images = torch.cat(parts)

    @torch.no_grad()
    def score(self, model: torch.nn.Module, draws: int = 3) -> dict[str, float]:
        """Mean accuracy of 1-nearest-neighbour (cosine) and of logistic regression on standardised features."""
        features = torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x in
                              self.images.split(250)])  # fmt: skip
        nearest, logistic = [], []
        for draw in range(draws):
            order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(draw))
            support = torch.cat([order[self.labels[order] == c][: self.shots] for c in range(HELD_OUT)])
            is_query = torch.ones(len(order), dtype=torch.bool)
            is_query[support] = False
            labels = self.labels.numpy()
            mean, std = features[support].mean(0), features[support].std(0) + 1e-5
            x = ((features - mean) / std).numpy()
            train, test = (x[support], labels[support]), (x[is_query], labels[is_query])
            logistic.append(LogisticRegression(C=0.1, max_iter=300).fit(*train).score(*test))
            x = features.numpy()
            nearest.append(
                KNeighborsClassifier(1, metric="cosine").fit(x[support], train[1]).score(x[is_query], test[1])
            )
        return {"knn_5shot": round(sum(nearest) / draws, 4), "logistic_5shot": round(sum(logistic) / draws, 4)}


def export(model: torch.nn.Module, path: Path) -> str:
    """Save the weights without the head as float16; returns the file's sha256."""
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors writes files that only their owner may read
    partial.replace(path)  # never a half-written file under the final name
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contact_sheet(images: torch.Tensor, path: Path, columns: int = 24) -> None:
    """Write inputs side by side as one PNG, to look at."""
    tiles = ((images[:, 0] * 0.5 + 0.5) * 255).byte()
    rows = [torch.cat(list(part), 1) for part in tiles.split(columns) if len(part) == columns]
    sheet = Image.fromarray(torch.cat(rows).numpy())
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Read the options and start the workers, processes of one thread each.

    Threads of one process wait for each other at every operation, which is slow if other programs use the cores too;
    processes wait once per step.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = HERE.parent / "src/nola_vision/models/zoo/weights/vit_mini_patch4_32.safetensors"
    parser.add_argument("--minutes", type=float, default=72, help="wall-clock time, set-up included")
    parser.add_argument("--images", type=int, help="stop after this many images instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=weights)
    parser.add_argument("--log", type=Path, default=HERE / "pretrain_contours.log.jsonl")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--patch-drop", type=float, default=0.5, help="share of patches dropped until the last quarter")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of training inputs here")
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(pretrain, (args, f"file://{folder}/meet"), nprocs=args.workers)


def pretrain(worker: int, args: argparse.Namespace, meet: str) -> None:
    """The whole run, in one of the workers; the first also evaluates, logs and saves."""
    start = time.monotonic()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=worker, world_size=args.workers)
    first = worker == 0
    families = Families.draw(CLASSES, torch.Generator().manual_seed(args.seed))
    held_out = FewShotTask(seed=args.seed + 1)

    torch.manual_seed(args.seed)
    shape = {"num_classes": CLASSES, "drop_path_rate": 0.05}
    model = create_model("vit_mini_patch4_32", patch_drop_rate=args.patch_drop, **shape)
    average = create_model("vit_mini_patch4_32", **shape).eval()
    average.load_state_dict(model.state_dict())
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    # Muon for the blocks' matrices, AdamW for the rest.
    matrices = [p for k, p in model.named_parameters() if k.startswith("blocks.") and p.ndim == 2]
    rest = [p for k, p in model.named_parameters() if not (k.startswith("blocks.") and p.ndim == 2)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True),
    ]
    g = torch.Generator().manual_seed(args.seed * args.workers + worker + 1000)  # other images in each worker
    torch.manual_seed(args.seed * args.workers + worker)  # other dropped patches in each worker

    def log(**entry: object) -> None:
        if first:
            line = json.dumps({"minutes": round((time.monotonic() - start) / 60, 2), **entry})
            with args.log.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)

    if first:
        args.log.write_text("")
        if args.sheet:
            # from the generator of the training images, so a run without a sheet trains on other images
            contact_sheet(distort(contours(families, torch.arange(480) // 6, g), g), args.sheet)
    settings = {f"arg_{k}": str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    log(event="start", **settings, classes=CLASSES, held_out_classes=HELD_OUT,
        parameters=sum(p.numel() for k, p in average.named_parameters() if not k.startswith("head.")),
        torch=torch.__version__)  # fmt: skip
    if first:
        log(images=0, **held_out.score(average))

    seen, step, running, done, next_report, warm_up = 0, 0, 0.0, 0.0, 10.0, 0.02
    train_start = time.monotonic()
    budget = args.minutes * 60 - (train_start - start) - 15  # for the last report and the export
    model.train()
    while done < 1:
        if done > 0.75 and model.patch_drop.prob:
            model.patch_drop.prob = 0.0  # whole images at the end, as in use
            log(event="whole images", images=seen)
        rate = args.lr * min(done / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - warm_up) / (1 - warm_up)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        labels = torch.randint(CLASSES, (args.batch // args.workers,), generator=g)
        inputs = distort(contours(families, labels, g), g, strength=min(1.0, 0.2 + 3.2 * done))
        with torch.autocast("cpu", torch.bfloat16):
            logits = parallel(inputs)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step, seen = step + 1, seen + args.batch
        keep = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        # workers agree on the loss and on the elapsed time, so that they all stop at the same step
        both = torch.tensor([loss.item(), (time.monotonic() - train_start) / budget])
        dist.all_reduce(both)
        value, done = (both / args.workers).tolist()
        running = value if step == 1 else 0.98 * running + 0.02 * value
        if args.images:
            done = seen / args.images
        if step % 100 == 0:
            log(images=seen, loss=round(running, 4), lr=round(rate, 7))
        if first and (time.monotonic() - start) / 60 >= next_report:
            export(average, args.out)
            log(images=seen, loss=round(running, 4), **held_out.score(average))
            next_report += 10
    if first:
        sha256 = export(average, args.out)  # before the report, so that the file exists even if the run is killed in it
        log(event="end", images=seen, steps=step, loss=round(running, 4), **held_out.score(average),
            bytes=args.out.stat().st_size, sha256=sha256)  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
