"""The base class of all user errors of this package."""

import re

from nola_vision.common.text import printable, without_middle

_LONGEST = 2000  # characters of a message
_LONGEST_WORD = 300  # of a path or a number in it
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")


def one_line(message: str) -> str:
    """A message on one line of a bounded length, without characters that control a terminal.

    Long words and long messages lose their middle: a message begins with the cause and ends with how to fix it.
    """
    text = _LONG_WORD.sub(lambda found: without_middle(found[0], _LONGEST_WORD), printable(message))
    return without_middle(text, _LONGEST)


class NolaVisionError(Exception):
    """A user error. The message is one line that states the cause and how to fix it.

    The command line prints it without a traceback and exits with status 2. `str` returns `one_line` of the message, so
    names in it cannot break the line, control the terminal or fill it.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class UnreachableBudgetError(NolaVisionError):
    """No size of a method gives an adapter file within its budget.

    Attributes:
        least: the smallest budget with a file.
        smallest: the setting that gives it, such as `rank 1`.
    """

    def __init__(self, budget: int, least: int, smallest: str) -> None:
        super().__init__(
            f"max_bytes is {budget:,}, but the smallest file ({smallest}) needs {least:,} bytes: give more, fewer "
            "bits, or fewer targets"
        )
        self.least, self.smallest = least, smallest
