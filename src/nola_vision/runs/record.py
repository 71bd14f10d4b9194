"""One run's record: the `Row`, to and from JSON; and which of several rows counts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path, PurePath
from typing import Any, Literal, get_type_hints

from nola_vision.runs import run_id
from nola_vision.runs.row_validation import LARGEST, ColumnType, column_type, read_columns

SCHEMA_VERSION = 1

Status = Literal["completed", "failed", "interrupted"]

# The columns that are reproducible on one machine with one thread count.
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


@dataclass(frozen=True)
class Row:
    """The result of one run. Accuracies are fractions from 0 to 1; None means "not measured".

    `split` and `init` are the run's place in its entry (`init` is None for methods on frozen features); `config` is its
    run config; `data` describes the k-shot draw; `started` is ISO 8601 in UTC; `error` one sentence. `epoch` is the
    epoch, counted from 0, whose weights were saved and tested: the last one, or the best by the metric `monitor` of a
    ModelCheckpoint. `train_loss` is that of the last epoch. `test_nll` is the mean cross-entropy of the test images.
    `estimate` is the accuracy by cross-validation of a data set without a test split, as `Estimate.to_dict` returns it;
    `seconds_total` then includes the runs of its folds. `seconds` is this run's own time by part of the work: building
    the model, decoding and transforming images, features, training, validation, test; with `num_workers` above 0,
    waiting for images counts as training, validation or test. `temperature` divides the logits
    of the adapter file; it was fitted on the predictions for `calibrated_on` ("folds" or "validation" images), whose
    NLL and expected calibration error are the columns `held_out_...`.
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
    seconds: dict[str, Any] = field(default_factory=dict)
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
        """Of several rows of one run, the one with the largest value counts: the newest completed one."""
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
        """Return the columns by name; nested values are not copied."""
        return {name: getattr(self, name) for name in _types()}

    def to_json(self) -> str:
        """Return the row as JSON text.

        A number that JSON cannot represent (nan, inf) becomes null and is listed in `warnings`; bytes of a file name
        that are not UTF-8 are escaped.
        """
        replaced: list[str] = []
        plain = _plain(self.columns(), "", replaced)
        plain["warnings"] += replaced
        return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Row:
        """Read a row from JSON text, validated by `read_columns`; unknown keys are ignored.

        Args:
            text: what `to_json` wrote.
            path: the text's file, for the error message; the row's `folder` is its parent.

        Raises:
            NolaVisionError: as `read_columns`.
        """
        known = read_columns(text, path, SCHEMA_VERSION, _types(), _required())
        return cls(**known, folder=path.parent)


@cache
def _types() -> dict[str, ColumnType]:
    """The columns of a row, each with the values that it accepts."""
    return {name: column_type(hint) for name, hint in get_type_hints(Row).items() if name != "folder"}


@cache
def _required() -> tuple[str, ...]:
    """The columns without a default, in their order."""
    return tuple(column.name for column in fields(Row) if column.default is column.default_factory is MISSING)


def _plain(value: Any, name: str, replaced: list[str]) -> Any:
    """Copies nested values for JSON: text as valid UTF-8, and null for a number that no reader accepts.

    Each such number is reported in `replaced`.
    """
    if isinstance(value, float) and not abs(value) <= LARGEST:
        replaced.append(f"{name} was {value} and is written as null")
        return None
    if isinstance(value, PurePath | str):  # a folder's name may hold bytes that are not UTF-8
        return str(value).encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _plain(item, f"{name}.{key}".lstrip("."), replaced) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{index}]", replaced) for index, item in enumerate(value)]
    return value


def count_once(rows: Iterable[Row]) -> list[Row]:
    """Keep one row of each run, the newest completed one: the same run in two folders counts once."""
    kept: dict[tuple[str, str, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.precedence):
        kept[row.cell, row.method, row.run_hash] = row
    return list(kept.values())


def search_rank(row: Row) -> tuple[float, float]:
    """Sort key of search runs, the best first: validation accuracy, then validation loss; a failed run comes last."""
    accuracy = _finite_or(row.val_accuracy, -math.inf) if row.status == "completed" else -math.inf
    return -accuracy, _finite_or(row.val_loss, math.inf)


def _finite_or(value: float | None, default: float) -> float:
    return value if value is not None and math.isfinite(value) else default
