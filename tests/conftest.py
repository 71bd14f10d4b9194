"""The tests import helpers that lie beside them, and run on one thread each: several processes may share the cores."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
sys.path.insert(0, str(Path(__file__).parent))
# Facts about files are not stored in the home folder. Matplotlib's font cache is expensive to make, so it stays there.
_cache = tempfile.TemporaryDirectory()
os.environ.setdefault(
    "MPLCONFIGDIR", str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache/")).expanduser() / "matplotlib")
)
os.environ["XDG_CACHE_HOME"] = _cache.name


@pytest.fixture
def adapter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` does not run the methods on frozen features first: three quarters of the time of a short run."""
    monkeypatch.setattr("nola_vision.runs.fit._frozen_rows", lambda *_: [])


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep does its runs in this process: its workers would import torch, before the search and after it."""
    from tiny import execute_in_process

    monkeypatch.setattr("nola_vision.sweep.engines.local.execute", execute_in_process)
