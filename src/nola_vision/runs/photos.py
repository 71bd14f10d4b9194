"""The config for a user's images: what `nola-vision fit PHOTOS` trains and `nola-vision init PHOTOS` writes.

Errors are reported before torch and timm are imported. These are only needed for a backbone other than the two known
ones.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from nola_vision.common.devices import parse_device
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import why_not_a_file
from nola_vision.common.imports import without_collections
from nola_vision.common.progress import say_start
from nola_vision.common.suggestions import did_you_mean
from nola_vision.common.tags import split_tag
from nola_vision.data.datasets.registry import get_dataset, open_split
from nola_vision.data.sources import ImageSource
from nola_vision.images.decoding import image_suffixes
from nola_vision.runs import cells, run_id, yaml_files
from nola_vision.runs.yaml_files import Config

BACKBONE = "vit_small_patch14_dinov2.lvd142m"  # docs/decisions/0016
QUICKSTART = "vit_mini_patch4_32.contours"  # ships with the package; its own side is 32 pixels
LARGEST_SIDE = 224  # pixels; a ViT-S/14 then takes 0.16 s per training image and pass on two cores
BATCH_SIZE = 16
STEPS = 100  # of the optimizer: 4 minutes for a ViT-S/14 at 224 pixels on two cores
EPOCHS = 10, 50  # at least, at most
MAX_PARAMETERS = 6144  # coefficients of the adapter: 24 KiB on any backbone; the head adds 1.5 KiB per class here
PHOTOS = "a folder with one folder of images per class, a CSV of path,label, or a text list of `path label` lines"


def config(
    place: str,
    *,
    backbone: str | None = None,
    method: str | None = None,
    shots: int | Literal["all"] | None = None,
    epochs: int | None = None,
    device: str | None = None,
    weights: str | None = None,
) -> Config:
    """A config with `methods` for the images at a place. Every path in it is absolute.

    Args:
        place: a folder, a CSV or a text list (docs/photos.md).
        backbone: a tag of timm, or `quickstart` (default: `BACKBONE`).
        method: the entry to train (default: nola).
        shots: training images per class (default: all).
        epochs: passes over the training images (default: chosen by their number).
        device: `cpu`, `cuda`, `cuda:N` or `mps` (default: a GPU if there is one).
        weights: a local file with the backbone's weights.

    Raises:
        NolaVisionError: there are no images of two or more classes at the place, or a value is not possible.
    """
    for name, value in (("shots", shots), ("epochs", epochs)):
        if isinstance(value, int) and value < 1:
            raise NolaVisionError(f"--{name} is {value}: give 1 or more{', or all' if name == 'shots' else ''}")
    trainer = {**_device(device), "precision": "32-true"}
    made: Config = {
        "protocol": "photos",
        "method": method or "nola",
        "methods": _methods(["qkv", "mlp"]),
        "model": {"backbone": _backbone(backbone, weights)},
        "data": {
            "dataset": "folder" if os.path.isdir(_absolute(place)) else "list",
            "root": _absolute(place),
            "shots": shots or "all",
            "batch_size": BATCH_SIZE,
            "augmentation": "light",
            "flip": True,
        },
        "trainer": trainer,
    }
    run_id.entry(made, made["method"])
    source = open_images(place)
    images = len(source) if shots in (None, "all") else min(len(source), int(shots or 0) * len(source.class_names))
    trainer["max_epochs"] = epochs or _epochs(images)
    trainer["check_val_every_n_epoch"] = trainer["max_epochs"]
    made["model"]["warmup_epochs"] = max(1, trainer["max_epochs"] // 10)  # the default protocol's share: 5 of 50
    if made["model"]["backbone"]["tag"] not in (BACKBONE, QUICKSTART):
        side, targets = _side_and_targets(made["model"]["backbone"])
        made["methods"] = _methods(targets)
        made["model"]["backbone"] |= {} if side is None else {"img_size": side}
    whole = cells.assemble([cells.read_part("protocols", "default"), made])
    return {section: _in_order(value, whole[section]) for section, value in made.items()}


def for_this_machine(made: Config, accelerator: Any) -> Config:
    """A config with 16-bit precision if the accelerator of its run is a GPU of this machine. Imports torch."""
    from nola_vision.training.precision import MIXED, gpu_has_bfloat16

    if not gpu_has_bfloat16(accelerator):
        return made
    return {**made, "trainer": {**made["trainer"], "precision": MIXED}}


def open_images(place: str) -> ImageSource:
    """The training images at a place; the files are listed, not read.

    Raises:
        NolaVisionError: the place does not exist, is one image or a config, or does not contain images of two or more
            classes.
    """
    path = Path(_absolute(place))
    if path.suffix.lower() in (".yaml", ".yml"):
        raise NolaVisionError(f"'{place}' is not a folder of images: a config is given by --config {place}")
    if not place or not path.exists():
        raise NolaVisionError(f"'{place}' does not exist: give {PHOTOS}")
    if path.is_file() and path.suffix.lower() in image_suffixes():
        raise NolaVisionError(
            f"'{place}' is one image: give {PHOTOS} (to classify it: nola-vision predict --adapter FILE IMAGE)"
        )
    return open_split(get_dataset("folder" if path.is_dir() else "list"), str(path), "train")


def describe(made: Config) -> str:
    """A config as YAML with comments, which `config_files.load_config` reads back as the same config.

    Raises:
        NolaVisionError: a path in it has bytes that are not UTF-8.
    """
    lines = _HEADER.splitlines()
    for section, value in made.items():
        lines += ["", *_comment(section)]
        if isinstance(value, dict):
            lines.append(f"{section}:")
            for key, setting in value.items():
                lines += [f"  {line}" for line in (*_comment(f"{section}.{key}"), *_yaml(key, setting))]
        else:
            lines += _yaml(section, value)
    text = "\n".join(lines) + "\n"
    try:
        same = yaml_files.load_yaml(text) == made
    except yaml.YAMLError:
        same = False
    if not same:
        raise NolaVisionError(
            f"{made['data']['root']} has bytes that are not UTF-8, which YAML cannot store: rename it, or train "
            "without a YAML file by nola-vision fit PHOTOS"
        )
    return text


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _in_order(value: Any, whole: Any) -> Any:
    """Mappings with the keys of `value` first; those that the default protocol adds come after them."""
    return {key: whole[key] for key in {**value, **whole}} if isinstance(value, dict) else whole


def _methods(targets: list[str]) -> Config:
    """The entries by name. What is not set here is the default protocol's."""
    return {
        **{name: {"class_path": class_name} for name, class_name in run_id.FROZEN_METHODS.items()},
        "linear": {"class_path": "LinearProbe"},
        "nola": {
            "class_path": "NOLA",
            "init_args": {"targets": targets, "rank": 4, "max_parameters": MAX_PARAMETERS, "c": 4},
        },
        "lora-r4": {"class_path": "LoRA", "init_args": {"targets": targets[:1], "rank": 4}},
        "full-ft": {"class_path": "FullFinetune"},
    }


