"""From a config to the objects of a run: LightningCLI with this project's wiring."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import lightning as L
import torch
import yaml
from jsonargparse import set_loader, set_parsing_settings
from jsonargparse._link_arguments import skip_apply_links
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from nola_vision.adapters.methods import Method, registry
from nola_vision.common import progress
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.hashing import sha256
from nola_vision.common.imports import resolve
from nola_vision.common.local_files import file_digest
from nola_vision.common.mappings import value_at
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.data.datasets.base import given_root
from nola_vision.data.datasets.registry import get_dataset
from nola_vision.data.manifest import MOST_BYTES
from nola_vision.models.backbones.properties import eval_batch_size
from nola_vision.models.backbones.sources import input_config, local_files
from nola_vision.models.backbones.spec import BackboneSpec
from nola_vision.runs import budgets, import_policy, run_id
from nola_vision.runs.config_errors import TOP_KEYS, explain, set_up_reason
from nola_vision.runs.early_checks import load_value, option_pairs, plain_value
from nola_vision.runs.lightning_messages import quiet
from nola_vision.runs.yaml_files import plain
from nola_vision.training import precision
from nola_vision.training.callbacks import LAST_CHECKPOINT, LastCheckpoint, checkpoint_folder, early_stopping
from nola_vision.training.classifier import Classifier
from nola_vision.training.progress import LiveProgress, PlainProgress
from nola_vision.training.task import make_task
from nola_vision.training.trainer_settings import (
    check_precision,
    check_stop_early,
    check_trainer,
    use_validation,
)

_MOST_THREADS = 1024  # more crash torch
_LINKED = ("input", "backbone", "run_seed")  # arguments of the DataModule that a config does not set
_METHOD_OPTIONS = ("model.method", "model.method.class_path")
_RATE = "the optimizer's learning rate is the method's: set model.method.init_args.lr (and head_lr)"

set_parsing_settings(subclasses_enabled=[Method])
set_loader("yaml", load_value, exceptions=(yaml.YAMLError,))


class _Parser(LightningArgumentParser):
    """Lightning's parser, without its reading of further files: a config is read by `config_files` alone."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        return super().add_class_arguments(*args, **{**kwargs, "sub_configs": False})


def make_data(backbone: BackboneSpec, **settings: Any) -> KShotDataModule:
    """The datamodule with the image format of a backbone.

    Args:
        backbone: that of the model.
        settings: those of `KShotDataModule`.
    """
    return KShotDataModule(input_config(backbone), **settings)


