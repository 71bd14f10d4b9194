"""Metrics of the test stage, the predictions and class weights, against scikit-learn."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from nola_vision.common.errors import NolaVisionError
from nola_vision.runs import run_id
from nola_vision.runs.parsing import build
from nola_vision.training.classifier import balanced_weights
from nola_vision.training.metrics import accuracies, collect_predictions, log_accuracy
from tiny import tiny


def evaluated(
    logits: torch.Tensor, labels: torch.Tensor, processes: int = 1, batch: int = 7
) -> tuple[dict, SimpleNamespace]:
    """Feeds batches to the metrics of one process or several, as a test stage does, and gathers what they hold.

    Returns:
        The logged values, and the predictions with their logits and index.
    """
    classes = logits.shape[1]
    indices = np.arange(100, 100 + len(labels))[::-1]  # any order of positions in the source
    every, logged = [], {}
    for rank in range(processes):
        trainer = SimpleNamespace(
            global_rank=rank, world_size=processes, datamodule=SimpleNamespace(test_indices=indices)
        )
        task = SimpleNamespace(trainer=trainer, log=lambda name, metric, **_: logged.setdefault(name, metric))
        metrics = accuracies(classes)
        for own in torch.arange(rank, len(labels), processes).split(batch):
            log_accuracy(task, metrics, "test", logits[own], labels[own])
        every.append(metrics)
    values = {}
    for name, metric in logged.items():
        key = "test" if name == "test_accuracy" else name
        for other in every[1:]:  # as torchmetrics reduces the states over processes
            for state in metric._defaults:
                setattr(metric, state, getattr(metric, state) + getattr(other[key], state))
        values[name] = float(metric.compute())
    for name in ("positions", "labels", "logits"):
        setattr(every[0]["tested"], name, [t for metrics in every for t in getattr(metrics["tested"], name)])
    return values, SimpleNamespace(found=collect_predictions(task, every[0]), indices=indices)


@pytest.mark.parametrize("processes", [1, 2])
def test_metrics_equal_scikit_learn(processes: int) -> None:
    draws = np.random.default_rng(0)
    labels = torch.tensor(draws.choice(12, 83, p=np.r_[0.4, [0.06] * 10, 0.0]))  # class 11 has no image
    logits = torch.tensor(draws.normal(size=(83, 12)), dtype=torch.float32)
    logits[torch.arange(83), labels] += 1.0
    logits[:3, 11] = 9.0  # but three were taken for it
    values, rest = evaluated(logits, labels, processes)
    predicted = logits.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scikit-learn's on the class without images
        expected = {
            "test_accuracy": sklearn.metrics.accuracy_score(labels, predicted),
            "test_balanced_accuracy": sklearn.metrics.balanced_accuracy_score(labels, predicted),
            "test_macro_f1": sklearn.metrics.f1_score(labels, predicted, average="macro"),
            "test_top5_accuracy": sklearn.metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(12)),
        }
    assert values == pytest.approx(expected, abs=1e-6)
    predictions = rest.found
    order = np.argsort(rest.indices)
    assert predictions.index.tolist() == sorted(rest.indices)
    assert predictions.label.tolist() == labels[order].tolist()
    assert predictions.predicted.tolist() == predicted[order].tolist()
    assert np.array_equal(predictions.logits, logits.numpy()[order])
    assert predictions.probability == pytest.approx(logits.softmax(1).max(1).values[order].numpy())


def test_few_classes_have_no_top5() -> None:
    values, _ = evaluated(torch.eye(9), torch.arange(9))
    assert "test_top5_accuracy" not in values and values["test_macro_f1"] == 1
    assert "test_top5_accuracy" in evaluated(torch.eye(10), torch.arange(10))[0]


@pytest.mark.parametrize("classes", [2, 3, 10, 37, 100])
def test_all_right_is_exactly_one(classes: int) -> None:
    """A row with a larger share is refused when it is read."""
    values, _ = evaluated(torch.eye(classes), torch.arange(classes))
    assert set(values.values()) == {1.0}


def test_class_weights_equal_scikit_learn(tmp_path: Path) -> None:
    labels = np.repeat([0, 1, 2, 3], [1, 3, 10, 2])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    assert balanced_weights(labels, 4).numpy() == pytest.approx(expected, rel=1e-6)
    assert balanced_weights(labels, 5).numpy() == pytest.approx([*(expected * 4 / 5), 0], rel=1e-6)
    with pytest.raises(NolaVisionError, match="class_weights is balanced, but data.shots is 3"):
        tiny(model={"class_weights": "balanced"})
    config = tiny(model={"class_weights": "balanced"}, data={"shots": "all"}, trainer={"max_epochs": 1})
    assert run_id.run_hash(config, "final") != run_id.run_hash(
        tiny(data={"shots": "all"}, trainer={"max_epochs": 1}), "final"
    )
    built = build(config, tmp_path)
    built.datamodule.train_dataloader()
    built.trainer.limit_train_batches = 2
    built.trainer.fit(built.model, datamodule=built.datamodule)
    of_set = compute_class_weight("balanced", classes=np.arange(10), y=built.datamodule.train_labels)
    assert built.model.weights.numpy() == pytest.approx(of_set, rel=1e-6) and of_set.min() < 0.99 < 1.01 < of_set.max()
    assert "weights" not in built.model.state_dict()
    # a batch with as many images of each class as the set has gives the mean of the classes' mean losses
    logits, labels = torch.randn(16, 4, generator=torch.manual_seed(0)), torch.tensor(labels)
    built.model.weights = balanced_weights(labels.numpy(), 4)
    built.model.label_smoothing = 0.0
    means = [F.cross_entropy(logits[labels == c], labels[labels == c]) for c in range(4)]
    assert float(built.model._loss(logits, labels)) == pytest.approx(float(sum(means)) / 4, rel=1e-5)


def test_the_loss_weights_each_image_equally(tmp_path: Path) -> None:
    """Batches of 16, 16, ... and a smaller last one; the validated logits are those of the whole pool."""
    built = build(tiny("linear", data={"eval_batch_size": 16}), tmp_path)
    built.datamodule.setup("validate")
    assert len(built.datamodule.val_dataloader().dataset) % 16 not in (0, 15)
    built.trainer.validate(built.model, datamodule=built.datamodule, verbose=False)
    logits, labels = built.model.validated.logits, built.model.validated.labels
    expected = F.cross_entropy(logits.double(), labels)
    assert float(built.trainer.callback_metrics["val_loss"]) == pytest.approx(float(expected), rel=1e-5)
