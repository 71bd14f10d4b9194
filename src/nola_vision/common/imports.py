"""Classes by their import path."""

from __future__ import annotations

import importlib
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
