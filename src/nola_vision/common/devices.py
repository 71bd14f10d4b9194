"""Names of devices: the values of `--device`, and the processor. Does not import torch: a typo is reported early."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.suggestions import did_you_mean


def parse_device(name: str, option: str = "--device") -> tuple[str, int | None]:
    """The kind of a device and the number of a GPU: `cpu`, `cuda`, `cuda:1` or `mps`.

    Args:
        name: what the user gave.
        option: what the user calls it.

    Raises:
        NolaVisionError: it is a different name.
    """
    if found := re.fullmatch(r"cpu|mps|cuda(?::(\d{1,4}))?", name):
        return name.partition(":")[0], None if found[1] is None else int(found[1])
    hint = did_you_mean("cuda" if name == "gpu" else name, ("cpu", "cuda", "mps"), "use cpu, cuda, cuda:1 or mps")
    raise NolaVisionError(f"{option} is '{name}': {hint}")


@functools.cache
def processor_name() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