def _epochs(images: int) -> int:
    """Passes over the training images: as many as make `STEPS` steps of the optimizer, within `EPOCHS`.

    Steps, not passes, decide how far the adapter gets, and so how long it takes: docs/decisions/0016.
    """
    least, most = EPOCHS
    steps_per_epoch = -(-images // BATCH_SIZE)
    return min(most, max(least, -(-STEPS // steps_per_epoch)))


def _device(device: str | None) -> Config:
    """The trainer's settings for a device."""
    if device is None:
        return {}
    kind, number = parse_device(device)
    return {"accelerator": kind} if number is None else {"accelerator": kind, "devices": [number]}


def _backbone(name: str | None, weights: str | None) -> Config:
    """The settings of the backbone, without what only timm knows."""
    if name != "quickstart" and (hint := did_you_mean(name, ["quickstart"], "", cutoff=0.8)):
        raise NolaVisionError(f"--backbone is '{name}': {hint}")
    tag = BACKBONE if name is None else QUICKSTART if name == "quickstart" else name
    kind, rest = split_tag(tag)
    backbone: Config = {"tag": f"{kind}:{_absolute(rest)}" if kind == "local-dir" else tag}
    if tag == BACKBONE:
        backbone["img_size"] = LARGEST_SIDE
    if weights is not None:
        backbone["file"] = _absolute(weights)
        if not os.path.isfile(backbone["file"]) and not os.path.isdir(backbone["file"]):
            reason = why_not_a_file(backbone["file"])
            raise NolaVisionError(f"--weights {weights} {reason}: give a .safetensors or .pth file with timm's keys")
    return backbone


def _side_and_targets(backbone: Config) -> tuple[int | None, list[str]]:
    """The image side, None for timm's own, and the targets that a backbone has.

    Raises:
        NolaVisionError: timm does not have the model.
    """
    say_start(f"the check of {backbone['tag']}")
    with without_collections():
        from nola_vision.models.backbones.creation import skeleton
        from nola_vision.models.backbones.image_size import largest_side
        from nola_vision.models.backbones.spec import BackboneSpec
        from nola_vision.models.targets import find_targets

    spec = BackboneSpec(**backbone)
    side = largest_side(spec, LARGEST_SIDE)
    model, targets = skeleton(spec), []
    for name in ("qkv", "mlp"):
        with suppress(NolaVisionError):  # a convolutional network lacks qkv, a ResNet also mlp
            find_targets(model, name)
            targets.append(name)
    return side, targets or ["conv"]


def _comment(key: str) -> list[str]:
    return [f"# {line}" for line in _COMMENTS.get(key, "").splitlines()]


def _yaml(key: str, value: Any) -> list[str]:
    style = None if isinstance(value, dict) else False  # one value is not written as {key: value}
    text = yaml_files.dump({key: value}, width=2**20, default_flow_style=style)  # a long path stays on its line
    return text.rstrip("\n").split("\n")  # splitlines() would split at U+2028 in a path too


_HEADER = """\
# Made by nola-vision init. Train it:             nola-vision fit --config THIS_FILE
# Compare all methods over 4 splits x 3 inits:   nola-vision sweep --config THIS_FILE
# Every key is an option too, for example --data.shots 10. docs/photos.md explains the choices."""

_COMMENTS = {
    "protocol": "A name for these settings. It is part of the name of the folder that the runs are in.",
    "method": "What `fit` trains: one of `methods`, or --method NAME.",
    "methods": """\
What `sweep` compares. `lr` is used, unless `fit --search` chooses among the values in `search`. `sweep` chooses
only if the data have a validation pool: a test split, and a class with 20 or more training images.""",
    "methods.1nn": "Classifiers on the frozen backbone's features, which `fit` reports first: docs/frozen-features.md.",
    "methods.linear": "Only the head is trained.",
    "methods.nola": f"""\
The adapter: {MAX_PARAMETERS:,} coefficients, spread over the targets: 24 KiB of the file, next to the head. The budget
keeps the file as small on every backbone. `max_bytes` sets the size of the whole file; `bits: 4` makes it smaller.""",
    "methods.lora-r4": "For comparison: LoRA, and training every weight.",
    "model.backbone": f"""\
Any timm tag; `file` is a local weights file. img_size: the image side in pixels. Twice the side takes four times as
long, so that it is at most {LARGEST_SIDE} unless set here.""",
    "data.dataset": "folder: one folder of images per class. list: a file of paths and labels.",
    "data.shots": "Training images per class, or all.",
    "data.augmentation": "Random crops, and mirrored images, since most photos look much the same mirrored.",
    "data.flip": "Set flip: false where left and right differ in meaning: text, traffic signs, left and right hands.",
    "trainer.check_val_every_n_epoch": """\
Epochs between validations. Here there is one, after training, to calibrate the adapter's probabilities, if the data
have a validation pool. With model.stop_early give 1.""",
    "trainer.precision": """\
32-true is float32. On a GPU bf16-mixed is faster, and `fit PHOTOS` takes it there. auto: whichever is faster here.""",
    "trainer.max_epochs": f"""\
Passes over the training images: as many as make {STEPS} steps of the optimizer, but {EPOCHS[0]} to {EPOCHS[1]}.""",
}
