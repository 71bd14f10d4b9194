"""Folders of runs with made-up figures, as a sweep leaves them: rows, logs, predictions, confusions, thumbnails."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from PIL import Image

from nola_vision.evaluation.confusion import CONFUSION_FILE, confusion_csv
from nola_vision.evaluation.estimates import Estimate
from nola_vision.evaluation.predictions import PREDICTIONS_FILE
from nola_vision.runs.record import Row
from nola_vision.runs.store import ROW_FILE
from nola_vision.runs.thumbnails import SIDE, THUMBNAILS_FILE


class Method(NamedTuple):
    """A method and what it reaches; frozen-feature methods have no file."""

    name: str
    method_class: str
    accuracy: float
    file_bytes: int | None = None


METHODS = (
    Method("1nn", "NearestNeighbor", 0.70),
    Method("nearest-mean", "NearestMean", 0.74),
    Method("logistic", "LogisticRegression", 0.79),
    Method("linear", "LinearProbe", 0.78, 155_000),
    Method("full-ft", "FullFinetune", 0.72, 88_400_000),
    Method("lora-r4", "LoRA", 0.815, 2_360_000),
    Method("pranc", "PRANC", 0.76, 170_000),
    Method("nola", "NOLA", 0.82, 192_000),
)
FROZEN = ("1nn", "nearest-mean", "logistic")


def write_runs(
    folder: Path,
    class_names: Sequence[str],
    methods: Sequence[Method] = METHODS,
    splits: int = 2,
    inits: int = 2,
    images: int = 10,
    cell: str = "vit_small_patch14_dinov2.lvd142m-folder.photos-5shot-default",
    side: int = SIDE,
    folds: int = 0,
) -> int:
    """Writes the runs of one cell into a folder, and returns how many they are.

    Args:
        folder: of all runs.
        class_names: of the data.
        methods: which; those of `FROZEN` have one run per split.
        splits, inits: how many.
        images: test images per class.
        cell: the cell's name.
        side: of a thumbnail, in pixels.
        folds: of a cross-validation that takes the place of a test set; 0 for a test set.
    """
    written = 0
    for method in methods:
        for split in range(splits):
            for init in [None] if method.name in FROZEN else range(inits):
                _write_run(folder, class_names, method, split, init, images, cell, side, folds)
                written += 1
    return written


def _write_run(
    folder: Path,
    class_names: Sequence[str],
    method: Method,
    split: int,
    init: int | None,
    images: int,
    cell: str,
    side: int,
    folds: int,
) -> None:
    classes = len(class_names)
    seed = [len(method.name), sum(method.name.encode()), split, 0 if init is None else init + 1]
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(classes), images)
    # some classes are harder for every method, and are mistaken for one of the two that follow them
    hard = np.random.default_rng(0).normal(0, 0.13, classes)
    level = np.clip(method.accuracy + 0.01 * split + hard + rng.normal(0, 0.02, classes), 0.02, 0.98)
    right = rng.random(len(label)) < level[label]
    predicted = np.where(right, label, (label + rng.choice([1, 2], len(label), p=[0.8, 0.2])) % classes)
    probability = np.where(right, rng.beta(8, 2, len(label)), rng.beta(4, 4, len(label))).astype(np.float32)
    run_hash = hashlib.sha256(f"{cell}{method.name}{seed}".encode()).hexdigest()[:10]
    row = Row(
        status="completed",
        stage="final",
        cell=cell,
        method=method.name,
        method_class=method.method_class,
        split=split,
        init=init,
        run_hash=run_hash,
        entry_hash=hashlib.sha256(method.name.encode()).hexdigest()[:10],
        config={
            "protocol": "default",
            "method": method.name,
            "model": {
                "backbone": {"tag": "vit_small_patch14_dinov2.lvd142m"},
                "method": {"class_path": method.method_class, "init_args": {}},
            },
            "data": {"dataset": "folder", "root": "photos", "shots": 5, "batch_size": 16, "augmentation": "light"},
            "trainer": {"max_epochs": 20},
        },
        split_seed=split,
        run_seed=init,
        basis_seed=init,
        adapter_parameters=method.file_bytes and method.file_bytes // 4,
        head_parameters=classes * 385,
        other_parameters=0,
        adapter_file_bytes=method.file_bytes,
        test_accuracy=None if folds else float(right.mean()),
        estimate=_estimate(right, folds) if folds else None,
        learning_rate=0.005 if method.file_bytes else None,
        seconds_total=12.5,
        device="cpu",
        threads=2,
        versions={"nola-vision": "0.1.0", "torch": "2.13.0", "python": "3.12.3"},
        started=f"2026-01-{1 + split % 28:02d}T12:00:00+00:00",
        data={
            "class_names": list(class_names),
            "counts": {"train": 5 * classes, "validation": 0, "test": 0 if folds else len(label)},
            "majority_share": 1 / classes,
        },
    )
    place = folder / cell / method.name / f"split{split}-init{init}-{run_hash}"
    place.mkdir(parents=True)
    (place / ROW_FILE).write_text(row.to_json(), encoding="utf-8")
    arrays = {"index": np.arange(len(label)), "label": label, "predicted": predicted, "probability": probability}
    (place / PREDICTIONS_FILE).write_bytes(safetensors.numpy.save(arrays))
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (label, predicted), 1)
    (place / CONFUSION_FILE).write_text(confusion_csv(counts, class_names), encoding="utf-8")
    if method.file_bytes:
        losses = 3 * np.exp(-np.arange(20) / (5 + 3 * method.accuracy)) + rng.normal(0, 0.05, 20)
        lines = [f"{epoch},{epoch},{loss:.4f}" for epoch, loss in enumerate(losses)]
        (place / "metrics.csv").write_text("\n".join(["epoch,step,train_loss", *lines, ""]))
    wrong = np.flatnonzero(~right)
    wrong = wrong[np.argsort(-probability[wrong], kind="stable")][:24]
    stored = {f"{i} class {label[i]}/image {i}.jpg": np.frombuffer(_jpeg(int(i), side), np.uint8) for i in wrong}
    (place / THUMBNAILS_FILE).write_bytes(safetensors.numpy.save(stored))


def _estimate(right: np.ndarray, folds: int) -> dict[str, object]:
    """As of folds that take every image in turn."""
    parts = [right[fold::folds] for fold in range(folds)]
    return Estimate.of([(int(part.sum()), len(part)) for part in parts], 1, ()).to_dict()


@cache
def _jpeg(index: int, side: int) -> bytes:
    """A picture with some detail, the same for the same image."""
    rng = np.random.default_rng(index)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
