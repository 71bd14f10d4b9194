"""The temperature against scikit-learn's and a grid, where it is bounded, and in adapter files and rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from nola_vision import LinearProbe, adapt, load_adapter
from nola_vision.adapters.serialization import open_adapter, read_adapter
from nola_vision.common.errors import NolaVisionError
from nola_vision.evaluation.calibration import ECE_FROM, cross_fitted, expected_calibration_error, fit_temperature
from nola_vision.models.loading import set_temperature

GOLDEN = Path(__file__).parent / "golden"


def drawn(images: int, seed: int = 0, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of four classes that are too sure by the factor `scale`, and labels drawn from the true probabilities."""
    draws = np.random.default_rng(seed)
    logits = draws.normal(size=(images, 4)) * 1.5
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return logits * scale, (draws.random(images)[:, None] >= probabilities.cumsum(axis=1)).sum(axis=1)


def nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    chosen = logits[np.arange(len(labels)), labels]
    return float((np.log(np.exp(logits / temperature).sum(axis=1)) - chosen / temperature).mean())


def reference_nll(logits: np.ndarray, temperature: float) -> float:
    """Of two classes, the first of which is true."""
    return float(np.log1p(np.exp((logits[:, 1] - logits[:, 0]) / temperature)).mean())


def test_the_temperature_is_scikit_learns_and_a_grids() -> None:
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 4, 300)
    points = draws.normal(size=(300, 5)) + 1.2 * np.eye(4, 5)[labels]
    model = LogisticRegression(C=100).fit(points[:30], labels[:30])
    calibrated = CalibratedClassifierCV(FrozenEstimator(model), method="temperature").fit(points[30:], labels[30:])
    theirs = 1 / calibrated.calibrated_classifiers_[0].calibrators[0].beta_
    logits = model.decision_function(points[30:])
    assert fit_temperature(logits, labels[30:]) == pytest.approx(theirs, rel=1e-4)
    logits, labels = drawn(400)
    grid = np.geomspace(0.1, 10, 4001)
    best = grid[np.argmin([nll(logits, labels, t) for t in grid])]
    assert fit_temperature(logits, labels) == pytest.approx(best, rel=2e-3)
    assert fit_temperature(logits * 7, labels) == pytest.approx(7 * best, rel=2e-3)
    assert fit_temperature(*drawn(20_000)) == pytest.approx(3, rel=0.03)  # the factor that they were drawn with


def test_a_temperature_is_bounded_where_the_likelihood_has_no_minimum() -> None:
    for images in (1, 5, 50):
        logits = np.tile([4.0, 1.0, 0.0], (images, 1))
        found = fit_temperature(logits, [0] * images)
        sure = np.exp(logits / found)[0]
        assert sure[0] / sure.sum() == pytest.approx((images + 1) / (images + 2), rel=1e-4)  # Laplace's rule
    assert fit_temperature([[4.0, 1.0]] * 3, [1, 1, 1]) == 150  # 100 times the mean distance to the largest logit
    assert fit_temperature([[1.0, 1.0]], [1]) == 1
    for absurd in (1e30, 1e300):  # one logit, whose image is right, does not decide for the others
        few = np.array([[absurd, 0.0]] + 5 * [[1.0, 0.0]])
        found = fit_temperature(few, [0] * 6)
        assert 0.1 < found < 1 and reference_nll(few, found) < reference_nll(few, 1)
    most = np.array([[1e30, 0.0]] * 4 + [[1.0, 0.0]] * 3)  # the median is absurd too
    assert reference_nll(most, fit_temperature(most, [0] * 7)) <= reference_nll(most, 1)
    assert 1e-4 <= fit_temperature([[1e-12, 0.0]], [0]) < fit_temperature([[1e12, 0.0]], [0]) <= 1e4
    for logits, labels in ([], []), ([[1.0, 2.0]], [0, 1]), ([[np.nan, 1.0]], [0]):
        with pytest.raises(ValueError, match="give no temperature"):
            fit_temperature(np.reshape(logits, (-1, 2)), labels)


