"""Command-line options of the verbs, in addition to those that Lightning's parser handles."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.mappings import value_at
from nola_vision.common.suggestions import did_you_mean
from nola_vision.runs import early_checks, run_id
from nola_vision.training import feature_cache

CONFIG_DIR = "folder with your configs and parts (default: $NOLA_VISION_CONFIGS, if that is set)"
_MOST_DIGITS = 4300  # that Python reads
_MOST_NUMBERS = 10_000  # in a range: more are a typo
LIGHTNINGS_OWN = ("--protocol", "--method", "--threads", "--seed_everything", "--print_config", "--help")


def refuse_strays(rest: Sequence[str], options: argparse.ArgumentParser) -> None:
    """Catches typos among the words that Lightning's parser will handle.

    Raises:
        NolaVisionError: a config given without `--config`, or a misspelt option of the verb.
    """
    own = [name for action in options._actions for name in action.option_strings]
    for option in (word.partition("=")[0] for word in rest if word.startswith("--") and "." not in word):
        if option not in LIGHTNINGS_OWN and (hint := did_you_mean(option, own, "", cutoff=0.8)):
            raise NolaVisionError(f"there is no option {option}: {hint}")
    if rest and not rest[0].startswith("-"):
        raise NolaVisionError(f"'{rest[0]}' is not an option: a config is given by --config {rest[0]}")


class Options(argparse.ArgumentParser):
    """The options of a verb; its errors are a NolaVisionError."""

    def __init__(self, verb: str, **settings: Any) -> None:
        super().__init__(f"nola-vision {verb}", allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise NolaVisionError(f"{message} ({self.prog} --help lists the options)")


def whole_number(text: str) -> int:
    """The type of an option that takes a whole number, 0 or more."""
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return int(text)


def parse_range(text: str) -> list[int]:
    """Parses `0-3`, `0,2,5`, `7` or a mix of them as a list of distinct numbers.

    Raises:
        NolaVisionError: anything else.
    """
    numbers: dict[int, None] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]+)(?:-([0-9]+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise NolaVisionError(f"{text!r} is not a range of numbers: write it like 0-3, 0,2,5 or 7")
        if last - first >= _MOST_NUMBERS:
            raise NolaVisionError(f"{text!r} is more than {_MOST_NUMBERS:,} numbers: give a shorter range")
        numbers |= dict.fromkeys(range(first, last + 1))
    return list(numbers)


def parse_shard(text: str) -> tuple[int, int]:
    """Parses `2/5` as the second of five shards.

    Raises:
        NolaVisionError: anything else.
    """
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= count:
        raise NolaVisionError(f"{text!r} is not a shard: write it like 2/5, from 1/5 to 5/5")
    return number, count


def parse_methods(text: str, config: Mapping[str, Any]) -> list[str]:
    """Parses `all`, or names separated by commas, as distinct names of the config's entries.

    Raises:
        NolaVisionError: a name is not an entry of the config.
    """
    names = list(run_id.need(config, "methods")) if text.strip() == "all" else [n.strip() for n in text.split(",")]
    if "" in names:
        raise NolaVisionError(f"--methods {text!r} has an empty name: write it like linear,nola")
    for name in names:
        run_id.entry(config, name)
    return list(dict.fromkeys(names))


def parse_budgets(text: str) -> list[int]:
    """Parses `10KB`, or sizes separated by commas, as bytes; a KB has 1,000 bytes.

    Raises:
        NolaVisionError: one of them is not a size.
    """
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([1-9][0-9]{0,8})\s*(|B|KB)\s*", part)
        if found is None:
            raise NolaVisionError(f"--budgets {text!r} is not a list of file sizes: write it like 10KB or 2KB,2500")
        sizes.append(int(found[1]) * (1000 if found[2] == "KB" else 1))
    return sizes


def config_options(verb: str, help: bool = False) -> Options:
    """A parser for the options of all verbs with a config; Lightning's parser handles the others."""
    parser = Options(verb, add_help=help)
    shipped = "a config, shipped or local"
    parser.add_argument("-c", "--config", action="append", default=[], metavar="FILE", help=shipped)
    parser.add_argument("--config-dir", metavar="DIR", help=CONFIG_DIR)
    parser.add_argument("--out", default="runs", metavar="DIR", help="the folder of all runs (default: runs)")
    allowed = "a package whose classes the config may name, such as a custom callback; may be repeated"
    parser.add_argument("--allow-import", action="append", default=[], metavar="PACKAGE", help=allowed)
    uncached = "neither read nor write the features that are cached on disk"
    parser.add_argument("--no-cache", action="store_true", help=uncached)
    return parser


def accelerator(config: Mapping[str, Any], rest: Sequence[str]) -> Any:
    """The trainer's accelerator, by the options or else the config."""
    given = value_at(config, "trainer", "accelerator")
    return dict(early_checks.option_pairs(rest)).get("trainer.accelerator", given) or "auto"


def apply_no_cache(known: argparse.Namespace) -> None:
    """Carries out --no-cache in the environment, which worker processes inherit, and not in a run's config.

    Raises:
        NolaVisionError: the environment variable is not a size.
    """
    if known.no_cache:
        os.environ[feature_cache.VARIABLE] = "0"
    feature_cache.most_bytes()


def shots_number(text: str) -> int | str:
    """The type of `--shots`: a whole number, or `all`."""
    return text if text == "all" else whole_number(text)


PHOTO_OPTIONS = {  # of `fit PHOTOS` and `init PHOTOS`, and the config setting that each sets
    "backbone": "--model.backbone.tag",
    "shots": "--data.shots",
    "epochs": "--trainer.max_epochs",
    "device": "--trainer.accelerator",
    "weights": "--model.backbone.file",
}


def add_photo_options(parser: argparse.ArgumentParser) -> None:
    """The options for `photos.config`, with the method."""
    add = parser.add_argument_group("options for PHOTOS").add_argument
    add("--backbone", metavar="TAG", help="a timm tag, or quickstart: the small one that ships, weak on photos")
    add("--weights", metavar="FILE", help="local file with the backbone's weights, instead of a download")
    add("--method", metavar="NAME", help="nola (default), lora-r4, linear, full-ft, logistic, nearest-mean or 1nn")
    add("--shots", type=shots_number, metavar="N", help="training images per class, or all (default: all)")
    add("--epochs", type=whole_number, metavar="N", help="passes over them (default: 10 to 50, fewer for more images)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 or mps (default: a GPU if there is one)")


def photo_settings(known: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `photos.config`, without PHOTOS itself."""
    return {name: getattr(known, name) for name in (*PHOTO_OPTIONS, "method")}


def refuse_without_photos(known: argparse.Namespace) -> None:
    """Raises NolaVisionError for an option of PHOTOS if a config is given instead."""
    for name, setting in PHOTO_OPTIONS.items():
        if getattr(known, name) is not None:
            raise NolaVisionError(f"--{name} goes with PHOTOS; with a config, give {setting} {getattr(known, name)}")


def take_photos(rest: Sequence[str]) -> tuple[str | None, list[str]]:
    """PHOTOS among the words that are not options of the verb, and the other words, which Lightning's parser takes.

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
            raise NolaVisionError(f"'{photos}' and '{word}' are two sets of images: give one folder, CSV or text list")
    return photos, others
