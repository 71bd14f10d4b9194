"""One run from config to row: on the shipped backbone and the bundled digits, made short; details on a small ViT."""

import errno
import io
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score, f1_score

from nola_vision import load_adapter
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.mappings import overlay
from nola_vision.evaluation.calibration import fit_temperature
from nola_vision.evaluation.predictions import load_predictions
from nola_vision.reports.confusion import read_confusion
from nola_vision.runs import checkpoints, run_id, runner, store
from nola_vision.runs.config_files import load_configs
from nola_vision.runs.parsing import build, parse
from nola_vision.runs.record import DETERMINISTIC
from nola_vision.runs.thumbnails import load_thumbnails
from tiny import TINY

SHORT = {
    "threads": 1,
    "data": {"test_limit": 60, "shots": 2},
    "trainer": {"max_epochs": 3, "check_val_every_n_epoch": 3, "enable_progress_bar": False},
}
pytestmark = pytest.mark.usefixtures("kept")


def config(method: str = "nola", **changes: object) -> run_id.Config:
    """The quick start's run config of one entry, made short."""
    return parse(overlay(run_id.resolve(overlay(load_configs(["quickstart.yaml"]), SHORT), method), changes))


def small(method: str = "nola", model: dict | None = None, **changes: object) -> run_id.Config:
    """The same on two blocks of a small ViT with random weights."""
    return config(method, model={"backbone": TINY["model"]["backbone"], **(model or {})}, **changes)


@pytest.fixture(scope="module")
def rows(kept: None, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("runs")
    names = load_configs(["quickstart.yaml"])["methods"]
    return {"out": out, **{name: runner.run(config(name), out) for name in names}}


def test_every_method_runs_to_a_row(rows: dict) -> None:
    for name, row in rows.items():
        if name == "out":
            continue
        assert row.status == "completed" and row.error is None
        assert store.read_row(run_id.run_folder(rows["out"], config(name), "final") / "row.json") == row
        assert 0 <= row.test_accuracy <= 1 and abs(row.test_accuracy * 60 - round(row.test_accuracy * 60)) < 1e-4
        assert row.threads == 1 and row.device == "cpu" and row.other_parameters == 0
        assert row.data["counts"]["train"] == 20 and len(row.data["draw"]) == 20
    assert rows["1nn"].head_parameters == 0 and rows["1nn"].adapter_file_bytes is None and rows["1nn"].init is None
    assert rows["linear"].adapter_parameters == 0 and rows["linear"].head_parameters == 1610
    assert rows["full-ft"].adapter_parameters == 1_874_400
    assert rows["lora-r4"].adapter_parameters == 6 * 4 * (160 + 480)
    assert rows["nola"].adapter_parameters == 18 * 2 * rows["nola"].config["model"]["method"]["init_args"]["num_basis"]
    assert rows["nola"].adapter_parameters <= rows["lora-r4"].adapter_parameters / 2


def test_every_tested_run_leaves_its_confusions(rows: dict) -> None:
    for name in ("1nn", "nola"):
        row = rows[name]
        counts = read_confusion(run_id.run_folder(rows["out"], config(name), "final") / "confusion.csv")
        assert list(counts.index) == list(counts.columns) == [str(digit) for digit in range(10)], name
        assert np.trace(counts) / counts.to_numpy().sum() == pytest.approx(row.test_accuracy, abs=1e-6)


def test_every_tested_run_leaves_thumbnails_of_its_mistakes(rows: dict) -> None:
    pixels = load_digits().images[-899:] * 255 / 16  # the test split of digits
    for name in ("1nn", "nola"):
        predictions = load_predictions(rows[name].folder)
        assert predictions is not None
        wrong = predictions.index[~predictions.correct]
        found = load_thumbnails(rows[name].folder)
        assert len(found) == min(24, len(wrong)) > 0 and set(found) <= set(wrong.tolist()), name
        for index, one in found.items():
            assert (one.index, one.name) == (index, f"digits[{index}]")
            stored = np.asarray(Image.open(io.BytesIO(one.jpeg)).convert("L"), dtype=float)
            assert np.abs(stored - pixels[index]).mean() < 10, index


def test_a_row_has_the_metrics_of_its_confusions(rows: dict) -> None:
    for name in ("1nn", "nearest-mean", "logistic", "linear", "nola"):
        row = rows[name]
        counts = read_confusion(run_id.run_folder(rows["out"], config(name), "final") / "confusion.csv").to_numpy()
        true, predicted = (np.repeat(grid.ravel(), counts.ravel()) for grid in np.indices(counts.shape))
        assert row.balanced_accuracy == pytest.approx(balanced_accuracy_score(true, predicted), abs=1e-6)
        assert row.macro_f1 == pytest.approx(f1_score(true, predicted, average="macro"), abs=1e-6)
        assert row.test_accuracy < row.top5_accuracy <= 1
        assert row.test_nll is None if name == "1nn" else 0 < row.test_nll < 3


def test_the_adapter_file_holds_what_was_tested(rows: dict) -> None:
    folder = run_id.run_folder(rows["out"], config("nola"), "final")
    model = load_adapter(folder / store.ADAPTER_FILE)
    built = build(config("nola"), folder / "again")
    built.datamodule.setup("test")
    right = total = loss = 0
    scores = []
    with torch.inference_mode():
        for images, labels in built.datamodule.test_dataloader():
            logits = model(images)
            scores.append(logits)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            total += len(labels)
    assert right / total == pytest.approx(rows["nola"].test_accuracy, abs=1e-6)
    assert loss / total == pytest.approx(rows["nola"].test_nll, rel=1e-5)
    assert (folder / store.ADAPTER_FILE).stat().st_size == rows["nola"].adapter_file_bytes
    # the stored probabilities are those that `predict` gives: calibrated
    found = load_predictions(folder)
    assert found is not None and found.logits is None and model.temperature != 1
    expected = torch.softmax(torch.cat(scores).double() / model.temperature, 1).max(1).values
    assert found.probability == pytest.approx(expected.numpy(), abs=1e-4)


def test_the_temperature_is_fitted_on_the_validation_pool(rows: dict) -> None:
    row, folder = rows["nola"], run_id.run_folder(rows["out"], config("nola"), "final")
    model, built = load_adapter(folder / store.ADAPTER_FILE), build(config("nola"), folder / "again")
    built.datamodule.setup("fit")
    with torch.inference_mode():
        batches = [(model(images), labels) for images, labels in built.datamodule.val_dataloader()]
    logits, labels = torch.cat([one for one, _ in batches]), torch.cat([labels for _, labels in batches])
    assert model.temperature == row.temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-4)
    assert (model.calibrated_on, model.calibration_images) == (row.calibrated_on, len(labels)) == ("validation", 177)
    assert row.held_out_nll == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert row.held_out_nll == pytest.approx(row.val_loss, rel=1e-5)
    assert row.held_out_nll_calibrated < row.held_out_nll and row.held_out_ece is None  # of fewer than 500 images
    assert rows["1nn"].temperature is None


