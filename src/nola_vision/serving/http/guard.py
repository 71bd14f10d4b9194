"""Who may ask: the checks of every request before its route, as ASGI middleware.

A web page that somebody opens in a browser can send requests to services on that machine. Therefore requests whose
`Origin` is another page's are refused, CORS is off, and without an API key the `Host` must name this machine: a foreign
name that resolves to 127.0.0.1 (DNS rebinding) would make a foreign page the same origin.
"""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nola_vision.serving.http.errors import JSON, RequestError

_log = logging.getLogger(__name__)
_HEALTH_ROUTES = frozenset({"/v2/health/live", "/v2/health/ready"})
_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|\[::1\]", re.IGNORECASE)
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Guard:
    """Answers requests that are not allowed, and passes on the others. An error in these is answered with 500.

    Args:
        app: what answers requests that are allowed.
        api_key: the key that they must have; None: they need none, and must name this machine as their host.
        page: the paths of the page, which need no key and may be opened from other pages.
        count: called with the pattern of the route and the status of each answer.
    """

    def __init__(
        self, app: ASGIApp, api_key: str | None, page: Collection[str], count: Callable[[str, int], None]
    ) -> None:
        self._app, self._key, self._count = app, api_key, count
        self._page, self._open = frozenset(page), _HEALTH_ROUTES.union(page)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message).update(_HEADERS)
                self._count(getattr(scope.get("route"), "path", "none"), message["status"])
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
        except RequestError as error:
            return await error.response()(scope, receive, answer)
        try:
            await self._app(scope, receive, answer)
        except Exception as error:
            if begun:  # the server closes the connection
                raise
            _log.error("a request failed", exc_info=error)
            await JSON({"error": "internal error"}, 500)(scope, receive, answer)

    def _check(self, path: str, headers: Headers) -> None:
        hosts = headers.getlist("host")
        host = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if host is None:
            raise RequestError(400, "the request needs one valid Host header")
        if self._key is None and not _LOOPBACK.fullmatch(host["name"]):
            raise RequestError(403, "this service answers requests to localhost and 127.0.0.1 only")
        for origin in headers.getlist("origin"):
            if origin.lower() not in (f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}"):
                raise RequestError(403, "requests of other web pages are refused")
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and path not in self._page:
            raise RequestError(403, "requests of other web pages are refused")
        if self._key is not None and path not in self._open:
            given = [value.partition(" ") for value in headers.getlist("authorization")]
            keys = [key.strip().encode("latin-1") for scheme, _, key in given if scheme.lower() == "bearer"]
            if len(keys) != 1 or not hmac.compare_digest(keys[0], self._key.encode()):
                raise RequestError(
                    401, "the request needs the API key: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
                )
