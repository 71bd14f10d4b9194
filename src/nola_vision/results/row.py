"""One run's record: the `Row`, to and from JSON, and the facts about the machine that go into it."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import types
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nola_vision.errors import NolaVisionError
from nola_vision.results import identity

SCHEMA_VERSION = 1

Status = Literal["completed", "failed", "interrupted"]

# The columns that repeat exactly on one machine with one thread count.
DETERMINISTIC = (
    "adapter_parameters",
    "head_parameters",
    "other_parameters",
    "adapter_file_bytes",
    "test_accuracy",
    "val_accuracy",
    "train_loss",
    "val_loss",
    "epoch",
    "monitor",
)

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


@dataclass(frozen=True)
class Row:
    """What one run leaves. Accuracies are fractions from 0 to 1; None stands for "not measured".

    `split` and `init` are the run's place in its entry (`init` is None for 1-NN); `config` is its run config;
    `data` what the datamodule says of the draw; `started` ISO 8601 in UTC; `error` one sentence. `epoch` is the epoch,
    counted from 0, whose weights were saved and tested: the last one, or the best by the metric `monitor` of a
    ModelCheckpoint. `train_loss` is that of the last epoch.
    """

    status: Status
    stage: identity.Stage
    cell: str
    method: str
    method_class: str
    split: int
    init: int | None
    run_hash: str
    entry_hash: str
    config: dict[str, Any]
    split_seed: int
    run_seed: int | None
    basis_seed: int | None
    error: str | None = None
    adapter_parameters: int | None = None
    head_parameters: int | None = None
    other_parameters: int | None = None
    adapter_file_bytes: int | None = None
    test_accuracy: float | None = None
    val_accuracy: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    epoch: int | None = None
    monitor: str | None = None
    learning_rate: float | None = None
    seconds_fit: float | None = None
    seconds_test: float | None = None
    seconds_total: float | None = None
    peak_memory_mib: float | None = None
    threads: int | None = None
    device: str | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    git: dict[str, Any] | None = None
    started: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    @property
    def precedence(self) -> tuple[bool, str]:
        """Of several rows of one run, the one where this is largest counts: the newest completed one."""
        return self.status == "completed", self.started

    @classmethod
    def of(cls, run_config: identity.Config, stage: identity.Stage, status: Status, **measured: Any) -> Row:
        """Make the row of a run from its config, which gives every column that says which run it is.

        Args:
            run_config: what `identity.resolve` returns, with the run's seeds in it.
            stage: "final" or "search".
            status: how the run ended.
            **measured: the other columns, by name.
        """
        model = identity.need(run_config, "model")
        split = identity.need(run_config, "data", "split_seed")
        run_seed = identity.need(run_config, "model", "run_seed") if identity.has_init(run_config) else None
        own_basis_seed = model.get("basis_seed")
        others: dict[str, Any] = {"threads": run_config.get("threads"), **measured}
        return cls(
            status=status,
            stage=stage,
            cell=identity.cell_name(run_config),
            method=identity.need(run_config, "method"),
            method_class=identity.method_class(run_config),
            split=split,
            init=run_seed,
            run_hash=identity.run_hash(run_config, stage),
            entry_hash=identity.entry_hash(run_config),
            config=run_config,
            split_seed=split,
            run_seed=run_seed,
            basis_seed=run_seed if run_seed is None or own_basis_seed is None else own_basis_seed,
            **others,
        )

    def to_json(self) -> str:
        """Return the row as JSON text. A number that JSON lacks (nan, inf) becomes null, and `warnings` says so."""
        lost: list[str] = []
        plain = _plain(asdict(self), "", lost)
        plain["warnings"] += lost
        return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Row:
        """Read a row from JSON text; keys that this version does not know are ignored.

        Args:
            text: what `to_json` wrote.
            path: where the text is from, for the error message.

        Raises:
            NolaVisionError: no JSON, a newer schema, a missing column, or one of the wrong type.
        """
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError):
            raise NolaVisionError(f"{path} is not JSON: delete it and run again") from None
        version = plain.get("schema_version") if isinstance(plain, dict) else None
        if type(version) is not int or version < 1:
            raise NolaVisionError(f"{path} is not a result row (no schema_version): delete it and run again")
        if version > SCHEMA_VERSION:
            raise NolaVisionError(
                f"{path} has schema version {version} and this nola-vision reads up to {SCHEMA_VERSION}: update it"
            )
        hints = get_type_hints(cls)
        known = {name: plain[name] for name in hints if name in plain}
        wrong = [name for name, value in known.items() if not _fits(value, hints[name])]
        if wrong:
            raise NolaVisionError(f"{path} holds a value of the wrong kind in {wrong[0]}: delete it and run again")
        try:
            return cls(**known)
        except TypeError:
            missing = [item.name for item in fields(cls) if item.name not in known][0]
            raise NolaVisionError(f"{path} has no {missing}: delete it and run again") from None


def environment() -> dict[str, str]:
    """Return the versions of the packages that are installed, of Python and the platform, and the processor's name."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["python"] = platform.python_version()
    versions["platform"] = platform.platform()
    versions["cpu"] = _cpu()
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


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _plain(value: Any, name: str, lost: list[str]) -> Any:
    """Copy nested values: null for a number that JSON lacks, noted in `lost`, and text that is valid as UTF-8."""
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(f"{name} was {value} and is written as null")
        return None
    if isinstance(value, PurePath | str):  # a folder's name may hold bytes that are not UTF-8
        return str(value).encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _plain(item, f"{name}.{key}".lstrip("."), lost) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{index}]", lost) for index, item in enumerate(value)]
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Say whether a JSON value has the type a column asks for; an integer does as a float, a bool as nothing else."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, origin or hint)
