"""From a config to the objects of a run: LightningCLI with this project's wiring."""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from nola_vision import backbones, methods
from nola_vision.backbones import BackboneSpec
from nola_vision.config_errors import explain
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.data.datasets import get_dataset, given_root
from nola_vision.errors import NolaVisionError
from nola_vision.results import identity
from nola_vision.tasks import make_task
from nola_vision.trainer_settings import CHECKPOINTS, LAST_CHECKPOINT, LastCheckpoint, check_precision, check_trainer

set_parsing_settings(subclasses_enabled=[methods.Method])


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
                parser_kwargs={"prog": "nola-vision fit", "exit_on_error": False, "allow_abbrev": False},
                trainer_defaults={
                    "devices": 1,  # several only where they are asked for: DDP changes the rounding
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
        for field in (field.name for field in fields(BackboneSpec)):
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
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.folder / CHECKPOINTS / (callback.monitor or "unmonitored"))
        if given["enable_checkpointing"] is not False:
            callbacks.append(LastCheckpoint(self.folder / LAST_CHECKPOINT))
        if given["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar(leave=False))
        loggers: list[Logger] = [CSVLogger(self.folder, name="", version=""), *_listed(given["logger"])]
        # a sweep saves no last checkpoint, but a ModelCheckpoint of the config still keeps the best epoch
        kwargs["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
        return super().instantiate_trainer(callbacks=callbacks, logger=loggers, default_root_dir=self.folder, **kwargs)


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
        methods.from_dict(method)
    optimizer = (config.get("model") or {}).get("optimizer")
    seen = [*options, *((optimizer.get("init_args") or {}) if isinstance(optimizer, Mapping) else {})]
    if any(word == "lr" or re.match(r"--model\.optimizer.*\.lr\b", word) for word in seen):
        raise NolaVisionError(
            "the optimizer's learning rate is the method's: set model.method.init_args.lr (and head_lr)"
        )
    try:
        with quiet():
            parsed = RunCLI(["--config", json.dumps(config), *options]).config
    except (argparse.ArgumentError, ValueError) as error:
        raise NolaVisionError(
            f"the configuration is not understood: {explain(str(error), _settings())} (nola-vision fit --help lists "
            "the options)"
        ) from error
    plain: identity.Config = json.loads(json.dumps(parsed.as_dict(), default=str))
    plain.pop("config", None)
    for linked in ("backbone", "run_seed"):  # said once, by the model
        plain["data"].pop(linked, None)
    plain.pop("seed_everything", None)
    if plain["data"]["dataset"] == "folder":
        plain["data"]["root"] = given_root(plain["data"]["root"])
    if plain["model"]["run_seed"] < 0 or plain["data"]["split_seed"] < 0:
        raise NolaVisionError("run_seed and split_seed must not be below 0")
    check_trainer(plain["trainer"])
    settings = plain["model"]["method"].get("init_args") or {}
    check_precision(plain["trainer"]["precision"], identity.method_class(plain), bool(settings.get("train_norms")))
    if plain["threads"] is not None and plain["threads"] < 1:
        raise NolaVisionError(f"threads is {plain['threads']}: it must be at least 1")
    plain["content"] = _content(plain)
    plain["model"]["method"].setdefault("init_args", {})
    asked = ((config.get("model") or {}).get("method") or {}).get("class_path", "").rpartition(".")[2]
    if plain.get("method") is None or identity.method_class(plain) != asked:  # another class by --model.method
        plain["method"] = identity.method_class(plain).lower()
    return plain


def _settings() -> dict[str, list[str]]:
    """The names that each group of a config and each method takes."""
    groups: dict[str, Any] = {"data": KShotDataModule, "model": make_task, "trainer": L.Trainer, **methods.METHODS}
    named = {group: list(inspect.signature(made).parameters) for group, made in groups.items()}
    top = ["protocol", "method", "threads", "model", "data", "trainer"]
    return {
        "": top,
        **named,
        "model.backbone": [f.name for f in fields(BackboneSpec)],
        "model.method": list(methods.METHODS),
    }


def _content(run_config: identity.Config) -> dict[str, str]:
    """Digests of what the config names by a path alone, so that two files of one name are two runs.

    `weights` is SHA-256 over a local weights file, the packaged one included; `manifest` over a manifest; `data` over
    what is a user's own in the data set. What is missing is left to the run, which says so.
    """
    found = {}
    backbone = run_config["model"]["backbone"]
    weights = backbone["file"] or backbones.packaged_file(backbone["tag"])
    for name, path in (("weights", weights), ("manifest", run_config["data"]["manifest"])):
        if path is not None and Path(path).is_file():
            with open(path, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(NolaVisionError):
        if content := get_dataset(run_config["data"]["dataset"]).own_content(run_config["data"]["root"]):
            found["data"] = hashlib.sha256(content.encode()).hexdigest()
    return found


def build(run_config: identity.Config, folder: Path) -> RunCLI:
    """Task, datamodule and trainer of a run config, seeded by `model.run_seed`; the run writes to `folder`.

    Raises:
        NolaVisionError: a setting that Lightning, the backbone or the data refuse.
    """
    if run_config["threads"] is not None:
        torch.set_num_threads(run_config["threads"])
        os.environ["OMP_NUM_THREADS"] = str(run_config["threads"])  # or Lightning's launcher sets its own number
    try:
        # a copy: jsonargparse replaces the dicts in lists of its argument by Namespaces
        return RunCLI(copy.deepcopy({key: value for key, value in run_config.items() if key != "content"}), folder)
    except (argparse.ArgumentError, MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise NolaVisionError(
            f"the run cannot be set up: {' '.join(str(error).split())}"
            + (
                ""
                if not re.search("accelerator|backend|device", str(error))
                else "; --trainer.accelerator cpu runs anywhere"
            )
        ) from error


def has_validation_images(run_config: identity.Config) -> bool:
    """Opens the training images of a run config, so that a data set that is not there is found before any run.

    Returns:
        Whether its classes are large enough for a validation pool.

    Raises:
        NolaVisionError: as `KShotDataModule.setup`.
    """
    module = KShotDataModule(BackboneSpec(**run_config["model"]["backbone"]), **run_config["data"])
    module.prepare_data()
    return module.describe()["counts"]["validation"] > 0  # type: ignore[no-any-return]


@contextmanager
def quiet() -> Iterator[None]:
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
            ".*Total length of `.*` across ranks is zero.*",  # no validation pool: a sentence of our own says so
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
