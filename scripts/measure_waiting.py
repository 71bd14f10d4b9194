"""Waiting times of the user: `python scripts/measure_waiting.py first|mistakes|busy`, on an idle machine.

Each time is measured alone and next to `--busy` busy processes (default: two), `--rounds` times (default: three).
Printed are minimum, median and maximum of the wall seconds.

    first     from the start of the process to the first byte on stdout or stderr, for every verb that imports torch
    mistakes  from the start to the end of the process, for user errors that are found without a model
    busy      `fit --config quickstart.yaml --method nola` and only its training, for each wait policy of the threads
              (`--epochs`; the printed digests of the adapters show that results do not depend on it)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NOLA_VISION = [sys.executable, "-m", "nola_vision.cli.main"]
FIT = ["fit", "--config=quickstart.yaml"]
FIRST = {
    "fit": [*FIT, "--trainer.max_epochs=1"],
    "sweep": ["sweep", "--config=quickstart.yaml", "--dry-run"],
    "predict": ["predict", "--adapter=FILE", "FILE"],
    "export": ["export", "--adapter=FILE", "--bits=4", "--out=shorter.safetensors"],
}
MISTAKES = {
    "data.root": [*FIT, "--data.dataset=folder", "--data.root=nowhere"],
    "data set": [*FIT, "--data.dataset=digit"],
    "shots": [*FIT, "--data.shots=few"],
    "manifest": [*FIT, "--data.manifest=nowhere.json"],
    "weights file": [*FIT, "--model.backbone.file=nowhere.pth"],
    "checkpoint": [*FIT, "--ckpt_path=nowhere.ckpt"],
    "key of the config": [*FIT, "--dta.shots=5"],
    "key of data": [*FIT, "--data.shts=5"],
    "method": ["fit", "--config=quickstart.yaml", "--config=method.yaml"],
    "key of a method": [*FIT, "--model.method.rnk=4"],
    "bits": [*FIT, "--model.method.bits=9"],
    "sweep, data set": ["sweep", "--config=quickstart.yaml", "--data.dataset=digit"],
    "predict, adapter": ["predict", "--adapter=nowhere.safetensors", "FILE"],
    "predict, device": ["predict", "--adapter=FILE", "--device=gpu", "FILE"],
    "export, adapter": ["export", "--adapter=nowhere.safetensors", "--bits=4", "--out=shorter.safetensors"],
    "export, bits": ["export", "--adapter=FILE", "--bits=9", "--out=shorter.safetensors"],
    "fit --help": ["fit", "--help"],
    "--help": ["--help"],
}
POLICIES: dict[str, dict[str, str]] = {
    "as shipped": {},
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "1 thread": {"OMP_WAIT_POLICY": "passive", "THREADS": "1"},
}


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Starts `number` busy processes."""
    counting = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in counting:
            process.kill()
            process.wait()


def spread(seconds: list[float]) -> str:
    return f"{min(seconds):6.2f} {statistics.median(seconds):6.2f} {max(seconds):6.2f}"


def first_byte(arguments: list[str]) -> float:
    start = time.perf_counter()
    process = subprocess.Popen([*NOLA_VISION, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.read(1)
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
    return seconds


def mistake(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([*NOLA_VISION, *arguments], capture_output=True)
    return time.perf_counter() - start


def compare(cases: dict[str, list[str]], measure: Callable[[list[str]], float], rounds: int, number: int) -> None:
    Path("method.yaml").write_text("methods: {nola: {class_path: MAGIC}}")
    Path("FILE").write_bytes(b"")
    print(f"{'':20s} alone: least, median, most    next to {number} busy processes")
    for name, arguments in cases.items():
        alone = [measure(arguments) for _ in range(rounds)]
        with busy(number):
            busy_times = [measure(arguments) for _ in range(rounds)]
        print(f"{name:20s} {spread(alone)}         {spread(busy_times)}", flush=True)


def quick_start(policy: dict[str, str], epochs: int) -> tuple[float, float, str]:
    """Wall seconds, seconds of training, and the beginning of the adapter file's digest."""
    settings = dict(policy)
    threads = settings.pop("THREADS", "2")
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        fit = [*FIT, "--method=nola", f"--threads={threads}", f"--trainer.max_epochs={epochs}", f"--out={out}"]
        subprocess.run([*NOLA_VISION, *fit], env=os.environ | settings, capture_output=True, check=True)
        seconds = time.perf_counter() - start
        row = json.loads(next(Path(out).rglob("nola/*/row.json")).read_text())
        digest = hashlib.sha256(next(Path(out).rglob("nola/*/adapter.safetensors")).read_bytes()).hexdigest()
        return seconds, row["seconds_fit"], digest[:8]


def compare_policies(names: list[str], rounds: int, number: int, epochs: int) -> None:
    print(f"{'':18s} busy   all: least, median, most    training: least, median, most   adapter", flush=True)
    for busy_processes in (0, number):
        measured: dict[str, list[tuple[float, float, str]]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                with busy(busy_processes):
                    measured[name].append(quick_start(POLICIES[name], epochs))
        for name, results in measured.items():
            alls, fits, digests = zip(*results, strict=True)
            line = f"{spread(list(alls))}        {spread(list(fits))}"
            print(f"{name:18s} {busy_processes:4d}   {line}         {' '.join(sorted(set(digests)))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["first", "mistakes", "busy"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=2, help="how many processes keep the machine busy")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--policies", default=",".join(POLICIES), help="some of them, with commas between")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        if given.what == "busy":
            compare_policies(given.policies.split(","), given.rounds, given.busy, given.epochs)
        else:
            cases, measure = (FIRST, first_byte) if given.what == "first" else (MISTAKES, mistake)
            compare(cases, measure, given.rounds, given.busy)


if __name__ == "__main__":
    main()
