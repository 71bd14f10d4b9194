"""Methods on frozen features against scikit-learn; features that are computed once; linear probes on them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, pairwise_distances_argmin
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler, normalize

from nola_vision import BackboneSpec, adapt, load_adapter
from nola_vision.adapters.methods import FrozenMethod, NearestNeighbor
from nola_vision.adapters.methods.registry import METHODS
from nola_vision.common import process_cache
from nola_vision.common.errors import NolaVisionError
from nola_vision.data.datamodule import KShotDataModule
from nola_vision.data.folds import folds
from nola_vision.evaluation.estimates import Estimate
from nola_vision.evaluation.predictions import load_predictions
from nola_vision.runs import run_id, runner, store
from nola_vision.runs.cells import compose
from nola_vision.runs.config_files import load_configs
from nola_vision.runs.parsing import build
from nola_vision.training import frozen
from nola_vision.training.features import drops_nothing
from tiny import tiny

CLASSES = {"1nn": "NearestNeighbor", "nearest-mean": "NearestMean", "logistic": "LogisticRegression"}
ENTRIES = {name: {"class_path": kind} for name, kind in CLASSES.items()}


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_cache, "_kept", {})


def blobs(counts: list[int], width: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    return 3 + generator.normal(size=(len(counts), width))[y] + generator.normal(size=(len(y), width)), y


class Scale(TransformerMixin, BaseEstimator):
    """Divides by one number: the root of the features' mean square."""

    def fit(self, x: np.ndarray, y: object = None) -> "Scale":
        self.by_ = np.sqrt(np.mean(x**2))
        return self

    def transform(self, x: np.ndarray) -> np.ndarray:
        return x / self.by_


def pipeline(c: float) -> Pipeline:
    return make_pipeline(StandardScaler(with_std=False), Scale(), LogisticRegression(C=c, max_iter=1000))


@pytest.mark.parametrize("counts", [[6, 9, 7], [10, 8], [30, 30, 30, 30]])
def test_logistic_regression_is_scikit_learns_with_c_from_inner_folds(counts: list[int]) -> None:
    x, y = blobs(counts, width=40)
    copies = np.arange(len(y))
    copies[1] = 0  # a copy shares a fold with its original
    x[1] = x[0]
    weight, bias, c = frozen.logistic_regression(x, y, copies)
    number = np.full(len(y), -1)
    for fold, (_, test) in enumerate(folds(y, copies, 0)):
        number[test] = fold
    assert number[0] == number[1]
    losses = [
        log_loss(y, cross_val_predict(pipeline(c), x, y, cv=PredefinedSplit(number), method="predict_proba"))
        for c in frozen.CS
    ]
    assert c == frozen.CS[int(np.argmin(losses))]
    model = pipeline(c).fit(x, y)
    new = blobs(counts, width=40, seed=1)[0]
    logits = new @ weight.T + bias
    assert (logits.argmax(1) == model.predict(new)).all()
    assert np.abs(torch.softmax(torch.from_numpy(logits), 1).numpy() - model.predict_proba(new)).max() < 1e-10


def test_c_without_two_images_of_a_class_is_the_default_and_a_class_of_one_image_is_no_obstacle() -> None:
    x, y = blobs([1, 1, 1])
    assert frozen.choose_c(x, y, np.arange(3)) == frozen.DEFAULT_C
    x, y = blobs([1, 6, 6])
    weight, _, c = frozen.logistic_regression(x, y, np.arange(len(y)))
    assert c in frozen.CS and weight.shape == (3, 12) and np.isfinite(weight).all()
    assert frozen.choose_c(x[1:3], y[1:3], np.zeros(2, dtype=np.int64)) == frozen.DEFAULT_C  # two copies of one image


@pytest.mark.parametrize("name", ["NearestMean", "LogisticRegression"])
def test_a_head_of_4_bits_predicts_as_one_of_32_though_features_have_a_large_mean(name: str) -> None:
    backbone, classes = BackboneSpec("vit_mini_patch4_32.contours"), 30
    heads = [
        frozen.FrozenClassifier(backbone, METHODS[name](head_bits=bits), [f"{one}" for one in range(classes)])
        for bits in (32, 4)
    ]
    width = heads[0].model.bank.num_features
    x, y = blobs([45] * classes, width)
    x, known = x + 20 * np.random.default_rng(7).normal(size=width), np.arange(len(y)) % 45 < 5
    for head in heads:
        head.fit(torch.from_numpy(x[known]).float(), torch.from_numpy(y[known]))
    with torch.no_grad():
        found = [head(torch.from_numpy(x[~known]).float()).softmax(1).numpy() for head in heads]
    same = (found[0].argmax(1) == found[1].argmax(1)).mean()
    assert same == 1 and np.abs(found[0] - found[1]).mean() < 1e-4


