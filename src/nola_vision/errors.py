"""The one base class of every error this package raises on purpose."""

from nola_vision.text import printable

LONGEST_MESSAGE = 2000  # characters


class NolaVisionError(Exception):
    """A user error. The message is one line that states the cause and how to fix it.

    The command line prints it without a traceback and leaves with exit status 2. Names in the message cannot break the
    line, drive the terminal or fill it: `str` shows their control characters as escapes, and ends after
    `LONGEST_MESSAGE` characters.
    """

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."
