"""The one base class of every error this package raises on purpose."""


class NolaVisionError(Exception):
    """A mistake a person can mend. The message is one sentence that names the cause and the mend.

    The command line prints it without a traceback and leaves with exit status 2.
    """
