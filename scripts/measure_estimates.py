"""Compares cross-validation estimates with the true accuracy: `python scripts/measure_estimates.py frozen`.

A draw simulates a user's folder: a few random images per class from a large pool. Its accuracy is estimated by the
folds and methods of this package. The truth is the accuracy of the same method, fitted on the whole draw, on thousands
of images outside of it. Printed, as Markdown: the bias of the estimate, and coverage and width of the 95 % interval and
of alternatives. Each draw has a separate seed, and one line per draw is appended to a file under --out, so that a
stopped measurement can be resumed.

    frozen       1-NN, nearest mean and logistic regression on features of the shipped ViT (5, 10 and 20 images per
                 class, 200 draws: about 40 minutes on one core, mostly for logistic regression)
    unbalanced   one class of 2 or 3 images among classes of 20: the product's folds, and always five (10 minutes)
    adapters     NOLA, trained as in `nola-vision fit`, 8 draws of 10 images per class (about 1 hour)
    calibration  NLL and expected calibration error on the images outside the draw, with and without the temperature
                 fitted on the held-out predictions, for the draws stored by `frozen` and `adapters`

Data: scikit-learn's digits (the truth: the images not drawn) and Fashion-MNIST (drawn from 20,000 of its training
images; the truth: its 10,000 test images), from --fashion, a folder with FashionMNIST/raw, or from Debian's package
dataset-fashion-mnist.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from scipy.stats import beta, t
from sklearn.model_selection import StratifiedKFold
from torchvision.transforms.v2.functional import pil_to_tensor

from nola_vision.adapters.methods import LogisticRegression, NearestMean, NearestNeighbor
from nola_vision.data.datasets.registry import get_dataset
from nola_vision.data.folds import folds
from nola_vision.data.sources import ImageSource
from nola_vision.evaluation.calibration import ECE_BINS, cross_fitted, fit_temperature, nll
from nola_vision.evaluation.estimates import CrossValidated, Estimate, compare, wilson
from nola_vision.evaluation.predictions import Predictions
from nola_vision.images.transforms import eval_transform
from nola_vision.models.backbones.creation import create_backbone
from nola_vision.models.backbones.sources import input_config
from nola_vision.models.backbones.spec import BackboneSpec

BACKBONE = BackboneSpec("vit_mini_patch4_32.contours")
METHODS = {"1-NN": NearestNeighbor, "nearest mean": NearestMean, "logistic regression": LogisticRegression}
SHOTS = (5, 10, 20)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION_POOL = 20_000
ADAPTER_TRUTH = 2000  # images outside the draw that an adapter is tested on

Record = dict[str, Any]
Split = Callable[[np.ndarray], list[tuple[np.ndarray, np.ndarray]]]


class Pool:
    """The images that draws are taken from, and those that the truth is measured on.

    Args:
        sources: the images.
        features: of the images of all sources, `[n, width]`.
        drawn_from: how many of the first images draws are taken from; None for all, where the truth is measured on
            those that are not drawn.
    """

    def __init__(self, sources: list[ImageSource], features: torch.Tensor, drawn_from: int | None) -> None:
        self.sources, self.features, self.drawn_from = sources, features, drawn_from
        self.labels = np.concatenate([source.labels for source in sources])[: len(features)]

    def draw(self, counts: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
        """A draw of so many images per class, the classes in random order, and the images outside of it."""
        rng = np.random.default_rng([seed, *counts])
        everything = np.arange(len(self.labels))
        candidates = everything[: self.drawn_from]
        classes = rng.permutation(len(counts))
        drawn = np.sort(
            np.concatenate(
                [
                    rng.choice(candidates[self.labels[candidates] == label], count, replace=False)
                    for label, count in zip(classes, counts, strict=True)
                ]
            )
        )
        outside = everything[self.drawn_from :] if self.drawn_from else np.setdiff1d(everything, drawn)
        return drawn, outside

    def image(self, index: int) -> Any:
        """The PIL image at a position."""
        for source in self.sources:
            if index < len(source):
                return source.image(index)
            index -= len(source)
        raise IndexError(index)


def pools(out: Path, fashion: Path | None) -> dict[str, Pool]:
    digits = [get_dataset("digits").open(None, split) for split in ("train", "test")]
    if fashion is None:
        fashion = out
        (fashion / "FashionMNIST/raw").mkdir(parents=True, exist_ok=True)
        for packed in DEBIAN.glob("*.gz"):
            unpacked = fashion / "FashionMNIST/raw" / packed.stem
            if not unpacked.exists():
                unpacked.write_bytes(gzip.decompress(packed.read_bytes()))
    train, test = (get_dataset("fashion_mnist").open(str(fashion), split) for split in ("train", "test"))
    train.labels, train._pixels = train.labels[:FASHION_POOL], train._pixels[:FASHION_POOL]  # type: ignore[attr-defined]
    return {
        "digits": Pool(digits, cached_features(out / "digits.npy", digits), None),
        "Fashion-MNIST": Pool([train, test], cached_features(out / "fashion.npy", [train, test]), FASHION_POOL),
    }


def cached_features(path: Path, sources: list[ImageSource]) -> torch.Tensor:
    """Features of the shipped ViT, computed once."""
    if not path.exists():
        backbone, transform = create_backbone(BACKBONE), eval_transform(input_config(BACKBONE))
        parts = []
        for source in sources:
            for start in range(0, len(source), 256):
                images = [source.image(i) for i in range(start, min(start + 256, len(source)))]
                with torch.inference_mode():
                    parts.append(backbone(torch.stack([transform(pil_to_tensor(image)) for image in images])).float())
        np.save(path, torch.cat(parts).numpy())
    return torch.from_numpy(np.load(path))


# --- draws ------------------------------------------------------------------------------------------------------------


def product_folds(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return folds(labels, np.arange(len(labels)), 0)


def five_folds(labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(StratifiedKFold(5, shuffle=True, random_state=0).split(labels, labels))


def on_frozen_features(task: Any, data: Pool, counts: list[int], seed: int, split: Split) -> Record:
    """One draw of one method: the estimate of the first repeat, and the truth."""
    drawn, outside = data.draw(counts, seed)
    features, labels = data.features[drawn], data.labels[drawn]
    groups, parts = np.arange(len(drawn)), []

    def fitted_logits(train: np.ndarray, tested: torch.Tensor) -> np.ndarray:
        task.fit(features[train], torch.from_numpy(labels[train]), groups[train])
        with torch.no_grad():
            logits: np.ndarray = task(tested).float().numpy()
        return logits

    for train, test in split(labels):
        parts.append(Predictions.of(test, labels[test], fitted_logits(train, features[test])))
    logits = fitted_logits(groups, data.features[outside])
    return record(parts, labels, logits, data.labels[outside])


def record(parts: list[Predictions], labels: np.ndarray, logits: np.ndarray, true: np.ndarray) -> Record:
    """The stored result of one draw.

    Args:
        parts: predictions for the held-out images of each fold.
        labels: of the draw.
        logits: of the model fitted on the whole draw, for the images outside of it.
        true: labels of those.
    """
    found = CrossValidated.of(parts)
    held_out = found.predictions
    assert held_out.logits is not None
    right = logits.argmax(axis=1) == true
    of_class = [right[true == label].mean() for label in range(logits.shape[1])]  # weighted as in the draw
    shares = np.bincount(labels, minlength=logits.shape[1]) / len(labels)
    temperature = fit_temperature(held_out.logits, held_out.label)
    crossed = cross_fitted(held_out.logits, held_out.label, found.folds)
    scores = logits.astype(np.float64)
    return {
        "truth": float(np.dot(shares, of_class)),
        "folds": [(int(part.correct.sum()), len(part.index)) for part in parts],
        "index": held_out.index.tolist(),
        "label": held_out.label.tolist(),
        "predicted": held_out.predicted.tolist(),
        "temperature": temperature,
        "held_out_nll": [crossed.nll_before, crossed.nll_after],
        "nll": [nll(scores, true), nll(scores / temperature, true)],
        "bins": [bins(logits, true), bins(logits / temperature, true)],
    }


def bins(logits: np.ndarray, true: np.ndarray) -> list[list[float]]:
    """Images, sum of probabilities and correct predictions in each bin of the predicted class's probability."""
    probability = softmax(logits.astype(np.float64), axis=1).max(axis=1)
    right = (logits.argmax(axis=1) == true).astype(float)
    edges = np.linspace(0, 1, ECE_BINS + 1)
    weights: list[np.ndarray] = [np.ones_like(probability), probability, right]
    return [np.histogram(probability, edges, weights=weight)[0].tolist() for weight in weights]


