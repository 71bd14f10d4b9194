"""Speed and memory of several contenders, interleaved in one run: `python scripts/benchmark.py step`, or another below.

Each round runs every contender once. Printed are ratios of medians, with the 10th and 90th percentile of the ratio
within a round. Run it on an idle machine.

    step     one training step of a ViT-B/16 (random weights) at 224 pixels, as a multiple of a forward and backward
             pass of the frozen backbone (with a trainable leaf before block 0)
    basis    basis entries per second, as a multiple of torch.rand's float32
    route    one forward pass of a ViT-B/16 at 224 pixels, batch 8, of two adapters of n = 2, 100 and 1,000
    mixed    the same with 64 images of 64 adapters of n = 64, and of 16 adapters of n = 300, as a multiple of the plain
             backbone's pass; float32, or with --bf16 under autocast
    scratch  one training step of ResNet-20 on CIFAR shapes with NOLA and PRANC, with Table 8's parameter counts
    input    images per second of image loading on one core, 500-pixel JPEG files at 224 pixels with the `released`
             augmentation, over 50 epochs: this project's loader, and torchvision's PIL pipeline that reads the files
    sweep    the runs of the quick start by `nola-vision sweep`: wall time, as a multiple of the total training and
             test time of the runs divided by the number of workers (one sweep into an empty folder --out; no rounds)
    run      whole commands, start-up included, of another checkout (--before) and of this one (for `fit` also with
             features of the frozen backbone that an earlier command stored): `fit` on 5 digits per class, a validation
             pool of 85 images and 500 test images, with the ViT-S/14 of --weights at 224 pixels, or what else --case
             names. Checks that the results are equal
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torchvision import datasets, transforms
from torchvision.transforms import v2

from nola_vision import NOLA, PRANC, BackboneSpec, FullFinetune, adapt
from nola_vision.adapters.bank import ParameterBank
from nola_vision.adapters.methods import Method
from nola_vision.adapters.random_basis import Basis, basis_key, basis_words
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.models.backbones.sources import input_config
from nola_vision.models.building import make_bank
from nola_vision.runs.store import read_rows

Step = Callable[[], Any]


def interleave(contenders: dict[str, Step], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each round of each contender. The order rotates by one per round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(-warm_up, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            contenders[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]], base: str, notes: dict[str, str] | None = None) -> None:
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"\n{'':34s}{'ms':>9s}{'ratio':>8s}   10 % to 90 % of the rounds")
    for name, times in seconds.items():
        ratios = sorted(one / other for one, other in zip(times, seconds[base], strict=True))
        low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
        line = f"{name:34s}{1000 * middle[name]:9.1f}{middle[name] / middle[base]:8.3f}   {low:.3f} to {high:.3f}"
        print(f"{line}   {(notes or {}).get(name, '')}")
    print(f"n = {len(seconds[base])} rounds, {torch.get_num_threads()} threads; ratio: of medians, to {base}")


# --- one training step of a ViT-B ------------------------------------------------------------------------------------

STEP_METHODS: dict[str, Method] = {
    "NOLA-MLP shared cached": NOLA(targets=["mlp"], rank=4, num_basis=1024),
    "NOLA-MLP shared streamed": NOLA(targets=["mlp"], rank=4, num_basis=1024, storage="streamed"),
    "NOLA-MLP per_layer streamed": NOLA(targets=["mlp"], rank=4, num_basis=1024, scope="per_layer", storage="streamed"),
}
STEP_NAMES = ["frozen", *STEP_METHODS, "PEFT LoRA r=4 QKV"]


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", num_classes=0).eval().requires_grad_(False)


class Contender:
    """A ViT-B, with an adapter or frozen; a trainable leaf before block 0 makes backward run through all blocks."""

    def __init__(self, name: str) -> None:
        backbone = vit()
        self.leaf = torch.zeros(768, requires_grad=True)
        backbone.norm_pre.register_forward_hook(lambda module, args, out: out + self.leaf)
        self.bank = None
        self.parameters: list[nn.Parameter] = []
        if name in STEP_METHODS:
            self.bank = make_bank(backbone, STEP_METHODS[name], 10)
            self.bank.attach(backbone)
            self.parameters = self.bank.adapter_parameters()
        elif name != "frozen":
            from peft import LoraConfig, get_peft_model

            backbone = get_peft_model(backbone, LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"]))
            self.parameters = [p for p in backbone.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters) if self.parameters else None
        self.backbone = backbone
        self.images = torch.randn(8, 3, 224, 224)

    def step(self) -> None:
        self.leaf.grad = None
        self.backbone(self.images).square().mean().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def memory(self) -> tuple[float, float]:
        """MiB in memory between forward and backward: adapter (basis, factors, merged weights), and activations."""
        storages: dict[int, tuple[int, bool]] = {}
        weights = {p.untyped_storage().data_ptr() for p in self.backbone.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            place = tensor.untyped_storage()
            if place.data_ptr() not in weights:
                activation = tensor.dim() > 0 and (tensor.shape[0] == 8 or tensor.shape[0] == 8 * 197)
                storages[place.data_ptr()] = (place.nbytes(), activation)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = self.backbone(self.images).square().mean()
        bases = [f[name] for f in self.bank.fixed.values() for name in ("basis_a", "basis_b")] if self.bank else []
        cached = sum(b.cached().numel() for b in bases if b.storage == "cached")  # a streamed chunk is gone by now
        adapter = cached + sum(size for size, activation in storages.values() if not activation)
        activations = sum(size for size, activation in storages.values() if activation)
        out.backward()
        return adapter / 2**20, activations / 2**20


def step(rounds: int) -> None:
    made = {name: Contender(name) for name in STEP_NAMES}
    memory = {name: contender.memory() for name, contender in made.items()}
    notes = {}
    for name, (adapter, activations) in memory.items():
        more = f"memory on top of frozen: adapter {adapter - memory['frozen'][0]:.0f} MiB, "
        more += f"activations {activations - memory['frozen'][1]:.0f} MiB"
        notes[name] = f"{more}; peak of a process {peak(name):.0f} MiB"
    table(interleave({name: contender.step for name, contender in made.items()}, rounds), "frozen", notes)


def peak(name: str) -> float:
    """Peak resident memory in MiB of a process that runs three steps of one contender."""
    command = [sys.executable, __file__, "peak", "--name", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    return float(done.stdout)


def print_peak(name: str) -> None:
    contender = Contender(name)
    for _ in range(3):
        contender.step()
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    print(int(found[1]) / 1024 if found else "nan")


# --- routing ---------------------------------------------------------------------------------------------------------


def route(rounds: int) -> None:
    images, index = torch.randn(8, 3, 224, 224), torch.arange(8) % 2
    contenders: dict[str, Step] = {}
    for count in (2, 100, 1000):
        backbone = vit()
        bank = make_bank(backbone, STEP_METHODS["NOLA-MLP shared cached"], 10, num_adapters=count)
        bank.attach(backbone)

        def forward(bank: ParameterBank = bank, last: int = count - 2) -> None:
            with torch.inference_mode(), bank.route(index + last):
                bank(images)

        contenders[f"n = {count}"] = forward
    table(interleave(contenders, rounds), "n = 2")


def mixed(rounds: int, bf16: bool) -> None:
    images, contenders = torch.randn(64, 3, 224, 224), {}
    for count, distinct in ((0, 0), (64, 64), (300, 16)):
        model, index = vit(), torch.empty(0)
        if count:
            bank = make_bank(model, STEP_METHODS["NOLA-MLP shared cached"], 10, num_adapters=count)
            bank.attach(model)
            index = torch.randperm(count)[:distinct].repeat(64 // distinct)

        def forward(model: nn.Module = model, bank: Any = bank if count else None, index: torch.Tensor = index) -> None:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                with nullcontext() if bank is None else bank.route(index):
                    model(images)

        contenders[f"{distinct} of {count} adapters" if count else "plain"] = forward
    table(interleave(contenders, rounds), "plain")
    print("bf16 autocast" if bf16 else "float32")


# --- making a basis --------------------------------------------------------------------------------------------------


def basis(rounds: int) -> None:
    entries, key = 256 * 4 * 768 * 16, basis_key(0, "shape 1x1", "A")
    box = ((0, 256), (0, 4), (0, 768))
    basis = Basis([key], 1024, 4, 768 * 16, "streamed")

    def stream() -> None:
        for _ in basis.chunks(1024, 4):
            pass

    seconds = interleave(
        {
            "torch.rand float32": lambda: torch.rand(entries),
            "compiled words": lambda: basis_words(key, *box, compiled=True),
            "plain words": lambda: basis_words(key, *box),
            "a streamed basis, chunk by chunk": stream,
        },
        rounds,
    )
    size = {name: entries for name in seconds} | {"a streamed basis, chunk by chunk": 1024 * basis.size}
    base = statistics.median(seconds["torch.rand float32"]) / entries
    for name, times in seconds.items():
        each = statistics.median(times) / size[name]
        print(f"{name:36s}{1e-9 / each:8.3f} G entries/s   {base / each:6.1f} times torch.rand")
    print(f"n = {rounds} rounds, {torch.get_num_threads()} threads; medians")


# --- ResNet-20 from scratch ------------------------------------------------------------------------------------------


def scratch(rounds: int, rank: int) -> None:
    spec = BackboneSpec("resnet20_cifar.untrained", base="random")
    names = [str(i) for i in range(10)]
    images, labels = torch.randn(256, 3, 32, 32), torch.arange(256) % 10
    pranc: dict[str, Any] = {"targets": ["conv", "head"], "num_basis": 10_000, "scope": "model", "train_norms": True}
    nola: dict[str, Any] = {"targets": ["conv", "head"], "rank": rank, "num_basis": 250, "head_num_basis": 1000}
    nola["train_norms"] = True
    for storage in ("cached", "streamed"):
        contenders: dict[str, Step] = {}
        for name, method in (
            ("NOLA", NOLA(**nola, storage=storage)),
            ("PRANC", PRANC(**pranc, storage=storage)),
        ):
            model = adapt(spec, method, names).train()
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(parameters, lr=1e-3)
            contenders[f"{name} {storage}"] = lambda m=model, o=optimizer: train(m, o, images, labels)
        plain = adapt(spec, FullFinetune(), names).train()
        optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
        contenders["the backbone's own step"] = lambda m=plain, o=optimizer: train(m, o, images, labels)
        seconds = interleave(contenders, rounds)
        table(seconds, f"NOLA {storage}")
        own = statistics.median(seconds["the backbone's own step"])
        less = {name: statistics.median(times) - own for name, times in seconds.items() if storage in name}
        print("seconds minus the backbone's step: " + ", ".join(f"{n} {left:.3f}" for n, left in less.items()))
        del contenders
        gc.collect()
    print(f"NOLA's rank: {rank}; images {tuple(images.shape)}")


def train(model: Any, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# --- the input side --------------------------------------------------------------------------------------------------

INPUT_CLASSES, INPUT_SHOTS, INPUT_EPOCHS = 10, 5, 50


def photographs(root: Path) -> None:
    """JPEG files of 500 x 375 pixels: smooth shapes with some noise, as large as photographs of that size."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(INPUT_CLASSES):
            for number in range(INPUT_SHOTS if split == "train" else 1):
                coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float64)
                noisy = (smooth + random.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
                path = root / split / f"class{label}" / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noisy).save(path, quality=90)


