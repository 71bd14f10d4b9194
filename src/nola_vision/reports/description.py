"""A cell in words: its title, its settings and how it was measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from nola_vision.common.tags import HUB_PREFIX, short_dataset, short_tag, split_tag
from nola_vision.common.text import last_part, plural, printable
from nola_vision.data.datasets.vtab import PREFIX, TASKS
from nola_vision.reports.formatting import short_printable
from nola_vision.reports.statistics import LEAST_SPLITS, cross_validated, is_measured
from nola_vision.runs.record import Row, count_once
from nola_vision.runs.run_id import FROZEN_METHODS, OWN_IMAGES

_DATASETS = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "fgvc_aircraft": "FGVC-Aircraft",
    "food101": "Food-101",
    "oxford_iiit_pet": "Oxford-IIIT Pets",
    "caltech101": "Caltech-101",
    "sun397": "SUN397",
    "cub200": "CUB-200-2011",
    "imagenet100": "ImageNet-100",
    **{f"{PREFIX}{task}": f"VTAB-1k {task}" for task in TASKS},
}
_ARCHITECTURES = {"vit_mini_patch4_32": "small ViT/4", "resnet20_cifar": "ResNet-20", "mlp_784_256": "MLP 784-256-10"}
_SIDES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g", "gigantic": "G"}
# Pretraining by word of the tag; the first match is used
_PRETRAINING = {
    "dinov3": "DINOv3",
    "dinov2": "DINOv2",
    "dino": "DINO",
    "mae": "MAE",
    "clip": "CLIP",
    "siglip": "SigLIP",
    "siglip2": "SigLIP 2",
    "in22k": "ImageNet-22k",
    "in21k": "ImageNet-21k",
    "in12k": "ImageNet-12k",
    "in1k": "ImageNet-1k",
    "contours": "pretrained on contours",
}
# Protocols that the title omits
_PLAIN_PROTOCOLS = ("default", "photos", "quickstart", "scratch")
_PROTOCOLS = {
    "paper": "as the paper states",
    "released": "as the code of the paper's authors does",
    "vtab": "as FacT and binary adapters train on VTAB-1k",
    "scratch": "training from scratch",
}

_VERSIONS = {
    "nola-vision": "nola-vision",
    "torch": "PyTorch",
    "timm": "timm",
    "python": "Python",
    "cpu": "processor",
}


def cell_title(rows: Sequence[Row]) -> str:
    """The title of the rows of one cell: `stamps: 4 classes, 80 images, ViT-S/14 DINOv2`.

    It includes a local weights file and a protocol that is not a default. Unknown facts are left out; without rows the
    title is empty.
    """
    if not rows:
        return ""
    facts = [
        *([plural("class", classes)] if (classes := _classes(rows)) else []),
        *([images] if (images := _shots(rows)) else []),
        backbone_name(rows[0]),
        *(["local weights"] if ((rows[0].config.get("model") or {}).get("backbone") or {}).get("file") else []),
    ]
    protocol = rows[0].config.get("protocol")
    if isinstance(protocol, str) and protocol not in _PLAIN_PROTOCOLS:
        facts.append(f"protocol {short_printable(protocol)}")
    return f"{dataset_name(rows[0])}: {', '.join(facts)}"


def cell_facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The settings of one cell in words, each with a heading such as `data`."""
    if not rows:
        return []
    return [
        ("data", _data_text(rows)),
        ("shots", _shots_text(rows)),
        ("backbone", _backbone_text(rows)),
        ("runs", _runs_text(rows)),
        ("protocol", _protocol_text(rows)),
    ]


def how_measured(rows: Sequence[Row]) -> list[str]:
    """The evaluation protocol of one cell in sentences: statistics, images, seeds, machines, dates and id."""
    final = [row for row in count_once(rows) if row.stage == "final"]
    measured = [row for row in final if is_measured(row)]
    sentences = ["Top-1 accuracy is the share of tested images whose class was predicted."]
    if not all(map(cross_validated, measured)):
        sentences += _on_a_test_set(measured)
    if any(map(cross_validated, measured)):
        sentences += _on_folds(measured)
    if rows and (rows[0].config.get("data") or {}).get("shots") not in ("all", None):
        sentences.append("Split s draws the training images with seed s.")
    if any(row.init is not None for row in final):
        others = "; methods on frozen features have none" if any(row.init is None for row in final) else ""
        sentences.append(f"Init i seeds the basis, the head and the order of batches{others}.")
    if trained := [row for row in measured if row.method_class not in FROZEN_METHODS.values()]:
        monitors = sorted({row.monitor or "" for row in trained})
        epochs = " or ".join(f"best epoch by {short_printable(name)}" if name else "last epoch" for name in monitors)
        what = "fold's model" if any(map(cross_validated, trained)) else "run"
        sentences.append(f"Each {what} was tested once, after its {epochs}.")
    return [*sentences, *_machines(measured or final), *([f"Cell: {printable(rows[0].cell)}."] if rows else [])]


