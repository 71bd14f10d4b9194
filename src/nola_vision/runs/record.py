"""One run's record: the `Row`, to and from JSON, and the facts about the machine that go into it."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import types
from dataclasses import MISSING, dataclass, field, fields
from datetime import datetime, timedelta
from functools import cache
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nola_vision.common.errors import NolaVisionError
from nola_vision.runs import run_id
from nola_vision.evaluation.estimates import Estimate
from nola_vision.common.text import last_part, shortened

SCHEMA_VERSION = 1

Status = Literal["completed", "failed", "interrupted"]

# The columns that repeat exactly on one machine with one thread count.
DETERMINISTIC = (
    "adapter_parameters",
    "head_parameters",
    "other_parameters",
    "adapter_file_bytes",
    "test_accuracy",
    "balanced_accuracy",
    "macro_f1",
    "top5_accuracy",
    "test_nll",
    "estimate",
    "temperature",
    "val_accuracy",
    "train_loss",
    "val_loss",
    "epoch",
    "monitor",
)

# What a row that is read may hold, so that nothing downstream has to check again.
_MOST_KEYS = 1000  # each becomes a column of the frame; a run has about 150
_MOST_DEPTH = 50
_LARGEST = 1e100  # sums and squares of numbers up to this stay finite
_MOST_IMAGES = 10**12
_MOST_BRACKETS = 100_000  # in the text, those in names included: 32 MB of empty lists would take 700 MB
_SIGNED = ("basis_seed", "train_loss", "val_loss")  # every other number is at least 0
_FRACTIONS = (
    "test_accuracy",
    "balanced_accuracy",
    "macro_f1",
    "top5_accuracy",
    "val_accuracy",
    "held_out_ece",
    "held_out_ece_calibrated",
)
_NAMES = ("cell", "run_hash", "entry_hash")
_LABELS = ("method", "method_class")
_MOST_CHARACTERS = 255  # of a label, which is a file name or a class
_NAME = re.compile(r"(?!\.)[\w.+-]{1,255}")  # a file name without a separator, as `identity` makes them
# The settings that tables and plots read from a row's config: type, and whether they are required.
_SETTINGS: dict[str, tuple[type | types.UnionType, bool]] = {
    "model.backbone.tag": (str, True),
    "model.backbone.file": (str, False),
    "model.method.class_path": (str, True),
    "model.method.init_args": (dict, False),
    "data.dataset": (str, True),
    "data.shots": (int | str, False),
    "trainer": (dict, False),
}

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

    `split` and `init` are the run's place in its entry (`init` is None for methods on frozen features); `config` is its
    run config;
    `data` what the datamodule says of the draw; `started` ISO 8601 in UTC; `error` one sentence. `epoch` is the epoch,
    counted from 0, whose weights were saved and tested: the last one, or the best by the metric `monitor` of a
    ModelCheckpoint. `train_loss` is that of the last epoch. `test_nll` is the mean cross-entropy of the test images.
    `estimate` is the accuracy by cross-validation of a data set without a test split, as `estimates.Estimate` writes
    it, and `seconds_total` contains the runs of its folds. `temperature` divides the logits of the adapter file; it was
    fitted on the predictions for `calibrated_on` ("folds" or "validation" images), whose NLL and expected calibration
    error the columns `held_out_...` give.
    `folder` is not a column: it is where the row was read from, None for a row that was not read.
    """

    status: Status
    stage: run_id.Stage
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
    balanced_accuracy: float | None = None
    macro_f1: float | None = None
    top5_accuracy: float | None = None
    test_nll: float | None = None
    estimate: dict[str, Any] | None = None
    temperature: float | None = None
    calibrated_on: str | None = None
    held_out_nll: float | None = None
    held_out_nll_calibrated: float | None = None
    held_out_ece: float | None = None
    held_out_ece_calibrated: float | None = None
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
    folder: Path | None = field(default=None, compare=False, repr=False)

    @property
    def precedence(self) -> tuple[bool, str]:
        """Of several rows of one run, the one where this is largest counts: the newest completed one."""
        return self.status == "completed", self.started

    @classmethod
    def of(cls, run_config: run_id.Config, stage: run_id.Stage, status: Status, **measured: Any) -> Row:
        """Make the row of a run from its config, which gives every column that identifies the run.

        Args:
            run_config: what `run_id.resolve` returns, with the run's seeds in it.
            stage: "final", "search" or "fold".
            status: how the run ended.
            **measured: the other columns, by name.
        """
        model = run_id.need(run_config, "model")
        split = run_id.need(run_config, "data", "split_seed")
        run_seed = run_id.need(run_config, "model", "run_seed") if run_id.has_init(run_config) else None
        own_basis_seed = model.get("basis_seed")
        others: dict[str, Any] = {"threads": run_config.get("threads"), **measured}
        return cls(
            status=status,
            stage=stage,
            cell=run_id.cell_name(run_config),
            method=run_id.need(run_config, "method"),
            method_class=run_id.method_class(run_config),
            split=split,
            init=run_seed,
            run_hash=run_id.run_hash(run_config, stage),
            entry_hash=run_id.entry_hash(run_config),
            config=run_config,
            split_seed=split,
            run_seed=run_seed,
            basis_seed=run_seed if run_seed is None or own_basis_seed is None else own_basis_seed,
            **others,
        )

    def columns(self) -> dict[str, Any]:
        """Return the columns by name; nested values are the row's own, not copies."""
        return {name: getattr(self, name) for name in _types()}

    def to_json(self) -> str:
        """Return the row as JSON text.

        A number that JSON lacks (nan, inf) becomes null, and `warnings` says so; text that UTF-8 lacks (a file name's
        bytes) is escaped.
        """
        lost: list[str] = []
        plain = _plain(self.columns(), "", lost)
        plain["warnings"] += lost
        return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Row:
        """Read a row from JSON text; keys that this version does not know are ignored.

        What comes back can be shown and plotted: every number is finite and in its column's range, every text valid
        UTF-8, `cell` and the hashes are file names, and the config has the settings that tables read.

        Args:
            text: what `to_json` wrote.
            path: the text's file, for the error message; the row's `folder` is its parent.

        Raises:
            NolaVisionError: the text is not JSON, has a newer schema, lacks a column, or holds a value that no run
                leaves.
        """
        again = "delete it and run again"
        if text.count("[") + text.count("{") > _MOST_BRACKETS:
            raise NolaVisionError(f"{path} has more than {_MOST_BRACKETS:,} lists and mappings: {again}")
        try:
            plain = json.loads(text, parse_float=_finite, parse_constant=_finite)
        except (json.JSONDecodeError, RecursionError):
            raise NolaVisionError(f"{path} is not JSON: {again}") from None
        except ValueError:  # by `_finite`, or an integer of more digits than Python converts
            raise NolaVisionError(f"{path} holds a number that is not finite or too large: {again}") from None
        version = plain.get("schema_version") if isinstance(plain, dict) else None
        if type(version) is not int or version < 1:
            raise NolaVisionError(f"{path} is not a result row (no schema_version): {again}")
        if version > SCHEMA_VERSION:
            raise NolaVisionError(
                f"{path} has schema version {version} and this nola-vision reads up to {SCHEMA_VERSION}: update it"
            )
        known = {column: plain[column] for column in _types() if column in plain}
        problem = _value_problem(known) or _column_problem(known) or _config_problem(known["config"])
        if problem := problem or _estimate_problem(known) or _data_problem(known.get("data", {})):
            raise NolaVisionError(f"{path} {problem}: {again}")
        return cls(**known, folder=path.parent)