def test_nearest_mean_is_the_nearest_by_cosine_and_its_scale_suits_images_that_were_left_out() -> None:
    x, y = blobs([1, 6, 9])
    weight, bias = frozen.nearest_mean(x, y, 3)
    means = np.stack([normalize(x)[y == label].mean(0) for label in range(3)])
    new = blobs([20, 20, 20], seed=5)[0]
    assert ((new @ weight.T + bias).argmax(1) == pairwise_distances_argmin(new, means, metric="cosine")).all()
    several = y > 0
    cosines = np.stack(
        [
            (normalize(np.stack([u[(y == c) & (np.arange(16) != i)].sum(0) for c in (1, 2)])) @ u[i])
            for u in [normalize(x)]
            for i in np.flatnonzero(several)
        ]
    )
    alone = normalize(x)[several] @ normalize(x)[:1].T
    held_out = np.concatenate([alone, cosines], axis=1)
    scale = np.linalg.norm(weight[0]) * np.linalg.norm(x, axis=1).mean()

    def probabilities(scale: float) -> np.ndarray:
        return torch.softmax(torch.from_numpy(scale * held_out), 1).numpy()

    # likeliest, or as sure as 15 right answers allow (Laplace's rule of succession)
    least, found, most = (
        log_loss(y[several], probabilities(s), labels=[0, 1, 2]) for s in (scale / 1.05, scale, scale * 1.05)
    )
    bounded = probabilities(scale).max(1).mean() == pytest.approx(16 / 17, abs=1e-4)
    assert found < least and (bounded or found < most)


