"""`nola-vision VERB ...`: finds the verb and turns mistakes into one sentence; torch waits until a verb needs it."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

from nola_vision import __version__
from nola_vision.errors import NolaVisionError

VERBS = {
    "fit": "train one run, test it, print its row and the table so far",
    "validate": "a checkpoint's accuracy on the validation pool",
    "test": "a checkpoint's accuracy on the test set",
    "sweep": "every split x init x method of a config, with the learning rates chosen on validation images",
    "report": "the tables of folders of runs",
    "export": "a shorter adapter file, or a plain timm checkpoint",
    "predict": "use an adapter: images in, labels out",
    "data": "check a data set on disk, or write the images of a draw to a file",
    "configs": "the configs that ship, and every cell of the paper's tables: list, show, copy",
}
_USAGE = "\n".join(
    [
        "usage: nola-vision VERB ...",
        "",
        "Adapt a pretrained vision model to a few labelled images with NOLA.",
        "",
        *(f"  {verb:10s}{text}" for verb, text in VERBS.items()),
        "",
        "Start with:  nola-vision fit --config quickstart.yaml",
        "A verb's options:  nola-vision VERB --help",
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit status: 0, 1 if a run of a sweep failed, 2 for a mistake, 130 for Ctrl-C."""
    verb, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may have characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    if verb in ("-h", "--help"):
        print(_USAGE)
        return 0
    if verb == "--version":
        print(f"nola-vision {__version__}")
        return 0
    try:
        if verb not in VERBS:
            close = difflib.get_close_matches(verb, VERBS) or list(VERBS)
            raise NolaVisionError(f"there is no verb '{verb}': did you mean {' or '.join(close)}?")
        module = "fit" if verb in ("validate", "test") else verb
        status: int = importlib.import_module(f"nola_vision.cli.{module}").main(rest, verb)
        return status
    except NolaVisionError as error:
        print(f"nola-vision: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        found = " and ".join(f"{name} {version(name)}" for name in ("torch", "torchvision"))
        print(f"nola-vision: {found} do not belong together: install both anew from one index", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = {
            "fit": ": the same command with --ckpt_path last finishes the run",
            "sweep": ": the same command resumes",
        }
        print(f"nola-vision: interrupted{hint.get(verb, '')}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"nola-vision: {error.strerror or error}{where}", file=sys.stderr)
        return 2
    finally:
        if arguments is None:  # the process ends: everything is written, and Python's own exit takes a while
            signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
