"""How long a run will take, from a few timed steps. Nothing of them is kept, and no result depends on them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from nola_vision.data.datamodule import KShotDataModule
from nola_vision.runs.lightning_messages import quiet
from nola_vision.runs.parsing import RunCLI, build
from nola_vision.runs.run_id import Config
from nola_vision.training.classifier import Classifier
from nola_vision.training.features import features
from nola_vision.training.frozen import FrozenClassifier

T = TypeVar("T")


@dataclass(frozen=True)
class RunTime:
    """Estimated seconds of the parts of a run.

    Args:
        training: building the model, and all steps.
        validation: a pass over the validation pool; 0 on features.
        test: a pass over the test images; 0 on features.
        once: what the runs of a worker share: decoding the images, and their features for a method that uses them.
    """

    training: float
    validation: float
    test: float
    once: float


def time_run(run_config: Config, limit: float = math.inf) -> RunTime:
    """Times the building of a run, a training step and an evaluation batch, and estimates the whole run from them.

    Images of the training set are used for all. What `torch.compile` gains or takes is left out.

    Args:
        run_config: what `parse` returns.
        limit: about how many seconds this may take; slow steps are timed on fewer images than a batch has.
    """
    config = {**run_config, "model": {**run_config["model"], "compile": False}}
    with TemporaryDirectory() as scratch, quiet():
        building, built = _timed(lambda: build(config, Path(scratch)))
        trainer, task, data = built.trainer, built.model, built.datamodule
        data.prepare_data()
        decoding, _ = _timed(lambda: data.setup("fit"))
        if data.has_test:
            data.setup("test")
        task.trainer, trainer.datamodule, data.trainer = trainer, data, trainer  # type: ignore[attr-defined]
        counts = data.describe()["counts"]
        pool, test = counts["validation"], counts.get("test", 0)
        trainer.precision_plugin.convert_module(task).to(trainer.strategy.root_device)
        image = _evaluation_seconds(built, limit / 3)
        on_features = task.needs_only_features()
        if isinstance(task, FrozenClassifier):
            training = _fit_seconds(built) if image * counts["train"] <= limit / 3 else 0.0
        else:
            training = _steps(built) * data.batch_size * _step_seconds(built, on_features, limit / 3)
    once = decoding / counts["train"] * (counts["train"] + pool + test)
    if on_features:
        return RunTime(building + training, 0.0, 0.0, once + image * (counts["train"] + pool + test))
    return RunTime(building + training, image * pool, image * test, once)


def _evaluation_seconds(built: RunCLI, limit: float) -> float:
    """Seconds per image of the forward pass in evaluation, its transform included."""
    task, precision, device = built.model, built.trainer.precision_plugin, built.trainer.strategy.root_device
    model = task.model.features if isinstance(task, FrozenClassifier) else task
    dataset: Any = built.datamodule.reference_dataloader().dataset

    def evaluate(count: int) -> None:
        images = torch.stack([dataset[position % len(dataset)][0] for position in range(count)]).to(device)
        with torch.no_grad(), precision.forward_context():
            model(precision.convert_input(images)).cpu()  # which waits for a GPU

    task.eval()
    return _per_image(evaluate, built.datamodule.eval_batch_size, limit)


def _step_seconds(built: RunCLI, on_features: bool, limit: float) -> float:
    """Seconds per image of a training step, the transform included."""
    task, precision, device = built.model, built.trainer.precision_plugin, built.trainer.strategy.root_device
    assert isinstance(task, Classifier)
    data: KShotDataModule = built.datamodule
    dataset: Any = data.train_dataloader().dataset
    task.train().on_features = on_features
    optimizer = task.optimizer(task.parameter_groups())

    def step(count: int) -> None:
        items = [dataset[position % len(dataset)] for position in range(1 if on_features else count)]
        images = precision.convert_input(torch.stack([image for image, _ in items]).to(device))
        labels = torch.tensor([label for _, label in items], device=device)
        if on_features:
            images, labels = known.expand(count, -1), labels.expand(count)
        with precision.train_step_context():
            loss = torch.nn.functional.cross_entropy(task(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # which waits for a GPU

    if on_features:
        with torch.no_grad(), precision.forward_context():
            known = task.model.features(precision.convert_input(dataset[0][0][None].to(device)))
    return _per_image(step, data.batch_size, limit)


def _fit_seconds(built: RunCLI) -> float:
    """Seconds of fitting a method to the features of the training images."""
    task, data, trainer = built.model, built.datamodule, built.trainer
    assert isinstance(task, FrozenClassifier)
    found = features(task.model, trainer, data.reference_dataloader())
    labels = torch.from_numpy(data.train_labels)
    return _timed(lambda: task.fit(found, labels, data.train_groups if task.method.regularised else None))[0]


def _steps(built: RunCLI) -> int:
    total = (built.trainer.max_epochs or 1) * len(built.datamodule.train_dataloader())
    return min(total, built.trainer.max_steps) if built.trainer.max_steps > 0 else total


def _per_image(work: Callable[[int], None], most: int, limit: float) -> float:
    """Seconds per image of `work`, timed on as many images as the limit admits, up to `most`."""
    few = min(2, most)
    work(few)  # warm-up
    each = _timed(lambda: work(few))[0] / few
    count = most if each * most <= limit else max(few, int(limit / each))
    return min(_timed(lambda: work(count))[0] for _ in range(2 if 2 * each * count <= limit else 1)) / count


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result
