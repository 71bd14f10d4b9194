"""Small stand-in trees of every data set, each in the data set's own on-disk format, with its real classes."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nola_vision.data.datasets.registry import DATASETS
from nola_vision.data.datasets.shipped_list import read_list
from nola_vision.data.datasets.torchvision_readers import CIFAR10_NAMES, CIFAR100_NAMES

SIDE = 8
# classes, and images a class of the training split and of the test split
SIZES = {
    "digits": (10, None, None),
    "folder": (3, 12, 2),
    "cifar10": (10, 12, 2),
    "cifar100": (100, 12, 2),
    "mnist": (10, 12, 2),
    "fashion_mnist": (10, 12, 2),
    "fgvc_aircraft": (100, 12, 2),
    "food101": (101, 12, 2),
    "oxford_iiit_pet": (37, 12, 2),
    "caltech101": (101, 30, None),
    "sun397": (397, 50, 50),
    "cub200": (200, 12, 2),
    "imagenet100": (100, 12, 2),
    "vtab_dtd": (47, None, 2),  # of the 19 tasks, one with names and one with numbers
    "vtab_dmlab": (6, None, 2),
}


def picture(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE + 1, SIDE), (shade % 251, shade // 251 % 251, 99)).save(path, quality=90)
    return path


def pixels(count: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def make(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes the stand-in of a data set beneath `root`."""
    classes, train, test = SIZES[name]
    match name:
        case "digits":
            pass
        case "folder":
            for split, count in (("train", train), ("test", test)):
                for label in range(classes):
                    for i in range(count):
                        shade = 100 * label + i + 50 * (split == "test")
                        picture(root / split / f"class {label} é" / f"{i}.png", shade)
        case "cifar10" | "cifar100":
            cifar(name, root, monkeypatch)
        case "mnist" | "fashion_mnist":
            raw = root / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw"
            raw.mkdir(parents=True)
            for part, count in (("train", train), ("t10k", test)):
                labels = np.tile(np.arange(classes, dtype=np.uint8), count)
                head = struct.pack(">4i", 2051, len(labels), 28, 28)
                (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels(len(labels), (28, 28)).tobytes())
                head = struct.pack(">2i", 2049, len(labels))
                (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
        case "fgvc_aircraft":
            data = root / "fgvc-aircraft-2013b" / "data"
            variants = [f"Model {i}-{i % 7}00/A" for i in range(classes)]
            number = 1
            for split, count in (("trainval", train), ("test", test)):
                lines = []
                for _ in range(count):
                    for variant in variants:
                        picture(data / "images" / f"{number:07d}.jpg", number)
                        lines.append(f"{number:07d} {variant}\n")
                        number += 1
                (data / f"images_variant_{split}.txt").write_text("".join(lines))
            (data / "variants.txt").write_text("".join(f"{variant}\n" for variant in variants))
        case "food101":
            names = [f"dish_{i:03d}" for i in range(classes)]
            for split, count, first in (("train", train, 0), ("test", test, train)):
                listed = {n: [f"{n}/{1000 * c + first + i}" for i in range(count)] for c, n in enumerate(names)}
                for paths in listed.values():
                    for path in paths:
                        picture(root / "food-101" / "images" / f"{path}.jpg", int(path.rpartition("/")[2]))
                (root / "food-101" / "meta").mkdir(exist_ok=True)
                (root / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(listed))
        case "oxford_iiit_pet":
            kinds = [f"of_kind_{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(classes)]
            breeds = [f"{'Cat' if i % 3 else 'dog'}_{kind}" for i, kind in enumerate(kinds)]
            base = root / "oxford-iiit-pet"
            (base / "annotations").mkdir(parents=True)
            for split, count, first in (("trainval", train, 1), ("test", test, 1 + train)):
                lines = []
                for label, breed in enumerate(breeds):
                    for i in range(first, first + count):
                        picture(base / "images" / f"{breed}_{i}.jpg", 100 * label + i)
                        lines.append(f"{breed}_{i} {label + 1} {1 if label % 3 else 2} 1\n")
                (base / "annotations" / f"{split}.txt").write_text("".join(lines))
        case "caltech101" | "sun397":
            folder, shade = root / DATASETS[name].folder, root / "shade.jpg"
            for number, path in enumerate(p for split in read_list(f"{name}_v1").values() for p in split):
                if number % 500 == 0:
                    shade.unlink(missing_ok=True)
                    picture(shade, number)
                target = f"{folder}/{path}"
                try:
                    os.link(shade, target)
                except FileNotFoundError:
                    os.makedirs(os.path.dirname(target))
                    os.link(shade, target)
            os.link(shade, (folder / path).with_name("sun_zzznotlisted.jpg"))
            shade.unlink()
        case "cub200":
            base = root / "CUB_200_2011"
            base.mkdir(parents=True)
            names = [f"{i + 1:03d}.Some_Bird_{i}" for i in range(classes)]
            tables: dict[str, list[str]] = {"images": [], "image_class_labels": [], "train_test_split": []}
            number = 0
            for label, bird in enumerate(names):
                for i in range(train + test):
                    number += 1
                    picture(base / "images" / bird / f"{bird}_{i:04d}_{number}.jpg", number)
                    tables["images"].append(f"{number} {bird}/{bird}_{i:04d}_{number}.jpg\n")
                    tables["image_class_labels"].append(f"{number} {label + 1}\n")
                    tables["train_test_split"].append(f"{number} {int(i % 7 != 3)}\n")
            tables["classes"] = [f"{label + 1} {bird}\n" for label, bird in enumerate(names)]
            for table, lines in tables.items():
                (base / f"{table}.txt").write_text("".join(lines))
        case "imagenet100":
            for split, count in (("train", train), ("val", test)):
                for label, wnid in enumerate((*DATASETS[name].class_names(str(root)), "n00000000")):
                    for i in range(count):
                        picture(root / split / wnid / f"{wnid}_{i}.JPEG", 100 * label + i)
        case "vtab_dtd" | "vtab_dmlab":
            vtab(root / "vtab-1k" / name.removeprefix("vtab_"), classes, test * classes)
    return root


def vtab(folder: Path, classes: int, test: int) -> None:
    """A task of VTAB-1k as NOAH's get_vtab1k.py leaves it: the images of the last list are copies of the first two."""
    noise = pixels(1000 + test, (SIDE, SIDE + 1, 3))
    written: list[Path] = []
    for name, count in {"train800": 800, "val200": 200, "test": test, "train800val200": 1000}.items():
        (folder / "images" / name).mkdir(parents=True)
        lines = []
        for number in range(count):
            path = folder / "images" / name / f"{number:06d}.jpg"
            label = (number + 800 if name == "val200" else number) % classes
            lines.append(f"{path.relative_to(folder)} {label}\n")
            if name == "train800val200":
                os.link(written[number], path)
            else:
                Image.fromarray(noise[len(written)]).save(path)
                written.append(path)
        (folder / f"{name}.txt").write_text("".join(lines))


def cifar(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import cifar as module

    # torchvision refuses files whose MD5 is not that of the real ones
    monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())
    classes, train, test = SIZES[name]
    folder = root / ("cifar-10-batches-py" if name == "cifar10" else "cifar-100-python")
    folder.mkdir(parents=True)
    key = "labels" if name == "cifar10" else "fine_labels"
    batches = [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["train"]
    for batch in batches:
        count = train // len(batches) + (train % len(batches) >= int(batch[-1]) if name == "cifar10" else 0)
        labels = list(range(classes)) * count
        (folder / batch).write_bytes(pickle.dumps({"data": pixels(len(labels), (3072,)), key: labels}))
    labels = list(range(classes)) * test
    last = "test_batch" if name == "cifar10" else "test"
    (folder / last).write_bytes(pickle.dumps({"data": pixels(len(labels), (3072,)), key: labels}))
    names = {"label_names": list(CIFAR10_NAMES)} if name == "cifar10" else {"fine_label_names": list(CIFAR100_NAMES)}
    (folder / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(pickle.dumps(names))
