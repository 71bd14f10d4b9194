"""Runs on a data set without a test split: folds as runs, the estimate, what is repeated and what is not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score, f1_score

from nola_vision import load_adapter
from nola_vision.adapters.serialization import open_adapter
from nola_vision.cli.main import main
from nola_vision.evaluation.predictions import load_predictions
from nola_vision.runs import run_id
from nola_vision.runs.parsing import open_data
from nola_vision.runs.record import Row
from nola_vision.runs.store import read_row, read_rows
from nola_vision.runs.thumbnails import load_thumbnails
from nola_vision.training import frozen

PER_CLASS = 6


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of six digits, and one of a single digit. The first image is mislabelled."""
    folder, digits = tmp_path_factory.mktemp("photos"), load_digits()
    for label, count in enumerate([PER_CLASS, PER_CLASS, PER_CLASS, 1]):
        place = folder / f"class {label}"
        place.mkdir()
        for number, index in enumerate(np.flatnonzero(digits.target == label)[:count]):
            shown = index if (label, number) != (0, 0) else np.flatnonzero(digits.target == 1)[PER_CLASS]
            pixels = np.round(digits.images[shown] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


def fit(photos: Path, out: Path, *options: str) -> int:
    words = ["fit", str(photos), "--backbone", "quickstart", "--epochs", "1", "--device", "cpu", "--out", str(out)]
    learnt = "--model.method.lr=0.05"  # something in one epoch
    return main([*words, "--threads", "1", learnt, *options])


def final_row(out: Path, method: str = "nola") -> Row:
    rows, problems = read_rows(out)
    assert not problems
    (row,) = [row for row in rows if row.stage == "final" and row.method == method]
    return row


def fold_rows(out: Path) -> list[Row]:
    return sorted((row for row in read_rows(out)[0] if row.stage == "fold"), key=lambda row: row.config["data"]["fold"])


@pytest.fixture(scope="module")
def fitted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen, "CS", (0.1, 10.0))  # a third of the fits of logistic regression
        assert fit(photos, out) == 0
    return out


def test_the_estimate_is_that_of_the_folds(photos: Path, fitted: Path) -> None:
    row, folds = final_row(fitted), fold_rows(fitted)
    assert len(folds) == 5 and row.estimate is not None and row.test_accuracy is None
    tested = [load_predictions(fold.folder) for fold in folds if fold.folder]
    right = [int((part.predicted == part.label).sum()) for part in tested if part]
    images = [len(part.index) for part in tested if part]
    assert sum(images) == 3 * PER_CLASS  # each once; the single image of a class never
    assert (row.estimate["correct"], row.estimate["images"]) == (sum(right), sum(images))
    assert row.estimate["folds"] == [r / n for r, n in zip(right, images, strict=True)]
    assert row.estimate["untested_classes"] == ["class 3"]
    pooled = load_predictions(row.folder) if row.folder else None
    assert pooled is not None and pooled.logits is None
    logits = np.concatenate([part.logits for part in tested if part])[
        np.argsort(np.concatenate([part.index for part in tested if part]))
    ]
    calibrated = softmax(logits.astype(float) / row.temperature, axis=1).max(axis=1)
    assert row.temperature != 1 and pooled.probability == pytest.approx(calibrated, abs=1e-6)
    assert pooled.index.tolist() == sorted(np.concatenate([part.index for part in tested if part]).tolist())
    assert row.balanced_accuracy == pytest.approx(balanced_accuracy_score(pooled.label, pooled.predicted))
    assert row.macro_f1 == pytest.approx(f1_score(pooled.label, pooled.predicted, average="macro", zero_division=0))
    assert row.test_nll == pytest.approx(row.held_out_nll, rel=1e-4) and row.top5_accuracy is None
    assert row.folder is not None and (row.folder / "confusion.csv").is_file()
    thumbnails, wrong = load_thumbnails(row.folder), pooled.index[~pooled.correct].tolist()
    names = [f"class {label}/{number}.png" for label in range(3) for number in range(PER_CLASS)]
    assert {index: one.name for index, one in thumbnails.items()} == {index: names[index] for index in wrong}
    assert 0 in wrong and not any(load_thumbnails(fold.folder) for fold in folds if fold.folder)
    assert row.data["counts"]["train"] == 3 * PER_CLASS + 1  # the final adapter sees every image
    for fold, part in zip(folds, tested, strict=True):
        assert part is not None and fold.data["draw"] is None and not set(part.index) & set(trained_on(fold))


def trained_on(fold: Row) -> list[int]:
    """The positions of a fold's training images."""
    return [int(index) for index in open_data(fold.config)._train_set[1]]


def test_the_file_is_calibrated_on_the_folds(fitted: Path) -> None:
    row = final_row(fitted)
    assert row.folder is not None and row.calibrated_on == "folds"
    model = load_adapter(row.folder / "adapter.safetensors")
    assert model.temperature == pytest.approx(row.temperature) and model.calibrated_on == "folds"


