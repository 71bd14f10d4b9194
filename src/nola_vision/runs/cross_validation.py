"""Runs on a data set without a test split: one training per fold, whose held-out predictions the final run pools.

A fold's training is a separate run (`stage="fold"`): it writes a row, can resume, and is not repeated. The final run
trains on every image; its row has the estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nola_vision.common.errors import NolaVisionError
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.runs import run_id, runner
from nola_vision.runs.completed import completed_row
from nola_vision.runs.parsing import open_data
from nola_vision.runs.record import Row
from nola_vision.runs.run_id import Config
from nola_vision.runs.search_grid import Settings, best, with_settings


def number_of_folds(run_config: Config, data: KShotDataModule | None = None) -> int:
    """How many folds the estimate of a run needs, or 0.

    0 on a data set with a test split, for a method on frozen features, which computes its own estimate, and on several
    devices, since Lightning starts its processes again for each training.

    Args:
        run_config: as of `runner.run`.
        data: its datamodule, if it is already open.

    Raises:
        NolaVisionError: as `KShotDataModule.setup`.
    """
    trainer = run_config["trainer"]
    if not run_id.has_init(run_config) or trainer["devices"] not in (1, "1") or trainer["num_nodes"] != 1:
        return 0
    return (data or open_data(run_config)).number_of_folds or 0


def run_with_estimate(
    run_config: Config,
    out: str | Path,
    stage: run_id.Stage = "final",
    *,
    candidates: Sequence[Settings] = (),
    on_trial: Callable[[Settings, Row], None] | None = None,
    on_choice: Callable[[Settings, Sequence[Row]], None] | None = None,
    on_fold: Callable[[int, Row], None] | None = None,
    folds: int | None = None,
    again: bool = False,
    **options: Any,
) -> Row:
    """`runner.run`, after one run per fold if there is no test split.

    Args:
        run_config: as of `runner.run`.
        out: as of `runner.run`.
        stage: as of `runner.run`; only a final run has an estimate.
        candidates: settings to try; the best ones on a validation pool are used. If the final run trains on all images,
            search runs hold the pool out of them, and out of each fold's training part.
        on_trial: called with the settings and the row of each search run for the final run.
        on_choice: called with the settings that are chosen for the final run, and the rows of the search runs.
        on_fold: called with the number and the row of each finished fold.
        folds: how many to run, from 0; `number_of_folds` if not given.
        again: repeat completed runs.
        options: other arguments of `runner.run`.

    Raises:
        NolaVisionError: as `runner.run`.
    """
    options = {**options, "again": again}
    if stage != "final":
        return runner.run(run_config, out, stage, **options)
    if folds is None:
        try:
            folds = number_of_folds(run_config)
        except NolaVisionError:
            if not options.get("keep_going"):
                raise
            folds = 0  # the final run fails with the same error, and its row states it
    # a checkpoint belongs to one run; `last` is the latest of each run
    before = {**options, "ckpt_path": "last" if options.get("ckpt_path") == "last" else None}
    held_out = []
    for fold in range(folds):
        fold_config = _with_best(_of_fold(run_config, fold), out, candidates, True, before)
        held_out.append(runner.run(fold_config, out, "fold", **before))
        if on_fold is not None:
            on_fold(fold, held_out[-1])
    holds_out = bool(candidates) and open_data(run_config).search_holds_out
    run_config = _with_best(run_config, out, candidates, holds_out, before, on_trial, on_choice)
    return runner.run(run_config, out, held_out=held_out, **options)


def pending_folds(run_config: Config, out: str | Path, folds: int) -> list[int]:
    """The folds that are not completed yet."""
    folders = [run_id.run_folder(out, _of_fold(run_config, fold), "fold") for fold in range(folds)]
    return [fold for fold, folder in enumerate(folders) if completed_row(folder) is None]


def _of_fold(run_config: Config, fold: int) -> Config:
    return _with(run_config, "data", fold=fold)


def _with(run_config: Config, group: str, **settings: Any) -> Config:
    return {**run_config, group: {**run_config[group], **settings}}


def _with_best(
    run_config: Config,
    out: str | Path,
    candidates: Sequence[Settings],
    hold_out: bool,
    options: dict[str, Any],
    on_trial: Callable[[Settings, Row], None] | None = None,
    on_choice: Callable[[Settings, Sequence[Row]], None] | None = None,
) -> Config:
    """The run config with the settings of the best validation accuracy, after one search run with each."""
    if len(candidates) < 2:
        return run_config
    held_out = _with(run_config, "data", hold_out=hold_out)
    options = {**options, "keep_going": True}  # settings that diverge are not chosen
    rows = []
    for settings in candidates:
        rows.append(runner.run(with_settings(held_out, settings), out, "search", **options))
        if on_trial is not None:
            on_trial(settings, rows[-1])
    chosen = best(candidates, rows)
    if chosen is None:
        reason = rows[-1].error or "no image can be held out"
        raise NolaVisionError(f"no settings of {run_config['method']} can be chosen: {reason}")
    if on_choice is not None:
        on_choice(chosen, rows)
    return with_settings(run_config, chosen)
