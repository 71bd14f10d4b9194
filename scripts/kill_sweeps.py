"""Kills sweeps at random moments and compares what they end with: `python scripts/kill_sweeps.py [--times 20]`.

One sweep of the quick start (one epoch, two slots) runs undisturbed. Then, for each seed, another one goes on
until it has been killed: its driver, or a worker of it, by SIGKILL, after a random time. Started again with the same
command, it must end with the same rows: the same set, the same deterministic columns, none twice, none torn.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from nola_vision.results import store
from nola_vision.results.row import DETERMINISTIC

SWEEP = [
    sys.executable, "-m", "nola_vision.cli.main", "sweep", "--config", "quickstart.yaml", "--splits=0-1", "--inits=0",
    "--methods=1nn,linear,nola", "--slots=2", "--threads=1", "--trainer.max_epochs=1", "--data.test_limit=100",
]  # fmt: skip


def start(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*SWEEP, f"--out={out}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def workers(driver: int) -> list[int]:
    listed = Path(f"/proc/{driver}/task/{driver}/children").read_text().split()
    return [pid for pid in map(int, listed) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def results(out: Path) -> dict[tuple[str, str, str], dict[str, object]]:
    rows, problems = store.read_rows(out)
    assert not problems, problems
    found = {
        (row.stage, row.method, row.run_hash): {
            "status": row.status, "learning_rate": row.learning_rate, **{k: asdict(row)[k] for k in DETERMINISTIC}
        }
        for row in rows
    }  # fmt: skip
    assert len(found) == len(rows), "a row is there twice"
    return found


def disturb(out: Path, seed: int, longest: float) -> str:
    """Kills one sweep once, and starts it again to its end; says what was killed, and when."""
    chance = random.Random(seed)
    victim, moment = chance.choice(["driver", "worker"]), chance.uniform(0.1, 0.9) * longest
    sweep = start(out)
    time.sleep(moment)
    told = "nothing: it had ended"
    if sweep.poll() is None:
        at_work = workers(sweep.pid)
        pid = chance.choice(at_work) if victim == "worker" and at_work else sweep.pid
        os.kill(pid, signal.SIGKILL)
        told = f"{'driver' if pid == sweep.pid else 'worker'} after {moment:.1f} s"
    sweep.wait()
    again = start(out)
    again.wait()
    return told + (f", then exit status {again.returncode}" if again.returncode else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    known = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        start(Path(scratch) / "undisturbed").wait()
        longest = time.monotonic() - began
        expected = results(Path(scratch) / "undisturbed")
        print(f"undisturbed: {len(expected)} rows in {longest:.0f} s")
        wrong = 0
        for seed in range(known.times):
            out = Path(scratch) / str(seed)
            told = disturb(out, seed, longest)
            same = results(out) == expected
            wrong += not same
            print(f"seed {seed}: killed {told}: {'the same rows' if same else 'OTHER ROWS'}", flush=True)
    print(f"{known.times - wrong} of {known.times} ended with the rows of the undisturbed sweep")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