def loader_of_torchvision(root: Path) -> Any:
    """The pipeline of most training scripts: PIL images, read from their files at every use."""
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.RandomResizedCrop(224, (0.2, 1.0), interpolation=bicubic),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], 0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ]
    images = datasets.ImageFolder(str(root / "train"), transforms.Compose(steps))
    return torch.utils.data.DataLoader(images, 50, shuffle=True)


def where_the_time_goes(subset: Any) -> dict[str, float]:
    """The share of each step in the time of the transform, over 200 images."""
    seconds: dict[str, float] = {}
    for number in range(200):
        image: Any = subset._kept[number % len(subset)]
        for step in subset._transform.transforms:
            named = step.transforms[0] if isinstance(step, v2.RandomApply) else step
            start = time.perf_counter()
            image = step(image)
            name = type(named).__name__.strip("_")
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    return {name: taken / sum(seconds.values()) for name, taken in seconds.items()}


def input_side(rounds: int) -> None:
    torch.set_num_threads(1)
    spec = BackboneSpec("vit_base_patch16_224.augreg_in21k_ft_in1k")
    images = INPUT_CLASSES * INPUT_SHOTS
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        photographs(root)
        seconds: dict[str, list[float]] = {"opening": [], "an epoch": [], "torchvision": []}
        theirs = loader_of_torchvision(root)
        for number in range(-1, rounds):
            times = {}
            start = time.perf_counter()
            data = KShotDataModule(
                input_config(spec), "folder", folder, shots=INPUT_SHOTS, batch_size=50, augmentation="released"
            )
            data.setup("fit")
            times["opening"] = time.perf_counter() - start
            ours = data.train_dataloader()
            ours.sampler.set_epoch(number + 1)
            for name, loader in (("an epoch", ours), ("torchvision", theirs)):
                start = time.perf_counter()
                for _ in loader:
                    pass
                times[name] = time.perf_counter() - start
            if number >= 0:
                for name, taken in times.items():
                    seconds[name].append(taken)
    ratios = sorted(
        INPUT_EPOCHS * theirs_ / (opening + INPUT_EPOCHS * epoch)
        for opening, epoch, theirs_ in zip(*(seconds[n] for n in ("opening", "an epoch", "torchvision")), strict=True)
    )
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    total = middle["opening"] + INPUT_EPOCHS * middle["an epoch"]
    print(f"this project   {INPUT_EPOCHS * images / total:7.1f} images/s: opening {1000 * middle['opening']:.0f} ms "
          f"(all files read and decoded, once), an epoch {1000 * middle['an epoch']:.0f} ms")  # fmt: skip
    other = middle["torchvision"]
    print(f"torchvision    {images / other:7.1f} images/s: an epoch {1000 * other:.0f} ms")
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    print(f"ratio over {INPUT_EPOCHS} epochs: {INPUT_EPOCHS * other / total:.2f} ({low:.2f} to {high:.2f})")
    parts = where_the_time_goes(ours.dataset)
    print("of an image's time in the transform: " + ", ".join(f"{n} {share:.0%}" for n, share in parts.items()))
    print(f"n = {rounds} rounds of an epoch of {images} images each, one thread")


