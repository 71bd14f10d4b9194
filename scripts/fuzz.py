"""Feeds hostile inputs to the package in one process: each must work, or be refused in one line, quickly.

python scripts/fuzz.py configs --count 10000 --seed 0
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def resident_mib(field: str = "VmHWM") -> float:
    """Memory of this process (Linux): its most so far, or what it has now (`VmRSS`)."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def configs(count: int, number: int, folder: Path) -> int:
    """Config files and options; each within 2 s of CPU time and 100 MiB."""
    import fuzz_configs

    fuzz_configs.understood(
        fuzz_configs.dump(fuzz_configs.load_config("quickstart")), [], folder
    )  # imports what a first parse needs

    def once(text: str, options: list[str]) -> str:
        with fuzz_configs.nothing_runs(folder):
            return fuzz_configs.understood(text, options, folder)

    return feed(once, (fuzz_configs.config_files(), fuzz_configs.option_lists()), count, number, 2.0)


def feed(
    once: Callable[..., str], inputs: tuple[st.SearchStrategy, ...], count: int, number: int, most_seconds: float
) -> int:
    """Calls `once` with each input, prints the worst, and returns the number of failures.

    Memory is that above what the process has when it gets the input: Hypothesis keeps what it has drawn.
    """
    failures: list[str] = []
    kinds: Counter[str] = Counter()
    slowest, largest = 0.0, 0.0

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*inputs))
    def feed_all(drawn: tuple) -> None:
        nonlocal slowest, largest
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before, started = resident_mib("VmRSS"), time.process_time()
        try:
            message = once(*drawn)
        except BaseException as error:
            message, failed = "", f"{type(error).__name__}: {error}"
            if isinstance(error, KeyboardInterrupt):
                raise
        else:
            failed = "several lines" if "\n" in message else ""
        seconds = time.process_time() - started
        grown = resident_mib() - before
        slowest, largest = max(slowest, seconds), max(largest, grown)
        kinds["works" if message == "parsed" else "refused"] += 1
        if failed or seconds > most_seconds or grown > 100:
            failures.append(f"{failed}, {seconds:.1f} s, {grown:.0f} MiB: {drawn!r:.3000}")

    feed_all()
    print(f"{sum(kinds.values())} inputs, {dict(kinds)}; slowest {slowest:.2f} s, largest {largest:.0f} MiB")
    for failure in failures[:5]:
        print(failure)
    print(f"{len(failures)} failures")
    return len(failures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["configs"])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sys.exit(min(1, {"configs": configs}[chosen.what](chosen.count, chosen.seed, Path(place))))
