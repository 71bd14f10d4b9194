"""The one base class of every error this package raises on purpose."""

from nola_vision.text import printable

_LONGEST = 2000  # characters of a message


def one_line(message: str) -> str:
    """A message on one line of a bounded length, without characters that control a terminal."""
    text = printable(message)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class NolaVisionError(Exception):
    """A user error. The message is one line that states the cause and how to fix it.

    The command line prints it without a traceback and leaves with exit status 2. Names in the message cannot break the
    line, drive the terminal or fill it: `str` gives `one_line` of the message.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())
