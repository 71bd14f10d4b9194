"""A verb's own command-line options, beside those that go on to Lightning's parser."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from nola_vision.errors import NolaVisionError

LIGHTNINGS_OWN = ("--protocol", "--method", "--threads", "--seed_everything", "--print_config", "--help")


def refuse_strays(rest: Sequence[str], options: argparse.ArgumentParser) -> None:
    """Catches what can only be a slip among the words that go on to Lightning's parser.

    Raises:
        NolaVisionError: a config given without `--config`, or an option that is nearly one of the verb's own.
    """
    own = [name for action in options._actions for name in action.option_strings]
    for option in (word.partition("=")[0] for word in rest if word.startswith("--") and "." not in word):
        if option not in LIGHTNINGS_OWN and (close := difflib.get_close_matches(option, own, n=1, cutoff=0.8)):
            raise NolaVisionError(f"there is no option {option}: did you mean {close[0]}?")
    if rest and not rest[0].startswith("-"):
        raise NolaVisionError(f"'{rest[0]}' is no option: a config is given by --config {rest[0]}")


class Options(argparse.ArgumentParser):
    """A verb's own options, whose mistakes are one sentence like any other."""

    def __init__(self, verb: str, **settings: Any) -> None:
        super().__init__(f"nola-vision {verb}", allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise NolaVisionError(f"{message} ({self.prog} --help lists the options)")


def whole_number(text: str) -> int:
    """The type of an option that takes a whole number from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 0 up")
    return int(text)


def device(text: str) -> str:
    """The type of an option that takes a device, by torch's name for it."""
    if text.partition(":")[0] == "gpu":
        raise argparse.ArgumentTypeError(f"the device '{text}' is called '{text.replace('gpu', 'cuda', 1)}': give that")
    return text


def config_options(verb: str, help: bool = False) -> Options:
    """A parser of the options that every verb with a config shares; other options are Lightning's."""
    parser = Options(verb, add_help=help)
    shipped = "a config, shipped or local"
    parser.add_argument("-c", "--config", action="append", default=[], metavar="FILE", help=shipped)
    parser.add_argument("--out", default="runs", metavar="DIR", help="the folder of all runs (default: runs)")
    allowed = "a package whose classes the config may name, such as a callback of your own; may be repeated"
    parser.add_argument("--allow-import", action="append", default=[], metavar="PACKAGE", help=allowed)
    return parser
