"""The tests import helpers that lie beside them, and run on one thread each: several processes may share the cores."""

import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling takes a minute; the tests of compiled code unset it
sys.path.insert(0, str(Path(__file__).parent))
# Facts about files are not stored in the home folder. Matplotlib's font cache is expensive to make, so it stays there.
_cache = tempfile.TemporaryDirectory()
os.environ.setdefault(
    "MPLCONFIGDIR", str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache/")).expanduser() / "matplotlib")
)
os.environ["XDG_CACHE_HOME"] = _cache.name
os.environ["NOLA_VISION_CACHE_GIB"] = "0"  # features are computed in every test that does not ask for their cache


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The test modules import PyTorch and Lightning, which later garbage collections need not visit."""
    from nola_vision.common.imports import without_collections

    with without_collections():
        return (yield)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium, for modules that skip their tests without it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def adapter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` does not run the methods on frozen features first: three quarters of the time of a short run."""
    monkeypatch.setattr("nola_vision.runs.fit._frozen_rows", lambda *_: [])


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep does its runs in this process: its workers would import torch, before the search and after it."""
    from tiny import execute_in_process

    monkeypatch.setattr("nola_vision.sweep.engines.local.execute", execute_in_process)


@pytest.fixture(scope="module")
def kept() -> Iterator[None]:
    """The runs of a module share data sets, decoded images, backbones and features, as those of a sweep do."""
    from nola_vision.common import process_cache

    with process_cache.keeping():
        yield


@pytest.fixture
def images_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images went through a backbone, call after call."""
    from nola_vision.models.adapted_model import AdaptedModel

    seen: list[int] = []
    original = AdaptedModel.features

    def counted(self: AdaptedModel, images: Any) -> Any:
        seen.append(len(images))
        return original(self, images)

    monkeypatch.setattr(AdaptedModel, "features", counted)
    yield seen