def expected_calibration_error(all_bins: list[list[list[float]]]) -> float:
    """ECE of several draws pooled: bins are added up first."""
    images, probability, right = np.sum(np.array(all_bins), axis=0)
    return float(np.abs(right - probability).sum() / images.sum())


def with_an_adapter(data: Pool, counts: list[int], seed: int, folder: Path) -> Record:
    """One draw of NOLA, trained as in `nola-vision fit` on a folder of the drawn images."""
    from nola_vision import load_adapter
    from nola_vision.evaluation.predictions import load_predictions
    from nola_vision.runs import cross_validation, photos, run_id
    from nola_vision.runs.lightning_messages import quiet
    from nola_vision.runs.parsing import parse

    drawn, outside = data.draw(counts, seed)
    if len(outside) > ADAPTER_TRUTH:
        outside = np.sort(np.random.default_rng(seed).choice(outside, ADAPTER_TRUTH, replace=False))
    for index in drawn:
        place = folder / "images" / str(data.labels[index])
        place.mkdir(parents=True, exist_ok=True)
        data.image(index).save(place / f"{index}.png")
    config = run_id.resolve(photos.config(str(folder / "images"), backbone="quickstart", device="cpu"))
    held_out: list[Any] = []
    with quiet():
        row = cross_validation.run_with_estimate(
            parse(config), folder / "runs", on_fold=lambda fold, row: held_out.append(row)
        )
    if row.status != "completed" or row.folder is None:
        raise SystemExit(f"a run did not complete: {row.error}")
    model = load_adapter(row.folder / "adapter.safetensors").eval()
    batches = []
    for start in range(0, len(outside), 250):
        images = torch.stack([model.transform(data.image(i)) for i in outside[start : start + 250]])
        with torch.inference_mode():
            batches.append(model(images).float().numpy())
    parts = [found for fold in held_out if (found := load_predictions(fold.folder)) is not None]
    names = [int(name) for name in model.metadata.class_names]  # "0" to "9", so a label is the digit
    assert names == sorted(names)
    return record(parts, data.labels[drawn], np.concatenate(batches), data.labels[outside])


