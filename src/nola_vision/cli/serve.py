"""`nola-vision serve`: a folder of adapters for one backbone as an HTTP service."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import socket
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from nola_vision.cli.options import Options, whole_number
from nola_vision.common.devices import parse_device
from nola_vision.common.errors import NolaVisionError
from nola_vision.common.files import weights_in
from nola_vision.common.imports import without_collections
from nola_vision.common.progress import say, say_start
from nola_vision.common.text import plural, printable
from nola_vision.common.validation import check_counts
from nola_vision.serving.http.settings import KEY_VARIABLE, api_key, service_settings

_END_SECONDS = 60  # for what was taken, after a signal


def main(arguments: Sequence[str], verb: str) -> int:
    options = Options(verb)
    options.description = "An HTTP service for a folder of adapters of one backbone. docs/serving.md describes it."
    options.add_argument("--adapters", required=True, metavar="DIR", help="a folder of adapter files that `fit` wrote")
    options.add_argument("--backbone", metavar="TAG", help="timm's tag (default: that of the first adapter file)")
    options.add_argument(
        "--weights", metavar="FILE", help="local file with the backbone's weights (default: found by its digest)"
    )
    options.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    options.add_argument("--port", type=whole_number, default=8000, help="0: any free port (default: 8000)")
    options.add_argument(
        "--max-batch-size", type=whole_number, default=64, metavar="N", help="images per forward pass (default: 64)"
    )
    options.add_argument(
        "--max-delay-ms", type=whole_number, default=5, metavar="MS", help="an image waits for others (default: 5)"
    )
    options.add_argument(
        "--cache-mib",
        type=whole_number,
        default=512,
        metavar="MIB",
        help="memory for adapters, their weight changes and bases (default: 512)",
    )
    options.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: a GPU if there is one)")
    options.add_argument(
        "--allow-changes",
        action="store_true",
        help=f"adapters may be stored and deleted over HTTP; needs {KEY_VARIABLE}",
    )
    known = options.parse_args(arguments)
    check_counts(max_batch_size=known.max_batch_size, cache_mib=known.cache_mib)
    if known.device is not None:
        parse_device(known.device)
    folder = Path(known.adapters)
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "does not exist"
        raise NolaVisionError(f"{folder} {reason}: give the folder of the adapter files by --adapters")
    if known.weights is not None:
        weights_in(known.weights)
    for package in ("fastapi", "uvicorn", "httptools", "prometheus_client"):
        if find_spec(package) is None:
            raise NolaVisionError(f"serve needs the package {package}: pip install 'nola-vision[serve]'")
    with _listener(known) as listener:
        say_start(verb)
        with without_collections():
            import torch
            import uvicorn

            from nola_vision.serving.http.app import load_app
            from nola_vision.serving.http.connections import LimitedConnection

        device = known.device or ("cuda" if torch.cuda.is_available() else "cpu")
        settings = service_settings(known.max_batch_size, known.max_delay_ms, known.allow_changes)
        app, bank = load_app(folder, settings, known.backbone, known.weights, device, known.cache_mib)
        _log_to_stderr()
        config = uvicorn.Config(
            app,
            http=LimitedConnection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_END_SECONDS,
        )

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                adapters = plural("adapter", len(bank.adapters()))
                say(f"{_url(listener)} serves {adapters} for {bank.backbone_tag}")

        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn handles the first and ends; then it sends it again to what was there before, which exits with 0
            signal.signal(number, signal.SIG_IGN)
        Server(config).run([listener])
    return 0


def _listener(known: argparse.Namespace) -> socket.socket:
    """A socket at the address of the options. Connections are refused until the service is ready.

    Raises:
        NolaVisionError: the address cannot be used, or needs an API key that there is not.
    """
    if known.port > 65535:
        raise NolaVisionError(f"--port is {known.port}: it must be a number from 0 to 65535")
    try:
        kind, *_, address = socket.getaddrinfo(known.host, known.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise NolaVisionError(
            f"--host {known.host} --port {known.port} is not an address ({error}): give others"
        ) from error
    local = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    if api_key() is None and not (local and not known.allow_changes):
        what = "--allow-changes" if local else f"--host {known.host}"
        raise NolaVisionError(f"{what} needs an API key: set the environment variable {KEY_VARIABLE}")
    listener = socket.socket(kind, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would share the port with another process
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise NolaVisionError(
            f"{known.host} port {known.port} cannot be used ({error.strerror}): give another by --port or --host"
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Lines(logging.Formatter):
    """Each line of a message as text that cannot control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line) for line in super().format(record).split("\n"))


def _log_to_stderr() -> None:
    """Logs what an operator must know. Requests that are refused are counted, and not logged."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("nola-vision: %(asctime)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
