"""Lightning checkpoints of a run: reading them, refusing those that do not fit, and evaluating one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import need_checkpoint_file
from nola_vision.models.adapted_model import first_not_finite
from nola_vision.runs import run_id
from nola_vision.runs.lightning_messages import quiet
from nola_vision.runs.parsing import build
from nola_vision.training.callbacks import LAST_CHECKPOINT, checkpoint_folder, current_path, monitoring
from nola_vision.training.distributed import is_main_process
from nola_vision.training.precision import tf32


class CheckpointError(NolaVisionError):
    """A run cannot resume from a checkpoint. The run's folder is unchanged."""


def checkpoint_path(given: str | None, folder: Path) -> str | None:
    """The path of the checkpoint that `--ckpt_path` names; `last` is the run's latest one.

    Raises:
        NolaVisionError: it does not exist.
    """
    path = folder / LAST_CHECKPOINT if given == "last" else given and Path(given)
    if path:
        need_checkpoint_file(path)
    return str(path) if path else None


def read_checkpoint(path: str) -> dict[str, Any]:
    """The content of a checkpoint, loaded with `weights_only=True`.

    Raises:
        CheckpointError: the file is damaged or not a checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an arbitrary file raises any exception
        raise CheckpointError(f"{path} is damaged or not a checkpoint: give one that `fit` wrote") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(f"{path} is not a Lightning checkpoint: give one that `fit` wrote")
    return checkpoint


def refuse_other_run(checkpoint: dict[str, Any], run_hash: str) -> None:
    """Refuses the checkpoint of another run, whose optimizer and schedule are in it.

    Raises:
        CheckpointError: its run hash differs.
    """
    if checkpoint.get("run_hash") != run_hash:
        raise CheckpointError(
            f"the checkpoint belongs to run {checkpoint.get('run_hash')} and these settings are run {run_hash}: a run "
            "can only resume with the settings that it was started with, --trainer.max_epochs included"
        )


def refuse_damaged(checkpoint: dict[str, Any], path: str, trainer: L.Trainer) -> None:
    """Validates what Lightning restores unchecked: with a wrong counter an untrained run would count as finished.

    Raises:
        CheckpointError: a part is missing, of another type or not finite, or the counters contradict each other.
    """
    wrong = _first_mismatch(
        checkpoint,
        {
            "epoch": 0,
            "global_step": 0,
            "callbacks": {},
            "optimizer_states": [{"state": {}, "param_groups": []}],
            "lr_schedulers": [{}],
            "stopped": False,
            "adapter": {},
            "loops": {"fit_loop": trainer.fit_loop.state_dict()},
        },
    )
    if wrong is None:
        epoch, current = checkpoint["epoch"], checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
        steps = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        if any(value - epoch not in (0, 1) for value in current.values()) or epoch > (trainer.max_epochs or -1) > 0:
            wrong = "epoch"
        elif steps["total"]["completed"] != checkpoint["global_step"]:
            wrong = "global_step"
        elif not isinstance(checkpoint.get("train_loss"), float | None):
            wrong = "train_loss"
        elif not all(isinstance(tensor, torch.Tensor) for tensor in checkpoint["state_dict"].values()):
            wrong = "state_dict"
        else:
            wrong = first_not_finite(checkpoint["state_dict"])
    if wrong is not None:
        raise CheckpointError(
            f"the checkpoint {path} is damaged (its {wrong}): give another one, or leave --ckpt_path out to start from "
            "scratch"
        )


def _first_mismatch(found: Any, example: Any, name: str = "content") -> str | None:
    """The name of the first part that lacks a key or an item of the example, or has another type."""
    if type(found) is not type(example) or (type(found) is int and found < 0):
        return name
    if isinstance(example, dict):
        parts = ((str(key), found.get(key), value) for key, value in example.items())
    elif isinstance(example, list) and example:
        if len(found) != len(example):
            return name
        parts = ((name, one, other) for one, other in zip(found, example, strict=True))
    else:
        return None
    return next((wrong for key, one, other in parts if (wrong := _first_mismatch(one, other, key)) is not None), None)


def evaluate(run_config: run_id.Config, out: str | Path, verb: str, ckpt_path: str | None) -> None:
    """Prints a checkpoint's accuracy on the validation pool (`validate`) or the test set (`test`); writes no row.

    Without a checkpoint, or with `last`, it evaluates the weights that the run's row describes.

    Raises:
        NolaVisionError: there is no checkpoint of a method that trains, or it is damaged or of another run.
    """
    folder = run_id.run_folder(out, run_config, "final")
    own = ckpt_path in (None, "last")
    ckpt_path = checkpoint_path(ckpt_path or "last", folder) if run_id.has_init(run_config) else None
    with quiet():
        built = build(run_config, folder / verb)
        if ckpt_path is not None:
            checkpoint = read_checkpoint(ckpt_path)
            best = monitoring(built.trainer.callbacks)  # type: ignore[attr-defined]
            states = checkpoint.get("callbacks")
            state = states.get(best.state_key) if own and best is not None and isinstance(states, dict) else None
            if best is not None and isinstance(state, dict) and (path := state.get("best_model_path")):
                run_checkpoints = checkpoint_folder(folder, best)  # `best.dirpath` is in the folder of the verb
                ckpt_path = current_path(str(path), state.get("dirpath"), run_checkpoints)
                built.model.load_best(ckpt_path)
            else:
                built.model.load_weights(checkpoint)
            if is_main_process():
                print(f"checkpoint: {ckpt_path}")
        if verb == "test" and built.datamodule.test_name is None:
            raise NolaVisionError("no test images in the data set: use `nola-vision fit` for an estimate by folds")
        step = built.trainer.validate if verb == "validate" else built.trainer.test
        try:
            with tf32(built.trainer):  # as in training
                step(built.model, datamodule=built.datamodule)
        except SystemExit:  # what Lightning raises on Ctrl-C
            raise KeyboardInterrupt from None