def test_cross_fitting_measures_each_image_with_a_temperature_of_others() -> None:
    logits, labels = drawn(ECE_FROM)
    found = cross_fitted(logits, labels)
    assert found.images == ECE_FROM and found.nll_before == pytest.approx(nll(logits, labels, 1))
    assert nll(logits, labels, found.temperature) < found.nll_after < found.nll_before  # the first is optimistic
    assert found.ece_after < 0.05 < found.ece_before == expected_calibration_error(logits, labels)
    fewer = cross_fitted(logits[1:], labels[1:])
    assert fewer.ece_before is fewer.ece_after is None and fewer.nll_after < fewer.nll_before
    # two groups of two images: each temperature comes from the other group alone
    logits, labels, groups = np.array([[6.0, 0], [9, 0], [9, 0], [0, 4]]), np.array([0, 1, 1, 1]), [0, 0, 1, 1]
    one, other = fit_temperature(logits[2:], labels[2:]), fit_temperature(logits[:2], labels[:2])
    expected = (nll(logits[:2], labels[:2], one) + nll(logits[2:], labels[2:], other)) / 2
    assert cross_fitted(logits, labels, groups).nll_after == pytest.approx(expected)
    # folds whose logits have opposite faults: a temperature of the one is worse than none for the other
    logits, labels = drawn(ECE_FROM, scale=1)
    groups = np.arange(ECE_FROM) % 2
    logits[groups == 0] *= 3
    logits[groups == 1] /= 3
    found = cross_fitted(logits, labels, groups)
    assert fit_temperature(logits, labels) != found.temperature == 1
    assert (found.nll_after, found.ece_after) == (found.nll_before, found.ece_before)
    assert cross_fitted(logits, labels, [7] * 4).nll_after is None and cross_fitted(logits[:1], [0]).nll_after is None


def test_the_calibration_error_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.91, 0.09], [0.3, 0.7], [0.29, 0.71]])  # bins of 1/15: two and two
    expected = (abs(0.5 - 0.905) + abs(1 - 0.705)) / 2
    assert expected_calibration_error(np.log(probabilities), [0, 1, 1, 1]) == pytest.approx(expected, rel=1e-5)


def test_a_temperature_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model = adapt("vit_mini_patch4_32.contours", LinearProbe(), ["a", "b", "c"])
    model.save(path)
    size, (metadata, tensors) = path.stat().st_size, read_adapter(path)
    assert open_adapter(path).version == 2 and metadata["calibration"] is None
    set_temperature(path, 1 / 3, "validation", 40)
    loaded = load_adapter(path)
    assert (loaded.temperature, loaded.calibrated_on, loaded.calibration_images) == (0.333333, "validation", 40)
    assert abs(path.stat().st_size - size) <= 8  # the name of the images; numbers have their place in any file
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_adapter(path)[1].items())
    image = torch.rand(3, 40, 40)
    batch = loaded.transform(image)[None]
    assert torch.equal(loaded(batch), load_adapter(path)(batch)) and torch.allclose(loaded(batch), model.eval()(batch))
    expected = (loaded(batch)[0] * 3).softmax(0).max()
    assert loaded.predict(image)[0].probability == pytest.approx(float(expected), rel=1e-4)
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    set_temperature(path, 1, None)
    assert load_adapter(path).calibrated_on is None and path.stat().st_size == size

    before = path.read_bytes()
    for temperature in (0, -1.0, float("nan"), float("inf"), 1e38, 1e-5, True, "2", None):
        with pytest.raises(NolaVisionError, match="temperature"):
            set_temperature(path, temperature, "folds")  # type: ignore[arg-type]
    for on, images in (("", None), ("x" * 41, None), ("a\nb", None), (3, None), ("folds", 0), ("folds", 1.5)):
        with pytest.raises(NolaVisionError, match="calibrated_on|images"):
            set_temperature(path, 2.0, on, images)  # type: ignore[arg-type]
    model.temperature = 2.0
    with pytest.raises(NolaVisionError, match="its calibrated_on is None"):
        model.save(path)
    with pytest.raises(NolaVisionError, match="calibrated_on None"):
        set_temperature(path, 2.0, None)
    assert path.read_bytes() == before

    old = tmp_path / "v1.safetensors"  # a file of version 1 is uncalibrated, and becomes one of version 2
    old.write_bytes((GOLDEN / "v1-linear.safetensors").read_bytes())
    assert load_adapter(old).calibrated_on is None and load_adapter(old).temperature == 1
    set_temperature(old, 2, "folds")
    assert load_adapter(old).temperature == 2 and open_adapter(old).version == 2
