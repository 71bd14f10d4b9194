"""Configs that a stranger may send: shipped ones with changed values, class paths, keys, options and text."""

from __future__ import annotations

import copy
import functools
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st
from jsonargparse._stubs_resolver import get_stubs_resolver

from fuzzing import Outcome, measured
from nola_vision.runs import run_id
from nola_vision.runs.config_files import load_config
from nola_vision.runs.parsing import parse
from nola_vision.runs.yaml_files import dump

get_stubs_resolver()  # asks a Python process for its path, once
CANARY = "canary_of_configs"  # a module that must never be imported
CLASS_PATHS = (
    "os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "functools.partial",
    f"{CANARY}.Thing", f"{CANARY}.NOLA", f"lightning.{CANARY}.Thing", "importlib.import_module", "pickle.load",
    "lightning.pytorch.trainer.trainer.os.system", "lightning.pytorch.cli.torch.load", "lightning.pytorch.cli.yaml",
    "torch.optim.optimizer.functools.partial", "torch.optim.adam.adam", "torch.optim.Optimizer", "torch.optim",
    "torch.load", "torch.hub.load", "torch.nn.Linear", "nola_vision.runs.parsing.os.system",
    "nola_vision.runs.runner.run",
    "nola_vision.NOLA", "nola_vision.LoRA", "nola_vision.adapters.methods.base.Method",
    "nola_vision.adapters.methods.base.Adapter", "NOLA",
    "nola_vision.PEFT", "nola_vision.runs.parsing.RunCLI", "nola_vision.cli.main.main", "lightning.pytorch.Trainer",
    "lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.EarlyStopping", "EarlyStopping",
    "lightning.pytorch.callbacks.ModelCheckpoint", "lightning.pytorch.callbacks.Callback", "WandbLogger",
    "lightning.pytorch.loggers.WandbLogger", "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.cli.LightningCLI",
    "lightning.pytorch.strategies.DDPStrategy", "lightning.fabric.utilities.cloud_io._load", "lightning", "torch",
    "jsonargparse.set_parsing_settings", "jsonargparse.ArgumentParser", "Adam", "SGD", "", ".", "a..b", "é.x", "a b.c",
    "__main__.x", "x" * 5000, "lightning." * 200 + "x", "http://localhost/x.yaml", "/etc/passwd", "x.yaml",
)  # fmt: skip
_KEYS = (
    "class_path", "init_args", "dict_kwargs", "callbacks", "logger", "plugins", "strategy", "optimizer", "method",
    "methods", "model", "data", "trainer", "backbone", "__path__", "__class__", "__dict__", "$schema", "config", "lr",
    "allow_import", "content", "published", "seed_everything", "data.shots", "model.method", "a.b.c", "", ".", "..",
    "+", "callbacks+", "é", "\U0001f600", "x" * 3000, "0", "subcommand", "rank", "num_basis", "include", "keys", "pop",
)  # fmt: skip

