"""Kills sweeps at random times and compares the results: `python scripts/kill_sweeps.py [--times 20]`.

Three sweeps of the quick start (one epoch) run without interruption: with two workers, with one worker, and on Ray, on
a cluster of two nodes that this script starts on this machine. Their rows must be equal. Then, for each seed, the
driver, a worker or a Ray node of another sweep is killed by SIGKILL at a random time. Restarted with the same command,
it must give the same rows: the same set, the same deterministic columns, no duplicates and no incomplete files.
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
from typing import Any

from nola_vision.runs import store
from nola_vision.runs.record import DETERMINISTIC

SWEEP = [
    sys.executable, "-m", "nola_vision.cli.main", "sweep", "--config", "quickstart.yaml", "--splits=0-1", "--inits=0",
    "--methods=1nn,linear,nola", "--threads=1", "--trainer.max_epochs=1", "--data.test_limit=100",
]  # fmt: skip
VICTIMS = [("local", "driver"), ("local", "worker"), ("ray", "driver"), ("ray", "worker"), ("ray", "node")]
LOCAL = ["--workers=2"]
TOKEN = "of-the-cluster-that-kill-sweeps-starts"


def start(out: Path, engine: list[str]) -> subprocess.Popen[bytes]:
    quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen([*SWEEP, *engine, f"--out={out}"], **quiet)


def workers(driver: int, engine: str) -> list[int]:
    """The processes that execute runs: the driver's children, or those that Ray names after their task."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            command = (place / "cmdline").read_bytes()
            if engine == "ray":
                at_work = command.startswith(b"ray::_work") and TOKEN.encode() in (place / "environ").read_bytes()
            else:
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                at_work = b"spawn_main" in command and parent == driver
        except (OSError, ValueError):  # no process, or one that has ended
            continue
        if at_work:
            found.append(int(place.name))
    return sorted(found)


def results(out: Path) -> dict[tuple[str, str, str], dict[str, object]]:
    rows, problems = store.read_rows(out)
    if problems:
        return {}  # different from any valid result
    found = {
        (row.stage, row.method, row.run_hash): {
            "status": row.status, "learning_rate": row.learning_rate, **{k: asdict(row)[k] for k in DETERMINISTIC}
        }
        for row in rows
    }  # fmt: skip
    return found if len(found) == len(rows) else {}


def disturb(out: Path, seed: int, longest: float, cluster: Any) -> str:
    """Kills one sweep once, and restarts it until its end; returns what was killed, and when."""
    chance = random.Random(seed)
    engine, victim = VICTIMS[seed % len(VICTIMS)]
    moment = chance.uniform(0.1, 0.9) * longest
    options = LOCAL if engine == "local" else on_ray(cluster)
    sweep = start(out, options)
    time.sleep(moment)
    outcome = f"nothing ({engine} {victim}): it had ended"
    if sweep.poll() is None:
        at_work = workers(sweep.pid, engine)
        if victim == "node":
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
            cluster.add_node(num_cpus=1)
        elif victim == "worker" and at_work:
            os.kill(chance.choice(at_work), signal.SIGKILL)
        else:
            victim = "driver"
            sweep.kill()
        outcome = f"{engine} {victim} after {moment:.1f} s"
    first = sweep.wait()
    rows = len(list(out.rglob(store.ROW_FILE)))
    again = start(out, options).wait()
    return f"{outcome}: exit status {first} with {rows} rows, then {again}"


def on_ray(cluster: Any) -> list[str]:
    return ["--engine=ray", f"--address={cluster.address}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    known = parser.parse_args()
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, RAY_USAGE_STATS_ENABLED="0")
    from ray.cluster_utils import Cluster  # Ray reads them when it is imported

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    wrong = missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        expected, longest = None, 0.0
        for name, engine in {"two workers": LOCAL, "one worker": ["--workers=1"], "ray": on_ray(cluster)}.items():
            began = time.monotonic()
            start(Path(scratch) / name, engine).wait()
            seconds = time.monotonic() - began
            found = results(Path(scratch) / name)
            if expected is None:
                expected, longest = found, seconds
            wrong += found != expected
            same = "the same rows" if found == expected else "OTHER ROWS"
            print(f"undisturbed, {name}: {len(found)} rows in {seconds:.0f} s, {same}", flush=True)
        for seed in range(known.times):
            out = Path(scratch) / str(seed)
            outcome = disturb(out, seed, longest, cluster)
            same = results(out) == expected
            wrong += not same
            missed += outcome.startswith("nothing")
            print(f"seed {seed}: {outcome}: {'the same rows' if same else 'OTHER ROWS'}", flush=True)
    cluster.shutdown()
    print(f"{known.times - missed} sweeps killed; {wrong} ended with other rows than the undisturbed one")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
