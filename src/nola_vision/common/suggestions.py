"""What to suggest for a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST_NAME = 100  # comparing longer ones takes seconds


def did_you_mean(name: object, known: Iterable[str], otherwise: str | None = None, cutoff: float = 0.6) -> str:
    """The second half of a message on an unknown name: `did you mean rank or bits?`.

    Args:
        name: what the user gave.
        known: the possible names.
        otherwise: what to return if no name is similar. Default: `use one of ...` with all known names.
        cutoff: how similar a name must be, from 0 to 1.
    """
    known = list(known)
    if close := difflib.get_close_matches(str(name)[:_LONGEST_NAME], known, n=3, cutoff=cutoff):
        return f"did you mean {' or '.join(close)}?"
    return f"use one of {', '.join(known)}" if otherwise is None else otherwise
