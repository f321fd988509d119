"""The pages at / and /dashboard: HTML, CSS and JavaScript of this package, and nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from fastapi.responses import Response

PAGES = {"/": "index.html", "/dashboard": "dashboard.html"}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
PARTS = ("page.css", "page.js", "common.js", "dashboard.css", "dashboard.js")
FILES = {**PAGES, **{f"/page/{name}": name for name in PARTS}}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    folder = resources.files("launch.serve") / "page"
    for path, name in FILES.items():
        response = _always((folder / name).read_bytes(), f"{KINDS[name.rpartition('.')[2]]}; charset=utf-8")
        app.add_api_route(path, response, include_in_schema=False, response_class=Response)


def _always(content: bytes, kind: str):
    async def response() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return response