# --- measurements -----------------------------------------------------------------------------------------------------


def resumed(path: Path, keys: list[tuple[Any, ...]], measure: Callable[..., Record]) -> list[Record]:
    """The record of each key, from the file or else measured."""
    done = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                found = json.loads(line)
            except json.JSONDecodeError:  # the incomplete last line of a killed measurement
                continue
            done[tuple(found["key"])] = found
    with path.open("a") as file:
        for key in keys:
            if key not in done:
                done[key] = {"key": key, **measure(*key)}
                file.write("\n" * (file.tell() > 0) + json.dumps(done[key]))
                file.flush()
    return [done[key] for key in keys]


def tasks() -> dict[str, Any]:
    from nola_vision.training.frozen import FrozenClassifier

    names = [str(label) for label in range(10)]
    return {name: FrozenClassifier(BACKBONE, method(), names) for name, method in METHODS.items()}


def frozen(options: argparse.Namespace) -> list[Record]:
    data, methods = pools(options.out, options.fashion), tasks()
    keys = [
        (name, shots, method, draw)
        for method in methods
        for draw in range(options.draws or 200)
        for shots in options.shots
        for name in data
    ]

    def measure(name: str, shots: int, method: str, draw: int) -> Record:
        return on_frozen_features(methods[method], data[name], [shots] * 10, draw, product_folds)

    return resumed(options.out / "frozen.jsonl", keys, measure)