def sweep(workers: int, out: Path) -> None:
    command = [sys.executable, "-m", "nola_vision.cli.main", "sweep", "--config=quickstart.yaml", f"--out={out}"]
    if out.exists():
        sys.exit(f"{out} is there already, and runs that are done would cost no time: give another --out")
    clock = time.perf_counter()
    subprocess.run([*command, f"--workers={workers}", "--threads=1", "--no-cache"], check=True)
    wall = time.perf_counter() - clock
    own = [(row.seconds_fit or 0) + (row.seconds_test or 0) for row in read_rows(out)[0]]
    print(f"{len(own)} runs of {statistics.median(own):.1f} s ({min(own):.1f} to {max(own):.1f}), {workers} workers")
    print(f"{wall:.1f} s against {sum(own) / workers:.1f} s: ratio {wall * workers / sum(own):.3f}")


# --- whole commands of two checkouts ---------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
_VIT_FIT = ["fit", "--config=bench_fewdigits_5shot_released", "--config-dir=parts", "--data.batch_size=16"]
_VIT_FIT += ["--threads=2", "--trainer.precision=32-true"]
CASES: dict[str, list[str]] = {
    "3 epochs": [*_VIT_FIT, "--trainer.max_epochs=3"],
    "50 epochs": [*_VIT_FIT, "--trainer.max_epochs=50"],
    "linear": [*_VIT_FIT, "--method=linear", "--data.augmentation=none", "--trainer.max_epochs=50"],
    "quick start": ["fit", "--config=quickstart.yaml"],
    "sweep": ["sweep", "--config=quickstart.yaml"],
    "100 classes": [
        "sweep",
        "--config=bench_many_5shot",
        "--config-dir=parts",
        "--splits=0",
        "--inits=0",
        "--threads=2",
    ],
}
STORED = "now, features stored"
_MANY = {"classes": 100, "train": 30, "test": 100, "size": 56}


