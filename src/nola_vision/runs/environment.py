"""Facts about the machine and the code that go into a row: package versions, processor, git commit."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

from nola_vision.common.devices import processor_name

_PACKAGES = (
    "nola-vision",
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "torchmetrics",
    "numpy",
    "pillow",
    "safetensors",
    "peft",
    "ray",
)


def environment() -> dict[str, str]:
    """Return the versions of the installed packages, of Python and of the platform, and the processor's name."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["python"] = platform.python_version()
    versions["platform"] = platform.platform()
    versions["cpu"] = processor_name()
    return versions


def git_state() -> dict[str, Any] | None:
    """Return `commit` and `dirty` (a tracked file differs) of the current folder, or None outside a git checkout."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    if commit is None or changed is None:
        return None
    return {"commit": commit, "dirty": changed != ""}


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