def adapters(options: argparse.Namespace) -> list[Record]:
    data = pools(options.out, options.fashion)
    keys = [(name, 10, "NOLA", draw) for draw in range(options.draws or 8) for name in data]

    def measure(name: str, shots: int, method: str, draw: int) -> Record:
        return with_an_adapter(data[name], [shots] * 10, draw, options.out / f"{name}-{shots}-{draw}")

    return resumed(options.out / "adapters.jsonl", keys, measure)


def unbalanced(options: argparse.Namespace) -> list[Record]:
    data, methods = pools(options.out, options.fashion), tasks()
    splits: dict[str, Split] = {"product": product_folds, "always 5": five_folds}
    keys = [
        (name, f"9 x 20 and {small}", f"{method}, {rule}", draw)
        for small in (2, 3)
        for name in data
        for method in methods
        for rule in splits
        for draw in range(options.draws or (50 if method == "logistic regression" else 200))
    ]

    def measure(name: str, shots: str, method: str, draw: int) -> Record:
        method, rule = method.split(", ")
        counts = [20] * 9 + [int(shots.rsplit(" ", 1)[1])]
        return on_frozen_features(methods[method], data[name], counts, draw, splits[rule])

    return resumed(options.out / "unbalanced.jsonl", keys, measure)


# --- tables -----------------------------------------------------------------------------------------------------------


def intervals(found: Estimate) -> dict[str, tuple[float, float]]:
    """The printed interval, and alternatives."""
    n, k, p = found.images, found.number_of_folds, found.accuracy
    spread = np.std(found.folds, ddof=1)
    naive, corrected = (t.ppf(0.975, k - 1) * spread * np.sqrt(factor) for factor in (1 / k, 1 / k + 1 / (k - 1)))
    fewer = [p * 0.8 * n, 0.8 * n]
    return {
        "printed": (found.low, found.high),
        "Wilson": wilson(found.correct, n),
        "Wilson, 2n/3": wilson_of(p, n * 2 / 3),
        "exact, 0.8n": (
            float(beta.ppf(0.025, fewer[0], fewer[1] - fewer[0] + 1)) if p > 0 else 0.0,
            float(beta.ppf(0.975, fewer[0] + 1, fewer[1] - fewer[0])) if p < 1 else 1.0,
        ),
        "t over folds": (found.mean - naive, found.mean + naive),
        "Nadeau-Bengio": (found.mean - corrected, found.mean + corrected),
    }