def run(case: str, before: Path, rounds: int, weights: Path) -> None:
    """Interleaves one command of this checkout and of another, and compares the rows that both wrote."""
    folder = Path(tempfile.mkdtemp(prefix="nola-benchmark-"))
    print(f"all runs: {folder}", flush=True)
    write_parts(folder / "parts", folder, weights.resolve())
    if case == "100 classes":
        write_many(folder / "many")
    else:
        write_digits(folder / "digits")
    results: dict[str, dict[str, tuple[Any, ...]]] = {}

    def command(name: str, root: Path) -> None:
        out, cache = folder / f"{name}{time.monotonic_ns()}", folder / ("cache before" if root == before else "cache")
        if name != STORED:
            shutil.rmtree(cache, ignore_errors=True)
        others = {"PYTHONPATH": str(root / "src"), "XDG_CACHE_HOME": str(cache)}
        done = subprocess.run(
            [sys.executable, "-m", "nola_vision.cli.main", *CASES[case], f"--out={out / 'runs'}"],
            cwd=folder,
            env={**os.environ, **others},
            stdout=subprocess.DEVNULL,
        )
        if done.returncode:
            sys.exit(f"the command failed in {root}: {' '.join(CASES[case])}")
        rows = read_rows(out / "runs")[0]
        found = {
            f"{row.method} {row.stage} {row.split} {row.init} {row.learning_rate}": (
                row.train_loss, row.test_accuracy, row.test_nll, row.adapter_file_bytes,
            ) for row in rows
        }  # fmt: skip
        if results.setdefault(name, found) != found:
            print(f"{name}: two rounds differ")

    roots = {"before": before.resolve(), "now": ROOT} | ({STORED: ROOT} if CASES[case][0] == "fit" else {})
    seconds = interleave({name: partial(command, name, root) for name, root in roots.items()}, rounds, warm_up=0)
    table(seconds, "before")
    print("seconds: " + "; ".join(f"{name} {' '.join(f'{t:.1f}' for t in times)}" for name, times in seconds.items()))
    for name in sorted(results["before"].keys() | results["now"].keys()):
        one, other = (results[which].get(name) for which in ("before", "now"))
        print(f"{name}: {'equal' if one == other else 'DIFFERS'}: {one}{'' if one == other else f', now {other}'}")
    if results.get(STORED, results["now"]) != results["now"]:
        print("results with stored features DIFFER from those without")


