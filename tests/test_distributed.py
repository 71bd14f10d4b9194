"""Two processes on two CPU devices (gloo): the same losses and accuracies as one process, and one row."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from nola_vision.evaluation.predictions import load_predictions
from nola_vision.runs import store
from nola_vision.runs.record import Row
from nola_vision.runs.thumbnails import load_thumbnails

pytestmark = pytest.mark.slow  # processes of their own, each of which imports torch

FIT = """fit --config quickstart.yaml --threads 1 --trainer.max_epochs 3 --trainer.check_val_every_n_epoch 3
    --trainer.enable_progress_bar false --data.shots 3 --data.batch_size 10 --data.test_limit 101""".split()


def fit(out: Path, method: str, *options: str) -> tuple[Row, pd.DataFrame, str]:
    command = [sys.executable, "-m", "nola_vision.cli.main", *FIT, f"--out={out}", f"--method={method}", *options]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stderr
    rows, problems = store.read_rows(out)
    assert not problems
    (row,) = [row for row in rows if row.method == method]  # next to those of frozen features
    assert row.folder is not None
    return row, pd.read_csv(row.folder / "metrics.csv"), ended.stdout


@pytest.mark.parametrize("method", ["nola", "full-ft"])
def test_two_processes_train_as_one(method: str, tmp_path: Path) -> None:
    one, log, _ = fit(tmp_path / "one", method)
    two, log_of_two, printed = fit(tmp_path / "two", method, "--trainer.devices=2", "--trainer.strategy=ddp")
    assert one.run_hash != two.run_hash and one.threads == two.threads == 1
    losses, of_two = log["train_loss"].dropna(), log_of_two["train_loss"].dropna()
    assert len(losses) == 3 and of_two.tolist() == pytest.approx(losses.tolist(), rel=1e-5)
    # 101 test images and 177 of validation do not divide by two
    assert two.val_loss == pytest.approx(one.val_loss, rel=1e-3)
    assert (two.val_accuracy, two.test_accuracy) == (one.val_accuracy, one.test_accuracy)
    # each process has a part of the validation pool, and the temperature is of all
    assert two.temperature == pytest.approx(one.temperature, rel=1e-3) and two.calibrated_on == "validation"
    assert two.held_out_nll == pytest.approx(one.held_out_nll, rel=1e-3)
    names = ("balanced_accuracy", "macro_f1", "top5_accuracy", "test_nll")
    for name in names:
        assert getattr(two, name) == pytest.approx(getattr(one, name), rel=1e-3), name
    a, b = load_predictions(one.folder), load_predictions(two.folder)
    assert a is not None and b is not None and a.index.tolist() == b.index.tolist() == sorted(set(a.index.tolist()))
    assert len(a.index) == 101 and (a.label == b.label).all() and (a.predicted == b.predicted).all()
    assert b.probability == pytest.approx(a.probability, abs=1e-3)
    shown = [set(load_thumbnails(row.folder)) for row in (one, two) if row.folder]
    assert [len(indices) for indices in shown] == [min(24, int((~a.correct).sum()))] * 2
    assert printed.count("test accuracy") == 1  # the second process prints nothing


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nola_vision.cli.main", *FIT, f"--out={tmp_path}", "--data.batch_size=9"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2 and "make it a multiple of 2" in ended.stderr
