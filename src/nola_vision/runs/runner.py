"""One run: from its full config to its row. The command line and every sweep engine end here."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import need_room
from nola_vision.common.interrupts import Interrupts
from nola_vision.common.stopwatch import spent, timed
from nola_vision.runs import record, run_id
from nola_vision.runs.checkpoints import (
    CheckpointError,
    checkpoint_path,
    read_checkpoint,
    refuse_damaged,
    refuse_other_run,
)
from nola_vision.runs.completed import completed_row
from nola_vision.runs.environment import environment, git_state
from nola_vision.runs.fold_results import add_estimate, pool_folds, total_seconds
from nola_vision.runs.lightning_messages import quiet
from nola_vision.runs.measuring import device_name, measure
from nola_vision.runs.parsing import RunCLI, build
from nola_vision.runs.record import Row
from nola_vision.runs.store import LOCK_FILE, drop_aside, lock_run, refuse_links, set_aside, write_row
from nola_vision.training.callbacks import CHECKPOINTS, LAST_CHECKPOINT, Heartbeat, ValidationTime, close_loggers
from nola_vision.training.classifier import Classifier
from nola_vision.training.distributed import is_main_process
from nola_vision.training.precision import tf32
from nola_vision.training.trainer_settings import check_limits, check_monitors, no_validations

_log = logging.getLogger(__name__)


def run(
    run_config: run_id.Config,
    out: str | Path,
    stage: run_id.Stage = "final",
    ckpt_path: str | None = None,
    keep_going: bool = False,
    heartbeat: Callable[[], None] | None = None,
    again: bool = False,
    held_out: Sequence[Row] = (),
) -> Row:
    """Trains, validates and (in the final stage) tests one run, and writes its row in every case.

    A run that is completed is not repeated: its row is returned.

    Args:
        run_config: what `parse` returns.
        out: the folder of all runs; this one's own folder in it is `run_id.run_folder`.
        stage: `search` stops before the test set; `fold` trains for an estimate and keeps no adapter.
        ckpt_path: resume from this checkpoint of the run. `last` finishes an interrupted run: it resumes from the run's
            latest checkpoint, or starts from scratch if there is none.
        keep_going: return the row of a failed run instead of raising; Ctrl-C raises in any case.
        heartbeat: called after every batch, to show that the run is alive.
        again: repeat a completed run. Its folder is moved aside (`store.set_aside`), and tables count its row until the
            repetition is completed.
        held_out: the rows of the folds for the estimate of a final run. A completed run without an estimate gets it
            without a second training.

    Raises:
        BusyError: another process is running it.
        NolaVisionError: an error before training leaves no files (with `keep_going` a row); any other error, and
            Ctrl-C, is raised after the row is written. With `keep_going` only Ctrl-C, a full disk, and links in the
            folder (`store.refuse_links`) raise.
    """
    folder = run_id.run_folder(out, run_config, stage)
    last, trains = ckpt_path == "last", run_id.has_init(run_config)
    if ckpt_path is not None and not last:
        if not trains:
            raise NolaVisionError(
                f"{run_config['method']} is fitted without training, so there is no checkpoint: leave --ckpt_path out"
            )
        ckpt_path = checkpoint_path(ckpt_path, folder)
    main = is_main_process(run_config)
    if again and main:
        set_aside(folder)
    # the first process of a distributed run holds the lock for all
    with lock_run(folder) if main else nullcontext():
        if not again and (row := completed_row(folder)) is not None:
            if held_out and row.estimate is None and main:
                refuse_links(folder)
                row = add_estimate(row, run_config, folder, held_out)
            return row
        if main:
            refuse_links(folder)
        if last:
            found = trains and (folder / LAST_CHECKPOINT).is_file()
            ckpt_path = str(folder / LAST_CHECKPOINT) if found else None
            if main and trains:
                _log.warning("this run %s", "resumes" if found else "starts from scratch: there is no checkpoint yet")
        row = _run(run_config, folder, Path(out), stage, ckpt_path, keep_going, heartbeat, held_out)
        if main and row.status == "completed":
            drop_aside(folder)
            if stage == "fold":  # five of them, each as large as an adapter
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return row


def _run(
    run_config: run_id.Config,
    folder: Path,
    out: Path,
    stage: run_id.Stage,
    ckpt_path: str | None,
    keep_going: bool,
    heartbeat: Callable[[], None] | None,
    held_out: Sequence[Row],
) -> Row:
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    before = spent()
    measured: dict[str, Any] = {}
    status: record.Status = "failed"
    begun = keep_going
    with Interrupts() as interrupts:  # Ctrl-C does not interrupt the writing of the row
        try:
            with interrupts.allowed(), quiet():
                measured |= {"versions": environment(), "git": git_state()}
                pooled = pool_folds(held_out)
                built = _prepared(run_config, folder, stage, ckpt_path)
                begun = True
                built.trainer.callbacks.append(ValidationTime())  # type: ignore[attr-defined]
                if heartbeat is not None:
                    built.trainer.callbacks.append(Heartbeat(heartbeat))  # type: ignore[attr-defined]
                try:
                    with tf32(built.trainer) as in_tf32:
                        measured["device"] = device_name(built.trainer, in_tf32)
                        measure(built, folder, stage, ckpt_path, pooled, measured)
                finally:
                    close_loggers(built.trainer)
                status = "completed"
        except (KeyboardInterrupt, SystemExit):
            if status != "completed":
                status, measured["error"] = "interrupted", "interrupted before it ended"
            raise KeyboardInterrupt from None
        except Exception as error:
            expected = isinstance(error, NolaVisionError)
            measured["error"] = " ".join(f"{'' if expected else f'{type(error).__name__}: '}{error}".split())
            begun = (begun or not expected) and (keep_going or not isinstance(error, CheckpointError))
            if not expected or (begun and error.__cause__ is not None):
                with suppress(OSError):
                    (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
            need_room(error, folder)  # the next runs would fail too, and a search would choose among the others
            if not keep_going:
                raise
        finally:
            learning_rate = run_config["model"]["method"]["init_args"].get("lr")
            finished = Row.of(
                run_config,
                stage,
                status,
                started=started,
                seconds_total=round(time.perf_counter() - clock + total_seconds(held_out), 3),
                seconds={part: round(seconds, 3) for part, seconds in spent(before).items()},
                **{"threads": torch.get_num_threads(), "learning_rate": learning_rate, **measured},
            )
            # the other processes of a distributed run have the same numbers
            if is_main_process(run_config):
                if begun:
                    write_row(folder, finished)
                else:
                    _remove_empty(folder, out)
    return dataclasses.replace(finished, folder=folder)


@timed("building")
def _prepared(run_config: run_id.Config, folder: Path, stage: run_id.Stage, ckpt_path: str | None) -> RunCLI:
    """Module, datamodule and trainer of a run, with the training images open and the checkpoint validated."""
    if run_config["model"].get("compile"):
        torch.compiler.reset()  # torch counts the models compiled in this process, and stops compiling after eight
    built = build(run_config, folder)
    asked, used = run_config["trainer"]["precision"], built.trainer.precision
    if asked != used:
        raise NolaVisionError(f"trainer.precision is {asked}, which Lightning replaces by {used} here: give {used}")
    # a method on frozen features has no epochs
    in_fit = built.validates and isinstance(built.model, Classifier)
    built.datamodule.evaluations = [
        *(["fit"] if in_fit else []),
        *(["validate"] if in_fit or stage == "search" else []),
        *(["test"] if stage != "search" else []),
    ]
    if isinstance(built.model, Classifier):
        built.model.run_hash = run_id.run_hash(run_config, stage)
        if ckpt_path is not None:
            refuse_other_run(checkpoint := read_checkpoint(ckpt_path), built.model.run_hash)
            refuse_damaged(checkpoint, ckpt_path, built.trainer)
            try:
                built.model.refuse_other_checkpoint(checkpoint)
            except NolaVisionError as error:
                raise CheckpointError(str(error)) from error
    if built.trainer.world_size == 1:  # else `fit` does it: one process per machine downloads, the others wait
        built.datamodule.prepare_data()
        built.datamodule.setup("fit")
        check_limits(built.trainer, built.datamodule)
        if isinstance(built.model, Classifier):
            has_validation = built.datamodule.describe()["counts"]["validation"] > 0
            check_monitors(built.trainer, has_validation)
            if built.validates and not has_validation and (warning := no_validations(built.trainer)):
                built.datamodule.warn(warning)
    return built


def check(run_config: run_id.Config, ckpt_path: str | None) -> None:
    """Sets a run up and discards it, so that an error is raised before anything is computed.

    Raises:
        NolaVisionError: as `run` before training.
    """
    with TemporaryDirectory() as scratch, quiet():
        _prepared(run_config, Path(scratch), "final", None if ckpt_path == "last" else ckpt_path)


def _remove_empty(folder: Path, out: Path) -> None:
    """Removes a run's folder and its parents up to `out`, as far as they are empty."""
    with suppress(OSError):
        (folder / LOCK_FILE).unlink(missing_ok=True)
        for empty in (folder, *folder.parents[: len(folder.relative_to(out).parts)]):
            empty.rmdir()
