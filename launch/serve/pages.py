"""The page at /: HTML, CSS and JavaScript of this package, and nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from fastapi.responses import Response

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    folder = resources.files("launch.serve") / "page"
    for path, (name, kind) in FILES.items():
        response = _always((folder / name).read_bytes(), kind)
        app.add_api_route(path, response, include_in_schema=False, response_class=Response)


def _always(content: bytes, kind: str):
    async def response() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return response