_texts = st.one_of(
    st.sampled_from(
        ["lr", "null", "true", "~", "1e10", "1e999", ".nan", "inf", "2020-01-01", "1:30:00", "${x}", "{a: b}", "[1",
         "-", "--", "\U0001f600", "a\nb", "\x1b[31m", "*a", "&a", "!!python/name:os.system", "9" * 5000, "{}" * 999,
         "x:"]
    ),
    st.text(st.characters(codec="utf-8"), max_size=12),
)  # fmt: skip
_numbers = st.one_of(
    st.integers(-(10**4), 10**4),
    st.sampled_from(
        [2**31, 2**63 - 1, 2**63, -(2**63), 10**400, 1e308, -1e308, 1e-320, 0.0, float("nan"), float("inf")]
    ),
)
_specs = st.builds(
    lambda path, key, args: {"class_path": path, key: args},
    st.sampled_from(CLASS_PATHS),
    st.sampled_from(["init_args", "dict_kwargs"]),
    st.dictionaries(st.sampled_from(_KEYS), st.one_of(_texts, _numbers, st.sampled_from(CLASS_PATHS)), max_size=3),
)
_leaves = st.one_of(st.none(), st.booleans(), _numbers, _texts, st.sampled_from(CLASS_PATHS), _specs)
_values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=3)
)
_SCRAPS = (
    "&a ", "*a", "<<: *a\n", "!!python/object/apply:os.system ['x']", "!!int ", "? ", "- ", "[" * 300, "{a: " * 300,
    "\t", "\0", "\u2028", "---\n", "...\n", "%YAML 1.2\n", "|\n", ">-\n", '"', "'", "#", ": ", "\r", "\ufeff",
    "9" * 5000,
    "a: &a [x,x,x]\nb: &b [*a,*a,*a]\n", "\\ud800", ": " * 500, "1" + ":1" * 5000, "protocol: 2020-01-01\n", "1e10",
)  # fmt: skip


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a nested value, as its container and its key or index."""
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from _places(inner)


@st.composite
def config_files(draw: st.DrawFn) -> str:
    """The text of a config: the quick start's with one to three changes, in its values or in its text."""
    config = copy.deepcopy(load_config("quickstart.yaml"))
    config["methods"] = {name: config["methods"][name] for name in ("linear", "nola")}
    for _ in range(draw(st.integers(0, 3))):
        container, key = draw(st.sampled_from(list(_places(config))))
        match draw(st.sampled_from(["value", "delete", "add", "class", "hook"])):
            case "value":
                container[key] = draw(_values)
            case "delete" if isinstance(container, dict):
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.sampled_from(_KEYS))] = draw(_values)
            case "class" if "methods" in config and isinstance(config["methods"], dict):
                config["methods"]["nola"] = draw(_specs)
            case "hook" if isinstance(config.get("trainer"), dict):
                hook = draw(st.sampled_from(["callbacks", "logger", "plugins", "profiler", "strategy", "accelerator"]))
                config["trainer"][hook] = draw(st.one_of(_specs, st.lists(_specs, max_size=2), _leaves))
    text = dump(config)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 40)))
        text = text[:start] + draw(st.sampled_from([text[start:end] * 2, "", *_SCRAPS])) + text[end:]
    return text


@st.composite
def option_lists(draw: st.DrawFn) -> list[str]:
    """Command-line options that a stranger may advise."""
    keys = [
        *("trainer.callbacks", "trainer.callbacks+", "trainer.logger+", "trainer.plugins+", "trainer.profiler"),
        *("model.optimizer", "model.optimizer.class_path", "model.method", "model.method.class_path", "model.backbone"),
        *("model.method.rank", "model.backbone.tag", "model", "data", "data.root", "data.shots", "protocol", "threads"),
    ]
    values = st.one_of(st.sampled_from(CLASS_PATHS), _texts, _numbers.map(str), _specs.map(str))
    pairs = draw(st.lists(st.tuples(st.sampled_from(keys), values), max_size=2))
    return [f"--{key}={value}" for key, value in pairs]


@contextmanager
def nothing_runs(folder: Path) -> Iterator[None]:
    """Fails where a command is started, or the canary module, which is importable meanwhile, is imported."""
    (folder / f"{CANARY}.py").write_text("class Thing: pass\nclass NOLA: pass\n")
    started: list[str] = []

    def refusing(original: Any) -> Any:
        @functools.wraps(original)
        def refuse(*_: Any, **__: Any) -> None:
            started.append("".join(traceback.format_stack(limit=8)))
            raise AssertionError("a config started a command")

        return refuse

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(sys, "path", [str(folder), *sys.path]))
        for owner, name in ((os, "system"), (os, "popen"), (subprocess, "Popen"), (socket.socket, "connect")):
            patches.enter_context(mock.patch.object(owner, name, refusing(getattr(owner, name))))
        yield
    assert not started, started[0]
    assert CANARY not in sys.modules


def inputs() -> st.SearchStrategy[tuple[str, tuple[str, list[str]]]]:
    """A name, and the text of a config file with command-line options."""
    return st.tuples(st.just("config"), st.tuples(config_files(), option_lists()))


def outcome(example: tuple[str, list[str]], folder: Path) -> Outcome:
    """What `fit` makes of a config file and options before a run.

    Raises:
        Exception: whatever is not a NolaVisionError of one printable line.
        AssertionError: something was executed.
    """
    text, options = example
    path = folder / "config.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with nothing_runs(folder):
        return measured(lambda: parse(run_id.resolve(load_config(str(path))), options))


def warm_up(folder: Path) -> None:
    """Imports what the first config needs."""
    assert outcome((dump(load_config("quickstart")), []), folder).refusal is None