def features_of(config: dict, folder: Path, test: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and positions of a run's images by a plain forward pass."""
    built = build(config, folder)
    built.datamodule.setup("test" if test else "fit")
    loader = built.datamodule.test_dataloader() if test else built.datamodule.reference_dataloader()
    with torch.inference_mode():
        batches = [(built.model.model.eval().features(images), labels) for images, labels in loader]
    indices = built.datamodule.test_indices if test else built.datamodule.train_indices
    x, y = (torch.cat(parts).numpy() for parts in zip(*batches, strict=True))
    return x, y, indices


def test_rows_are_those_of_scikit_learn_on_the_same_features(
    tmp_path: Path, keeping: None, images_seen: list[int]
) -> None:
    rows, configs = {}, {name: tiny(name, methods=ENTRIES) for name in CLASSES}
    for name, config in configs.items():
        rows[name] = runner.run(config, tmp_path)
        assert rows[name].status == "completed" and rows[name].init is None and rows[name].adapter_parameters == 0
    assert sum(images_seen) == 30 + 50  # once for the three; a final run makes no pass over the validation pool
    x, y, _ = features_of(configs["logistic"], tmp_path / "train", False)
    new, true, positions = features_of(configs["logistic"], tmp_path / "test", True)
    c = frozen.choose_c(x.astype(np.float64), y, np.arange(len(y)))
    expected = {
        "1nn": KNeighborsClassifier(1, metric="cosine").fit(x, y).predict(new),
        "nearest-mean": pairwise_distances_argmin(
            new, np.stack([normalize(x)[y == label].mean(0) for label in range(10)]), metric="cosine"
        ),
        "logistic": pipeline(c).fit(x.astype(np.float64), y).predict(new.astype(np.float64)),
    }
    for name, config in configs.items():
        folder = run_id.run_folder(tmp_path, config, "final")
        found = load_predictions(folder)
        assert found is not None and (found.index == np.sort(positions)).all()
        assert (found.predicted == expected[name][np.argsort(positions)]).all(), name
        assert rows[name].test_accuracy == pytest.approx((expected[name] == true).mean())
        if name == "1nn":
            assert rows[name].adapter_file_bytes is None and rows[name].head_parameters == 0
            continue
        assert rows[name].head_parameters == 10 * x.shape[1] + 10
        assert rows[name].adapter_file_bytes == (folder / store.ADAPTER_FILE).stat().st_size
        logits = load_adapter(folder / store.ADAPTER_FILE).classified(torch.from_numpy(new)).detach()
        assert (logits.argmax(1).numpy()[np.argsort(positions)] == found.predicted).all()


def test_one_nearest_neighbour_cannot_be_saved(tmp_path: Path) -> None:
    model = adapt("vit_mini_patch4_32.contours", NearestNeighbor(), ["a", "b"])
    with pytest.raises(NolaVisionError, match="save NearestMean or LogisticRegression instead"):
        model.save(tmp_path / "a.safetensors")


def test_few_bits_of_the_head_are_what_is_tested(tmp_path: Path) -> None:
    entry = {"logistic": {"class_path": "LogisticRegression", "init_args": {"head_bits": 3}}}
    built = build(tiny("logistic", methods=entry), tmp_path)
    built.datamodule.setup("fit")
    built.model.fit_to(built.datamodule, built.trainer)
    built.model.model.save(tmp_path / "a.safetensors")
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert torch.equal(loaded.bank.head_weight, built.model.model.bank.head_weight)
    assert len(loaded.bank.head_weight[0, 0].unique()) <= 8


def test_features_are_computed_again_for_other_images_weights_or_settings(
    tmp_path: Path, keeping: None, images_seen: list[int]
) -> None:
    def computed(**changes: dict) -> int:
        images_seen.clear()
        runner.run(tiny("1nn", **changes), tmp_path / str(changes))
        return sum(images_seen)

    assert computed() == 80 and computed() == 0
    assert computed(data={"split_seed": 1}) == 30
    assert computed(data={"test_limit": 60}) == 60
    assert computed(threads=2) == 80
    assert computed(model={"backbone": {"normalisation": "imagenet", "tag": "test_vit.r160_in1k"}}) == 80
    assert computed(trainer={"precision": "bf16-true"}) == 80
    assert computed(data={"eval_batch_size": 64}) == 80
    assert computed() == 0  # all of them are still there


def test_only_so_many_bytes_of_features_are_kept(keeping: None) -> None:
    made: list[int] = []

    def get(key: int) -> bytes:
        def make() -> bytes:
            made.append(key)
            return bytes(4)

        return process_cache.recent("things", key, make, len, 10)

    for key in (0, 1, 0, 2, 0, 1):
        get(key)
    assert made == [0, 1, 2, 1]


class Watching(Callback):
    """A callback of another package: it may look at the images."""

    def __init__(self) -> None:
        self.shapes: list[int] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:  # type: ignore[no-untyped-def]
        self.shapes.append(batch[0].dim())
        self.losses.append(float(outputs["loss"]))


def trained_probe(folder: Path, foreign: bool, **changes: object) -> tuple[Watching, torch.Tensor, dict]:
    built = build(tiny("linear", **changes), folder)
    watching = Watching()
    if not foreign:
        watching.__class__ = type("Own", (Watching,), {"__module__": "nola_vision.own"})
    built.trainer.callbacks.append(watching)
    built.trainer.fit(built.model, datamodule=built.datamodule)
    head = built.model.model.bank.head_weight.detach().clone()
    metrics = dict(built.trainer.callback_metrics)
    built.trainer.test(built.model, datamodule=built.datamodule, verbose=False)
    return watching, head, {**metrics, **built.trainer.callback_metrics}


@pytest.mark.parametrize(
    "changes",
    [{}, {"trainer": {"precision": "bf16-mixed"}}, {"model": {"method": {"init_args": {"head_bits": 4}}}}],
)
def test_a_linear_probe_trains_on_features_to_the_same_numbers(
    changes: dict, tmp_path: Path, images_seen: list[int]
) -> None:
    epochs = {"max_epochs": 6, "check_val_every_n_epoch": 2, **changes.get("trainer", {})}
    changes = {**changes, "trainer": epochs}
    with_images, head, metrics = trained_probe(tmp_path / "images", True, **changes)
    before = sum(images_seen)
    images_seen.clear()
    with_features, same, same_metrics = trained_probe(tmp_path / "features", False, **changes)
    assert set(with_images.shapes) == {4} and set(with_features.shapes) == {2}
    assert before >= 6 * 30 + 50 and sum(images_seen) < before / 1.9
    rounding = 1e-5 if "precision" not in epochs else 1e-2
    assert with_features.losses == pytest.approx(with_images.losses, rel=rounding)
    assert (same - head).abs().max() <= rounding * head.abs().max()
    assert metrics.keys() == same_metrics.keys()
    for name, value in metrics.items():
        assert float(same_metrics[name]) == pytest.approx(float(value), rel=rounding), name


@pytest.mark.parametrize("changes", [{"data": {"augmentation": "light"}}, {"trainer": {"limit_train_batches": 1}}])
def test_a_linear_probe_that_needs_images_gets_them(changes: dict, tmp_path: Path) -> None:
    assert set(trained_probe(tmp_path, False, **changes)[0].shapes) == {4}


def test_dropout_is_found() -> None:
    model = adapt("vit_mini_patch4_32.contours", NearestNeighbor(), ["a", "b"]).train()
    assert drops_nothing(model) and model.training
    model.backbone.blocks[0].mlp.drop1.p = 0.1
    assert not drops_nothing(model)


def make_photos(root: Path, counts: list[int]) -> str:
    """Classes of digits without a test split; the first image is there twice."""
    digits = load_digits()
    for label, count in enumerate(counts):
        (root / str(label)).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == label][:count]):
            image = Image.fromarray((pixels * 15).astype(np.uint8)).resize((32, 32))
            image.save(root / str(label) / f"{number}.png")
    (root / "0" / "copy.png").write_bytes((root / "0" / "0.png").read_bytes())
    return str(root)