def test_a_finished_fit_is_not_repeated_unless_asked(
    photos: Path, fitted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {row.run_hash: (row.started, row.seconds_total) for row in read_rows(fitted)[0]}
    assert fit(photos, fitted) == 0
    assert "this run is completed: --again repeats it" in capfd.readouterr().out
    assert {row.run_hash: (row.started, row.seconds_total) for row in read_rows(fitted)[0]} == before


@pytest.mark.slow
def test_the_estimate_may_come_later(photos: Path, tmp_path: Path, fitted: Path) -> None:
    assert fit(photos, tmp_path, "--estimate", "none") == 0
    row = final_row(tmp_path)
    assert row.estimate is None and row.temperature is None and not fold_rows(tmp_path)
    assert row.folder is not None
    file = row.folder / "adapter.safetensors"
    trained = {name: tensor.clone() for name, tensor in open_adapter(file).tensors().items()}
    assert fit(photos, tmp_path, "--estimate", "folds") == 0
    later = final_row(tmp_path)
    assert later.started == row.started and later.estimate == final_row(fitted).estimate
    assert later.adapter_file_bytes == file.stat().st_size
    assert load_thumbnails(row.folder) == load_thumbnails(final_row(fitted).folder)  # type: ignore[arg-type]
    assert load_adapter(file).temperature == pytest.approx(later.temperature)
    assert all((tensor == trained[name]).all() for name, tensor in open_adapter(file).tensors().items())
    assert file.read_bytes() == (final_row(fitted).folder / "adapter.safetensors").read_bytes()  # type: ignore[operator]


@pytest.mark.slow
def test_a_fold_that_was_not_completed_is_done_again(photos: Path, tmp_path: Path, fitted: Path) -> None:
    shutil.copytree(fitted, tmp_path / "runs")
    out = tmp_path / "runs"
    lost, other = fold_rows(out)[1:3]
    assert lost.folder is not None and other.folder is not None
    stated = json.loads((lost.folder / "row.json").read_text())
    (lost.folder / "row.json").write_text(json.dumps({**stated, "status": "interrupted", "error": "interrupted"}))
    final = final_row(out)
    assert final.folder is not None
    shutil.rmtree(final.folder)
    assert fit(photos, out) == 0
    assert read_row(lost.folder / "row.json").status == "completed"
    assert read_row(other.folder / "row.json").started == other.started
    assert final_row(out).estimate == final.estimate


@pytest.mark.slow
def test_what_a_completed_run_lacks_is_repeated(
    photos: Path, tmp_path: Path, fitted: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = Path(shutil.copytree(fitted, tmp_path / "runs"))
    folds, final = fold_rows(out), final_row(out)
    assert final.folder is not None and all(fold.folder for fold in folds)
    damaged, lost, other, bare, kept = (fold.folder or out for fold in folds)
    (damaged / "predictions.safetensors").write_bytes(b"damaged")
    (lost / "predictions.safetensors").unlink()
    found = load_predictions(other)
    assert found is not None
    dataclasses.replace(found, logits=None).save(other)
    stated = json.loads((bare / "row.json").read_text())
    (bare / "row.json").write_text(json.dumps({**stated, "data": {}}))
    adapter = final.folder / "adapter.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-4] + b"\0\1\2\3")
    started = read_row(kept / "row.json").started
    assert fit(photos, out) == 0
    warned = [message for message in caplog.messages if "this run was completed, but it is repeated" in message]
    for path in (
        damaged / "predictions.safetensors is damaged: ",
        lost / "predictions.safetensors does not exist",
        other / "predictions.safetensors lacks logits",
        bare / "row.json lacks data.class_names",
        final.folder / "adapter.safetensors was changed or damaged",
    ):
        assert sum(str(path) in message for message in warned) == 1
    assert len(warned) == 5 and read_row(kept / "row.json").started == started
    assert final_row(out).estimate == final.estimate
    assert adapter.read_bytes() == (final_row(fitted).folder / "adapter.safetensors").read_bytes()  # type: ignore[operator]

    capfd.readouterr(), caplog.clear()
    (final.folder / "predictions.safetensors").write_bytes(b"damaged")  # only the comparison needs it
    nearest = final_row(out, "1nn").folder
    assert nearest is not None
    (nearest / "predictions.safetensors").write_bytes(b"")
    assert fit(photos, out) == 0
    printed = capfd.readouterr()
    assert f"{final.folder}/predictions.safetensors is damaged" in printed.err
    assert f"{nearest}/predictions.safetensors is damaged" in printed.err
    assert "nola: " in printed.out and "nola against" not in printed.out

    for name, label in (("nola", 0), *((name, 1) for name in run_id.FROZEN_METHODS)):
        place = final_row(out, name).folder
        found = load_predictions(final_row(fitted, name).folder or out)
        assert place is not None and found is not None
        dataclasses.replace(found, label=(found.label + label) % 4).save(place)
    assert fit(photos, out) == 0
    assert "the methods are not compared: an image has another label" in capfd.readouterr().err


@pytest.mark.slow
def test_settings_are_chosen_inside_the_fold(photos: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    assert main(["init", str(photos), "--backbone", "quickstart", "--epochs", "1", "--out", str(config)]) == 0
    text = config.read_text()
    out = tmp_path / "runs"
    words = ["fit", "--config", str(config), "--threads", "1", "--trainer.accelerator", "cpu", "--out", str(out)]
    assert "search:" in text
    assert main([*words, "--search", "--method", "linear"]) == 0
    rows = read_rows(out)[0]
    searched = [row for row in rows if row.stage == "search"]
    folds = [row for row in rows if row.stage == "fold"]
    assert len(folds) == 5 and len(searched) > 6
    for row in searched:
        if (fold := row.config["data"]["fold"]) is None:
            continue
        (tested,) = [part for part in folds if part.config["data"]["fold"] == fold]
        predictions = load_predictions(tested.folder) if tested.folder else None
        module = open_data(row.config)
        used = {*map(int, module._train_set[1]), *map(int, module._pool_set[1])}
        assert predictions is not None and not used & set(predictions.index.tolist())
        assert row.data["counts"]["validation"] > 0
        best = min(
            (-(one.val_accuracy or 0), one.val_loss or 0, one.learning_rate or 0)
            for one in searched
            if one.config["data"]["fold"] == fold
        )
        assert tested.learning_rate == best[2]
