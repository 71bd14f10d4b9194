"""Twelve short runs of the quick start, one of each method and more, with all results to the last digit.

    python scripts/quick_start_runs.py after.json                           3 minutes on one core
    python scripts/quick_start_runs.py after.json --against before.json     exit 1 if a result differs

Shows that a change of the source changes no result: run it before and after, on the same machine and with the same
packages. It uses the command line, and the files that a run leaves: the row, the log, and the adapter file. A callback
logs the loss of every training step. A row's hashes, times, versions, config and paths are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "nola_vision.cli.main"]

# --- names that may change; the names of runs, and of columns in the results, stay so that old results compare --
SWEEP = [
    "sweep",
    "--config",
    "quickstart.yaml",
    "--config",
    "runs.yaml",
    "--splits",
    "0",
    "--inits",
    "0",
    "--out",
    "runs",
]
SETTINGS: dict[str, dict[str, Any]] = {
    "1nn": {"class_path": "NearestNeighbor"},
    "nearest-mean": {"class_path": "NearestMean"},
    "logistic": {"class_path": "LogisticRegression"},
    "linear": {"class_path": "LinearProbe", "init_args": {"lr": 0.005}},
    "full-ft": {"class_path": "FullFinetune", "init_args": {"lr": 0.0002}},
    "lora": {"class_path": "LoRA", "init_args": {"targets": ["qkv", "head"], "rank": 4, "c": 8, "lr": 0.01}},
    "nola": {"class_path": "NOLA", "init_args": {"targets": ["qkv", "mlp"], "num_basis": 192, "lr": 0.01}},
    "nola-streamed-per-layer": {
        "class_path": "NOLA",
        "init_args": {
            **{"targets": ["mlp"], "rank": 8, "num_basis": 48, "num_basis_b": 64, "start": "released", "lr": 0.05},
            **{"scope": "per_layer", "storage": "streamed", "memory_mib": 1},
        },
    },
    "nola-nested-4-bits": {
        "class_path": "NOLA",
        "init_args": {
            **{"targets": ["qv", "head"], "max_parameters": 1200, "head_num_basis": 512, "lr": 0.05},
            **{"nested": True, "bits": 4, "head_bits": 8, "quantise_from": 0.4},
        },
    },
    "pranc": {
        "class_path": "PRANC",
        "init_args": {"targets": ["qkv"], "num_basis": 64, "scope": "layer", "bits": 8, "lr": 0.02},
    },
    "hashednet": {
        "class_path": "HashedNet",
        "init_args": {"targets": ["mlp"], "max_parameters": 4000, "lr": 0.02},
    },
    "peft-vera": {
        "class_path": "PEFT",
        "init_args": {"config": "peft.VeraConfig", "settings": {"r": 16, "target_modules": ["qkv"]}, "lr": 0.05},
    },
}
ROW_FILE, ADAPTER_FILE, LOG_FILE = "row.json", "adapter.safetensors", "metrics.csv"
RENAMED: dict[str, str] = {}  # columns of a row and of the log: the new name, and the old one
LEFT_OUT = {
    *("config", "run_hash", "entry_hash", "versions", "git", "started", "device", "peak_memory_mib", "method_class"),
    *("seconds_fit", "seconds_test", "seconds_total", "seconds", "schema_version", "warnings"),
}
# ----------------------------------------------------------------------------------------------------------------------

CONFIG = {
    # the quick start has some of these too, with settings to search
    "methods": {name: {**settings, "search": None} for name, settings in SETTINGS.items()},
    "threads": 1,
    "model": {"warmup_epochs": 1},
    "data": {"batch_size": 16, "augmentation": "light"},
    "trainer": {"max_epochs": 4, "check_val_every_n_epoch": 2},
}
LOSSES = "step_losses.txt"
CALLBACK = f"""
import lightning
class StepLosses(lightning.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        with open(trainer.default_root_dir + "/{LOSSES}", "a") as file:
            print(float(outputs["loss"]), file=file)
"""
CALLED = ["--allow-import", "step_losses", "--trainer.callbacks+=step_losses.StepLosses"]


def sweep(folder: Path) -> None:
    """Does all runs, one after another."""
    folder.joinpath("runs.yaml").write_text(json.dumps(CONFIG))
    folder.joinpath("step_losses.py").write_text(CALLBACK)
    paths = f"{ROOT / 'src'}{os.pathsep}{folder}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["NOLA_VISION_CACHE_GIB"] = "0"  # no features of another state of the source
    command = [*COMMAND, *SWEEP, "--methods", ",".join(SETTINGS), *CALLED]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def result(folder: Path) -> dict[str, Any]:
    """The results of the run in a folder."""
    row = json.loads(folder.joinpath(ROW_FILE).read_text())
    header, *lines = [line.split(",") for line in folder.joinpath(LOG_FILE).read_text().splitlines()]
    losses = folder / LOSSES
    return {
        "row": {named(key): value for key, value in row.items() if key not in LEFT_OUT},
        "log": [{named(key): value for key, value in zip(header, line, strict=True) if value} for line in lines],
        "losses": [float(line) for line in losses.read_text().split()] if losses.exists() else [],
        **adapter(folder / ADAPTER_FILE),
    }


def named(column: str) -> str:
    """A column's name in older results."""
    return RENAMED.get(column, column)


def adapter(path: Path) -> dict[str, Any]:
    """An adapter file's size, and type, shape and digest of each tensor, in an order that no name decides."""
    if not path.exists():
        return {"file_bytes": None, "tensors": []}
    from nola_vision.adapters.serialization import read_adapter

    tensors = [
        [str(one.dtype), list(one.shape), hashlib.sha256(one.contiguous().numpy().tobytes()).hexdigest()[:16]]
        for one in read_adapter(path)[1].values()
    ]
    return {"file_bytes": path.stat().st_size, "tensors": sorted(tensors)}


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    """What differs between two results, one line each."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        missing = "missing"
        return [
            line
            for key in keys
            for line in differences(before.get(key, missing), after.get(key, missing), f"{place}/{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for i, (one, other) in pairs for line in differences(one, other, f"{place}[{i}]")]
    return [] if repr(before) == repr(after) else [f"{place}: {before!r} before, {after!r} now"]


def main() -> int:
    """Runs, writes, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, metavar="BEFORE.json", help="results to compare with")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sweep(folder)
        for method in SETTINGS:
            (row,) = folder.glob(f"runs/*/{method}/*/{ROW_FILE}")
            results[method] = result(row.parent)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.against is None:
        return 0
    found = differences(json.loads(arguments.against.read_text()), json.loads(arguments.out.read_text()))
    print("\n".join(found) or f"all results are those of {arguments.against}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
