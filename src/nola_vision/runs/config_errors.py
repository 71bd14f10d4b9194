"""jsonargparse's long messages as one short sentence: the key, the given value, what it may be. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nola_vision.common.suggestions import did_you_mean
from nola_vision.common.validation import KINDS

_MOST_KINDS = 6  # beyond these, only close ones are named
TOP_KEYS = ("protocol", "method", "threads", "model", "data", "trainer")  # of a run config
PACKAGES = ("torch.optim", "lightning", "nola_vision")  # whose classes a config may name


def explain(message: str, settings: Mapping[str, Sequence[str]]) -> str:
    """A message of the parser in plain words.

    Args:
        message: of a jsonargparse error.
        settings: the names that a group (`data`) or a class (`LoRA`) takes, to suggest the close ones.
    """
    message = " ".join(message.split())
    if denied := re.search(r"Importing '([\w.]+)' is not allowed", message):
        return refusal(denied[1])
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    key = ".".join(keys)
    inside = re.search(r"class_path '[\w.]*?(\w+)'", message)
    if unknown := re.search(r"Option '([\w.]+)' is not accepted", message):
        name = inside[1] if inside else key
        given = unknown[1] if name else unknown[1].partition(".")[0]
        return no_setting(name or "the config", given, settings.get(name, ()))
    if unknown := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        group, option = unknown.groups()
        inner, _, last = f"{group}.{option}".rpartition(".")
        known = settings.get(inner, settings.get(group, ()))
        return f"unknown key '{option}' in `{group}`{_instead(last, known)}"
    if unknown := re.search(r"[Uu]nrecognized arguments: (--[\w.]+)", message):
        key = unknown[1].lstrip("-")
        group, _, name = key.rpartition(".")
        return no_option(key, name, settings.get(group, ()))
    if inside and (needed := re.search(r"the following arguments are required: (\w+)", message)):
        return f"{inside[1]} needs a value for '{needed[1]}': give --{key}.{needed[1]}"
    if nested := re.search(r"NestedArg\(key='([\w.]+)'", message):
        return f"{key} takes no '.{nested[1]}': it is one value{_instead(nested[1], settings.get(key, ()))}"
    shown = re.search(r".*(?:Given value|Got value): (.*)$", message)
    if keys and (missing := re.search(r"Expected a dot import path string: (\S+)", message)):
        classes = settings.get(key, ())
        return f"{key} is '{shorten(missing[1])}', which is not the name of a class{_instead(missing[1], classes)}"
    if keys and shown and len(kinds := _kinds(message)) > _MOST_KINDS:
        return f"{key} is '{shorten(shown[1])}'{_instead(shown[1], [kind for kind in kinds if ' ' not in kind])}"
    if keys and shown and kinds:
        return f"{key} is '{shorten(shown[1])}': it must be {' or '.join(kinds)}"
    return shorten(message, 600)


def set_up_reason(message: str) -> str:
    """Why an object of a config could not be made, out of the parser's message."""
    message = " ".join(message.split())
    made = re.search(r"Problem with given class_path '[\w.]*?(\w+)': (.*?)(?: - Expected| Given value type)", message)
    return f"{made[1]}: {re.sub(r'( (True|False))+$', '', made[2])}" if made else message


def no_setting(name: str, given: str, known: Sequence[str]) -> str:
    """The message on an unknown setting."""
    return f"unknown setting '{given}' of {name}{_instead(given, known)}"


def no_option(key: str, name: str, known: Sequence[str]) -> str:
    """The message on an unknown option `--KEY`; `name` is the part of it that is not among the `known`."""
    otherwise = (
        "a setting's name includes its section, such as --data.shots or --model.basis_seed" if "." not in key else None
    )
    return f"there is no option --{key}{_instead(name, known, otherwise)}"


def refusal(class_path: str) -> str:
    """Why a config may not name a class, and what allows it."""
    return (
        f"'{class_path}' may not be imported: a config names classes of {', '.join(PACKAGES)} and of registered "
        f"plug-ins; if you trust the package, give --allow-import {class_path.partition('.')[0]}"
    )


def shorten(text: str, width: int = 100) -> str:
    return text if len(text) <= width else f"{text[:width]}..."


def _kinds(message: str) -> list[str]:
    found: list[str] = []
    for plain, choices in re.findall(r"Expected a (?:<class '([\w.]+)'>|typing\.Literal\[(.*?)\])", message):
        found += [KINDS.get(plain, plain.rpartition(".")[2])] if plain else re.split(r",\s*", choices.replace("'", ""))
    return list(dict.fromkeys(found))


def _instead(name: str, known: Sequence[str], otherwise: str | None = None) -> str:
    return f": {did_you_mean(name, known, otherwise)}" if known else ""
