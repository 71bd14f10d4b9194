"""bf16-mixed against 32-true: accuracy, NLL and loss curves of equal runs that differ in `trainer.precision` alone.

    python scripts/measure_precision.py OUT                                              12 runs of the quick start
    python scripts/measure_precision.py OUT --fashion-mnist /usr/share/datasets/fashion-mnist     8 of Fashion-MNIST

The runs are NOLA's, with the config's learning rate, 5 images per class and 4 splits. Fashion-MNIST is read from the
four .gz files of the folder (the Debian package dataset-fashion-mnist), and tested on 200 images per class. Completed
runs in OUT are not repeated.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from nola_vision.common import process_cache
from nola_vision.common.mappings import overlay
from nola_vision.reports.statistics import student_half_width
from nola_vision.runs import run_id, runner
from nola_vision.runs.config_files import load_configs
from nola_vision.runs.parsing import parse
from nola_vision.runs.record import Row

PRECISIONS = ("32-true", "bf16-mixed")
QUIET = {"trainer": {"enable_progress_bar": False, "enable_checkpointing": False}}


def unpacked(folder: Path, out: Path) -> dict[str, Any]:
    """Settings of the data of Fashion-MNIST, whose files are unpacked to where torchvision expects them."""
    raw = out / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for packed in folder.glob("*.gz"):
        (raw / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    data = {"dataset": "fashion_mnist", "root": str(out / "data"), "test_limit": 2000}
    return {"protocol": "fashion", "data": data, "trainer": {"limit_val_batches": 1}}


def curve(row: Row) -> list[float]:
    """The training loss of each epoch."""
    assert row.folder is not None
    losses: list[float] = pd.read_csv(row.folder / "metrics.csv")["train_loss"].dropna().tolist()
    return losses


def interval(differences: Sequence[float]) -> str:
    """The mean of paired differences and its 95 % interval (Student's t), which equal pairs do not have."""
    count, mean = len(differences), fmean(differences)
    if stdev(differences) == 0:
        return f"{mean:+.5f} (all {count} pairs equal: no interval)"
    half = student_half_width(differences)
    return f"{mean:+.5f} ({mean - half:+.5f} to {mean + half:+.5f}, n = {count} pairs)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fashion-mnist", type=Path, metavar="DIR")
    known = parser.parse_args()
    changes = {} if known.fashion_mnist is None else unpacked(known.fashion_mnist, known.out)
    config = overlay(overlay(load_configs(["quickstart.yaml"]), QUIET), changes)
    rows: dict[str, list[Row]] = {precision: [] for precision in PRECISIONS}
    with process_cache.keeping():
        for split, init in product(range(4), range(3 if known.fashion_mnist is None else 2)):
            for precision in PRECISIONS:
                options = [f"--data.split_seed={split}", f"--model.run_seed={init}", f"--trainer.precision={precision}"]
                row = runner.run(parse(run_id.resolve(config, "nola"), [*options, "--threads=1"]), known.out)
                rows[precision].append(row)
                named = f"split {split} init {init} {precision:10s}"
                print(f"{named} {row.test_accuracy:.4f} {row.test_nll:.5f} {row.seconds_fit} s", flush=True)
    exact, mixed = (rows[precision] for precision in PRECISIONS)
    for name, unit, factor in (("test_accuracy", "percentage points", 100), ("test_nll", "nats", 1)):
        means = [factor * fmean(getattr(row, name) for row in found) for found in (exact, mixed)]
        apart = [factor * (getattr(a, name) - getattr(b, name)) for a, b in zip(mixed, exact, strict=True)]
        print(f"{name}: 32-true {means[0]:.4f}, bf16-mixed {means[1]:.4f}; difference {interval(apart)} {unit}")
    pairs = [(curve(a), curve(b)) for a, b in zip(mixed, exact, strict=True)]
    print("epoch   loss 32-true   bf16-mixed   largest relative difference of a pair")
    epochs = len(pairs[0][0])
    for epoch in sorted({0, *range(4, epochs, 10), epochs - 1}):
        values = [(a[epoch], b[epoch]) for a, b in pairs]
        apart = max(abs(a - b) / b for a, b in values)
        print(f"{epoch:5d}   {fmean(b for _, b in values):12.5f}   {fmean(a for a, _ in values):10.5f}   {apart:.1e}")


if __name__ == "__main__":
    main()