@cache
def _types() -> dict[str, Any]:
    """The columns of a row, each with its type."""
    return {name: hint for name, hint in get_type_hints(Row).items() if name != "folder"}


@cache
def _required() -> tuple[str, ...]:
    """The columns that every row has."""
    return tuple(item.name for item in fields(Row) if item.default is item.default_factory is MISSING)


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
    """Copy nested values: null for a number that no reader takes, noted in `lost`, and text that is valid as UTF-8."""
    if isinstance(value, float) and not abs(value) <= _LARGEST:
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
    if type(value) not in _kinds(hint):
        return False
    if isinstance(value, list):
        return all(_fits(item, get_args(hint)[0]) for item in value)
    choices = _choices(hint)
    return not choices or value in choices


@cache
def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a literal type."""
    return get_args(hint) if get_origin(hint) is Literal else ()


@cache
def _kinds(hint: Any) -> frozenset[type]:
    """The types of the JSON values that may fit a column's type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return frozenset().union(*map(_kinds, get_args(hint)))
    if origin is Literal:
        return frozenset(map(type, get_args(hint)))
    return frozenset({int, float} if hint is float else {origin or hint})


def _finite(text: str) -> float:
    value = float(text)
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{text} is not finite or too large")
    return value


def _value_problem(columns: dict[str, Any]) -> str | None:
    """What makes nested values unusable in a table. A draw lists thousands of indices: lists are checked as a whole."""
    stack: list[tuple[Any, int]] = [(columns, 0)]
    keys = 0
    while stack:
        value, depth = stack.pop()
        if depth > _MOST_DEPTH:
            return f"is nested more than {_MOST_DEPTH} levels deep"
        items = [*value, *value.values()] if isinstance(value, dict) else value
        keys += len(value) if isinstance(value, dict) else 0
        if keys > _MOST_KEYS:
            return f"has more than {_MOST_KEYS} keys"
        kinds = set(map(type, items))
        if int in kinds:
            whole = [item for item in items if type(item) is int] if len(kinds) > 1 else items
            for number in (min(whole), max(whole)):
                if not -(2**63) <= number < 2**63:
                    return f"holds the number {_quoted(number)}, which does not fit 64 bits"
        if str in kinds:
            try:
                "".join(item for item in items if type(item) is str).encode()
            except UnicodeEncodeError:
                return "holds text that is not valid Unicode (a lone surrogate)"
        if dict in kinds or list in kinds:
            stack += [(item, depth + 1) for item in items if isinstance(item, dict | list)]
    return None


