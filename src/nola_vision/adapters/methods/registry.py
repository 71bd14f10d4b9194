"""The known methods by class name, and a method as plain values."""

from __future__ import annotations

import dataclasses
from importlib.metadata import entry_points
from typing import Any, TypeVar

from nola_vision.adapters.methods.base import Method
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.suggestions import did_you_mean
from nola_vision.common.validation import check_types, quoted

PLUGINS = "nola_vision.methods"  # the entry-point group of methods from other packages
METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=Method)


def register(method: type[M]) -> type[M]:
    """Makes a method known to configs and adapter files by the name of its class; a decorator.

    Raises:
        NolaVisionError: it is not a subclass of `Method`, or another class has the name.
    """
    if not isinstance(method, type) or not issubclass(method, Method):
        raise NolaVisionError(
            f"{method!r} is not a subclass of nola_vision.adapters.methods.Method: a method must be one"
        )
    known = METHODS.setdefault(method.__name__, method)
    if (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise NolaVisionError(
            f"{method.__module__}.{method.__name__} has the name of another method, {known.__module__}."
            f"{known.__name__}: rename the class"
        )
    METHODS[method.__name__] = method
    return method


def check(method: Method) -> Method:
    """The method with Python's own numbers, if a backbone could take its settings.

    Raises:
        NolaVisionError: a value of another type, a number out of range, or two settings that exclude each other.
    """
    method = check_types(method)
    method.check()
    return method


def to_dict(method: Method) -> dict[str, Any]:
    """`{class_path, init_args}` of plain values, as in a config."""
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(method).items()}
    return {"class_path": type(method).__name__, "init_args": fields}


def from_dict(described: dict[str, Any]) -> Method:
    """The method that `to_dict` described.

    Raises:
        NolaVisionError: an unknown method or field.
    """
    if not isinstance(described, dict):
        raise NolaVisionError(f"the method is {quoted(described)}: write it as class_path and init_args")
    path = described.get("class_path")
    name = path.rpartition(".")[2] if isinstance(path, str) else None
    if name is not None and name not in METHODS:
        load_plugins(name)
    if name not in METHODS:
        raise NolaVisionError(
            f"unknown method {quoted(name or path)}: use one of {', '.join(METHODS)}, or import the package that has it"
        )
    given = described.get("init_args")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise NolaVisionError(f"init_args of {name} is {quoted(given)}: it must be a mapping")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    if wrong := [key for key in given if key not in known]:
        raise NolaVisionError(f"unknown setting '{wrong[0]}' of {name}: {did_you_mean(wrong[0], known)}")
    return METHODS[name](**given)


def load_plugins(name: str) -> list[tuple[str, type[Method]]]:
    """Imports and registers the methods that installed packages state under a class name.

    Returns:
        Each class, usually one, with the class path that its package states.

    Raises:
        NolaVisionError: the package cannot be imported, or what it states cannot be registered.
    """
    found = []
    for plugin in entry_points(group=PLUGINS):
        if plugin.attr == name:
            try:
                loaded = plugin.load()
            except Exception as error:  # another package's import fails in any way
                raise NolaVisionError(f"the plug-in {plugin.value} cannot be imported: {error}") from error
            found.append((f"{plugin.module}.{name}", register(loaded)))
    return found