def test_the_same_seeds_give_the_same_columns(rows: dict, tmp_path: Path) -> None:
    torch.manual_seed(77)
    torch.rand(3)
    again = runner.run(config("nola"), tmp_path)
    for column in DETERMINISTIC:
        assert getattr(again, column) == getattr(rows["nola"], column), column


def test_run_seed_changes_the_start_and_not_the_set(rows: dict, tmp_path: Path) -> None:
    other = runner.run(config("nola", model={"run_seed": 1}), tmp_path)
    assert other.data["draw"] == rows["nola"].data["draw"]
    assert other.train_loss != rows["nola"].train_loss
    assert other.run_hash != rows["nola"].run_hash and other.entry_hash == rows["nola"].entry_hash
    split = runner.run(config("1nn", data={"split_seed": 1}), tmp_path)
    assert split.data["draw"] != rows["1nn"].data["draw"]


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("photos/train/ant/1.png", {"data": {"dataset": "folder", "root": "photos"}}),
        ("photos/imagenet100.txt", {"data": {"dataset": "imagenet100", "root": "photos"}}),
        ("m.json", {"data": {"manifest": "m.json"}}),
        ("w.safetensors", {"model": {"backbone": {"file": "w.safetensors"}}}),
    ],
)
def test_what_a_config_names_by_a_path_is_in_the_hash(
    file: str, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(file).parent.mkdir(parents=True, exist_ok=True)

    def hash_with(content: str) -> str:
        Path(file).write_text(content)
        return run_id.run_hash(config(**changes), "final")

    assert hash_with("n1\n") == hash_with("n1\n") != hash_with("n1\nn2\n")


def test_search_stops_before_the_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("the test set was touched")

    monkeypatch.setattr("nola_vision.data.datamodule.KShotDataModule.test_dataloader", touched)
    checks: list[int] = []
    monkeypatch.setattr("nola_vision.runs.measuring.check_saved", lambda *_: checks.append(1))
    row = runner.run(small("linear"), tmp_path, "search")
    assert row.stage == "search" and row.test_accuracy is None and row.val_accuracy is not None
    assert not checks  # of the saved file
    with pytest.raises(AssertionError):
        runner.run(small("linear"), tmp_path, "final")
    assert checks == [1]


def test_a_checkpoint_is_small_and_resumes_to_the_same_losses(tmp_path: Path) -> None:
    whole = build(config(), tmp_path / "whole")
    whole.trainer.fit(whole.model, datamodule=whole.datamodule)
    saved = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(saved, weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"model.bank.{n}" for n, _ in whole.model.model.bank.named_parameters()}
    numbers = sum(p.numel() for p in whole.model.model.bank.parameters())
    assert saved.stat().st_size < 4 * 3 * numbers + 60_000  # weights and Adam's two moments; the backbone is 7.5 MB

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
            if trainer.current_epoch == 1:
                raise RuntimeError("stop")

    half = build(config(), tmp_path / "half")
    half.trainer.callbacks.insert(0, Stop())
    with pytest.raises(RuntimeError, match="stop"):
        half.trainer.fit(half.model, datamodule=half.datamodule)
    rest = build(config(), tmp_path / "rest")
    with torch.no_grad():  # what the checkpoint must bring back
        for parameter in rest.model.model.bank.parameters():
            parameter.add_(1)
    rest.trainer.fit(
        rest.model, datamodule=rest.datamodule, ckpt_path=tmp_path / "half/checkpoints/last.ckpt", weights_only=True
    )
    for one, other in zip(whole.model.model.bank.parameters(), rest.model.model.bank.parameters(), strict=True):
        assert torch.equal(one, other)
    assert rest.trainer.callback_metrics["train_loss"] == whole.trainer.callback_metrics["train_loss"]

    for changes, named in (
        ({"method": {"init_args": {"c": 64}}}, r"another method.c \(16"),
        ({"basis_seed": 9}, "another basis_seed"),
    ):
        other = build(config(model=changes), tmp_path / "other")
        with pytest.raises(NolaVisionError, match=named):
            other.trainer.fit(other.model, datamodule=other.datamodule, ckpt_path=saved, weights_only=True)


def test_resuming_a_finished_run_keeps_it(tmp_path: Path) -> None:
    done = runner.run(small("linear"), tmp_path)
    folder = run_id.run_folder(tmp_path, small("linear"), "final")
    log = (folder / "metrics.csv").read_text()
    assert runner.run(small("linear"), tmp_path, ckpt_path="last") == done
    assert runner.run(small("linear"), tmp_path) == done  # as for `fit` typed twice
    assert store.read_row(folder / "row.json") == done
    assert (folder / "metrics.csv").read_text() == log


def test_only_its_own_run_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    runner.run(small("linear"), tmp_path)
    saved = run_id.run_folder(tmp_path, small("linear"), "final") / "checkpoints" / "last.ckpt"
    for changes in ({"data": {"split_seed": 3}}, {"trainer": {"max_epochs": 9}}):
        other = small("linear", **changes)
        folder = run_id.run_folder(tmp_path, other, "final")
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("an old log")
        with pytest.raises(NolaVisionError, match="resume with the settings that it was started with"):
            runner.run(other, tmp_path, ckpt_path=str(saved))
        assert (folder / "metrics.csv").read_text() == "an old log"  # refused before anything is touched
        assert runner.run(other, tmp_path, ckpt_path=str(saved), keep_going=True).status == "failed"
    saved.write_bytes(b"damaged")
    with pytest.raises(NolaVisionError, match="damaged or not a checkpoint"):
        checkpoints.evaluate(small("linear"), tmp_path, "test", None)
    torch.save([1], saved)
    with pytest.raises(NolaVisionError, match="last.ckpt is not a Lightning checkpoint"):
        checkpoints.evaluate(small("linear"), tmp_path, "test", None)
    with pytest.raises(NolaVisionError, match="1nn is fitted without training"):
        runner.run(small("1nn"), tmp_path, ckpt_path=str(saved))
    assert runner.run(small("1nn"), tmp_path, ckpt_path="last").status == "completed"


def test_a_loss_that_is_no_number_is_not_hidden(tmp_path: Path) -> None:
    built = build(small("linear"), tmp_path)
    with torch.no_grad():
        built.model.model.bank.head_bias.fill_(torch.nan)
    built.trainer.validate(built.model, datamodule=built.datamodule, verbose=False)
    assert math.isnan(built.trainer.callback_metrics["val_loss"])


def test_the_last_checkpoint_is_the_trained_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exact = {"method": {"init_args": {"head_bits": 32}}}  # the file has what the checkpoint has, not rounded
    uneven = small("linear", model=exact, trainer={"check_val_every_n_epoch": 2})
    runner.run(uneven, tmp_path)
    assert "weights_only" not in caplog.text  # Lightning would log a line for each epoch
    folder = run_id.run_folder(tmp_path, uneven, "final")
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    trained = load_adapter(folder / store.ADAPTER_FILE)
    assert torch.equal(checkpoint["model.bank.head_weight"], trained.bank.head_weight)


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(trainer: L.Trainer, path: Path, **_: object) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.raises(NolaVisionError, match=r"last.ckpt cannot be written \(PytorchStreamWriter .*\): make room"):
        runner.run(small("linear"), tmp_path)
    assert not list((run_id.run_folder(tmp_path, small("linear"), "final") / "checkpoints").iterdir())


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
@pytest.mark.parametrize("method", ["1nn", "nola"])
def test_other_precisions_run(method: str, precision: str, tmp_path: Path) -> None:
    few = {"data": {"eval_batch_size": 20}, "trainer": {"precision": precision, "limit_val_batches": 1}}
    row = runner.run(config(method, **few, model={"backbone": {"tag": "vit_mini_patch4_32.contours"}}), tmp_path)
    assert row.status == "completed" and row.test_accuracy > 0.3


def test_warm_up_counts_optimizer_steps_and_max_steps_alone_is_enough(tmp_path: Path) -> None:
    changes = {"accumulate_grad_batches": 2, "max_epochs": -1, "max_steps": 3}
    method = {"init_args": {"lr": 0.005}}
    built = build(small(model={"warmup_epochs": 1, "method": method}, trainer=changes), tmp_path)
    rates = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:  # type: ignore[no-untyped-def]
            rates.append(optimizer.param_groups[0]["lr"])

    built.trainer.callbacks.append(Watch())
    built.trainer.fit(built.model, datamodule=built.datamodule)
    # two batches an epoch make one step: one step of warm-up, then the top of a cosine over two
    assert rates == pytest.approx([0.0025, 0.005, 0.0025], rel=1e-3)


def test_a_resnet_with_adapted_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = timm.create_model("resnet10t", zero_init_last=False)
    convolutions, weights = sum(isinstance(m, torch.nn.Conv2d) for m in source.modules()), source.state_dict()
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    backbone = {"tag": "resnet10t.c3_in1k", "file": str(tmp_path / "w.safetensors"), "img_size": 32}
    method = {"class_path": "NOLA", "init_args": {"targets": "conv", "num_basis": 8, "c": 1}}
    changes = {"method": "conv", "methods": {"conv": method}, "model": {"backbone": backbone}}
    plain = run_id.resolve(overlay(overlay(load_configs(["quickstart.yaml"]), SHORT), changes))
    row = runner.run(parse(plain), tmp_path)
    assert row.status == "completed" and row.adapter_parameters == 2 * 8 * convolutions
    path = next(tmp_path.rglob("adapter.safetensors"))
    loaded = load_adapter(path, backbone["file"])  # its fingerprint covers the weights
    kept = loaded.backbone.state_dict()
    assert all(torch.equal(kept[name], weights[name]) for name in kept)


def test_learning_rates_of_head_and_adapter_are_apart(tmp_path: Path) -> None:
    method = {"method": {"init_args": {"lr": 0.25, "head_lr": 0.5}}}
    built = build(small("nola", model={**method, "warmup_epochs": 1}), tmp_path)
    rates: dict[str, list[float]] = {"adapter": [], "head": []}

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, index) -> None:  # type: ignore[no-untyped-def]
            for group in trainer.optimizers[0].param_groups:
                rates[group["name"]].append(group["lr"])

    built.trainer.callbacks.append(Watch())
    built.trainer.fit(built.model, datamodule=built.datamodule)
    for name, lr in (("adapter", 0.25), ("head", 0.5)):
        # 2 steps an epoch: a linear rise over 2 steps, then half a cosine to 1e-6 over 4
        rise = [lr / 3, lr * 2 / 3]
        fall = [1e-6 + (lr - 1e-6) * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
        assert rates[name] == pytest.approx(rise + fall, rel=1e-6)


def test_a_failed_run_leaves_a_row(tmp_path: Path) -> None:
    failing = small("nola", data={"shots": 75})
    with pytest.raises(NolaVisionError, match="75"):
        runner.run(failing, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # a mistake that shows before training leaves nothing
    assert runner.run(failing, tmp_path, keep_going=True).status == "failed"
    row = store.read_row(run_id.run_folder(tmp_path, failing, "final") / "row.json")
    assert row.status == "failed" and "75" in row.error and row.test_accuracy is None
    blown = small("nola", model={"method": {"init_args": {"lr": 1e9}}}, trainer={"gradient_clip_val": None})
    with pytest.raises(NolaVisionError, match=r"after step \d adapter\.\S+ of blocks\.0\.\S+ is not finite"):
        runner.run(blown, tmp_path)
    folder = run_id.run_folder(tmp_path, blown, "final")
    assert store.read_row(folder / "row.json").status == "failed" and not (folder / store.ADAPTER_FILE).exists()


def test_a_full_disk_ends_a_sweep_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were a failed run, a search would choose among the runs that had room."""

    def full(*_: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "adapter.safetensors")
        except OSError as error:
            raise NolaVisionError("adapter.safetensors cannot be written: give another path") from error

    monkeypatch.setattr("nola_vision.models.adapted_model.AdaptedModel.save", full)
    with pytest.raises(NolaVisionError, match="No space left on device.*free disk space"):
        runner.run(small("linear"), tmp_path, keep_going=True)
    row = store.read_row(run_id.run_folder(tmp_path, small("linear"), "final") / "row.json")
    assert row.status == "failed" and "cannot be written" in str(row.error)


def test_a_run_refuses_links_that_lead_out_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_id.run_folder(tmp_path, small("linear"), "final")
    (folder / "checkpoints").mkdir(parents=True)
    (tmp_path / "outside").write_text("precious")
    (folder / "checkpoints" / "latest.ckpt").symlink_to("last.ckpt")  # `save_last="link"` of Lightning makes these
    for name in (store.ADAPTER_FILE, "traceback.txt", "metrics.csv", "checkpoints/last.ckpt"):
        (folder / name).symlink_to(tmp_path / "outside")
        with pytest.raises(NolaVisionError, match="is a symbolic link to .*outside"):
            runner.run(small("linear"), tmp_path, keep_going=True)
        (folder / name).unlink()
    (folder / "traceback.txt").mkdir()  # it cannot be written, which does not hide the error
    with monkeypatch.context() as patched:
        patched.setattr("nola_vision.models.adapted_model.AdaptedModel.save", "no function")
        assert "TypeError" in str(runner.run(small("linear"), tmp_path, keep_going=True).error)
    assert runner.run(small("linear"), tmp_path).status == "completed"
    assert (tmp_path / "outside").read_text() == "precious"


def test_a_damaged_row_is_replaced_and_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("a file cannot be written")

    path = run_id.run_folder(tmp_path, small("linear"), "final") / "row.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff")
    monkeypatch.setattr("nola_vision.models.adapted_model.AdaptedModel.save", full)
    with pytest.raises(OSError, match="a file cannot be written"):
        runner.run(small("linear"), tmp_path)
    row = store.read_row(path)
    assert row.status == "failed" and "a file cannot be written" in str(row.error)
    assert f"replaces one that cannot be read: {path}" in caplog.text


@pytest.mark.slow  # a process that imports torch; tests/test_resume.py interrupts runs in this one
def test_ctrl_c_leaves_a_row_marked_interrupted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nola_vision.cli.main", "fit", "--config", "quickstart.yaml", "--threads=1"]
    quiet = ["--trainer.max_epochs=100000", "--trainer.enable_progress_bar=false", f"--out={tmp_path}"]
    quiet += ["--data.shots=1", "--data.test_limit=20"]

    def heed() -> None:  # a shell's background jobs start with Ctrl-C ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command + quiet, preexec_fn=heed, **pipes)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    (path,) = tmp_path.rglob("nola/*/row.json")  # next to those of the frozen features
    assert json.loads(path.read_text())["status"] == "interrupted"


def test_logs_are_always_written(rows: dict) -> None:
    folder = run_id.run_folder(rows["out"], config("nola"), "final")
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    assert {"train_loss", "val_accuracy", "epoch"} <= set(header.split(","))
