"""Interrupts fits at random times and compares the results: `python scripts/kill_fits.py`.

One small fit runs without interruption. Then, for each seed, another one receives SIGINT (Ctrl-C) or SIGKILL
at a random time between its start and its exit. The same command with `--ckpt_path last` must then give the same
deterministic columns and the same bytes of the adapter file. An interrupted fit must not print a traceback.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nola_vision.runs import store
from nola_vision.runs.record import DETERMINISTIC

CONFIG = """
protocol: kills
method: nola
methods:
  nola:
    class_path: NOLA
    init_args: {targets: [mlp], rank: 4, num_basis: 32, c: 2, lr: 0.005, bits: 4, quantise_from: 0.5}
threads: 1
model: {backbone: {tag: test_vit.r160_in1k, base: random, img_size: 32}, warmup_epochs: 1}
data: {dataset: digits, shots: 3, batch_size: 8, augmentation: light, test_limit: 50}
trainer: {max_epochs: 3, accelerator: cpu, check_val_every_n_epoch: 1, enable_progress_bar: false}
"""


def start(config: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nola_vision.cli.main", "fit", f"--config={config}", f"--out={out}", *options]

    def handle() -> None:  # a shell's background jobs start with Ctrl-C ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        command, preexec_fn=handle, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )


def result(out: Path) -> tuple[dict[str, Any], bytes] | None:
    """The deterministic columns and the adapter's bytes of the one run of a folder, or None."""
    rows, problems = store.read_rows(out) if out.is_dir() else ([], [])
    if problems or len(rows) != 1:
        return None
    (adapter,) = out.rglob("adapter.safetensors") if rows[0].adapter_file_bytes else ()
    columns = {"status": rows[0].status, "hash": rows[0].run_hash, **{k: asdict(rows[0])[k] for k in DETERMINISTIC}}
    return columns, adapter.read_bytes()


def disturb(config: Path, out: Path, number: signal.Signals, moment: float) -> tuple[str, str]:
    """Interrupts one fit and resumes it; returns a description and the errors of the interruption."""
    fit, began = start(config, out), time.monotonic()
    try:
        _, errors = fit.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        fit.send_signal(number)
        _, errors = fit.communicate()
    lasted = time.monotonic() - began
    row = store.read_rows(out)[0] if out.is_dir() else []
    left = row[0].status if row else "no"
    checkpoint = "a" if list(out.rglob("last.ckpt")) else "no"
    outcome = f"{number.name} after {moment:.2f} s: exit status {fit.returncode} after {lasted:.2f} s, {left} row, "
    again = start(config, out, "--ckpt_path=last")
    _, later = again.communicate()
    outcome += f"{checkpoint} checkpoint, then {again.returncode}"
    wrong = [name for name, text in (("TRACEBACK", errors), ("LATER TRACEBACK", later)) if "Traceback" in text]
    if wrong:
        print(errors[-1500:], later[-1500:], flush=True)
    return outcome, " ".join(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interrupts", type=int, default=50, help="how many by Ctrl-C")
    parser.add_argument("--kills", type=int, default=20, help="how many by kill -9")
    parser.add_argument("--seed", type=int, default=0)
    known = parser.parse_args()
    chance, equal, tracebacks = random.Random(known.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "kills.yaml"
        config.write_text(CONFIG)
        start(config, Path(scratch) / "first").communicate()  # warms up the disk cache
        expected, seconds = result(Path(scratch) / "first"), 0.0
        numbers = [signal.SIGINT] * known.interrupts + [signal.SIGKILL] * known.kills
        for count, number in enumerate(numbers):
            if count % 10 == 0:  # other work on the machine changes how long a fit takes
                whole, began = Path(scratch) / f"whole{count}", time.monotonic()
                start(config, whole).communicate()
                seconds = time.monotonic() - began
                same = expected is not None and result(whole) == expected
                print(f"undisturbed: {seconds:.1f} s, {expected and expected[0] if same else 'ANOTHER'}", flush=True)
            of = known.interrupts if number == signal.SIGINT else known.kills
            place = count if number == signal.SIGINT else count - known.interrupts
            moment = (place + chance.random()) / of * seconds  # spread evenly, drawn within each part
            out = Path(scratch) / str(count)
            outcome, wrong = disturb(config, out, number, moment)
            same = expected is not None and result(out) == expected
            equal, tracebacks = equal + same, tracebacks + ("TRACEBACK" in wrong)
            print(f"{count}: {outcome}: {'the same result' if same else 'ANOTHER RESULT'} {wrong}".rstrip(), flush=True)
    print(f"{equal} of {len(numbers)} ended with the undisturbed result; {tracebacks} printed a traceback")
    sys.exit(equal < len(numbers) or tracebacks > 0)


if __name__ == "__main__":
    main()
