"""Lightning's callbacks, loggers, strategies and limits: each works with its effect or is refused by name."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from nola_vision import load_adapter
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.mappings import overlay
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.runs import checkpoints, run_id, runner, store
from nola_vision.runs.parsing import build, parse
from nola_vision.training import classifier
from nola_vision.training.base import ClassificationTask
from nola_vision.training.callbacks import LAST_CHECKPOINT
from nola_vision.training.classifier import Classifier
from nola_vision.training.distributed import is_main_process
from tiny import TINY, tiny

pytestmark = pytest.mark.usefixtures("kept")


class Watcher(L.Callback):
    """Of another package, which uses validations."""

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        assert "val_loss" in trainer.callback_metrics


OWN_LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "own-log"}}


def callback(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": settings}


def with_callbacks(*callbacks: dict[str, Any], method: str = "linear", **trainer: Any) -> run_id.Config:
    return tiny(method, trainer={"callbacks": list(callbacks), **trainer})


def log(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


def test_early_stopping_stops(tmp_path: Path) -> None:
    config = with_callbacks(callback("EarlyStopping", monitor="val_loss", mode="max", patience=1), max_epochs=9)
    row = runner.run(config, tmp_path)
    assert row.status == "completed" and row.epoch == 1 and row.monitor is None
    assert row.config["trainer"]["callbacks"] == config["trainer"]["callbacks"]  # plain values still


def test_the_best_epoch_is_saved_validated_and_tested(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the largest loss: the first epoch, which the last one is not
    worst = callback("ModelCheckpoint", monitor="val_loss", mode="max")
    config = with_callbacks(callback("ModelCheckpoint", save_last=True), worst, method="nola4")
    row = runner.run(config, tmp_path)
    folder = run_id.run_folder(tmp_path, config, "final")
    assert (row.status, row.epoch, row.monitor) == ("completed", 0, "val_loss")
    losses = [float(line["val_loss"]) for line in log(folder) if line.get("val_loss")]
    assert len(losses) == 3 and row.val_loss == pytest.approx(max(losses), rel=1e-5)
    (best,) = (folder / "checkpoints" / "val_loss").glob("*.ckpt")
    assert "epoch=0" in best.name
    last = torch.load(folder / LAST_CHECKPOINT, weights_only=True)
    assert last["epoch"] == 2 and last["train_loss"] == row.train_loss
    checkpoints.evaluate(config, tmp_path, "test", "last")
    printed = re.search(r"test_accuracy\W+([\d.]+)", capsys.readouterr().out)
    assert printed and float(printed[1]) == pytest.approx(row.test_accuracy, abs=1e-6)
    (folder / "row.json").unlink()
    best.write_bytes(b"damaged")
    with pytest.raises(NolaVisionError, match="best epoch's checkpoint .* is damaged: train again"):
        runner.run(config, tmp_path, ckpt_path="last")
    best.unlink()
    with pytest.raises(NolaVisionError, match="best epoch's checkpoint .* does not exist: put the file back"):
        runner.run(config, tmp_path, ckpt_path="last")
    with pytest.raises(NolaVisionError, match="best epoch's checkpoint .* does not exist: put the file back"):
        checkpoints.evaluate(config, tmp_path, "test", None)


def test_stop_early_stops_and_keeps_the_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 0.5, 0.7, 0.6, 0.4, 0.1])
    log_value = Classifier.log

    def scripted(self: Classifier, name: str, value: Any, **options: Any) -> None:
        if name == "val_loss" and self.trainer.state.fn == "fit":
            value = torch.tensor(next(losses))  # the pool is one batch
        log_value(self, name, value, **options)

    monkeypatch.setattr(Classifier, "log", scripted)
    config = tiny("nola", model={"stop_early": 2}, trainer={"max_epochs": 9})
    assert run_id.run_hash(config, "final") != run_id.run_hash(tiny("nola", trainer={"max_epochs": 9}), "final")
    row = runner.run(config, tmp_path)
    assert (row.status, row.epoch, row.monitor) == ("completed", 1, "val_loss")
    assert next(losses) == 0.4  # the fourth validation was the last
    folder = run_id.run_folder(tmp_path, config, "final")
    (best,) = (folder / "checkpoints" / "val_loss").glob("*.ckpt")
    kept = torch.load(best, weights_only=True)["state_dict"]
    saved = load_adapter(folder / store.ADAPTER_FILE).bank.state_dict()
    assert kept and all(torch.equal(saved[name.removeprefix("model.bank.")], value) for name, value in kept.items())
    assert runner.run(tiny("1nn", model={"stop_early": 2}), tmp_path).status == "completed"


BY_VAL_LOSS = callback("ModelCheckpoint", monitor="val_loss")


@pytest.mark.parametrize(
    ("method", "stage", "passes", "changes"),
    [
        ("nola", "final", 0, {}),
        ("nola", "search", 1, {}),
        ("nola", "final", 1, {"trainer": {"check_val_every_n_epoch": 3}}),
        ("nola", "search", 1, {"trainer": {"check_val_every_n_epoch": 3}}),
        ("nola", "final", 2, {"trainer": {"check_val_every_n_epoch": 2}}),
        ("nola", "final", 1, {"trainer": {"check_val_every_n_epoch": 9}}),  # asked for, and not reached
        ("nola", "final", 9, {"trainer": {"val_check_interval": 0.5}}),  # of an epoch of 3 batches
        ("nola", "final", 5, {"trainer": {"val_check_interval": 2}}),  # 9 batches: Lightning counts on over epochs
        ("nola", "final", 3, {"trainer": {"logger": OWN_LOGGER}}),
        ("nola", "final", 0, {"trainer": {"callbacks": [callback("ModelCheckpoint", monitor="train_loss")]}}),
        ("nola", "final", 3, {"model": {"stop_early": 5}}),  # the last epoch is the best
        ("nola", "final", 9, {"trainer": {"callbacks": [BY_VAL_LOSS], "val_check_interval": 0.5}}),
        ("nola", "final", 3, {"trainer": {"callbacks": [{"class_path": f"{__name__}.Watcher"}]}}),
        ("nola", "final", 2, {"trainer": {"num_sanity_val_steps": 1, "check_val_every_n_epoch": 3}}),
        ("nola", "final", 0, {"trainer": {"check_val_every_n_epoch": 1, "limit_val_batches": 0}}),
        ("1nn", "final", 0, {"trainer": {"check_val_every_n_epoch": 3}}),
        ("1nn", "search", 1, {}),
    ],
)
def test_no_weights_are_validated_twice(
    method: str,
    stage: run_id.Stage,
    passes: int,
    changes: dict[str, Any],
    tmp_path: Path,
    evaluated: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # for the logger
    config = parse(run_id.resolve(overlay(TINY, changes), method), allow_import=[__name__])
    row = runner.run(config, tmp_path, stage)
    assert row.status == "completed" and evaluated == ["val"] * passes + ["test"] * (stage == "final")
    assert (row.val_accuracy is not None) == (passes > 0)
    assert (row.val_loss is not None) == (passes > 0 and method == "nola")  # 1-NN has no probabilities
    assert (row.temperature is not None) == (passes > 0 and stage == "final")
    monitors = "monitor" in str(changes) or "stop_early" in str(changes)
    assert (row.epoch, row.monitor is None) == (None if method == "1nn" else 2, not monitors)
    if stage == "final" and method == "nola":  # as given
        given = changes.get("trainer", {})
        expected = 1 if "logger" in given else given.get("check_val_every_n_epoch")
        assert row.config["trainer"]["check_val_every_n_epoch"] == expected


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stage of every batch that is evaluated; the pool and the test set are one batch each."""
    stages: list[str] = []
    original = ClassificationTask._evaluate
    monkeypatch.setattr(
        ClassificationTask, "_evaluate", lambda self, batch, stage: stages.append(stage) or original(self, batch, stage)
    )
    return stages


