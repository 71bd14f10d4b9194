"""Runs that are interrupted at any moment, and the one command that finishes them: `fit ... --ckpt_path last`."""

import csv
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from nola_vision.common.errors import NolaVisionError
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.models.adapted_model import AdaptedModel
from nola_vision.runs import checkpoints, run_id, runner, store
from nola_vision.runs.record import DETERMINISTIC, Row
from nola_vision.training.callbacks import LAST_CHECKPOINT
from nola_vision.training.classifier import Classifier
from tiny import tiny

pytestmark = pytest.mark.usefixtures("kept")

EARLY = {"class_path": "EarlyStopping", "init_args": {"monitor": "val_accuracy", "mode": "min", "patience": 1}}
BEST = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val_loss", "mode": "max"}}
AWARE = {"model": {"method": {"init_args": {"quantise_from": 0.5}}}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nola": ("nola", {}),
    "quantised": ("nola4", AWARE),
    "full-ft": ("full-ft", {}),
    "stopped early": ("linear", {"trainer": {"callbacks": [EARLY], "max_epochs": 9}}),
    "best": ("nola", {"trainer": {"callbacks": [BEST]}}),
}


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """A shell's background jobs, and what they start, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def result(config: run_id.Config, out: Path) -> tuple[dict[str, Any], bytes]:
    folder = run_id.run_folder(out, config, "final")
    row = store.read_row(folder / "row.json")
    assert row.status == "completed" and row.error is None
    return {name: getattr(row, name) for name in DETERMINISTIC}, (folder / store.ADAPTER_FILE).read_bytes()


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], object], call: int = 1) -> None:
    """Does something before the first (or a later) call of a function."""
    original, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def corrupt() -> None:
    raise NolaVisionError("the image 3.png cannot be decoded")


def interrupted(config: run_id.Config, out: Path) -> Row | None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        runner.run(config, out)
    assert signal.getsignal(signal.SIGINT) == before  # a second Ctrl-C works
    return store.find_row(run_id.run_folder(out, config, "final"))


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that are not interrupted; each is done once."""
    return tmp_path_factory.mktemp("wholes")


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_in_the_test_phase_is_finished(
    case: str, wholes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(CASES[case][0], **CASES[case][1])
    whole = runner.run(config, wholes)
    if case == "stopped early":
        assert whole.epoch is not None and whole.epoch < 8
    with monkeypatch.context() as patch:
        once(patch, KShotDataModule, "test_dataloader", ctrl_c)
        row = interrupted(config, tmp_path / "stopped")
    assert row is not None and row.status == "interrupted" and row.train_loss == whole.train_loss
    with monkeypatch.context() as patch:  # found while the run is finished
        once(patch, KShotDataModule, "test_dataloader", corrupt)
        with pytest.raises(NolaVisionError, match="3.png"):
            runner.run(config, tmp_path / "stopped", ckpt_path="last")
    (run_id.run_folder(tmp_path / "stopped", config, "final") / store.ADAPTER_FILE).unlink()
    runner.run(config, tmp_path / "stopped", ckpt_path="last")
    assert result(config, tmp_path / "stopped") == result(config, wholes)


@pytest.mark.parametrize("call", [1, 3, 6])  # two steps per epoch: before there is a checkpoint, and after
def test_a_run_stopped_in_training_is_finished(
    call: int, wholes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("nola4", **AWARE)
    runner.run(config, wholes)
    with monkeypatch.context() as patch:
        once(patch, Classifier, "training_step", ctrl_c, call)
        row = interrupted(config, tmp_path / "stopped")
    assert row is not None and row.status == "interrupted"
    runner.run(config, tmp_path / "stopped", ckpt_path="last")
    assert result(config, tmp_path / "stopped") == result(config, wholes)


@pytest.mark.parametrize("moved", [False, True])
def test_the_best_epoch_is_found_under_another_path(
    moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("nola4", trainer={"callbacks": [BEST]})
    monkeypatch.chdir(tmp_path)
    whole = runner.run(config, Path("whole"))
    assert whole.epoch == 0
    with monkeypatch.context() as patch:
        once(patch, Classifier, "training_step", ctrl_c, 5)  # in the last epoch
        interrupted(config, Path("stopped"))
    out = tmp_path / "stopped"
    if moved:
        out = out.rename(tmp_path / "moved")
    runner.run(config, out, ckpt_path="last")
    assert result(config, out) == result(config, tmp_path / "whole")
    (best,) = out.rglob("val_loss/*.ckpt")  # the other epochs' files are gone
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for place in (out, tmp_path / "whole"):
        checkpoints.evaluate(config, place, "test", None)
        printed = re.search(r"test_accuracy\W+([\d.]+)", capsys.readouterr().out)
        assert printed and float(printed[1]) == pytest.approx(whole.test_accuracy, abs=1e-6)


def test_ctrl_c_while_the_row_is_written_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("1nn")
    once(monkeypatch, runner, "write_row", ctrl_c)
    row = interrupted(config, tmp_path)
    assert row is not None and row.status == "completed"
    assert runner.run(config, tmp_path, ckpt_path="last") == row  # and the hint on the screen is right


def test_a_ctrl_c_that_arrives_twice_is_handled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def twice() -> None:  # the terminal and a sweep's engine send one each
        try:
            ctrl_c()
        finally:
            ctrl_c()
            ended.append("cleanup")

    once(monkeypatch, AdaptedModel, "save", twice)
    row = interrupted(tiny("linear"), tmp_path)
    assert row is not None and row.status == "interrupted" and row.train_loss is not None
    assert ended == ["cleanup"]  # the second one did not interrupt it


def test_ctrl_c_before_training_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny("linear")
    once(monkeypatch, runner, "build", ctrl_c)
    assert interrupted(config, tmp_path / "out") is None
    assert not (tmp_path / "out").exists()
    row = runner.run(config, tmp_path / "out", ckpt_path="last")
    assert row.status == "completed" and "starts from scratch" in caplog.text
    (run_id.run_folder(tmp_path / "out", config, "final") / LAST_CHECKPOINT).unlink()
    caplog.clear()
    assert runner.run(config, tmp_path / "out", ckpt_path="last") == row
    with monkeypatch.context() as patch:  # another process of a distributed run
        patch.setattr(runner, "is_main_process", lambda *_: False)
        patch.setattr(runner, "_run", lambda *_: None)
        runner.run(config, tmp_path / "other", ckpt_path="last")
    assert "from scratch" not in caplog.text


def test_dropout_is_the_same_after_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Classifier.forward

    def with_dropout(self: Classifier, images: torch.Tensor) -> torch.Tensor:
        return forward(self, torch.nn.functional.dropout(images, 0.3, self.training))

    monkeypatch.setattr(Classifier, "forward", with_dropout)
    config = tiny("linear")
    runner.run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        once(patch, Classifier, "training_step", ctrl_c, 4)
        interrupted(config, tmp_path / "stopped")
    runner.run(config, tmp_path / "stopped", ckpt_path="last")
    assert result(config, tmp_path / "stopped") == result(config, tmp_path / "whole")


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(checkpoint: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for name in parents:
            checkpoint = checkpoint[int(name) if name.isdigit() else name]
        if value is None:
            del checkpoint[last]
        else:
            checkpoint[last] = value

    return damage


PROGRESS = "loops/fit_loop/epoch_progress/current/"
DAMAGE = [
    _set("loops", None),
    _set("loops", {}),
    _set("loops/fit_loop", None),
    _set("loops/fit_loop/epoch_loop.batch_progress", None),
    _set("loops/fit_loop/epoch_loop.state_dict", 3),
    _set(f"{PROGRESS}processed", 10**9),
    _set(f"{PROGRESS}processed", "2"),
    _set("epoch", None),
    _set("epoch", "two"),
    _set("epoch", 10**9),
    _set("epoch", -1),
    _set("global_step", 2.5),
    _set("global_step", 10**6),
    _set("callbacks", None),
    _set("callbacks", 1),
    _set("optimizer_states", None),
    _set("optimizer_states", []),
    _set("optimizer_states", [{"state": {}, "param_groups": []}]),
    _set("optimizer_states/0/state", 5),
    _set("optimizer_states/0/state", {0: {"step": "x"}}),
    _set("lr_schedulers", None),
    _set("lr_schedulers", [5]),
    _set("state_dict", [1]),
    _set("state_dict/model.bank.head_weight", "text"),
    _set("state_dict/model.bank.head_weight", torch.full((1, 10, 64), torch.nan)),
    _set("adapter", None),
    _set("adapter", "text"),
    _set("train_loss", "low"),
    _set("stopped", [1]),
]


def test_a_damaged_checkpoint_is_one_line_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny("linear")
    with monkeypatch.context() as patch:
        once(patch, Classifier, "training_step", ctrl_c, 5)
        row = interrupted(config, tmp_path)
    folder = run_id.run_folder(tmp_path, config, "final")
    whole = (folder / LAST_CHECKPOINT).read_bytes()
    wrong = {}
    for number, damage in enumerate(DAMAGE):
        (folder / LAST_CHECKPOINT).write_bytes(whole)
        checkpoint = torch.load(folder / LAST_CHECKPOINT, weights_only=True)
        damage(checkpoint)
        torch.save(checkpoint, folder / LAST_CHECKPOINT)
        try:
            runner.run(config, tmp_path, ckpt_path="last")
            wrong[number] = "accepted"
        except NolaVisionError as error:
            if "\n" in str(error) or str(LAST_CHECKPOINT) not in str(error) and "checkpoint" not in str(error):
                wrong[number] = str(error)
        except Exception as error:
            wrong[number] = repr(error)
        if store.find_row(folder) != row:
            wrong[number] = "row lost " + str(wrong.get(number))
            store.write_row(folder, row)

    assert wrong == {}
    (folder / LAST_CHECKPOINT).write_bytes(whole)
    assert runner.run(config, tmp_path, ckpt_path="last").status == "completed"


def test_a_run_whose_file_is_not_its_model_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Classifier.training_step

    def moving(self: Classifier, batch: Any, batch_idx: int) -> torch.Tensor:
        with torch.no_grad():  # as a method does whose changes the file does not hold
            self.model.backbone.norm.bias.add_(0.3)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Classifier, "training_step", moving)
    with pytest.raises(NolaVisionError, match="does not give the trained model back"):
        runner.run(tiny(), tmp_path)
    row = store.find_row(run_id.run_folder(tmp_path, tiny(), "final"))
    assert row is not None and row.status == "failed"


def test_trained_tensors_are_searched_only_after_a_loss_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[int] = []
    once(monkeypatch, AdaptedModel, "not_finite", lambda: searches.append(1))
    runner.run(tiny("full-ft"), tmp_path)
    assert len(searches) == 1 == sum(searches)  # at the end, by `save`
    step = Classifier.training_step

    def broken(self: Classifier, batch: Any, batch_idx: int) -> torch.Tensor:
        return step(self, batch, batch_idx) * (torch.nan if self.global_step == 2 else 1)

    monkeypatch.setattr(Classifier, "training_step", broken)
    blown = tiny("linear", trainer={"gradient_clip_val": None})
    with pytest.raises(NolaVisionError, match="after step 3 head.weight is not finite"):
        runner.run(blown, tmp_path)


def test_weights_that_are_not_finite_are_named_before_training(tmp_path: Path) -> None:
    weights = timm.create_model("vit_short").state_dict()
    weights["blocks.1.mlp.fc1.bias"][3] = torch.nan
    torch.save(weights, tmp_path / "w.pth")
    backbone = {"base": "pretrained", "file": str(tmp_path / "w.pth"), "img_size": 160}
    for method in ("linear", "1nn"):
        with pytest.raises(NolaVisionError, match=r"w\.pth: blocks.1.mlp.fc1.bias has a value that is not finite"):
            runner.run(tiny(method, model={"backbone": backbone}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_validate_and_test_evaluate_what_the_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = runner.build
    for module in (runner, checkpoints):
        monkeypatch.setattr(module, "build", lambda *given: built.append(original(*given)) or built[-1])
    every = {"check_val_every_n_epoch": 1}
    config = tiny("nola4", model={"method": {"init_args": {"bits": 2, "head_bits": 2}}}, trainer=every)
    row = runner.run(config, tmp_path)
    for verb, loss in (("validate", "val_loss"), ("test", "test_loss")):
        checkpoints.evaluate(config, tmp_path, verb, None)
        metrics = built[-1].trainer.callback_metrics
        assert float(metrics[loss]) == float(built[0].trainer.callback_metrics.get(loss, row.val_loss))
    assert float(metrics["test_accuracy"]) == row.test_accuracy
    # and in training: the last epoch's validation is that of the run
    losses = [line["val_loss"] for line in csv.DictReader(next(tmp_path.rglob("metrics.csv")).open())]
    assert float([loss for loss in losses if loss][2]) == pytest.approx(row.val_loss, rel=1e-5)
