"""A bank of 10,000 adapters: speed, memory and throughput. `python scripts/benchmark_bank.py bank`, or another below.

Contenders are interleaved: each round runs every one once, and the order rotates. Printed are ratios of medians, with
the 10th and 90th percentile of the ratio within a round. Run it on an idle machine.

    bank     one forward pass of 64 images with 1, 4, 16 and 64 distinct adapters, as a multiple of the plain
             backbone's pass: this project's bank with factors in its cache and without, and PEFT's `adapter_names`
             with LoRA r=4 on the same layers
    memory   the resident memory of all adapters, the time until a folder is ready, and the first use of an adapter
    serve    requests per second of `nola-vision serve` at 1, 100 and all adapters, named uniformly and by Zipf's law
             (exponent 1), from 64 clients in another process; and the bank itself in batches of 64 of the same images

The adapters are NOLA on the MLP (k = 1024, r = 4, 4 bits, 10 classes) for a ViT-B/16 with random weights at 224 pixels;
with --small, NOLA for vit_mini_patch4_32.contours. Their values are random.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image

from benchmark import interleave, table
from nola_vision import NOLA, AdapterBank, BackboneSpec, adapt
from nola_vision.adapters.context import Pass
from nola_vision.adapters.quantization import scales_per_row
from nola_vision.adapters.serialization import open_adapter
from nola_vision.adapters.stored import Stored, rows_and_count
from nola_vision.models.backbones.creation import create_backbone
from serving_clients import CLIENTS

CLASSES = [f"class {number}" for number in range(10)]
METHODS = {
    False: NOLA(targets=["mlp"], rank=4, num_basis=1024, bits=4),
    True: NOLA(targets=["qkv", "mlp"], rank=4, num_basis=142, bits=4),
}


def backbone(folder: Path, small: bool) -> BackboneSpec:
    """A small bundled ViT, or a ViT-B/16 whose random weights are read from a file as pretrained ones are."""
    if small:
        return BackboneSpec("vit_mini_patch4_32.contours")
    file = folder / "vit_base_patch16_224.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        safetensors.torch.save_file(timm.create_model("vit_base_patch16_224").state_dict(), file)
    return BackboneSpec("vit_base_patch16_224.augreg2_in21k_ft_in1k", file=str(file))


def adapters(folder: Path, spec: BackboneSpec, small: bool, count: int) -> Path:
    """A folder of adapter files of random values: one is trained for no step, and the others have other levels."""
    made = folder / f"adapters-{'small' if small else 'vit-b'}-{count}"
    if made.exists():
        return made
    made.mkdir(parents=True)
    model = adapt(spec, METHODS[small], CLASSES)
    with torch.no_grad():
        for parameter in model.bank.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save(folder / "template.safetensors")
    template, draws = open_adapter(folder / "template.safetensors"), np.random.default_rng(0)
    for number in range(count):
        stored = {name: random_levels(one, draws) for name, one in template.stored.items()}
        content = dataclasses.replace(template, stored=stored).rewritten({})
        (made / f"adapter-{number:05d}.safetensors").write_bytes(content)
    return made


def random_levels(one: Stored, draws: np.random.Generator) -> Stored:
    """The same scales with other levels of 4 bits, from 0 to 14: two in a byte."""
    if one.bits != 4:
        return one
    data, (rows, values) = one.data.clone(), rows_and_count(one.shape)
    scales = 2 * rows * scales_per_row(values, 4)
    low, high = draws.integers(0, 15, (2, len(data) - scales), dtype=np.uint8)
    data[scales:] = torch.from_numpy(low | high << 4)
    return Stored(4, one.shape, data)


# --- passes ----------------------------------------------------------------------------------------------------------


def bank(folder: Path, small: bool, count: int, rounds: int) -> None:
    """Forward passes of 64 images."""
    spec = backbone(folder, small)
    ours = AdapterBank(spec)
    names = ours.load_folder(adapters(folder, spec, small, count))
    every = [ours.adapter(name) for name in names]
    side = every[0].input.size
    images = torch.randn(64, 3, side, side)
    unused = itertools.cycle(range(0, len(every) - 63, 64))
    contenders: dict[str, Any] = {"plain backbone": lambda: plain(ours, images)}
    for distinct in (1, 4, 16, 64):
        warm = every[-distinct:] * (64 // distinct)
        contenders[f"bank, {distinct} distinct, warm"] = lambda warm=warm: ours.logits(images, warm)
        contenders[f"PEFT, {distinct} distinct"] = peft_pass(spec, images, distinct)
    contenders["bank, 64 distinct, cold"] = lambda: ours.logits(images, cold(every, next(unused)))
    before = ours.cache_counts()
    seconds = interleave(contenders, rounds, warm_up=1)
    after = ours.cache_counts()
    table(seconds, "plain backbone")
    made = after[1] - before[1]
    print(f"{len(every):,} adapters; factors were made for {made:,} of {made + after[0] - before[0]:,}")


def cold(every: list[Any], first: int) -> list[Any]:
    return every[first : first + 64]


@torch.no_grad()
def plain(ours: AdapterBank, images: torch.Tensor) -> None:
    ours._shared._injection.run(images, Pass({}, None))


def peft_pass(spec: BackboneSpec, images: torch.Tensor, distinct: int) -> Any:
    """PEFT's pass with LoRA r=4 on the same layers."""
    from peft import LoraConfig, get_peft_model

    targets = ["fc1", "fc2"] if "mini" not in spec.tag else ["qkv", "fc1", "fc2"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(create_backbone(spec), config, adapter_name="a0").eval()
    for number in range(1, distinct):
        model.add_adapter(f"a{number}", config)
    names = [f"a{number}" for number in range(distinct)] * (64 // distinct)

    @torch.no_grad()
    def run() -> None:
        model(images, adapter_names=names)

    return run


# --- memory and first use --------------------------------------------------------------------------------------------


def resident() -> float:
    """Resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def memory(folder: Path, small: bool, count: int, rounds: int) -> None:
    """What the adapters take next to the backbone, and what a first use costs."""
    spec = backbone(folder, small)
    made = adapters(folder, spec, small, count)
    ours = AdapterBank(spec, cache_mib=1024)  # half of it for files, which 10,000 of a ViT-B fit into
    side = ours.adapter("__base__").input.size
    image = torch.randn(1, 3, side, side)
    ours.logits(image, [ours.adapter("__base__")])
    start = time.perf_counter()
    names = ours.load_folder(made)
    print(f"a folder of {len(names):,} files is ready after {time.perf_counter() - start:.2f} s")
    ours.logits(image, [ours.adapter(names[0])])  # makes the basis
    first, again = [], []
    for name in names[1 : 1 + rounds]:
        for seconds in (first, again):
            start = time.perf_counter()
            ours.logits(image, [ours.adapter(name)])
            seconds.append(time.perf_counter() - start)
    more = [1000 * (one - other) for one, other in zip(first, again, strict=True)]
    deciles = statistics.quantiles(more, n=10)
    print(
        f"first use: {statistics.median(more):.1f} ms more than the second (10 to 90 %: {deciles[0]:.1f} to "
        f"{deciles[-1]:.1f}; n = {rounds}); the second {1000 * statistics.median(again):.1f} ms"
    )
    before, start = resident(), time.perf_counter()
    for name in names:
        ours.adapter(name)
    files = sum(one.bytes for one in ours.adapters()) / 2**20
    print(
        f"{len(names):,} adapters read in {time.perf_counter() - start:.1f} s: {resident() - before:.0f} MiB of memory "
        f"for {files:.0f} MiB of files"
    )
    last = names[-640:]
    for start_at in range(0, len(last) - 63, 64):
        ours.logits(image.expand(64, -1, -1, -1), [ours.adapter(name) for name in last[start_at : start_at + 64]])
    print(f"with the cache filled by {len(last)} of them: {resident() - before:.0f} MiB")


# --- the service -----------------------------------------------------------------------------------------------------


def serve(folder: Path, small: bool, count: int, rounds: int, requests: int) -> None:
    """Throughput and latency of the service."""
    spec = backbone(folder, small)
    made = adapters(folder, spec, small, count)
    names = sorted(path.stem for path in made.iterdir())
    images = encoded(folder, 32 if small else 256)
    ours = AdapterBank(spec)
    ours.load_folder(made)
    port = free_port()
    options = ["--adapters", str(made), "--port", str(port), *(["--weights", spec.file] if spec.file else [])]
    server = subprocess.Popen(
        [sys.executable, "-m", "nola_vision.cli.main", "serve", *options], stdout=subprocess.DEVNULL
    )
    try:
        start = time.perf_counter()
        wait_until_ready(port, server)
        print(f"ready after {time.perf_counter() - start:.1f} s, imports and backbone included")
        loads = {"1 adapter": chosen(names[:1], requests, zipf=False)}
        for n in (min(100, count), count):
            loads[f"{n:,} adapters"] = chosen(names[:n], requests, zipf=False)
            loads[f"{n:,} adapters, Zipf 1.0"] = chosen(names[:n], requests, zipf=True)
        everyone = f"{count:,} adapters"
        latencies: dict[str, list[float]] = {name: [] for name in loads}
        contenders: dict[str, Any] = {
            f"the bank, {name}": lambda name=name: offline(ours, loads[name], images)
            for name in ("1 adapter", everyone)
        }
        for name, load in loads.items():
            contenders[name] = lambda name=name, load=load: latencies[name].extend(clients(port, load, images))
            clients(port, load[:64], images)  # warms up
        offline(ours, loads[everyone][:64], images)
        table(interleave(contenders, rounds, warm_up=0), "1 adapter")
        for name, seconds in latencies.items():
            cuts = statistics.quantiles(seconds, n=20)
            print(f"{name:34s}p50 {1000 * cuts[9]:8.1f} ms   p95 {1000 * cuts[-1]:8.1f} ms")
        print(f"{requests:,} requests of {CLIENTS} clients in each; a ratio above 1 is slower")
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"the server has ended with exit status {server.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server does not become ready")


def encoded(folder: Path, side: int) -> list[Path]:
    """16 JPEG images of smooth colours."""
    made = [folder / f"{number}-{side}.jpg" for number in range(16)]
    for number, path in enumerate(made):
        small = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path, quality=90)
    return made


def chosen(names: list[str], requests: int, zipf: bool) -> list[str]:
    """The adapter of each request."""
    weights = 1 / np.arange(1, len(names) + 1) if zipf else np.ones(len(names))
    drawn = np.random.default_rng(0).choice(len(names), requests, p=weights / weights.sum())
    return [names[place] for place in drawn]


def offline(ours: AdapterBank, load: list[str], images: list[Path]) -> None:
    ours.predict([images[number % len(images)] for number in range(len(load))], load, top_k=5)


def clients(port: int, load: list[str], images: list[Path]) -> list[float]:
    """The seconds of each request, sent from a separate process."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as names:
        json.dump(load, names)
        names.flush()
        command = [sys.executable, str(Path(__file__).with_name("serving_clients.py")), str(port), names.name]
        done = subprocess.run([*command, *map(str, images)], stdout=subprocess.PIPE, check=True)
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bank", "memory", "serve"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "nola-vision-bank")
    parser.add_argument("--count", type=int, default=10_000, help="adapters")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="vit_mini_patch4_32.contours")
    parser.add_argument("--requests", type=int, default=500, help="of serve, for each load")
    known = parser.parse_args()
    if known.count < 64:
        parser.error("--count must be at least 64, the images of a batch")
    known.folder.mkdir(parents=True, exist_ok=True)
    common = known.folder, known.small, known.count, known.rounds
    if known.what == "serve":
        serve(*common, known.requests)
    else:
        {"bank": bank, "memory": memory}[known.what](*common)


if __name__ == "__main__":
    main()
