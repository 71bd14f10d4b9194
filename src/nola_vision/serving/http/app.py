"""The HTTP service of a bank of adapters, as an ASGI application. docs/serving.md describes its routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nola_vision import __version__
from nola_vision.serving.bank import AdapterBank
from nola_vision.serving.files import backbone_of
from nola_vision.serving.http.bank import Bank
from nola_vision.serving.http.bodies import unprocessable
from nola_vision.serving.http.errors import JSON, RequestError
from nola_vision.serving.http.folder import AdapterFolder
from nola_vision.serving.http.guard import Guard
from nola_vision.serving.http.images import pillow_limit
from nola_vision.serving.http.metrics import Metrics
from nola_vision.serving.http.routes import hugging_face, models, open_inference
from nola_vision.serving.http.service import Service
from nola_vision.serving.http.settings import Settings

_PAGE = {  # a file and its type, by the path
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def create_app(
    bank: Bank,
    folder: str | Path,
    settings: Settings | None = None,
    labels: Mapping[str, str] | None = None,
) -> FastAPI:
    """The ASGI application of a service. Its threads run from the start of its lifespan to the end.

    In that time Pillow refuses images of more than `settings.pixels` in the whole process.

    Args:
        bank: answers the requests.
        folder: with the adapter files, see `AdapterFolder`.
        settings: limits, API key and batch sizes.
        labels: of every metric.

    Raises:
        NolaVisionError: the folder does not exist or cannot be read.
    """
    settings = settings or Settings()
    metrics, adapters = Metrics(bank.cache_counts, labels), AdapterFolder(bank, Path(folder))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with pillow_limit(settings.pixels):
            app.state.service = service = Service(adapters, settings, metrics)
            yield
            service.close()

    app = FastAPI(
        title="nola-vision",
        version=__version__,
        docs_url=None,  # the documentation pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.add_middleware(Guard, api_key=settings.api_key, page=_PAGE, count=metrics.request)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.include_router(hugging_face.router)
    app.include_router(open_inference.router)
    app.include_router(models.router)
    if settings.allow_changes:
        app.include_router(models.changes)

    @app.get("/metrics", response_class=Response, tags=["metrics"])
    async def show_metrics() -> Response:
        """Counts and times, in Prometheus's text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    for path, (file, kind) in _PAGE.items():
        content = (resources.files("nola_vision.serving.http") / "page" / file).read_bytes()
        methods, answer = ["GET", "HEAD"], _static(content, kind)
        app.add_api_route(path, answer, methods=methods, include_in_schema=False, response_class=Response)
    return app


def load_app(
    folder: str | Path,
    settings: Settings,
    backbone: str | None,
    weights: str | None,
    device: str,
    cache_mib: float,
    labels: Mapping[str, str] | None = None,
) -> tuple[FastAPI, Bank]:
    """The application of a service with a new bank, and the bank.

    Args:
        folder: with the adapter files.
        settings: as for `create_app`.
        backbone: timm's tag; None: that of the first adapter file.
        weights: a local file with the backbone's weights; None: it is found by its digest.
        device: where to compute.
        cache_mib: as for `AdapterBank`.
        labels: as for `create_app`.

    Raises:
        NolaVisionError: as `backbone_of`, `AdapterBank` and `create_app`.
    """
    bank = AdapterBank(backbone_of(folder, weights, backbone), device, cache_mib)
    return create_app(bank, folder, settings, labels), bank


def _static(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=f"{kind}; charset=utf-8")

    return answer


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error.response()


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return unprocessable(error.errors()).response()


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSON({"error": str(error.detail)}, error.status_code, dict(error.headers or {}))
