"""Which classes a config may name. Configs are untrusted, so naming a class must not run foreign code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, ClusterEnvironment, LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nola_vision.adapters.methods import registry
from nola_vision.adapters.methods.base import Method
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.imports import resolve
from nola_vision.common.suggestions import did_you_mean
from nola_vision.runs.config_errors import PACKAGES, refusal

# fmt: off
_BASES = (
    Method, Optimizer, LRScheduler, Callback, Logger, Profiler, Strategy, Accelerator, Precision, CheckpointIO,
    ClusterEnvironment, LayerSync,
)
# fmt: on
# Loggers that send the config, and some of them the source code, to a server that the config names.
_NETWORK = {
    "CometLogger": "comet_ml",
    "LitLogger": "litlogger",
    "MLFlowLogger": "mlflow",
    "NeptuneLogger": "neptune",
    "WandbLogger": "wandb",
}

# jsonargparse imports a class path before its type is checked: it may import from these packages alone, and what it
# gets must be defined in them. Configs are not read from URLs, which Lightning turns on.
set_parsing_settings(
    import_path_denylist=["*"],
    import_path_allowlist=list(PACKAGES),
    instantiate_subclass_spec_in_any=False,
    config_read_mode_urls_enabled=False,
    config_read_mode_fsspec_enabled=False,
)


@contextmanager
def allowing(packages: Sequence[str]) -> Iterator[None]:
    """Lets jsonargparse import from more packages for a while."""
    more = [package for package in packages if not _within(package, PACKAGES)]
    set_parsing_settings(import_path_allowlist=more)
    try:
        yield
    finally:
        set_parsing_settings(import_path_denylist=more)


def check_packages(packages: Sequence[str]) -> None:
    """Refuses an `--allow-import` that is not the name of a package.

    Raises:
        NolaVisionError: it has characters that no dotted name has, or names the parser itself.
    """
    for package in packages:
        if not all(part.isidentifier() for part in package.split(".")) or _within(package, ("jsonargparse",)):
            raise NolaVisionError(f"--allow-import {package}: give the name of a package, such as my_package")


def register_method(class_path: Any, packages: Sequence[str]) -> list[str]:
    """Adds a method of another package to the known ones: a registered plug-in, or a class of `packages`.

    Args:
        class_path: of the config's method, or the name of its class. A method of this package needs no import.
        packages: those that the user allowed.

    Returns:
        The import paths that belong to the plug-in, for `allowing`.

    Raises:
        NolaVisionError: the class may not or cannot be imported, is not a `Method`, or has the name of another method.
    """
    if not isinstance(class_path, str):
        return []
    known = registry.METHODS.get(class_path)
    if _within(class_path if known is None else known.__module__, PACKAGES):
        return []
    if _within(class_path, packages):
        registry.register(resolve(class_path))
        return []
    if (plugin := registry.load_plugin(class_path)) is not None:
        return [plugin[0], _name(plugin[1])]  # its package may import the class from another of its modules
    if "." not in class_path:
        return []  # the parser lists the names that there are
    if close := did_you_mean(class_path, registry.plugins().values(), otherwise=""):
        raise NolaVisionError(f"there is no method '{class_path}': {close}")
    raise NolaVisionError(f"the method: {refusal(class_path)}")


def check_classes(config: Any, packages: Sequence[str], where: str = "") -> None:
    """Checks every class that a parsed config names, however its path was written.

    Args:
        config: the config as the parser returns it, with full class paths.
        packages: those that the user allowed, and the paths of plug-ins.
        where: the key of `config` in the whole config.

    Raises:
        NolaVisionError: a class of another package, one of no known kind, a function, or a logger that contacts the
            network and whose package the user did not allow.
    """
    if isinstance(config, Mapping):
        if isinstance(path := config.get("class_path"), str):
            _check_class(path, packages, where)
            config = {**config, "init_args": _without_defaults(path, config.get("init_args"))}
        for key, value in config.items():
            check_classes(value, packages, f"{where}.{key}".lstrip("."))
    elif isinstance(config, list | tuple):
        for number, value in enumerate(config):
            check_classes(value, packages, f"{where}.{number}")
    elif callable(config):
        raise NolaVisionError(f"{where} names a function or a class, {_name(config)}: give class_path and init_args")


def _check_class(path: str, packages: Sequence[str], where: str) -> None:
    if not _within(path, (*PACKAGES, *packages)):
        raise NolaVisionError(f"{where}: {refusal(path)}")
    found = resolve(path)
    if not isinstance(found, type):
        raise NolaVisionError(f"{where} is '{path}', which is not a class: a config names classes, not functions")
    if not _within(_name(found), (*PACKAGES, *packages)):
        raise NolaVisionError(f"{where}: {refusal(_name(found))}")
    if not issubclass(found, _BASES):
        kinds = ", ".join(base.__name__ for base in _BASES)
        raise NolaVisionError(f"{where} is '{path}', which a run cannot use: name a subclass of {kinds}")
    needed = next((_NETWORK[base.__name__] for base in found.__mro__ if base.__name__ in _NETWORK), None)
    if needed is not None and not _within(needed, packages):
        raise NolaVisionError(
            f"{where}: {found.__name__} sends the run's settings over the network: give --allow-import {needed} if you "
            "want that"
        )


def _without_defaults(path: str, arguments: Any) -> Any:
    """The arguments of a class that differ from its defaults, where they are functions: the parser writes those out."""
    if not isinstance(arguments, Mapping):
        return arguments
    parameters = inspect.signature(resolve(path)).parameters
    return {
        key: value
        for key, value in arguments.items()
        if not (callable(value) and key in parameters and value is parameters[key].default)
    }


def _name(found: Any) -> str:
    return f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', type(found).__name__)}"


def _within(path: str, packages: Sequence[str]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)