class RunCLI(LightningCLI):
    """LightningCLI with this project's wiring: one task, one datamodule, one folder for all that a run writes.

    Args:
        config: a run config as a nested dict. It stays as it was.
        folder: where the run writes, if the config is a full one, as `parse` returns it. None: the config is parsed
            and validated, without building its objects.
        options: command-line options that override the config; not with a full config.

    Attributes:
        validates: whether validation during training is asked for: by `trainer.check_val_every_n_epoch` or
            `val_check_interval`, or a callback that monitors a validation metric or acts in validations.
    """

    _shared: ClassVar[LightningArgumentParser | None] = None  # making the parser takes as long as using it

    def __init__(self, config: Mapping[str, Any], folder: Path | None = None, options: Sequence[str] = ()) -> None:
        self.folder, self.options = folder, list(options)
        # a copy: jsonargparse replaces the mappings in lists by its own, in place
        settings: run_id.Config = plain(config)
        self.packages: list[str] = settings.pop("allow_import", [])
        named = [value for key, value in option_pairs(options) if key in _METHOD_OPTIONS]
        for class_path in (value_at(settings, "model", "method", "class_path"), *named):
            self.packages = [*self.packages, *import_policy.register_method(class_path, self.packages)]
        method = value_at(settings, "model", "method")
        if (known := registry.METHODS.get(value_at(method, "class_path"))) is not None:
            # jsonargparse would look for a short name among the classes of every module
            method["class_path"] = f"{known.__module__}.{known.__qualname__}"
        with import_policy.allowing(self.packages):
            super().__init__(
                make_task,
                make_data,
                args=settings,
                run=False,
                save_config_callback=None,  # the row holds the config
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # checkpoints hold no hyperparameters
                parser_class=_Parser,
                parser_kwargs={"prog": "nola-vision fit", "exit_on_error": False, "allow_abbrev": False},
                trainer_defaults={
                    "devices": 1,  # several only where they are asked for: DDP changes the rounding
                    "max_epochs": 50,
                    "check_val_every_n_epoch": None,  # validation in training only for what uses it
                    "num_sanity_val_steps": 0,
                    "log_every_n_steps": 1,
                    "enable_model_summary": False,
                },
            )

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        if RunCLI._shared is None:
            super().setup_parser(*args, **kwargs)
            RunCLI._shared = self.parser
        self.parser = RunCLI._shared

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if self.folder is not None:  # `parse` has validated it
            self.config = parser.parse_object(args, env=False, _skip_validation=True)
        else:
            partly = {"defaults": False, "_skip_validation": True, "_skip_required": True}
            with skip_apply_links():  # their sources may be missing until the options are there
                given = parser.parse_object(args, env=False, **partly)
            self.config = parser.parse_args(self.options, namespace=given, env=False)
        import_policy.check_classes(self.config.as_dict(), self.packages)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--protocol", type=str, default="default", help="Name of the protocol: part of the cell.")
        parser.add_argument("--method", type=str, default=None, help="Entry of the config's `methods` to train.")
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; they decide rounding.")
        for action in parser._actions:
            # `typing` may hand out an equal Union of another order that another package made first: a number of batches
            # would become a share of them
            kinds = get_args(getattr(action, "_typehint", None))
            if len(kinds) == 3 and all(kind in kinds for kind in (int, float, type(None))):
                action._typehint = int | float | None  # type: ignore[attr-defined]
            if action.dest == "trainer.precision":
                action._typehint |= Literal["auto"]  # type: ignore[attr-defined]
        for field in (field.name for field in fields(BackboneSpec)):
            parser.link_arguments(f"model.backbone.{field}", f"data.backbone.{field}")
        parser.link_arguments("model.run_seed", "data.run_seed")
        parser.link_arguments("model.run_seed", "seed_everything")
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")

    def instantiate_classes(self) -> None:
        if self.folder is not None:
            super().instantiate_classes()
            if self.config["data.eval_batch_size"] is None:
                backbone = self.model.model.backbone
                self.datamodule.eval_batch_size = eval_batch_size(backbone, self.datamodule.input.size)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        assert self.folder is not None
        given = self.config_init["trainer"]
        callbacks: list[L.Callback] = list(_listed(given["callbacks"]))
        if (patience := self.config["model.stop_early"]) is not None and isinstance(self.model, Classifier):
            callbacks += early_stopping(patience)
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(checkpoint_folder(self.folder, callback))
        if given["enable_checkpointing"] is not False:
            callbacks.append(LastCheckpoint(self.folder / LAST_CHECKPOINT))
        if given["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(LiveProgress() if progress.is_live() else PlainProgress())
        loggers: list[Logger] = [CSVLogger(self.folder, name="", version=""), *_listed(given["logger"])]
        # a sweep saves no last checkpoint, but a ModelCheckpoint of the config still keeps the best epoch
        kwargs["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
        # any of the user's settings of when to validate; null and a number of batches is Lightning's own way
        when = given["check_val_every_n_epoch"], given["val_check_interval"]
        self.validates = when != (None, None) or use_validation(callbacks)
        if when[0] is None and not isinstance(when[1], int):
            kwargs["check_val_every_n_epoch"] = 1
        return super().instantiate_trainer(callbacks=callbacks, logger=loggers, default_root_dir=self.folder, **kwargs)


def _listed(value: Any) -> list[Any]:
    """A config's callbacks or loggers as a list; empty for `true`, `false` and null."""
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def parse(
    config: Mapping[str, Any],
    options: Sequence[str] = (),
    allow_import: Sequence[str] = (),
    fastest: Callable[[Any], str] = precision.fastest,
    keep_budget: bool = False,
) -> run_id.Config:
    """The full run config, every default written out.

    Two spellings of one run give the same full config, so hashes are taken of what this returns.

    Args:
        config: a run config, as `run_id.resolve` returns it.
        options: command-line options that override it, such as `--data.shots=10`.
        allow_import: packages whose classes the config may name too, see `import_policy`.
        fastest: gives the precision that `auto` resolves to for an accelerator; the row and its hash have that value.
        keep_budget: leave a method's `max_bytes` to `budgets.solved`, which every run config goes through.

    Raises:
        NolaVisionError: an unknown key, method or setting, a value of the wrong type, or a class that a config may not
            name.
    """
    import_policy.check_packages(allow_import)
    if "allow_import" in config:
        raise NolaVisionError("unknown key 'allow_import' in the config: give --allow-import on the command line")
    pairs = option_pairs(options)
    for group in ("model", "model.backbone", "data", "trainer"):
        given = [value_at(config, *group.split(".")), *(value for key, value in pairs if key == group)]
        if any(isinstance(value, str) and not value.lstrip().startswith("{") for value in given):
            raise NolaVisionError(f"`{group}` takes settings, not a file: give the file by --config")
    config = _without_settings_of_another(config, pairs)
    optimizer = value_at(config, "model", "optimizer", "init_args")
    if "lr" in (optimizer or ()) or any(re.fullmatch(r"model\.optimizer\.(.*\.)?lr", key) for key, _ in pairs):
        raise NolaVisionError(_RATE)
    try:
        if method := value_at(config, "model", "method"):
            import_policy.register_method(value_at(method, "class_path"), allow_import)
            registry.from_dict(method)
        with quiet():
            parsed = RunCLI({**config, "allow_import": list(allow_import)}, options=options).config
        full: run_id.Config = plain(json.loads(json.dumps(parsed.as_dict(), default=str)))
    except NolaVisionError:
        raise
    except Exception as error:  # the parser fails in many ways on a config that no person would write
        reason = explain(str(error) or type(error).__name__, _settings())
        raise NolaVisionError(
            f"the configuration is not understood: {reason} (nola-vision fit --help lists the options)"
        ) from error
    # the parser takes null for anything
    required = [key for key, one in inspect.signature(KShotDataModule).parameters.items() if one.default is not None]
    for path in (
        ("protocol",),
        ("trainer",),
        ("model", "optimizer"),
        *(("data", k) for k in required if k not in _LINKED),
    ):
        run_id.need(full, *path)
    if "lr" in _given(full["model"]["optimizer"]):  # of an option that is a whole mapping
        raise NolaVisionError(_RATE)
    if full["trainer"].get("model_registry") and "litmodels" not in allow_import:
        raise NolaVisionError("trainer.model_registry uploads the model: give --allow-import litmodels to let it")
    full.pop("config", None)
    for key in _LINKED:  # stated once, by the model
        full["data"].pop(key, None)
    full.pop("seed_everything", None)
    if full["data"]["dataset"] in run_id.OWN_IMAGES:
        full["data"]["root"] = given_root(full["data"]["root"])
    if full["model"]["run_seed"] < 0 or full["data"]["split_seed"] < 0:
        raise NolaVisionError("run_seed and split_seed must not be below 0")
    check_trainer(full["trainer"])
    check_stop_early(full["model"]["stop_early"], full["trainer"]["callbacks"])
    if full["model"]["class_weights"] == "balanced" and full["data"]["shots"] != "all":
        raise NolaVisionError(
            f"model.class_weights is balanced, but data.shots is {full['data']['shots']} and all classes have equally "
            "many images: leave it out, or give data.shots all"
        )
    if full["trainer"]["precision"] == "auto":
        full["trainer"]["precision"] = fastest(full["trainer"]["accelerator"])
    full["trainer"]["precision"] = precision.one_spelling(full["trainer"]["precision"])
    when = full["trainer"]["check_val_every_n_epoch"], full["trainer"]["val_check_interval"]
    if when == (None, None) and full["trainer"]["logger"] not in (None, False, True, []):
        # for its curves; written out, since the hash leaves loggers out and a validation calibrates the adapter
        full["trainer"]["check_val_every_n_epoch"] = 1
    check_precision(full["trainer"]["precision"], registry.from_dict(full["model"]["method"]))
    if full["threads"] is not None and not 1 <= full["threads"] <= _MOST_THREADS:
        raise NolaVisionError(f"threads is {full['threads']}: use 1 to {_MOST_THREADS}")
    full["content"] = _content(full)
    full["model"]["method"].setdefault("init_args", {})
    budgets.refuse_contradictions(config, full)
    full = full if keep_budget else budgets.solved(full)
    asked = str(value_at(config, "model", "method", "class_path") or "").rpartition(".")[2]
    if full.get("method") is None or run_id.method_class(full) != asked:  # another class by --model.method
        full["method"] = run_id.method_class(full).lower()
    if allow_import:
        full["allow_import"] = list(allow_import)
    return full


def _without_settings_of_another(config: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> Mapping[str, Any]:
    """The config without its method's settings if the options name another class, which starts from its own defaults.

    The parser would keep those of the same name: LoRA's c is not NOLA's.
    """
    own = value_at(config, "model", "method", "class_path")
    for asked in (plain_value(value) for key, value in pairs if key in _METHOD_OPTIONS):
        name = asked.get("class_path") if isinstance(asked, Mapping) else asked
        if isinstance(own, str) and isinstance(name, str) and own.rpartition(".")[2] != name.rpartition(".")[2]:
            return {**config, "model": {**config["model"], "method": {"class_path": own}}}
    return config


def _given(optimizer: Mapping[str, Any]) -> list[str]:
    """The settings of an optimizer that are not its class's defaults."""
    parameters = inspect.signature(resolve(optimizer["class_path"])).parameters
    args = optimizer.get("init_args") or {}
    return [key for key, value in args.items() if key in parameters and value != parameters[key].default]


def _settings() -> dict[str, list[str]]:
    """The names that each group of a config and each method takes."""
    groups: dict[str, Any] = {"data": KShotDataModule, "model": make_task, "trainer": L.Trainer, **registry.METHODS}
    named = {group: list(inspect.signature(made).parameters) for group, made in groups.items()}
    named["data"] = [name for name in named["data"] if name not in _LINKED]
    return {
        "": list(TOP_KEYS),
        **named,
        "model.backbone": [f.name for f in fields(BackboneSpec)],
        "model.method": list(registry.METHODS),
        "trainer.callbacks": lightning_callbacks.__all__,
        "trainer.logger": lightning_loggers.__all__,
    }


def _content(run_config: run_id.Config) -> dict[str, str]:
    """Digests of what the config names by a path alone, so that two files of one name are two runs.

    `weights` is SHA-256 over a local weights file, the packaged one included; `config` over the `config.json` of a
    `local-dir:` backbone; `manifest` over a manifest; `data` over the user's part of the data set. What is missing is
    left to the run, which reports it.
    """
    found: dict[str, str] = {}
    backbone = run_config["model"]["backbone"]
    files = local_files(backbone["tag"], backbone["file"])
    named = [(name, path, None) for name, path in files.items()]
    for name, path, most in (*named, ("manifest", run_config["data"]["manifest"], MOST_BYTES)):
        if path is not None and (digest := file_digest(path, most)) is not None:
            found[name] = digest
    with suppress(NolaVisionError):
        if content := get_dataset(run_config["data"]["dataset"]).own_content(run_config["data"]["root"]):
            found["data"] = sha256(content)
    return found


def build(run_config: run_id.Config, folder: Path) -> RunCLI:
    """Task, datamodule and trainer of a run config, seeded by `model.run_seed`; the run writes to `folder`.

    Raises:
        NolaVisionError: a setting that Lightning, the backbone or the data refuse.
    """
    if run_config["threads"] is not None:
        torch.set_num_threads(run_config["threads"])
        os.environ["OMP_NUM_THREADS"] = str(run_config["threads"])  # or Lightning's launcher sets its own number
    try:
        return RunCLI({key: value for key, value in run_config.items() if key != "content"}, folder)
    except (argparse.ArgumentError, MisconfigurationException, ValueError, TypeError, ImportError) as error:
        of_device = re.search("accelerator|backend|device", str(error))
        fix = "; --trainer.accelerator cpu runs anywhere" if of_device else ""
        raise NolaVisionError(f"the run cannot be set up: {set_up_reason(str(error))}{fix}") from error


def open_data(run_config: run_id.Config) -> KShotDataModule:
    """The datamodule of a run config. It opens the images when they are first asked for, and decodes none.

    Raises:
        NolaVisionError: as `KShotDataModule`.
    """
    return make_data(BackboneSpec(**run_config["model"]["backbone"]), **run_config["data"])


def has_validation_images(run_config: run_id.Config) -> bool:
    """Opens and checks the images of a run config, so that what is missing or damaged is found before any run.

    Returns:
        Whether its classes are large enough for a validation pool.

    Raises:
        NolaVisionError: as `KShotDataModule.prepare_data`.
    """
    data = open_data(run_config)
    data.hold_out = data.hold_out or data.entry.trains_on_pool  # as search runs do
    data.prepare_data()
    return data.describe()["counts"]["validation"] > 0  # type: ignore[no-any-return]
