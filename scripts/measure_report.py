"""Time and size of the report page: 5,000 rows in one cell, and in 52 cells.

    python scripts/measure_report.py [--rows 5000]

The runs have random results (`tests/fake_runs.py`) and all files of real runs: logs, predictions, confusion matrices
and thumbnails. The time is that of `nola-vision report DIR --html FILE` in a separate process, imports included.
Exit status 1 if a page takes more than 10 s or is larger than 20 MB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from fake_runs import METHODS, write_runs

MOST_SECONDS, MOST_BYTES = 10, 20_000_000
CLASSES = [f"class {i}" for i in range(100)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    rows = parser.parse_args().rows
    within = True
    for cells in (1, 52):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "runs"
            trained = sum(method.file_bytes is not None for method in METHODS)
            inits = 3
            splits = max(1, rows // cells // (trained * inits + len(METHODS) - trained))
            written = sum(
                write_runs(folder, CLASSES, splits=splits, inits=inits, cell=f"vit-folder.photos{i}-5shot-default")
                for i in range(cells)
            )
            page = Path(scratch) / "report.html"
            command = [sys.executable, "-m", "nola_vision.cli.main", "report", str(folder), "--html", str(page)]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds, size = time.perf_counter() - start, page.stat().st_size
            print(f"{written:,} rows in {cells} cells: {seconds:.1f} s, {size / 1e6:.1f} MB", flush=True)
            within &= seconds <= MOST_SECONDS and size <= MOST_BYTES
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