def dataset_name(row: Row) -> str:
    """The data set's name: `CIFAR-10`, or the name of the folder or list of a user's images."""
    data = row.config.get("data") or {}
    name = str(data.get("dataset", "?"))
    own = name in OWN_IMAGES
    # the folders of a path may contain a person's name
    name = last_part(str(data.get("root", name))) if own else short_dataset(name).removeprefix(HUB_PREFIX)
    return short_printable(_DATASETS.get(name, name))


def backbone_name(row: Row) -> str:
    """The backbone's name from timm's tag: `ViT-S/14 DINOv2`; for unknown architectures the tag."""
    backbone = (row.config.get("model") or {}).get("backbone") or {}
    source, tag = split_tag(short_tag(str(backbone.get("tag", "?"))))
    architecture = tag.partition(".")[0]
    words = re.split(r"[._]", tag)
    if found := re.match(r"vit_(\w+?)_patch(\d+)", architecture):
        name = f"ViT-{_SIDES[found[1]]}/{found[2]}" if found[1] in _SIDES else architecture
    else:
        name = re.sub(r"^resnet(\d+)$", r"ResNet-\1", architecture)
    name = _ARCHITECTURES.get(architecture, name)
    if source:
        return short_printable(tag)
    base = backbone.get("base") or "pretrained"
    if base != "pretrained":
        return short_printable(f"{name} with {base} weights")
    return short_printable(" ".join([name, *[text for word, text in _PRETRAINING.items() if word in words][:1]]))


def grid_text(runs: Sequence[Row]) -> str:
    """The number of runs of one entry: `12 runs: 4 splits x 3 inits`, or `4 splits` without inits."""
    splits, inits = len({row.split for row in runs}), len({row.init for row in runs} - {None})
    if not inits and len(runs) == splits:
        return plural("split", splits)
    whole = f": {plural('split', splits)} x {plural('init', inits)}" if splits * inits == len(runs) else ""
    return plural("run", len(runs)) + (whole or f" of {plural('split', splits)}")


def _data_text(rows: Sequence[Row]) -> str:
    parts = []
    if train := _span(_count(row, "train") for row in rows):
        parts.append(f"{train} training images")
    if classes := _classes(rows):
        parts.append(plural("class", classes))
    name = dataset_name(rows[0])
    own = (rows[0].config.get("data") or {}).get("dataset") in OWN_IMAGES
    listed = " of ".join(parts) + (" in " if parts and own else " of " if parts else "")
    text = listed + (f"'{name}'" if own else name)
    if folds := max(map(_folds, rows), default=0):
        return f"{text}, no test images: {folds}-fold cross-validation"
    tested = [row for row in rows if row.stage == "final" and row.test_accuracy is not None]
    if images := _span(_count(row, "test") for row in tested):
        return f"{text}, tested on {images} {_test_name(tested)} images"
    return text


def _shots_text(rows: Sequence[Row]) -> str:
    shots = (rows[0].config.get("data") or {}).get("shots")
    if shots == "all" or shots is None:
        return "every training image"
    seeds = sorted({row.split_seed for row in rows})
    listed = short_printable(", ".join(map(str, seeds)))
    if len(seeds) > 1 and seeds[-1] - seeds[0] == len(seeds) - 1:
        listed = f"{seeds[0]} to {seeds[-1]}"
    return f"{_shots(rows)}, drawn with seed{'' if len(seeds) == 1 else 's'} {listed} (the splits)"


def _backbone_text(rows: Sequence[Row]) -> str:
    backbone = (rows[0].config.get("model") or {}).get("backbone") or {}
    name, tag = backbone_name(rows[0]), short_printable(short_tag(str(backbone.get("tag", "?"))), 100)
    text = name if name == tag else f"{name} ({tag})"
    transforms = [found for row in rows if isinstance(found := row.data.get("transform"), dict)]
    if size := _span(_whole(found.get("size")) for found in transforms):
        text += f", images of {size} pixels"
    if file := backbone.get("file"):
        text += f", weights of {short_printable(last_part(str(file)))}"
    return text


def _runs_text(rows: Sequence[Row]) -> str:
    counted = count_once(rows)
    final = [row for row in counted if row.stage == "final"]
    if not final:
        return f"no final run yet, {plural('run', len(counted))} of searches and folds"
    entries = len({(row.method, row.entry_hash) for row in final})
    splits, inits = {row.split for row in final}, {row.init for row in final} - {None}
    text = f"{plural('method', entries)}, {plural('split', len(splits))}"
    if inits:
        text += f" x {plural('init', len(inits))}"
        text += " (frozen features: one run per split)" if any(row.init is None for row in final) else ""
    statuses: Counter[str] = Counter(row.status for row in final)
    text += f": {plural('final run', len(final))}"
    for status in ("failed", "interrupted"):
        text += f", {statuses[status]} {status}" if statuses[status] else ""
    return text