def _column_problem(columns: dict[str, Any]) -> str | None:
    """What makes a value unfit for its column."""
    types = _types()
    for name, value in columns.items():
        if not _fits(value, types[name]):
            return f"holds a value of the wrong kind in {name} ({_quoted(value)})"
        if type(value) in (int, float) and name not in _SIGNED:
            if value < 0 or (name in _FRACTIONS and value > 1):
                limits = "between 0 and 1" if name in _FRACTIONS else "0 or more"
                return f"has {name} {_quoted(value)}, which must be {limits}"
        if name in _LABELS and len(value) > _MOST_CHARACTERS:
            return f"has {name} {_quoted(value)} of {len(value):,} characters, more than {_MOST_CHARACTERS}"
        if name in _NAMES and not _NAME.fullmatch(value):
            return f"has {name} {_quoted(value)}, which is not a file name of letters, digits and `._+-`"
    for name in _required():
        if name not in columns:
            return f"has no {name}"
    started = columns.get("started", "")
    if started and not _is_utc(started):
        return f"has started {_quoted(started)}, which is not like 2026-01-31T12:00:00+00:00"
    return None


def _config_problem(config: dict[str, Any]) -> str | None:
    """What a config lacks that the tables rely on."""
    wanted = _SETTINGS
    if isinstance(config.get("data"), dict) and config["data"].get("dataset") in run_id.OWN_IMAGES:
        wanted = {**wanted, "data.root": (str, True)}
    for setting, (kind, required) in wanted.items():
        value: Any = config
        keys = setting.split(".")
        for depth, key in enumerate(keys):
            if value is not None and not isinstance(value, dict):
                return f"has a config whose {'.'.join(keys[:depth])} is not a mapping"
            value = None if value is None else value.get(key)
        if value is None and required:
            return f"has a config without {setting}"
        if value is not None and not isinstance(value, kind):
            return f"has a config of the wrong kind in {setting} ({_quoted(value)})"
        if setting == "data.root" and last_part(str(value)) in ("", ".."):
            return f"has data.root {_quoted(value)} in its config, which has no name"
    return None


def _estimate_problem(columns: dict[str, Any]) -> str | None:
    """What makes an estimate unusable."""
    if columns.get("estimate") is None:
        return None
    try:
        Estimate.from_dict(columns["estimate"])
    except ValueError as error:
        return f"has an unusable estimate ({error})"
    return None


def _data_problem(data: dict[str, Any]) -> str | None:
    """What is wrong with the facts on the data that tables read."""
    counts, share = data.get("counts"), data.get("majority_share")
    images = counts.get("test") if isinstance(counts, dict) else None
    fits = type(images) in (int, type(None)) and 0 <= (images or 0) <= _MOST_IMAGES
    if not isinstance(counts, dict | None) or not fits:
        return f"has no number of test images in data.counts ({_quoted(counts)})"
    if share is not None and not (type(share) in (int, float) and 0 <= share <= 1):
        return f"has data.majority_share {_quoted(share)}, which must be between 0 and 1"
    for name in ("class_names", "untested_classes"):
        found = data.get(name)
        if found is not None and not (isinstance(found, list) and all(isinstance(item, str) for item in found)):
            return f"has data.{name} {_quoted(found)}, which must be a list of names"
    return None


def _is_utc(text: str) -> bool:
    """Whether this is a time to the second in UTC; in that one spelling the order of texts is the order of times."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return False
    return time.utcoffset() == timedelta(0) and time.isoformat(timespec="seconds") == text


def _quoted(value: Any) -> str:
    """A value for a message, shortened."""
    return shortened(json.dumps(value, ensure_ascii=False), 60)