@pytest.mark.parametrize(("shots", "counts", "untested"), [("all", [9, 9, 9, 1], ["3"]), (4, [9, 9, 9], [])])
def test_an_estimate_is_cross_validated_in_the_folds_of_the_data(
    shots: str | int,
    counts: list[int],
    untested: list[str],
    tmp_path: Path,
    images_seen: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = torch.zeros(80, 384), np.arange(4)
    assert frozen.number_of_repeats(*some, NearestNeighbor()) == frozen.MOST_REPEATS
    assert frozen.number_of_repeats(*some, METHODS["LogisticRegression"]()) == frozen.MOST_LOGISTIC_REPEATS
    monkeypatch.setattr(frozen, "MOST_REPEATS", 2)
    monkeypatch.setattr(frozen, "MOST_LOGISTIC_REPEATS", 2)
    monkeypatch.setattr(frozen, "CS", (0.1, 10.0))  # 11 fits for each fold, not 31
    data = {"dataset": "folder", "root": make_photos(tmp_path / "photos", counts), "split_seed": 3}
    config = tiny("logistic", methods=ENTRIES, data={**data, "shots": shots, "test_limit": None})
    row = runner.run(config, tmp_path / "runs")
    assert row.status == "completed" and row.test_accuracy is None and row.calibrated_on == "folds"
    assert sum(images_seen) == sum(counts) + 1  # once
    folder = run_id.run_folder(tmp_path / "runs", config, "final")
    estimate, found = Estimate.from_dict(row.estimate or {}), load_predictions(folder)
    assert found is not None and len(estimate.folds) == 5 * 2 and estimate.std > 0
    assert estimate.untested_classes == untested and len(found.index) == estimate.images == 28

    image = build(config, tmp_path / "built").datamodule.input
    x, y, order = features_of({**config, "data": {**config["data"], "shots": "all"}}, tmp_path / "all", False)
    assert (order == np.arange(len(y))).all()
    right = []
    for fold in range(5):
        part = KShotDataModule(image, **{**config["data"], "fold": fold})
        train, test = part.train_indices, part.test_indices
        weight, bias, _ = frozen.logistic_regression(x[train].astype(np.float64), y[train], part.groups[train])
        chosen = (x[test] @ weight.T + bias).argmax(1)
        assert (found.predicted[np.searchsorted(found.index, test)] == chosen).all()
        right.append((chosen == y[test]).mean())
    assert estimate.folds[:5] == pytest.approx(right)

    final = KShotDataModule(image, **config["data"]).train_indices
    weight, _, _ = frozen.logistic_regression(x[final].astype(np.float64), y[final], part.groups[final])
    saved = load_adapter(folder / store.ADAPTER_FILE)
    assert saved.bank.head_weight[0].detach().numpy() == pytest.approx(weight, abs=1e-4 * np.abs(weight).max())


def test_every_shipped_cell_has_the_methods() -> None:
    for config in (load_configs(["quickstart.yaml"]), compose("vitb", "cifar10", 5), compose("vitl_mae", "pets", 10)):
        classes = {name: entry["class_path"] for name, entry in config["methods"].items()}
        assert classes.items() >= run_id.FROZEN_METHODS.items() == CLASSES.items()


def test_every_frozen_method_has_a_name() -> None:
    frozen_methods = [name for name, method in METHODS.items() if issubclass(method, FrozenMethod)]
    assert frozen_methods == list(run_id.FROZEN_METHODS.values())
