"""What a request passes before it reaches a route: stop, token, rate and size. Plain ASGI, so that streams and the
news that a client is gone pass through."""

from __future__ import annotations

import hmac
import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any, Protocol
from urllib.parse import parse_qs

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.serve import errors
from launch.serve.pages import PAGES

COOKIE = "rlhf_serve"
OPEN = {"/health"}
WATCHED = {"/health", "/ready", "/metrics"}  # also while the server stops, and without a limit
MOST_CLIENTS = 10_000  # whose rate is remembered


@dataclass(frozen=True)
class Limits:
    body: int = 4 << 20
    """Bytes."""
    per_minute: int = 1200
    """Requests of one client address, which may come at once; 0: no limit."""


class Guarded(Protocol):
    token: str
    limits: Limits
    stopping: bool

    @property
    def metrics(self) -> Any: ...


class Gate:
    def __init__(self, app: ASGIApp, service: Guarded) -> None:
        self.app, self.service, self.limits = app, service, service.limits
        self._token = service.token.encode()
        self._rate = Rate(self.limits.per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")  # not the path, of which there are infinitely many
                self.service.metrics.requests.labels(route, message["status"]).inc()
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._sized(scope, receive, counted)
        else:
            await refusal(scope, receive, counted)

    def _refusal(self, scope: Scope) -> Response | None:
        path, headers = scope["path"], Headers(scope=scope)
        if path in OPEN:
            return None
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if path in PAGES and self._right("".join(query.get("token", [])[:1])):
            return self._welcome(path)
        if not (self._right(_bearer(headers)) or self._right(_cookie(headers))):
            way = f"open {path}?token=TOKEN" if path in PAGES else "Authorization: Bearer TOKEN"
            return errors.response(401, f"the token is missing or wrong: {way}", "invalid_api_key")
        if path in WATCHED:
            return None
        if self.service.stopping:
            return errors.response(503, "the server stops", "stopping", retry_after=5)
        client = scope["client"][0] if scope.get("client") else ""
        if wait_s := self._rate.wait(client, time.monotonic()):
            return errors.response(
                429, f"more than {self.limits.per_minute} requests in a minute", "rate_limit", retry_after=wait_s
            )
        length = headers.get("content-length", "0")
        return self._too_large() if not length.isdigit() or int(length) > self.limits.body else None

    async def _sized(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A body without a length is counted as it comes."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limits.body:
                raise HTTPException(413, self._size())
            return message

        await self.app(scope, counted, send)

    def _size(self) -> str:
        return f"the body is larger than {self.limits.body} bytes"

    def _too_large(self) -> Response:
        return errors.response(413, self._size())

    def _right(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(errors="replace"), self._token)

    def _welcome(self, path: str) -> Response:
        """The token goes from the address into a cookie, which scripts and other sites cannot use."""
        response = RedirectResponse(path, 303)
        response.set_cookie(COOKIE, self._token.decode(), httponly=True, samesite="strict")
        return response


class Rate:
    """A bucket for each client that holds the requests of a minute and fills evenly."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client → (requests left, when)

    def wait(self, client: str, now: float) -> int:
        """0, and one request less; or the seconds until there is one."""
        if not self._per_minute:
            return 0
        left, when = self._buckets.pop(client, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - when) * self._per_minute / 60)
        allowed = left >= 1
        self._buckets[client] = (left - allowed, now)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0 if allowed else math.ceil((1 - left) * 60 / self._per_minute)


def _bearer(headers: Any) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _cookie(headers: Any) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""
