"""How long a run will take, estimated from a few timed steps, of which nothing is kept.

`sweep --dry-run` prints it; `fit` decides by it whether cross-validation would take too long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from nola_vision.runs.lightning_messages import quiet
from nola_vision.runs.parsing import RunCLI, build
from nola_vision.runs.run_id import Config
from nola_vision.training.classifier import Classifier
from nola_vision.training.features import compute_features
from nola_vision.training.frozen import FrozenClassifier
from nola_vision.training.precision import tf32

T = TypeVar("T")


@dataclass(frozen=True)
class RunTime:
    """Estimated seconds of the parts of a run.

    Args:
        training: building the model, and all steps.
        validation: a pass over the validation pool; 0 on features.
        passes: how many such passes a final run has.
        test: a pass over the test images; 0 on features.
        split: what the runs of a worker on one split share: decoding the training images, and their features for a
            method that uses them.
        pool: what all runs of a worker share that use the validation pool: decoding its images, and their features.
        tested: the same for the test images.
    """

    training: float
    validation: float
    passes: int
    test: float
    split: float
    pool: float
    tested: float

    @property
    def search(self) -> float:
        """Seconds of a search run, which is validated at the end if not in training."""
        return self.training + max(1, self.passes) * self.validation

    @property
    def final(self) -> float:
        """Seconds of a final run."""
        return self.training + self.passes * self.validation + self.test


def training_seconds(run_config: Config, limit: float = math.inf) -> float:
    """Estimated seconds for building the model of a run and for all its steps.

    Args:
        run_config: what `parse` returns.
        limit: about how many seconds this may take; slow steps are timed on fewer images than a batch has.
    """
    with _built(run_config) as (built, building, _):
        return building + _training_seconds(built, limit)


def time_run(run_config: Config, limit: float = math.inf) -> RunTime:
    """Times the building of a run, a training step and an evaluation batch, and estimates the whole run from them.

    Images of the training set are used for all. What `torch.compile` gains or takes is left out.

    Args:
        run_config: what `parse` returns.
        limit: as of `training_seconds`.
    """
    with _built(run_config) as (built, building, decoding):
        if built.datamodule.has_test:
            built.datamodule.setup("test")
        counts = built.datamodule.describe()["counts"]
        train, pool, tested = counts["train"], counts["validation"], counts.get("test", 0)
        image, each = _evaluation_seconds(built, limit / 3), decoding / counts["train"]
        if isinstance(built.model, FrozenClassifier):
            training = _fit_seconds(built) if image * train <= limit / 3 else 0.0
        else:
            training = _training_seconds(built, limit / 3)
        training, passes = training + building, _validations(built)
        if built.model.needs_only_features():
            each += image
            return RunTime(training, 0.0, passes, 0.0, each * train, each * pool, each * tested)
        return RunTime(training, image * pool, passes, image * tested, each * train, each * pool, each * tested)


@contextmanager
def _built(run_config: Config) -> Iterator[tuple[RunCLI, float, float]]:
    """The objects of a run, and the seconds of building them and of decoding the training images."""
    config = {**run_config, "model": {**run_config["model"], "compile": False}}
    with TemporaryDirectory() as scratch, quiet():
        building, built = _timed(lambda: build(config, Path(scratch)))
        trainer, task, data = built.trainer, built.model, built.datamodule
        # before the data: without a trainer, all images would be decoded to check them
        task.trainer, trainer.datamodule, data.trainer = trainer, data, trainer  # type: ignore[attr-defined]
        data.prepare_data()
        decoding, _ = _timed(lambda: data.setup("fit"))
        trainer.precision_plugin.convert_module(task).to(trainer.strategy.root_device)
        with tf32(trainer):
            yield built, building, decoding


def _training_seconds(built: RunCLI, limit: float) -> float:
    data, trainer = built.datamodule, built.trainer
    count, batches, limited = len(data.train_labels), len(data.train_dataloader()), trainer.limit_train_batches
    steps = max(1, int(limited * batches) if isinstance(limited, float) else min(limited, batches))
    steps *= trainer.max_epochs or 1
    if trainer.max_steps > 0:  # and the epochs may be -1, no limit
        steps = min(steps, trainer.max_steps) if steps > 0 else trainer.max_steps
    return steps * count / batches * _step_seconds(built, min(data.batch_size, count), limit)


def _validations(built: RunCLI) -> int:
    """The number of validations of a final run."""
    if not built.validates or not isinstance(built.model, Classifier):
        return 0
    return max(1, (built.trainer.max_epochs or 1) // (built.trainer.check_val_every_n_epoch or 1))


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


def _step_seconds(built: RunCLI, batch: int, limit: float) -> float:
    """Seconds per image of a training step of up to `batch` images, the transform included."""
    task, precision, device = built.model, built.trainer.precision_plugin, built.trainer.strategy.root_device
    assert isinstance(task, Classifier)
    dataset: Any = built.datamodule.train_dataloader().dataset
    on_features = task.needs_only_features()
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
    return _per_image(step, batch, limit)


def _fit_seconds(built: RunCLI) -> float:
    """Seconds of fitting a method to the features of the training images."""
    task, data, trainer = built.model, built.datamodule, built.trainer
    assert isinstance(task, FrozenClassifier)
    found = compute_features(task.model, trainer, data.reference_dataloader())
    labels = torch.from_numpy(data.train_labels)
    return _timed(lambda: task.fit(found, labels, data.train_groups if task.method.regularised else None))[0]


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