def write_parts(parts: Path, data: Path, weights: Path) -> None:
    """The parts of the cells `bench_fewdigits_5shot_released` and `bench_many_5shot`."""
    backbone = f"{{tag: vit_small_patch14_dinov2.lvd142m, file: {weights}, img_size: %d}}"
    methods = (
        "methods:\n  lora-r4: {class_path: LoRA, init_args: {targets: [qkv], rank: 4}}\n"
        "  nola-mlp: {class_path: NOLA, init_args: {targets: [mlp], rank: 4, num_basis: 1024}}\nmethod: nola-mlp\n"
    )
    files = {
        "backbones/bench.yaml": f"{methods}model: {{backbone: {backbone % 224}}}\n",
        "datasets/fewdigits.yaml": f"data: {{dataset: folder, root: {data}/digits}}\ntrainer: {{accelerator: cpu}}\n",
        "datasets/many.yaml": f"data: {{dataset: folder, root: {data}/many}}\nmodel: {{backbone: {{img_size: 56}}}}\n"
        "trainer: {accelerator: cpu, max_epochs: 5, precision: 32-true}\n",
    }
    for name, text in files.items():
        (parts / name).parent.mkdir(parents=True, exist_ok=True)
        (parts / name).write_text(text)


def write_digits(folder: Path) -> None:
    """The first 447 of scikit-learn's digits for training and validation, and the next 500 for the test."""
    images, labels = load_digits(return_X_y=True)
    for number, (pixels, label) in enumerate(zip(images[:947], labels[:947], strict=True)):
        target = folder / ("train" if number < 447 else "test") / str(label) / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels.reshape(8, 8) * 255 / 16).astype(np.uint8)).save(target)


def write_many(folder: Path) -> None:
    """100 classes of noisy gratings: an angle and a colour per class."""
    random = np.random.default_rng(0)
    side = _MANY["size"]
    ys, xs = np.mgrid[:side, :side] / side
    for number in range(_MANY["classes"]):
        angle, colour = np.pi * (number % 10) / 10, 0.3 + 0.7 * random.random(3)
        for split in ("train", "test"):
            (target := folder / split / f"class {number}").mkdir(parents=True)
            for image in range(_MANY[split]):
                phase, frequency = 2 * np.pi * random.random(), 4 + 2 * (number // 10) + random.random()
                wave = np.sin(frequency * 2 * np.pi * (np.cos(angle) * xs + np.sin(angle) * ys) + phase)
                pixels = 127 + 60 * wave[..., None] * colour + 30 * random.standard_normal((side, side, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target / f"{image}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "route", "mixed", "basis", "scratch", "input", "sweep", "run", "peak"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bf16", action="store_true", help="16-bit autocast in mixed")
    parser.add_argument("--rank", type=int, default=4, help="NOLA's rank in scratch")
    parser.add_argument("--workers", type=int, default=2, help="of the sweep")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="of the sweep")
    parser.add_argument("--case", choices=CASES, default="3 epochs", help="of run")
    parser.add_argument("--before", type=Path, help="the other checkout of run")
    parser.add_argument("--weights", type=Path, help="file of the ViT-S/14 of run, such as DINOv2's in timm's names")
    parser.add_argument("--name", help="of the contender whose peak is measured (for the script's own use)")
    known = parser.parse_args()
    if known.what == "step":
        step(known.rounds)
    elif known.what == "route":
        route(known.rounds)
    elif known.what == "mixed":
        mixed(known.rounds, known.bf16)
    elif known.what == "basis":
        basis(known.rounds)
    elif known.what == "scratch":
        scratch(known.rounds, known.rank)
    elif known.what == "input":
        input_side(known.rounds)
    elif known.what == "run":
        if known.before is None or known.weights is None:
            parser.error("run needs --before and --weights")
        run(known.case, known.before, known.rounds, known.weights)
    elif known.what == "sweep":
        sweep(known.workers, known.out)
    else:
        print_peak(known.name)


if __name__ == "__main__":
    main()
