"""The one base class of every error this package raises on purpose."""

from nola_vision.text import printable


class NolaVisionError(Exception):
    """A user error. The message is one line that states the cause and how to fix it.

    The command line prints it without a traceback and leaves with exit status 2. File names in the message cannot break
    the line or drive the terminal: `str` shows their control characters as escapes.
    """

    def __str__(self) -> str:
        return printable(super().__str__())
