"""The known methods by class name, and a method as plain values."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import EntryPoint, entry_points
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
        NolaVisionError: it is not a subclass of `Method`, it adds settings but is not a dataclass, or another
            class has the name.
    """
    if not isinstance(method, type) or not issubclass(method, Method):
        raise NolaVisionError(
            f"{method!r} is not a subclass of nola_vision.adapters.methods.Method: a method must be one"
        )
    own = "__annotations__" in vars(method) or any(field.name in vars(method) for field in dataclasses.fields(method))
    if own and "__dataclass_params__" not in vars(method):
        raise NolaVisionError(
            f"the fields of {method.__name__} are not settings yet: put @dataclass(frozen=True, kw_only=True) below "
            "@register"
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
        NolaVisionError: its class is not registered, or a value of another type, a number out of range, or two settings
            that exclude each other.
    """
    if METHODS.get(name := type(method).__name__) is not type(method):
        raise NolaVisionError(f"{name} is not registered, so its files could not be loaded: decorate it with @register")
    method = check_types(method)
    method.check()
    try:
        json.dumps(to_dict(method))
    except TypeError as error:
        raise NolaVisionError(f"a setting of {name} is not a plain value ({error}): no file could state it") from error
    return method


def to_dict(method: Method) -> dict[str, Any]:
    """`{class_path, init_args}` of plain values, as in a config."""
    settings = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    plain = {name: list(one) if isinstance(one, tuple | list) else one for name, one in settings.items()}
    return {"class_path": type(method).__name__, "init_args": plain}


def from_dict(described: dict[str, Any]) -> Method:
    """The method that `to_dict` described.

    Raises:
        NolaVisionError: an unknown method or field.
    """
    if not isinstance(described, dict):
        raise NolaVisionError(f"the method is {quoted(described)}: write it as class_path and init_args")
    path = described.get("class_path")
    name = path.rpartition(".")[2] if isinstance(path, str) else None
    if name is None:
        raise NolaVisionError(f"unknown method {quoted(path)}: give the name of a class, such as NOLA")
    known_method(name)
    given = described.get("init_args")
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise NolaVisionError(f"init_args of {name} is {quoted(given)}: it must be a mapping")
    known = [field.name for field in dataclasses.fields(METHODS[name])]
    if wrong := [key for key in given if key not in known]:
        if not known:
            raise NolaVisionError(f"unknown setting '{wrong[0]}' of {name}: it has no settings")
        raise NolaVisionError(f"unknown setting '{wrong[0]}' of {name}: {did_you_mean(wrong[0], known)}")
    return METHODS[name](**given)


def known_method(name: str) -> type[Method]:
    """The method of a class name; a plug-in is imported.

    Raises:
        NolaVisionError: there is none.
    """
    if name not in METHODS and load_plugin(name) is None:
        raise NolaVisionError(
            f"unknown method {quoted(name)}: {did_you_mean(name, [*METHODS, *plugins()])}; another package's method "
            "must be installed as a plug-in, or imported in Python first (docs/own-method.md)"
        )
    return METHODS[name]


def plugins() -> dict[str, str]:
    """The class paths of the methods that installed packages state, by class name; none of them is imported."""
    return {plugin.attr: f"{plugin.module}.{plugin.attr}" for plugin in _entry_points()}


def load_plugin(class_path: str) -> tuple[str, type[Method]] | None:
    """Imports and registers the method that an installed package states under a class path or under its last part.

    Returns:
        The class path that the package states, and the class, which may be defined in another module; None if there is
        none.

    Raises:
        NolaVisionError: the package cannot be imported, or what it states cannot be registered, or two packages state
            different classes of this name.
    """
    stated = {f"{plugin.module}.{plugin.attr}": plugin for plugin in _entry_points()}
    name = class_path.rpartition(".")[2]
    # the package that states exactly this path decides, whatever others state
    asked = [class_path] if class_path in stated else [path for path, one in stated.items() if one.attr == name]
    found = {path: _imported(stated[path]) for path in asked}
    if "." in class_path and class_path not in stated:
        found = {path: one for path, one in found.items() if f"{one.__module__}.{one.__qualname__}" == class_path}
    if len(set(found.values())) > 1:
        raise NolaVisionError(f"{' and '.join(found)} are different methods of one name: uninstall one of the packages")
    for path, method in found.items():
        return path, register(method)
    return None


def _entry_points() -> list[EntryPoint]:
    """The valid ones: one that is malformed would raise at each access."""
    return [plugin for plugin in entry_points(group=PLUGINS) if EntryPoint.pattern.match(plugin.value)]


def _imported(plugin: EntryPoint) -> type[Method]:
    try:
        method = plugin.load()
    except (Exception, SystemExit) as error:  # another package's import fails in any way
        raise NolaVisionError(f"the plug-in {plugin.value} cannot be imported: {error!r}") from error
    if isinstance(method, type) and method.__name__ != plugin.attr:
        raise NolaVisionError(f"the plug-in {plugin.value} is a class named {method.__name__}: state it by that name")
    return method  # type: ignore[no-any-return]
