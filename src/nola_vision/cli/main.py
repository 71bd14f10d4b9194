"""`nola-vision VERB ...`: runs a verb and reports its error in one line; only the verb that needs torch imports it."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from nola_vision import __version__
from nola_vision.common import stopwatch
from nola_vision.common.errors import NolaVisionError, one_line
from nola_vision.common.progress import let_idle_threads_sleep
from nola_vision.common.suggestions import did_you_mean

VERBS = {
    "fit": "adapt to the images in PHOTOS, or train one run of a config; test it and print the table so far",
    "init": "write the config for a folder of photos, to edit",
    "validate": "a checkpoint's accuracy on the validation pool",
    "test": "a checkpoint's accuracy on the test set",
    "sweep": "every split x init x method of a config, with searched settings chosen on validation images",
    "report": "the tables of folders of runs",
    "export": "a shorter adapter file, or a plain timm checkpoint",
    "predict": "use an adapter: images in, labels out",
    "serve": "a folder of adapters as an HTTP service with a page",
    "data": "check a data set on disk, or write the images of a draw to a file",
    "configs": "the shipped configs, and every cell of the paper's tables: list, show, copy",
}
_USAGE = "\n".join(
    [
        "usage: nola-vision VERB ...",
        "",
        "Adapt a pretrained vision model to a few labelled images with NOLA.",
        "",
        *(f"  {verb:10s}{text}" for verb, text in VERBS.items()),
        "",
        "Start with:  nola-vision fit PHOTOS                      a folder with one folder of images per class",
        "             nola-vision fit --config quickstart.yaml    an example that needs no files",
        "A verb's options:  nola-vision VERB --help",
        "The traceback of an error:  --debug with any verb, or NOLA_VISION_DEBUG=1",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status.

    0: success. 1: a run of a sweep failed, or an unexpected error. 2: a user error. 130: Ctrl-C.
    """
    # the processor time until here is that of Python's own start, about as long on the clock
    stopwatch.start(time.monotonic() - (time.process_time() if arguments is None else 0))
    let_idle_threads_sleep()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # file names may have characters that the terminal cannot encode; a pipe gets each line at once
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w")
    words, debug = _without_debug(sys.argv[1:] if arguments is None else arguments)
    verb, *rest = words or ["--help"]
    try:
        if verb in ("-h", "--help", "--version"):
            print(f"nola-vision {__version__}" if verb == "--version" else _USAGE, flush=True)
            return 0
        if verb not in VERBS:
            raise NolaVisionError(f"there is no verb '{verb}': {did_you_mean(verb, VERBS)}")
        module = "fit" if verb in ("validate", "test") else verb
        status: int = importlib.import_module(f"nola_vision.cli.{module}").main(rest, verb)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        hint = {
            "fit": ": the same command continues with what is not completed; --ckpt_path last resumes its training",
            "sweep": ": the same command resumes",
        }
        print(f"nola-vision: interrupted{hint.get(verb, '')}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head`
        _drop_output()
        return 141
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # perhaps the output itself
            _drop_output()
        if debug:
            traceback.print_exc()
        status, message = _report(error)
        print(f"nola-vision: {one_line(' '.join(message.split()))}", file=sys.stderr)
        return status
    finally:
        if arguments is None:  # all output is written, and Python's exit takes a while
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _drop_output() -> None:
    """Discards buffered output, which Python would try to write again at exit."""
    with suppress(OSError, ValueError):  # not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _without_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """The words of a command line without `--debug`, which may be anywhere before `--`, and whether to debug."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    asked = len(kept) < end or os.environ.get("NOLA_VISION_DEBUG", "0") not in ("", "0")
    return [*kept, *words[end:]], asked


def _report(error: Exception) -> tuple[int, str]:
    """Exit status and message of an error: 2 for one that a user can fix, else 1, with the place in the program."""
    if isinstance(error, NolaVisionError):
        return 2, str(error)
    if isinstance(error, RuntimeError) and "operator torchvision::" in str(error):
        found = " and ".join(f"{name} {version(name)}" for name in ("torch", "torchvision"))
        return 2, f"{found} are incompatible: reinstall both from one index"
    if isinstance(error, OSError) and error.filename:
        return 2, f"{error.strerror or error} ({os.fsdecode(error.filename)})"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return 2, f"{error.strerror}: free disk space"
    package = Path(__file__).parents[1]
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if Path(f.filename).is_relative_to(package)), frames[-1])
    place = f"{frame.filename.removeprefix(f'{package.parent}{os.sep}')}:{frame.lineno}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported
        return 1, f"out of memory at {place}: give a smaller batch_size, fewer workers or fewer runs ({error})"
    kind = type(error).__name__
    return 1, f"unexpected {kind} at {place}: {error}; run again with --debug for the traceback"


if __name__ == "__main__":
    sys.exit(main())
