"""Classes by their import path, and imports that take long."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nola_vision.common.errors import NolaVisionError


def resolve(path: str) -> Any:
    """The object with an import path. Importing runs code: check first that the path is allowed.

    Raises:
        NolaVisionError: there is no such module or name.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's own module fails in any way
        raise NolaVisionError(f"'{path}' cannot be imported ({error}): check the name of the class") from error


@contextmanager
def without_collections() -> Iterator[None]:
    """For the import of PyTorch and Lightning: without garbage collections it takes a sixth less time.

    What exists at the end, which is modules, classes and functions, is left out of later collections too. This concerns
    the whole process, so it is for the command line and workers. Without an effect if Lightning is imported already.
    """
    if "lightning" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
