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
from nola_vision.serving.http.bodies import unprocessable
from nola_vision.serving.http.errors import JSON, RequestError
from nola_vision.serving.http.folder import AdapterFolder
from nola_vision.serving.http.guard import Guard
from nola_vision.serving.http.metrics import Metrics
from nola_vision.serving.http.routes import hugging_face, models, open_inference
from nola_vision.serving.http.service import Service
from nola_vision.serving.http.settings import Settings

_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


def create_app(
    bank: AdapterBank,
    folder: str | Path,
    settings: Settings | None = None,
    labels: Mapping[str, str] | None = None,
) -> FastAPI:
    """The ASGI application of a service. Its threads run from the start of its lifespan to the end.

    Args:
        bank: answers the requests.
        folder: with the adapter files, see `AdapterFolder`.
        settings: limits, API key and batch sizes.
        labels: of every metric.
    """
    settings = settings or Settings()
    metrics = Metrics(bank.cache_counts, labels)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = service = Service(AdapterFolder(bank, Path(folder)), settings, metrics)
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
    app.add_middleware(Guard, api_key=settings.api_key, count=metrics.request)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(Exception, _unexpected)
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
        app.add_api_route(path, _static(content, kind), include_in_schema=False, response_class=Response)
    return app


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


async def _unexpected(request: Request, error: Exception) -> Response:
    return JSON({"error": "internal error"}, 500)
