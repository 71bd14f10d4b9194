"""The combinations of settings that the search of an entry tries, and the choice among them. Pure functions.

An entry's `search: {lr: [0.01, 0.005], c: [2, 8]}` maps names of its method's settings to the values to try. `run_id`
reads it from a config; `budgets.refuse_larger_files` keeps it within a byte budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from nola_vision.adapters.methods import registry
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.text import excerpt, setting_text
from nola_vision.runs.early_checks import plain_value
from nola_vision.runs.record import Row, search_rank

Settings = Mapping[str, Any]  # a value for each searched setting
MOST_COMBINATIONS = 1000


def checked(name: str, search: Mapping[str, Sequence[Any]], method: Mapping[str, Any]) -> dict[str, list[Any]]:
    """A search with its values as the parser would give them, each once: text that is a number becomes one.

    Args:
        name: of the entry, for messages.
        search: the values to try of each setting.
        method: `class_path` and `init_args` of the entry, as `parse` returns them.

    Raises:
        NolaVisionError: a setting that the method does not have, a value or a combination that it refuses (the message
            names the combination), a budget, or more than `MOST_COMBINATIONS`.
    """
    if "max_bytes" in search:
        raise NolaVisionError(f"`search` of the method {name!r} has max_bytes: list `budgets` of the method instead")
    if (count := math.prod(map(len, search.values()))) > MOST_COMBINATIONS:
        raise NolaVisionError(
            f"`search` of the method {name!r} has {count:,} combinations: give at most {MOST_COMBINATIONS:,}"
        )
    try:
        hints = get_type_hints(registry.known_method(str(method["class_path"]).rpartition(".")[2]))
        typed = {key: _distinct([_typed(value, hints.get(key)) for value in search[key]]) for key in search}
    except NolaVisionError as error:
        raise NolaVisionError(f"`search` of the method {name!r}: {error}") from error
    for settings in combinations(typed):
        try:
            registry.check(registry.from_dict({**method, "init_args": {**method["init_args"], **settings}}))
        except NolaVisionError as error:
            raise NolaVisionError(f"`search` of the method {name!r} with {in_words(settings)}: {error}") from error
    return typed


def combinations(search: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The combinations of a search in the config's order; of an empty one the empty combination."""
    return [dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())]


def with_settings(run_config: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """A run config in which some settings of its method have other values."""
    method = run_config["model"]["method"]
    method = {**method, "init_args": {**method["init_args"], **settings}}
    return {**run_config, "model": {**run_config["model"], "method": method}}


def best(tried: Sequence[Settings], rows: Sequence[Row]) -> Settings | None:
    """The best of several settings by a search run with each; None if no run has a validation accuracy.

    The highest validation accuracy wins. Ties go to the lower validation loss, then to the smaller `lr`, then to the
    combination that comes first. A failed run is worse than any other.
    """
    ranked = [(*search_rank(row), settings.get("lr", 0.0)) for settings, row in zip(tried, rows, strict=True)]
    first = min(range(len(ranked)), key=ranked.__getitem__)
    return None if ranked[first][0] == math.inf else tried[first]


def in_words(settings: Settings) -> str:
    """Settings as text: `lr 0.005, c 2`."""
    return ", ".join(f"{key} {setting_text(value)}" for key, value in settings.items())


def trial_in_words(name: str, settings: Settings, row: Row) -> str:
    """A search run as a line: `nola: lr 0.005, c 2, validation 87.6 %`."""
    failed = f"failed ({excerpt(row.error or row.status)})"
    found = failed if row.val_accuracy is None else f"validation {100 * row.val_accuracy:.1f} %"
    return f"{name}: {in_words(settings)}, {found}"


def choice_in_words(name: str, chosen: Settings, rows: Sequence[Row]) -> str:
    """The choice for an entry by its search runs, as a line: `nola: lr 0.005, c 2 (best of 6)`.

    Runs without a validation accuracy are counted separately: `(best of 4; 2 failed)`.
    """
    failed = sum(row.val_accuracy is None for row in rows)
    return f"{name}: {in_words(chosen)} (best of {len(rows) - failed}{f'; {failed} failed' if failed else ''})"


def _typed(value: Any, hint: Any) -> Any:
    value = plain_value(value)
    return float(value) if type(value) is int and hint in (float, float | None) else value


def _distinct(values: list[Any]) -> list[Any]:
    """Values may be lists, which have no hash."""
    return [value for index, value in enumerate(values) if value not in values[:index]]