VALIDATED = {"check_val_every_n_epoch": 3}
RESULTS = ("val_loss", "val_accuracy", "temperature", "held_out_nll", "held_out_nll_calibrated", "test_accuracy")


def test_reused_validations_are_those_of_a_separate_pass(
    tmp_path: Path, evaluated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last digit with few stored bits: training validates with rounded values, then the model is rounded."""

    def results(every: int, **trainer: Any) -> list[float | None]:
        evaluated.clear()
        row = runner.run(tiny("nola4", trainer={"check_val_every_n_epoch": every, **trainer}), tmp_path)
        return [getattr(row, column) for column in RESULTS]

    separate = results(9)
    assert results(3) == separate and None not in separate and evaluated == ["val", "test"]
    # the last epoch is the best
    assert results(1, callbacks=[BY_VAL_LOSS]) == separate and evaluated == ["val"] * 3 + ["test"]
    worst = callback("ModelCheckpoint", monitor="val_loss", mode="max")  # the first epoch
    reused = results(1, callbacks=[worst])
    assert reused != separate and evaluated == ["val"] * 3 + ["test"]
    monkeypatch.setattr(classifier, "Validated", lambda **_: None)
    monkeypatch.setattr(runner, "completed_row", lambda *_: None)
    assert results(1, callbacks=[worst]) == reused and evaluated == ["val"] * 4 + ["test"]


class Averaged(L.Callback):
    """Validates other weights than those that are trained, as averages of them."""

    def on_validation_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.trained = [parameter.detach().clone() for parameter in task.model.bank.parameters()]
        for parameter in task.model.bank.parameters() if trainer.state.fn == "fit" else ():
            parameter.data.mul_(0.5)

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        for parameter, trained in zip(task.model.bank.parameters(), self.trained, strict=True):
            parameter.data.copy_(trained)


class Halved(L.Callback):
    """Changes the weights after they were validated, without a step, as an average of weights would."""

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        for parameter in task.model.bank.parameters():
            parameter.data.mul_(0.5)


@pytest.mark.parametrize("name", ["Halved", "Averaged"])
def test_a_validation_of_weights_that_a_callback_changed_is_not_used(
    name: str, tmp_path: Path, evaluated: list[str]
) -> None:
    config = overlay(TINY, {"trainer": {"callbacks": [{"class_path": f"{__name__}.{name}"}]}})

    def loss(every: int, passes: int) -> float | None:
        evaluated.clear()
        changed = overlay(config, {"trainer": {"check_val_every_n_epoch": every}})
        row = runner.run(parse(run_id.resolve(changed, "nola"), allow_import=[__name__]), tmp_path)
        assert evaluated == ["val"] * passes + ["test"]
        return row.val_loss

    found, without = loss(9, passes=1), runner.run(tiny(trainer=VALIDATED), tmp_path).val_loss
    assert loss(3, passes=2) == found and (found == without) == (name == "Averaged")


def without_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the classes are too small."""
    pool = property(lambda data: (data._train_set[0], np.empty(0, np.int64)))
    monkeypatch.setattr(KShotDataModule, "_pool_set", pool)


def test_stop_early_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NolaVisionError, match="stop_early is 0: give the number of validations"):
        tiny(model={"stop_early": 0})
    for other in (callback("EarlyStopping", monitor="train_loss"), callback("ModelCheckpoint", monitor="train_loss")):
        with pytest.raises(NolaVisionError, match="both choose the epoch"):
            tiny(model={"stop_early": 1}, trainer={"callbacks": [other]})
    assert tiny(model={"stop_early": 1}, trainer={"callbacks": [callback("ModelCheckpoint", save_last=True)]})
    without_pool(monkeypatch)
    with pytest.raises(NolaVisionError, match="no validation images .*: leave model.stop_early out"):
        runner.run(tiny(model={"stop_early": 1}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for every, warned in ((1, True), (2, False)):  # after the last epoch it would only calibrate
        row = runner.run(tiny(trainer={"max_epochs": 2, "check_val_every_n_epoch": every}), tmp_path)
        assert any("nothing is validated in training" in warning for warning in row.warnings) == warned


def test_learning_rates_are_logged_and_loggers_are_a_list(tmp_path: Path) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "own")}}
    config = with_callbacks(callback("LearningRateMonitor", logging_interval="step"), logger=[logger])
    assert runner.run(config, tmp_path / "out").status == "completed"
    assert "lr-Adam/head" in log(run_id.run_folder(tmp_path / "out", config, "final"))[0]
    assert list((tmp_path / "own").rglob("metrics.csv"))
    by_option = parse(
        run_id.resolve(TINY, "linear"), ["--trainer.logger+=CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    )
    # the hash leaves the logger out, but not the validations for its curves, which calibrate the adapter
    validated = tiny("linear", trainer={"check_val_every_n_epoch": 1})
    assert run_id.run_hash(by_option, "final") == run_id.run_hash(validated, "final")
    assert run_id.run_hash(validated, "final") != run_id.run_hash(tiny("linear"), "final")
    assert runner.run(by_option, tmp_path / "option").status == "completed"


@pytest.mark.parametrize("name", ["Timer", "DeviceStatsMonitor", "ModelSummary"])
def test_callbacks_that_only_watch(name: str, tmp_path: Path) -> None:
    assert runner.run(with_callbacks(callback(name), max_epochs=1), tmp_path).status == "completed"


def test_a_sweep_takes_callbacks(tmp_path: Path) -> None:
    callbacks = (callback("EarlyStopping", monitor="train_loss"), callback("ModelCheckpoint", monitor="val_loss"))
    config = with_callbacks(*callbacks, max_epochs=1, enable_checkpointing=False)  # the sweep's own setting
    sent = json.loads(json.dumps(config))  # as a worker gets it
    row = runner.run(sent, tmp_path, keep_going=True, heartbeat=lambda: None)
    assert row.status == "completed" and row.monitor == "val_loss" and sent == config
    assert not list(tmp_path.rglob("last.ckpt"))


@pytest.mark.parametrize(
    "name",
    [
        "BatchSizeFinder",
        "LearningRateFinder",
        "GradientAccumulationScheduler",
        "StochasticWeightAveraging",
        "WeightAveraging",
        "EMAWeightAveraging",
        "BackboneFinetuning",
        "ModelPruning",
    ],
)
def test_callbacks_that_cannot_work_are_refused_by_name(name: str) -> None:
    settings: dict[str, Any] = {
        "GradientAccumulationScheduler": {"scheduling": {0: 2}},
        "StochasticWeightAveraging": {"swa_lrs": 0.1},
        "ModelPruning": {"pruning_fn": "l1_unstructured"},
    }.get(name, {})
    with pytest.raises(NolaVisionError, match=f"the callback {name} is not supported: ") as caught:
        with_callbacks(callback(name, **settings))
    assert "\n" not in str(caught.value)


def test_a_monitor_that_is_not_logged_is_named(tmp_path: Path) -> None:
    for name in ("EarlyStopping", "ModelCheckpoint"):
        with pytest.raises(NolaVisionError, match=f"{name} monitors 'valid_loss', .* train_loss, val_loss, val_acc"):
            with_callbacks(callback(name, monitor="valid_loss"))
    config = with_callbacks(callback("EarlyStopping", monitor="val_loss"), check_val_every_n_epoch=5)
    with pytest.raises(NolaVisionError, match="check_val_every_n_epoch is 5 and trainer.max_epochs 3"):
        runner.run(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_monitors_are_checked_in_each_process_of_a_distributed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pool(monkeypatch)
    built = build(with_callbacks(callback("EarlyStopping", monitor="val_loss")), tmp_path)
    with pytest.raises(NolaVisionError, match="EarlyStopping monitors 'val_loss', but there are no validation images"):
        built.trainer.fit(built.model, datamodule=built.datamodule)  # as in `run` where the world has two processes
    assert not built.model.began


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overfit_batches": 0.5}, "overfit_batches is 0.5: it would validate on training images"),
        ({"limit_train_batches": 0}, "limit_train_batches is 0, so there would be no training"),
        ({"limit_train_batches": 0.0}, "limit_train_batches is 0.0, so there would be no training"),
        ({"limit_test_batches": 0}, "limit_test_batches is 0, so there would be no test"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches is 0: it must be at least 1"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch is 0: it must be at least 1"),
        ({"max_epochs": 0}, "max_epochs is 0, so there would be no training"),
        ({"max_epochs": -1}, "max_epochs is -1 without trainer.max_steps"),
        ({"max_epochs": -3}, "max_epochs is -3"),
        ({"fast_dev_run": True}, "fast_dev_run leaves no checkpoint"),
        ({"strategy": "fsdp"}, "strategy fsdp is not supported"),
        ({"strategy": "deepspeed_stage_2"}, "strategy deepspeed_stage_2 is not supported"),
        ({"strategy": "ddp_spawn"}, "strategy ddp_spawn is not supported"),
        ({"strategy": {"class_path": "lightning.pytorch.strategies.FSDPStrategy"}}, "FSDPStrategy is not supported"),
        ({"strategy": {"class_path": "ModelParallelStrategy"}}, "ModelParallelStrategy is not supported"),
    ],
)
def test_settings_that_give_no_result_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NolaVisionError, match=message):
        tiny(trainer=settings)


