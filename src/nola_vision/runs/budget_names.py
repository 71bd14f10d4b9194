"""Entries with byte budgets: `nola` with `budgets: [2000, 10000]` is the entries `nola@2KB` and `nola@10KB`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nola_vision.common.errors import NolaVisionError
from nola_vision.common.validation import quoted

MOST_BUDGET = 10**9
_NAME = re.compile(r"(.+)@([1-9][0-9]{0,8})(K?B)")


def budget_text(budget: int) -> str:
    """A budget in bytes as names and options have it: `2KB`, `2500B`. A KB has 1,000 bytes."""
    return f"{budget // 1000}KB" if budget % 1000 == 0 else f"{budget}B"


def with_budget(name: str, budget: int) -> str:
    """The name of an entry at a budget in bytes: `nola@2KB`."""
    return f"{name}@{budget_text(budget)}"


def split_budget(name: str) -> tuple[str, int | None]:
    """The name that `with_budget` was given, and the budget; None if it has none."""
    found = _NAME.fullmatch(name)
    return (name, None) if found is None else (found[1], int(found[2]) * (1000 if found[3] == "KB" else 1))


def budgets_of(name: str, settings: Mapping[str, Any]) -> list[int]:
    """The budgets of an entry, the smallest first; empty if its config gives none.

    Raises:
        NolaVisionError: `budgets` is not a list of distinct numbers of bytes, or `init_args` has a budget too.
    """
    given = settings.get("budgets")
    if given is None:
        return []
    wrong = [one for one in given if type(one) is not int or not 1 <= one <= MOST_BUDGET] if type(given) is list else []
    if type(given) is not list or not given or wrong or len(set(given)) < len(given):
        shown = wrong[0] if wrong else given
        raise NolaVisionError(
            f"`budgets` of the method {name!r} has {quoted(shown)}: list distinct file sizes in bytes, from 1 to "
            f"{MOST_BUDGET:,}, such as [2000, 10000]"
        )
    args = settings.get("init_args")
    if isinstance(args, Mapping) and args.get("max_bytes") is not None:
        raise NolaVisionError(f"the method {name!r} has both budgets and max_bytes: leave one out")
    return sorted(given)


def search_budgets(budgets: list[int]) -> list[int]:
    """The budgets at which settings may be searched, in order of preference: the middle one, then larger ones.

    Only a larger budget can be within reach where one is not.
    """
    return budgets[len(budgets) // 2 :]
