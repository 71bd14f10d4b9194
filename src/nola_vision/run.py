"""One run: from a config to its row. The command line and every sweep engine end here."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import re
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from nola_vision import backbones, methods
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.errors import NolaVisionError
from nola_vision.results import identity, row
from nola_vision.results.row import Row
from nola_vision.results.store import find_row, write_row
from nola_vision.tasks import make_task
from nola_vision.tasks.classifier import Classifier

set_parsing_settings(subclasses_enabled=[methods.Method])

ADAPTER_FILE = "adapter.safetensors"


class RunCLI(LightningCLI):
    """LightningCLI with this project's wiring: one task, one datamodule, one folder for all that a run writes.

    Args:
        args: command-line arguments, or a run config as a nested dict.
        folder: where the run writes; None only parses and builds nothing.
    """

    def __init__(self, args: Sequence[str] | Mapping[str, Any], folder: Path | None = None) -> None:
        self.folder = folder
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
            super().__init__(
                make_task,
                KShotDataModule,
                args=list(args) if not isinstance(args, Mapping) else dict(args),
                run=False,
                save_config_callback=None,  # the row holds the config
                auto_configure_optimizers=False,
                parser_kwargs={"prog": "nola-vision fit", "exit_on_error": False},
                trainer_defaults={
                    "max_epochs": 50,
                    "num_sanity_val_steps": 0,
                    "log_every_n_steps": 1,
                    "enable_model_summary": False,
                },
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--protocol", type=str, default="default", help="Name of the protocol: part of the cell.")
        parser.add_argument("--method", type=str, default=None, help="Entry of the config's `methods` to train.")
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; they decide rounding.")
        for field in ("tag", "file", "img_size", "pretrained"):
            parser.link_arguments(f"model.backbone.{field}", f"data.backbone.{field}")
        parser.link_arguments("model.run_seed", "data.run_seed")
        parser.link_arguments("model.run_seed", "seed_everything")
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")

    def instantiate_classes(self) -> None:
        if self.folder is not None:
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        assert self.folder is not None
        given = self.config_init["trainer"]
        callbacks: list[L.Callback] = list(_listed(given["callbacks"]))
        if given["enable_checkpointing"] is not False:
            # at each epoch's end, whenever validation comes: `last.ckpt` is the model as it is trained so far
            every: dict[str, Any] = {"save_last": True, "save_on_train_epoch_end": True}
            callbacks.append(ModelCheckpoint(self.folder / "checkpoints", enable_version_counter=False, **every))
        if given["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar(leave=False))
        _keep_old_log(self.folder)
        loggers: list[Logger] = [CSVLogger(self.folder, name="", version=""), *_listed(given["logger"])]
        return super().instantiate_trainer(
            callbacks=callbacks, logger=loggers, default_root_dir=self.folder, **kwargs
        )


def _keep_old_log(folder: Path) -> None:
    """A resumed run starts a log of its own, and Lightning would delete the one that is there."""
    log = folder / "metrics.csv"
    if log.exists():
        number = 1
        while (kept := folder / f"metrics-{number}.csv").exists():
            number += 1
        log.rename(kept)


def _listed(value: Any) -> list[Any]:
    """A config's callbacks or loggers as a list; `true`, `false` and null stand for none of one's own."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def parse(config: Mapping[str, Any], options: Sequence[str] = ()) -> identity.Config:
    """The full run config, every default written out.

    Two spellings of one run give the same full config, so hashes are taken of what this returns.

    Args:
        config: a run config, as `identity.resolve` returns it.
        options: command-line options that override it, such as `--data.shots=10`.

    Raises:
        NolaVisionError: an unknown key, method or setting, or a value of the wrong type.
    """
    if method := (config.get("model") or {}).get("method"):
        methods.from_dict(method)  # says which methods and settings there are, where the parser speaks of import paths
    try:
        with _quiet():
            parsed = RunCLI(["--config", json.dumps(config), *options]).config
    except (argparse.ArgumentError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise NolaVisionError(
            f"the configuration is not understood: {reason} (nola-vision fit --help lists the options)"
        ) from error
    plain: identity.Config = json.loads(json.dumps(parsed.as_dict(), default=str))
    plain.pop("config", None)
    for linked in ("backbone", "run_seed"):  # said once, by the model
        plain["data"].pop(linked, None)
    plain.pop("seed_everything", None)
    if plain["data"]["dataset"] == "folder":
        plain["data"]["root"] = plain["data"]["root"] or os.environ.get("NOLA_VISION_DATA")
    if plain["threads"] is not None and plain["threads"] < 1:
        raise NolaVisionError(f"threads is {plain['threads']}: it must be at least 1")
    plain["content"] = _content(plain)
    plain["model"]["method"].setdefault("init_args", {})
    if plain.get("method") is None:
        plain["method"] = identity.method_class(plain).lower()
    return plain


def _content(run_config: identity.Config) -> dict[str, str]:
    """Digests of what the config names by a path alone, so that two files of one name are two runs.

    `weights` is SHA-256 over a local weights file, the packaged one included; `folder` over the relative paths and
    sizes of a `folder` data set's files. A file that is missing is left to the run, which says so.
    """
    found = {}
    backbone = run_config["model"]["backbone"]
    weights = backbone["file"] or backbones.packaged_file(backbone["tag"])
    if weights is not None and Path(weights).is_file():
        with open(weights, "rb") as file:
            found["weights"] = hashlib.file_digest(file, "sha256").hexdigest()
    root = run_config["data"]["root"]
    if run_config["data"]["dataset"] == "folder" and root is not None and Path(root).is_dir():
        files = sorted(path for path in Path(root).rglob("*") if path.is_file())
        listing = "\n".join(f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in files)
        found["folder"] = hashlib.sha256(listing.encode()).hexdigest()
    return found


def build(run_config: identity.Config, folder: Path) -> RunCLI:
    """Task, datamodule and trainer of a run config, seeded by `model.run_seed`; the run writes to `folder`.

    Raises:
        NolaVisionError: a setting that Lightning, the backbone or the data refuse.
    """
    if run_config["threads"] is not None:
        torch.set_num_threads(run_config["threads"])
    try:
        return RunCLI({key: value for key, value in run_config.items() if key != "content"}, folder)
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise NolaVisionError(f"the run cannot be set up: {' '.join(str(error).split())}") from error


def checkpoint_path(given: str | None, folder: Path) -> str | None:
    """The checkpoint that `--ckpt_path` names; `last` is the run's own.

    Raises:
        NolaVisionError: it is not there.
    """
    path = folder / "checkpoints" / "last.ckpt" if given == "last" else given and Path(given)
    if path and not path.is_file():
        raise NolaVisionError(
            f"there is no checkpoint {path}: give one by --ckpt_path ('last' is that of a run with these very settings)"
        )
    return str(path) if path else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what Lightning says of every healthy run: tips, a device report, and advice that is wrong here."""
    loggers = [logging.getLogger(f"lightning.{n}") for n in ("pytorch.utilities.rank_zero", "fabric.utilities.seed")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for advice in (
            ".*does not have many workers.*",  # workers cost more than they bring for a set kept in memory
            ".*in eval mode at the start of training.*",  # frozen batch norms are meant to be
            ".*treespec.*is deprecated.*",
            ".*The dirpath has changed from.*",  # `validate` and `test` write beside the run
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*Experiment logs directory .* exists and is not empty.*",
        ):
            warnings.filterwarnings("ignore", message=advice)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def run(
    run_config: identity.Config, out: str | Path, stage: identity.Stage = "final", ckpt_path: str | None = None
) -> Row:
    """Trains, validates and (in the final stage) tests one run, and leaves its row whatever happens.

    Args:
        run_config: what `parse` returns.
        out: the folder of all runs; this one's own folder in it is `identity.run_folder`.
        stage: `search` stops before the test set.
        ckpt_path: resume from this checkpoint, or from `last`.

    Raises:
        NolaVisionError: after the row is written; so is any other error, and Ctrl-C.
    """
    folder = identity.run_folder(out, run_config, stage)
    ckpt_path = checkpoint_path(ckpt_path, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NolaVisionError(f"the folder {folder} cannot be made: {error.strerror}") from error
    started, clock = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
    measured: dict[str, Any] = {}
    status: row.Status = "failed"
    try:
        with _quiet():
            _measure(run_config, folder, stage, ckpt_path, measured)
        status = "completed"
    except (KeyboardInterrupt, SystemExit):
        status, measured["error"] = "interrupted", "interrupted before it ended"
        raise KeyboardInterrupt from None
    except Exception as error:
        expected = isinstance(error, NolaVisionError)
        measured["error"] = " ".join(str(error).split()) if expected else f"{type(error).__name__}: {error}"
        if not expected:
            (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise
    finally:
        finished = Row.of(
            run_config,
            stage,
            status,
            started=started,
            seconds_total=round(time.perf_counter() - clock, 3),
            versions=row.environment(),
            git=row.git_state(),
            **{"threads": torch.get_num_threads(), **measured},
        )
        # the other processes of a distributed run have the same numbers, and no later trial costs a completed row
        if is_main_process() and (status == "completed" or not _completed(folder)):
            write_row(folder, finished)
    return finished


def is_main_process() -> bool:
    """False in all but the first process of a distributed run."""
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]


def _completed(folder: Path) -> bool:
    row = find_row(folder)
    return row is not None and row.status == "completed"


def _measure(
    run_config: identity.Config, folder: Path, stage: identity.Stage, ckpt_path: str | None, measured: dict[str, Any]
) -> None:
    """Fills in `measured` as the run goes on, so that a failed run keeps what was known."""
    built = build(run_config, folder)
    trainer, task, data = built.trainer, built.model, built.datamodule
    device = trainer.strategy.root_device
    measured["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    _reset_peak_memory(device)
    measured["learning_rate"] = run_config["model"]["method"]["init_args"].get("lr")
    measured |= _counts(task)

    if isinstance(task, Classifier):
        clock = time.perf_counter()
        trainer.fit(task, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        measured["seconds_fit"] = round(time.perf_counter() - clock, 3)
        if "train_loss" not in trainer.callback_metrics:
            raise NolaVisionError("there was nothing left to train: give more --trainer.max_epochs, or no checkpoint")
        measured["train_loss"] = _number(trainer.callback_metrics["train_loss"])
        if measured["train_loss"] is None:
            raise NolaVisionError("training ended with a loss that is no number: try a smaller learning rate or scale")
        if trainer.is_global_zero:
            measured["adapter_file_bytes"] = task.model.save(folder / ADAPTER_FILE)
    quiet = {"datamodule": data, "verbose": False}
    trainer.validate(task, **quiet)
    measured["val_accuracy"] = _number(trainer.callback_metrics.get("val_accuracy"))
    measured["val_loss"] = _number(trainer.callback_metrics.get("val_loss"))
    if stage == "final":
        clock = time.perf_counter()
        trainer.test(task, **quiet)
        measured["seconds_test"] = round(time.perf_counter() - clock, 3)
        measured["test_accuracy"] = _number(trainer.callback_metrics.get("test_accuracy"))
    measured["peak_memory_mib"] = _peak_memory_mib(device)
    measured["data"] = data.describe()


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the process's high-water mark starts anew


def _peak_memory_mib(device: torch.device) -> float | None:
    """On a GPU what torch had allocated at most, else the most the process had resident; None where nobody tells."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    with suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return round(int(found[1]) / 1024, 1) if found else None
    return None


def _counts(task: L.LightningModule) -> dict[str, int]:
    """Trainable numbers: the adapter's (Full-FT: the backbone's), the head's, and any others."""
    if not isinstance(task, Classifier):
        return {"adapter_parameters": 0, "head_parameters": 0, "other_parameters": 0}
    groups = {group["name"]: sum(p.numel() for p in group["params"]) for group in task.parameter_groups()}
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    adapter, head = groups.get("adapter", 0), groups["head"]
    return {"adapter_parameters": adapter, "head_parameters": head, "other_parameters": trained - adapter - head}


def _number(value: torch.Tensor | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def evaluate(run_config: identity.Config, out: str | Path, verb: str, ckpt_path: str | None) -> None:
    """Prints a checkpoint's accuracy on the validation pool (`validate`) or the test set (`test`); leaves no row.

    Raises:
        NolaVisionError: a method that trains was given no checkpoint.
    """
    folder = identity.run_folder(out, run_config, "final")
    ckpt_path = checkpoint_path(ckpt_path or "last", folder) if identity.has_init(run_config) else None
    with _quiet():
        built = build(run_config, folder / verb)
        step = built.trainer.validate if verb == "validate" else built.trainer.test
        try:
            step(built.model, datamodule=built.datamodule, ckpt_path=ckpt_path, weights_only=True)
        except SystemExit:  # how Lightning ends on Ctrl-C
            raise KeyboardInterrupt from None