@pytest.mark.slow  # a process that imports torch
def test_a_number_of_batches_stays_one_whatever_was_imported_before() -> None:
    # scikit-learn has a Union of float and int, which `typing` keeps and gives to who asks for one of int and float
    numbers = "[tiny(trainer={'limit_train_batches': n})['trainer']['limit_train_batches'] for n in (1, 1.0, 0.5)]"
    code = f"import sklearn.metrics; from tiny import tiny; print({numbers})"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path})
    assert ended.stdout == "[1, 1.0, 0.5]\n", ended.stderr


def test_a_share_of_batches_that_is_none_is_one_line(tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        every = {"check_val_every_n_epoch": 1, f"limit_{name}_batches": 0.1}
        with pytest.raises(NolaVisionError, match=f"limit_{name}_batches") as caught:
            runner.run(tiny(trainer=every), tmp_path / name)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.rglob("adapter.safetensors"))  # refused before training
    unused = tiny(trainer={"limit_val_batches": 0.1, "max_epochs": 1})  # nothing is validated
    assert runner.run(unused, tmp_path).status == "completed"


@pytest.mark.parametrize("method", ["FullFinetune", "PEFT"])
def test_sixteen_bit_weights_are_refused_where_the_backbone_trains(method: str) -> None:
    settings: dict[str, Any] = {"config": "peft.LoraConfig"} if method == "PEFT" else {}
    with pytest.raises(NolaVisionError, match=f"bf16-true, but {method} trains .*: use bf16-mixed"):
        changes = {
            "methods": {"x": {"class_path": method, "init_args": settings}},
            "trainer": {"precision": "bf16-true"},
        }
        parse(run_id.resolve(overlay(TINY, changes), "x"))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_trained_values_move_in_a_16_bit_model(precision: str, tmp_path: Path) -> None:
    config = tiny(trainer={"precision": precision}, model={"method": {"init_args": {"lr": 1e-4}}})
    row = runner.run(config, tmp_path)
    assert row.status == "completed"
    checkpoint = torch.load(run_id.run_folder(tmp_path, config, "final") / LAST_CHECKPOINT, weights_only=True)
    adam = [value for state in checkpoint["optimizer_states"][0]["state"].values() for value in state.values()]
    assert {tensor.dtype for tensor in (*checkpoint["state_dict"].values(), *adam)} == {torch.float32}
    exact = runner.run(tiny(model={"method": {"init_args": {"lr": 1e-4}}}), tmp_path)
    assert row.train_loss == pytest.approx(exact.train_loss, rel=0.02)


def test_one_device_unless_several_are_asked_for() -> None:
    assert tiny()["trainer"]["devices"] == 1
    assert tiny(trainer={"devices": 2})["trainer"]["devices"] == 2


def test_only_the_first_process_of_the_first_node_claims_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    assert is_main_process(tiny())  # a variable that a cluster sets for jobs of one node
    several = tiny(trainer={"num_nodes": 2, "devices": 1, "strategy": "ddp"})
    assert not is_main_process(several)
    monkeypatch.setattr(runner, "_run", lambda *_: None)
    with store.lock_run(run_id.run_folder(tmp_path, several, "final")):  # by the first node
        runner.run(several, tmp_path)
    monkeypatch.setenv("NODE_RANK", "0")
    assert is_main_process(several)
