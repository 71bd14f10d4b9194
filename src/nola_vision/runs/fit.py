"""The runs of one `fit`: methods on frozen features, the folds of an estimate, and the final run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.progress import duration, say, time_left
from nola_vision.common.text import printable
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.runs import cross_validation, run_id, runner, search_grid, store
from nola_vision.runs.budget_names import split_budget
from nola_vision.runs.budgets import budget_of, refuse_larger_files, solved
from nola_vision.runs.completed import completed_row
from nola_vision.runs.parsing import open_data, parse
from nola_vision.runs.record import Row
from nola_vision.runs.timing import training_seconds
from nola_vision.training.distributed import is_main_process

LONGEST_ESTIMATE = 600.0  # seconds that the folds may take unless they are asked for
_TIMING_SECONDS = 10.0  # to estimate them


@dataclass(frozen=True)
class Fitted:
    """The result of `fit`.

    Args:
        row: of the final run.
        frozen: the rows of the methods on frozen features.
        skipped: whether the folds were skipped because they would take too long.
    """

    row: Row
    frozen: Sequence[Row]
    skipped: bool


def fit(
    run_config: run_id.Config,
    raw: run_id.Config,
    out: Path,
    accuracy: Callable[[Row], str],
    *,
    ckpt_path: str | None = None,
    again: bool = False,
    search: bool = False,
    estimate: Literal["folds", "none"] | None = None,
    allow_import: Sequence[str] = (),
) -> Fitted | None:
    """Does the run of a config, after the methods on frozen features and the folds of its estimate, if it needs any.

    Prints what is done in plain lines.

    Args:
        run_config: what `parse` returns; with its budget, if it has one, so that `search` keeps to it.
        raw: the config that it comes from; its entries on frozen features and its `search` are used.
        out: the folder of all runs.
        accuracy: the text for the accuracy of a run.
        ckpt_path: as of `runner.run`.
        again: repeat completed runs.
        search: choose among the settings of the entry's `search`.
        estimate: "folds" trains on each fold however long it takes, "none" skips them; None skips them if they would
            take longer than `LONGEST_ESTIMATE`.
        allow_import: packages whose classes the config may name.

    Returns:
        None in all but the first process of a distributed run.

    Raises:
        NolaVisionError: as `runner.run`, or the options contradict the config.
    """
    if run_config["trainer"]["accelerator"] in ("cuda", "gpu") and not torch.cuda.is_available():
        raise NolaVisionError("there is no CUDA device here: leave --device (--trainer.accelerator) out, or give cpu")
    main, trains = is_main_process(run_config), run_id.has_init(run_config)
    budget, run_config = budget_of(run_config), solved(run_config)
    candidates = _candidates(raw, run_config, budget) if search else []
    data = open_data(run_config)
    if main:
        say(_summary(run_config, data))
    folds = cross_validation.number_of_folds(run_config, data) if estimate != "none" else 0
    if trains and data.number_of_folds and not folds and estimate != "none":
        if estimate == "folds":
            raise NolaVisionError("folds are trained on one device: leave --trainer.devices out, or --estimate folds")
        if main:
            say("the adapter gets no estimate: folds are trained on one device, and this run has several")
    folder = run_id.run_folder(out, run_config, "final")
    store.refuse_other_things(folder)
    done = None if again or candidates else completed_row(folder)
    finished = done is not None and (not folds or done.estimate is not None)
    if main and finished:
        say(f"this run is completed: --again repeats it ({folder})")
    frozen: list[Row] = []
    if main and trains and run_config["model"]["backbone"]["base"] == "pretrained":
        if done is None:
            runner.check(run_config, ckpt_path)
        frozen = _frozen_rows(run_config, raw, out, accuracy, again, allow_import)
    pending, skipped = list(range(folds)), False
    if finished:
        folds = 0
    elif folds:
        if not again and not candidates:
            pending = cross_validation.pending_folds(run_config, out, folds)
        if skipped := bool(pending) and _takes_too_long(run_config, folds, len(pending), len(candidates), estimate):
            folds = 0
    clock = time.monotonic()

    def on_fold(fold: int, row: Row) -> None:
        correct = round((row.test_accuracy or 0) * row.data["counts"]["test"])
        left = [one for one in pending if one > fold]
        seconds = (time.monotonic() - clock) / max(1, len(pending) - len(left)) * len(left)
        more = f"; {time_left(seconds)}" if left and fold in pending else ""
        say(f"fold {fold + 1} of {folds}: {correct} of its {row.data['counts']['test']} images right{more}")

    def on_trial(settings: search_grid.Settings, row: Row) -> None:
        say(search_grid.trial_in_words(run_config["method"], settings, row))

    def on_choice(chosen: search_grid.Settings, rows: Sequence[Row]) -> None:
        say(search_grid.choice_in_words(run_config["method"], chosen, rows))

    row = cross_validation.run_with_estimate(
        run_config,
        out,
        candidates=candidates,
        on_trial=on_trial if main else None,
        on_choice=on_choice if main else None,
        on_fold=on_fold if main else None,
        folds=folds,
        ckpt_path=ckpt_path,
        again=again,
    )
    return Fitted(row, frozen, skipped) if main else None


def _summary(run_config: run_id.Config, data: KShotDataModule) -> str:
    """Training images, test images and backbone in one line."""
    described = data.describe()
    classes, images = len(described["class_names"]), described["counts"]["train"]
    if data.has_test:
        tested = f"tested on {data.test_name} images"
    elif data.number_of_folds:
        tested = f"no test images, so accuracy is estimated by {data.number_of_folds} folds"
    else:
        tested = "no test images, and no class has two distinct ones to estimate an accuracy with"
    spec = run_config["model"]["backbone"]
    backbone = f"{spec['tag']} at {described['transform']['size']} pixels"
    backbone += f", weights of {printable(Path(spec['file']).name)}" if spec["file"] else ""
    return f"{images:,} training images of {classes} classes, {tested}; backbone {backbone}"


def _candidates(raw: run_id.Config, run_config: run_id.Config, budget: int | None) -> list[dict[str, Any]]:
    """The combinations of settings to try, for --search, within a budget in bytes."""
    name = split_budget(run_config["method"])[0]
    search = run_id.search_of(raw, name) if name in raw.get("methods", {}) else {}
    search = search_grid.checked(name, search, run_config["model"]["method"])
    if search:
        refuse_larger_files(run_config, search, budget)
    candidates = search_grid.combinations(search)
    if len(candidates) < 2:
        raise NolaVisionError(
            f"--search needs several values of a setting: give {name} a mapping `search` in the config, such as "
            "{lr: [0.005, 0.001]}"
        )
    return candidates


def _frozen_rows(
    run_config: run_id.Config,
    raw: run_id.Config,
    out: Path,
    accuracy: Callable[[Row], str],
    again: bool,
    allow_import: Sequence[str],
) -> list[Row]:
    """Runs the methods on frozen features on the data of a run, and prints the accuracy of each."""
    say("accuracy with frozen features, without an adapter:")
    rows = []
    for name, class_name in run_id.FROZEN_METHODS.items():
        entries = {key: entry for key, entry in raw.get("methods", {}).items() if _class_of(entry) == class_name}
        name, entry = next(iter(entries.items()), (name, {"class_path": class_name}))
        method = {"class_path": class_name, "init_args": entry.get("init_args") or {}}
        one = {key: value for key, value in run_config.items() if key not in ("content", "allow_import")}
        # one device and no callbacks: those of the run may need epochs
        alone = {"devices": 1, "num_nodes": 1, "strategy": "auto", "callbacks": None, "logger": None}
        model = {key: value for key, value in one["model"].items() if key != "optimizer"}
        one |= {"method": name, "model": {**model, "method": method}, "trainer": {**one["trainer"], **alone}}
        rows.append(runner.run(parse(one, [], allow_import), out, again=again))
        say(f"  {printable(name):14s}{accuracy(rows[-1])}")
    return rows


def _class_of(entry: dict[str, Any]) -> str:
    return str(entry["class_path"]).rpartition(".")[2]


def _takes_too_long(
    run_config: run_id.Config, folds: int, pending: int, candidates: int, estimate: Literal["folds", "none"] | None
) -> bool:
    """Prints how long the folds will take, and whether they are skipped.

    Args:
        run_config: of the final run.
        folds: how many there are.
        pending: how many of them are not completed.
        candidates: the number of combinations of settings to choose from.
        estimate: as of `fit`.
    """
    each = training_seconds(run_config, _TIMING_SECONDS) * (1 + candidates)
    total = each * pending * (folds - 1) / folds  # every fold leaves out one part of the images
    if estimate is None and total > LONGEST_ESTIMATE:
        say(f"{folds} folds would take {duration(total)}, so the adapter gets no estimate now")
        return True
    say(f"{run_config['method']}: {pending} folds in about {duration(total)}, then all images in {duration(each)}")
    return False
