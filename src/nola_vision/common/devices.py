"""The values of `--device`. Does not import torch, so that a typo is reported immediately."""

from __future__ import annotations

import re

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.suggestions import did_you_mean


def parse_device(name: str) -> tuple[str, int | None]:
    """The kind of a device and the number of a GPU: `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        NolaVisionError: it is a different name.
    """
    if found := re.fullmatch(r"cpu|mps|cuda(?::(\d{1,4}))?", name):
        return name.partition(":")[0], None if found[1] is None else int(found[1])
    hint = did_you_mean("cuda" if name == "gpu" else name, ("cpu", "cuda", "mps"), "use cpu, cuda, cuda:1 or mps")
    raise NolaVisionError(f"--device is '{name}': {hint}")
