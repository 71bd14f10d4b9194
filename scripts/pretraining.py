"""What the pretraining scripts share: distortions of drawn images, a few-shot evaluation and the training loop."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from nola_vision.models.zoo.mini_vit import WEIGHTS  # registers the model too

HERE = Path(__file__).parent
SIDE = 48  # pixels of a drawn image, before it is distorted to 32
HELD_OUT = 80  # classes of the evaluation


def uniform(g: torch.Generator, n: int, low: float, high: float) -> torch.Tensor:
    return torch.rand(n, generator=g) * (high - low) + low


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

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels  # [n, 3, 32, 32], [n]

    @classmethod
    def of(cls, draw: Callable[[torch.Tensor], torch.Tensor], g: torch.Generator) -> FewShotTask:
        """Distorted images of HELD_OUT classes; `draw` makes [n, 1, SIDE, SIDE] of labels [n]."""
        labels = torch.arange(HELD_OUT).repeat(cls.shots + cls.queries)
        # in random order, since `distort` picks the resolution by place in the batch
        labels = labels[torch.randperm(len(labels), generator=g)]
        return cls(torch.cat([distort(draw(part), g) for part in labels.split(240)]), labels)

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
            fit, query = (x[support], labels[support]), (x[is_query], labels[is_query])
            logistic.append(LogisticRegression(C=0.1, max_iter=300).fit(*fit).score(*query))
            x = features.numpy()
            nearest.append(
                KNeighborsClassifier(1, metric="cosine").fit(x[support], fit[1]).score(x[is_query], query[1])
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


def argument_parser(doc: str | None, minutes: float, weights: str, log: str, workers: int) -> argparse.ArgumentParser:
    """The options of a pretraining script, with its defaults."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=minutes, help="wall-clock time of training and evaluation")
    options.add_argument("--images", type=int, help="stop after this many images instead")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, default=WEIGHTS / weights)
    options.add_argument("--log", type=Path, default=HERE / log)
    options.add_argument("--workers", type=int, default=workers, help="processes, of one thread each")
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--lr", type=float, default=2e-3)
    options.add_argument(
        "--sheet",
        type=Path,
        help="write a contact sheet of inputs here, drawn by the generator of the training images",
    )
    return options


def spawn(pretrain: Callable[..., None], args: argparse.Namespace, *more: object) -> None:
    """Call `pretrain(worker, args, *more)` in `args.workers` processes of one thread each.

    Threads of one process wait for each other at every operation, which is slow if other programs use the cores too;
    processes wait once per step.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meet"
        torch.multiprocessing.spawn(_join, (meeting, pretrain, args, *more), nprocs=args.workers)


def _join(worker: int, meeting: str, pretrain: Callable[..., None], args: argparse.Namespace, *more: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=worker, world_size=args.workers)
    pretrain(worker, args, *more)
    dist.destroy_process_group()


def image_generator(worker: int, args: argparse.Namespace) -> torch.Generator:
    """Generator of the training images; its seed differs between workers and from the evaluation's."""
    return torch.Generator().manual_seed(args.seed * args.workers + worker + 1000)


def train(
    worker: int,
    args: argparse.Namespace,
    model: nn.Module,
    encoder: VisionTransformer,
    draw: Callable[[int, float], tuple[torch.Tensor, ...]],
    task: FewShotTask,
    before_step: Callable[[float], None] = lambda done: None,
    **logged_settings: object,
) -> None:
    """Train in one of the workers; the first also evaluates, logs and saves.

    Args:
        model: returns the loss of what `draw` returns.
        encoder: the part of it that is kept, as the moving average of its weights.
        draw: a batch from its size and the strength of the distortions.
        task: evaluates the moving average.
        before_step: called with the part of the run that is done.
        logged_settings: more to log at the start.
    """
    start = time.monotonic()
    first = worker == 0
    average = copy.deepcopy(encoder).eval()
    parallel = nn.parallel.DistributedDataParallel(model)
    # Muon for the blocks' matrices, AdamW for the rest.
    matrices = [p for k, p in model.named_parameters() if "blocks." in k and p.ndim == 2]
    rest = [p for k, p in model.named_parameters() if not ("blocks." in k and p.ndim == 2)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True),
    ]

    def log(**entry: object) -> None:
        if first:
            line = json.dumps({"minutes": round((time.monotonic() - start) / 60, 2), **entry})
            with args.log.open("a") as file:
                file.write(line + "\n")
            print(line, flush=True)

    if first:
        args.log.write_text("")
    settings = {f"arg_{k}": str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    log(event="start", **settings, **logged_settings, held_out_classes=HELD_OUT,
        parameters=sum(p.numel() for k, p in average.named_parameters() if not k.startswith("head.")),
        torch=torch.__version__)  # fmt: skip
    if first:
        log(images=0, **task.score(average))

    seen, step, running, done, next_report, warm_up = 0, 0, 0.0, 0.0, 10.0, 0.02
    train_start = time.monotonic()
    budget = args.minutes * 60 - (train_start - start) - 15  # for the last report and the export
    model.train()
    while done < 1:
        before_step(done)
        rate = args.lr * min(done / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - warm_up) / (1 - warm_up)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        batch = draw(args.batch // args.workers, min(1.0, 0.2 + 3.2 * done))
        with torch.autocast("cpu", torch.bfloat16):
            loss = parallel(*batch)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step, seen = step + 1, seen + args.batch
        keep = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(encoder.parameters()), 1 - keep)
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
            log(images=seen, loss=round(running, 4), **task.score(average))
            next_report += 10
    if first:
        sha256 = export(average, args.out)  # before the report, so that the file exists even if the run is killed in it
        log(event="end", images=seen, steps=step, loss=round(running, 4), **task.score(average),
            bytes=args.out.stat().st_size, sha256=sha256)  # fmt: skip