def _protocol_text(rows: Sequence[Row]) -> str:
    config = rows[0].config
    protocol = str(config.get("protocol", "?"))
    text = short_printable(protocol) + (f" ({_PROTOCOLS[protocol]})" if protocol in _PROTOCOLS else "")
    trained = [row.config for row in rows if row.init is not None] or [config]
    epochs = _span(_whole((one.get("trainer") or {}).get("max_epochs")) for one in trained)
    batch = _span(_whole((one.get("data") or {}).get("batch_size")) for one in trained)
    augmentation = (trained[0].get("data") or {}).get("augmentation")
    parts = [
        *([f"{epochs} epochs"] if epochs else []),
        *([f"batches of {batch}"] if batch else []),
        *([f"augmentation {short_printable(augmentation)}"] if isinstance(augmentation, str) else []),
    ]
    return ": ".join([text, *([", ".join(parts)] if parts else [])])


def _on_a_test_set(measured: Sequence[Row]) -> list[str]:
    tested = [row for row in measured if not cross_validated(row)]
    images = _span(_count(row, "test") for row in tested)
    limit = (tested[0].config.get("data") or {}).get("test_limit")
    part = f"{images} {_test_name(tested)} images" if images else f"the {_test_name(tested)} images"
    chosen = ", evenly spaced over each class" if limit is not None else ""
    sentences = [
        f"Each run was tested on {part}{chosen}.",
        "mean (std): over the completed runs of a method, n of them; the std has ddof 0, as in the paper.",
        "[low, high]: Wilson's 95 % interval of one run, of its test images alone: other training images and another "
        "init change the accuracy too.",
    ]
    if len({row.split for row in tested}) >= LEAST_SPLITS:
        sentences.append(
            "The interval of a difference between two methods is Student's t over the splits that both have, of the "
            "difference of their means in each, since runs of one split share their training images. It leaves out "
            "that other test images would give another difference: all splits share them."
        )
    return sentences


def _on_folds(measured: Sequence[Row]) -> list[str]:
    folds = max(map(_folds, measured))
    sentences = [
        f"There is no test set: all images are divided into {folds} folds, and each is tested by a model that was "
        "trained on the other folds, so on fewer images than the final one. Split s divides them with seed s.",
        "mean (std): over folds, n of them; methods on frozen features are repeated on further divisions.",
        "The headline accuracy counts each image once, in the first division into folds; the table averages all folds.",
        "The interval of an accuracy is Clopper and Pearson's for 80 % of the images, since errors of cross-validation "
        "come together; it leaves out the variation of training sets.",
    ]
    if len({row.split for row in measured}) > 1:
        sentences.append(
            "There is no interval over splits for the difference between two methods, since splits divide the same "
            "images: methods are compared image by image, in the first split and init that both have."
        )
    return sentences


def _machines(rows: Sequence[Row]) -> list[str]:
    """Devices, versions and dates, if the rows have them."""
    sentences = []
    devices = Counter(
        short_printable(row.device) + (f" with {plural('thread', row.threads)}" if row.threads else "")
        for row in rows
        if row.device
    )
    if devices:
        sentences.append(f"Device: {_listed(devices)}.")
    found = {
        words: Counter(short_printable(version) for row in rows if (version := row.versions.get(package)))
        for package, words in _VERSIONS.items()
    }
    if versions := [f"{words} {_listed(counts)}" for words, counts in found.items() if counts]:
        sentences.append(f"Versions: {', '.join(versions)}.")
    if times := sorted(row.started for row in rows if row.started):
        first, last = (time[:16].replace("T", " ") for time in (times[0], times[-1]))
        sentences.append(f"Started {first} UTC." if first == last else f"Started {first} to {last} UTC.")
    return sentences


def _listed(counts: Counter[str], most: int = 3) -> str:
    """The values of rows, the most frequent first, each with its number of runs if there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    shown = [f"{value} ({plural('run', count)})" for value, count in counts.most_common(most)]
    return ", ".join(shown) + (f" and {len(counts) - most} more" if len(counts) > most else "")


def _shots(rows: Sequence[Row]) -> str:
    """`5 images per class`, or the number of images for `shots: all`; empty if unknown."""
    shots = _whole((rows[0].config.get("data") or {}).get("shots"))
    if shots is not None:
        return f"{plural('image', shots)} per class"
    train = _span(_count(row, "train") for row in rows)
    return f"{train} images" if train else ""


def _classes(rows: Iterable[Row]) -> int:
    return max((len(row.data.get("class_names") or ()) for row in rows), default=0)


def _folds(row: Row) -> int:
    return len(row.estimate["folds"]) // row.estimate["repeats"] if row.estimate and cross_validated(row) else 0


def _test_name(rows: Sequence[Row]) -> str:
    """The name of the test split on disk: `test` or `validation`."""
    return short_printable(next((name for row in rows if (name := row.data.get("test_name"))), "test"))


def _count(row: Row, part: str) -> int | None:
    counts = row.data.get("counts")
    return _whole(counts.get(part)) if isinstance(counts, dict) and row.stage == "final" else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _span(numbers: Iterable[int | None]) -> str:
    """The range of the known numbers: `1,297` or `80 to 96`; empty if all are unknown."""
    known = [number for number in numbers if number is not None]
    if not known:
        return ""
    return f"{known[0]:,}" if min(known) == max(known) else f"{min(known):,} to {max(known):,}"
