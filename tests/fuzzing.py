"""How an input from a stranger ended, and what it cost; for `fuzz_adapters`, `fuzz_configs` and `scripts/fuzz.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.text import printable


@dataclass(frozen=True)
class Outcome:
    """How an example ended, and what it cost.

    Args:
        refusal: the line of a NolaVisionError; None where it worked.
        seconds: of processor time.
        mib: of memory at the most, above the start.
    """

    refusal: str | None
    seconds: float
    mib: float


def cheap(ended: Outcome) -> None:
    """Fails where an input ran away. How long exactly is for `scripts/fuzz.py`: the machine of a test may be busy."""
    assert ended.seconds < 10 and ended.mib < 100, ended


def measured(use: Callable[[], object]) -> Outcome:
    """Uses an input.

    Raises:
        Exception: whatever is not a NolaVisionError of one printable line.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before, start, refusal = _memory("VmRSS"), time.process_time(), None
    try:
        use()
    except NolaVisionError as error:
        refusal = str(error)
        assert refusal == printable(refusal) and len(refusal) < 2010, ascii(refusal)[:1000]
    return Outcome(refusal, time.process_time() - start, _memory("VmHWM") - before)


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