def wilson_of(p: float, n: float, z: float = 1.959964) -> tuple[float, float]:
    middle, half = (p + z**2 / (2 * n)) / (1 + z**2 / n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return middle - half / (1 + z**2 / n), middle + half / (1 + z**2 / n)


def grouped(records: list[Record]) -> Iterator[tuple[str, Any, str, list[Record]]]:
    groups: dict[tuple[str, Any, str], list[Record]] = defaultdict(list)
    for found in records:
        name, shots, method, _ = found["key"]
        groups[name, shots, method].append(found)
    for (name, shots, method), members in sorted(
        groups.items(), key=lambda item: (item[0][0], str(item[0][1]).zfill(9))
    ):
        yield name, shots, method, members


def print_estimates(records: list[Record]) -> None:
    others: list[str] = []
    for name, shots, method, members in grouped(records):
        truth = np.array([found["truth"] for found in members])
        made = [Estimate.of(found["folds"]) for found in members]
        estimates = np.array([one.accuracy for one in made])
        limits = {key: np.array([intervals(one)[key] for one in made]) for key in intervals(made[0])}
        if not others:
            others = [key for key in limits if key != "printed"]
            heads = "data | per class | method | draws | truth % | bias | RMSE | covered % | width"
            print(f"| {heads} | {' | '.join(others)} |\n|" + " --- |" * (9 + len(others)))
        covered = {
            key: (100 * np.mean((low <= truth) & (truth <= high)), 100 * np.mean(high - low))
            for key, (low, high) in ((key, found.T) for key, found in limits.items())
        }
        print(
            f"| {name} | {shots} | {method} | {len(members)} | {100 * truth.mean():.1f} | "
            f"{100 * (estimates - truth).mean():+.1f} | {100 * np.sqrt(np.mean((estimates - truth) ** 2)):.1f} | "
            f"{covered['printed'][0]:.1f} | {covered['printed'][1]:.1f} | "
            + " | ".join("{:.1f} / {:.1f}".format(*covered[key]) for key in others)
            + " |"
        )
    print("\nLast columns: coverage in % / mean width in points of other intervals of the same estimates.")


def print_comparisons(records: list[Record]) -> None:
    """How often the interval of a paired difference contains the true difference of two methods."""
    of_method: dict[tuple[str, Any], dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for found in records:
        name, shots, method, draw = found["key"]
        of_method[name, shots][method][draw] = found
    print("\n| data | per class | pair | draws | true difference | covered % | wrong verdict % | no difference % |")
    print("|" + " --- |" * 8)
    for (name, shots), methods in of_method.items():
        known = list(methods)
        for one_name, other in ((a, b) for i, a in enumerate(known) for b in known[i + 1 :]):
            draws = sorted(methods[one_name].keys() & methods[other].keys())
            pairs = [(methods[one_name][draw], methods[other][draw]) for draw in draws]
            true = np.array([100 * (a["truth"] - b["truth"]) for a, b in pairs])
            made = [compare(*map(_predictions, pair)) for pair in pairs]
            covered = [one.low <= value <= one.high for one, value in zip(made, true, strict=True)]
            wrong = [one.shown and one.difference * value < 0 for one, value in zip(made, true, strict=True)]
            shares = [100 * np.mean(column) for column in (covered, wrong, [not one.shown for one in made])]
            print(
                f"| {name} | {shots} | {one_name} - {other} | {len(pairs)} | {true.mean():+.1f} | "
                + " | ".join(f"{share:.1f}" for share in shares)
                + " |"
            )


def _predictions(found: Record) -> Predictions:
    columns = [np.array(found[name]) for name in ("index", "label", "predicted")]
    return Predictions(*columns, probability=np.ones(len(columns[0]), np.float32))


def print_calibration(records: list[Record]) -> None:
    print("| data | per class | method | draws | temperature | NLL | after | held-out NLL | after | ECE % | after |")
    print("|" + " --- |" * 11)
    for name, shots, method, members in grouped(records):
        before, after = np.mean([found["nll"] for found in members], axis=0)
        held_before, held_after = np.mean([found["held_out_nll"] for found in members], axis=0)
        errors = [100 * expected_calibration_error([found["bins"][i] for found in members]) for i in (0, 1)]
        temperature = float(np.median([found["temperature"] for found in members]))
        print(
            f"| {name} | {shots} | {method} | {len(members)} | {temperature:.2f} | {before:.3f} | {after:.3f} | "
            f"{held_before:.3f} | {held_after:.3f} | {errors[0]:.1f} | {errors[1]:.1f} |"
        )


def calibration(options: argparse.Namespace) -> list[Record]:
    files = [options.out / f"{name}.jsonl" for name in ("frozen", "adapters")]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    if not lines:
        raise SystemExit(f"{options.out} has no draws: run `frozen` or `adapters` first")
    return [json.loads(line) for line in lines]


def main() -> None:
    measurements = {"frozen": frozen, "unbalanced": unbalanced, "adapters": adapters, "calibration": calibration}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=list(measurements))
    parser.add_argument("--out", type=Path, default=Path("/tmp/nola-vision-estimates"), help="features and records")
    parser.add_argument("--fashion", type=Path, help="a folder with FashionMNIST/raw")
    parser.add_argument("--draws", type=int, help="fewer or more")
    parser.add_argument("--shots", type=int, nargs="+", default=list(SHOTS), help="images per class, of frozen")
    options = parser.parse_args()
    torch.set_num_threads(1)  # draws are small: more threads would wait for one another
    options.out.mkdir(parents=True, exist_ok=True)
    records = measurements[options.measurement](options)
    if options.measurement == "calibration":
        print_calibration(records)
    else:
        print_estimates(records)
    if options.measurement == "frozen":
        print_comparisons(records)


if __name__ == "__main__":
    main()
