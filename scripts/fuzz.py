"""Tests many malformed inputs in one process: `python scripts/fuzz.py adapters --count 10000 --seed 0`.

Each example must work or end with a one-line error, within limits of time and memory. The strategies are those of the
tests. Violations are printed, and their bytes are saved for a regression test.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

TESTS = Path(__file__).parent.parent / "tests"
LIMITS = {"adapters": (1.0, 100.0), "configs": (2.0, 100.0)}  # seconds of processor time, MiB above the start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=sorted(LIMITS), help="the module tests/fuzz_<what>.py")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the examples that fail")
    options = parser.parse_args()

    sys.path.insert(0, str(TESTS))
    cases = importlib.import_module(f"fuzz_{options.what}")
    from nola_vision.common import process_cache

    process_cache.keep()
    seconds, mib = LIMITS[options.what]
    endings: Counter[str] = Counter()
    slowest, largest, failures, start = (0.0, ""), (0.0, ""), 0, time.time()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cases.warm_up(folder)

        @seed(options.seed)
        @settings(
            max_examples=options.count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases.inputs())
        def one(example: tuple[str, Any]) -> None:
            nonlocal slowest, largest, failures
            name, content = example
            try:
                ended = cases.outcome(content, folder)
            except Exception:
                endings["FAILED"] += 1
                failures += 1
                print(f"--- {name} ---\n{traceback.format_exc(limit=-6)}", flush=True)
                keep(content)
                return
            endings["refused" if ended.refusal else "works"] += 1
            slowest = max(slowest, (ended.seconds, f"{name}: {ended.refusal}"))
            largest = max(largest, (ended.mib, f"{name}: {ended.refusal}"))
            if ended.seconds > seconds or ended.mib > mib:
                failures += 1
                print(f"--- {name}: {ended.seconds:.2f} s, {ended.mib:.0f} MiB: {ended.refusal}", flush=True)
                keep(content)
            if sum(endings.values()) % 500 == 0:
                print(f"{dict(endings)} after {time.time() - start:.0f} s", flush=True)

        def keep(content: Any) -> None:
            if options.keep is not None:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{failures}").write_bytes(
                    content if isinstance(content, bytes) else repr(content).encode()
                )

        one()
    print(f"{sum(endings.values())} {options.what}: {dict(endings)} in {time.time() - start:.0f} s")
    print(f"slowest: {slowest[0]:.2f} s ({slowest[1]})\nmost memory: {largest[0]:.0f} MiB ({largest[1]})")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
