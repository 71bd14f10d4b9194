"""A verb's own command-line options, beside those that go on to Lightning's parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.suggestions import did_you_mean

_MOST_DIGITS = 4300  # that Python reads
LIGHTNINGS_OWN = ("--protocol", "--method", "--threads", "--seed_everything", "--print_config", "--help")


def refuse_strays(rest: Sequence[str], options: argparse.ArgumentParser) -> None:
    """Catches what can only be a slip among the words that go on to Lightning's parser.

    Raises:
        NolaVisionError: a config given without `--config`, or an option that is nearly one of the verb's own.
    """
    own = [name for action in options._actions for name in action.option_strings]
    for option in (word.partition("=")[0] for word in rest if word.startswith("--") and "." not in word):
        if option not in LIGHTNINGS_OWN and (hint := did_you_mean(option, own, "", cutoff=0.8)):
            raise NolaVisionError(f"there is no option {option}: {hint}")
    if rest and not rest[0].startswith("-"):
        raise NolaVisionError(f"'{rest[0]}' is not an option: a config is given by --config {rest[0]}")


class Options(argparse.ArgumentParser):
    """A verb's own options, whose mistakes are one sentence like any other."""

    def __init__(self, verb: str, **settings: Any) -> None:
        super().__init__(f"nola-vision {verb}", allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise NolaVisionError(f"{message} ({self.prog} --help lists the options)")


def whole_number(text: str) -> int:
    """The type of an option that takes a whole number from 0 up."""
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 0 up")
    return int(text)


def config_options(verb: str, help: bool = False) -> Options:
    """A parser of the options that every verb with a config shares; other options are Lightning's."""
    parser = Options(verb, add_help=help)
    shipped = "a config, shipped or local"
    parser.add_argument("-c", "--config", action="append", default=[], metavar="FILE", help=shipped)
    parser.add_argument("--out", default="runs", metavar="DIR", help="the folder of all runs (default: runs)")
    allowed = "a package whose classes the config may name, such as a callback of your own; may be repeated"
    parser.add_argument("--allow-import", action="append", default=[], metavar="PACKAGE", help=allowed)
    return parser


def shots_number(text: str) -> int | str:
    """The type of `--shots`: a whole number from 0 up, or `all`."""
    return text if text == "all" else whole_number(text)


PHOTO_OPTIONS = {  # of `fit PHOTOS` and `init PHOTOS`, and the setting of a config that each is about
    "backbone": "--model.backbone.tag",
    "shots": "--data.shots",
    "epochs": "--trainer.max_epochs",
    "device": "--trainer.accelerator",
    "weights": "--model.backbone.file",
}


def add_photo_options(parser: argparse.ArgumentParser) -> None:
    """The options of `photos.config`, the method included."""
    add = parser.add_argument_group("options for PHOTOS").add_argument
    add("--backbone", metavar="TAG", help="a timm tag, or quickstart: the small one that ships, weak on photos")
    add("--weights", metavar="FILE", help="local file with the backbone's weights: nothing is downloaded")
    add("--method", metavar="NAME", help="nola (default), lora-r4, linear, full-ft, logistic, nearest-mean or 1nn")
    add("--shots", type=shots_number, metavar="N", help="training images per class, or all (default: all)")
    add("--epochs", type=whole_number, metavar="N", help="passes over them (default: 10 to 50, fewer for more images)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 or mps (default: a GPU if there is one)")


def photo_settings(known: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `photos.config` besides the place."""
    return {name: getattr(known, name) for name in (*PHOTO_OPTIONS, "method")}


def refuse_without_photos(known: argparse.Namespace) -> None:
    """Raises NolaVisionError for an option of PHOTOS where a config is given instead."""
    for name, setting in PHOTO_OPTIONS.items():
        if getattr(known, name) is not None:
            raise NolaVisionError(f"--{name} goes with PHOTOS; with a config, give {setting} {getattr(known, name)}")


def take_photos(rest: Sequence[str]) -> tuple[str | None, list[str]]:
    """PHOTOS among the words that the verb's own options leave, and the others, which go on to Lightning's parser.

    An option of Lightning's parser takes one value, as `--key value` or `--key=value`; argparse alone would mistake the
    value for PHOTOS.

    Raises:
        NolaVisionError: there is a second such word.
    """
    photos, others, words = None, [], iter(rest)
    for word in words:
        if word.startswith("-"):
            others.append(word)
            if "=" not in word and word not in ("--print_config", "-h", "--help"):
                others += [value for value in [next(words, None)] if value is not None]
        elif photos is None:
            photos = word
        else:
            raise NolaVisionError(f"'{photos}' and '{word}' are two places: give one folder, CSV or text list")
    return photos, others
