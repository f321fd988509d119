"""Errors in OpenAI's form, with the status that its clients understand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from rlhf.errors import UserError
from rlhf.serving.engine import EngineDown, QueueFull

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
SERVER_ERROR = 500
ROUTES = "/openapi.json has the routes, and the base URL of OpenAI's clients ends with /v1"


class ApiError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


def body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= SERVER_ERROR else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response(
    status: int, message: str, code: str | None = None, param: str | None = None, retry_after: int | None = None
) -> JSONResponse:
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body(status, message, code, param), status, headers)


def queue_full() -> JSONResponse:
    return response(429, "too many requests wait; try again later", "queue_full", retry_after=1)


def engine_down() -> JSONResponse:
    return response(503, "the model is not ready; try again later", "not_ready", retry_after=1)


def add_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def _(_: Request, error: ApiError) -> JSONResponse:
        return response(error.status, error.message, error.code, error.param)

    @app.exception_handler(UserError)
    async def _(_: Request, error: UserError) -> JSONResponse:
        return response(400, error.message)

    @app.exception_handler(QueueFull)
    async def _(_: Request, __: QueueFull) -> JSONResponse:
        return queue_full()

    @app.exception_handler(EngineDown)
    async def _(_: Request, __: EngineDown) -> JSONResponse:
        return engine_down()

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        message = f"there is no {request.url.path}; {ROUTES}" if error.status_code == 404 else str(error.detail)
        made = response(error.status_code, message)
        made.headers.update(error.headers or {})
        return made

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return response(400, f"the body is no JSON: character {first['loc'][-1]}", "invalid_json")
        place = ".".join(map(str, first["loc"][1:])) or None
        return response(422, f"{place or 'the body'}: {_reason(first, request)}", "invalid_value", place)


def _reason(first: dict[str, Any], request: Request) -> str:
    if first["type"] == "extra_forbidden":
        return "this server has no such thing: leave it out"
    if len(first["loc"]) == 1 and "json" not in request.headers.get("content-type", ""):
        return "it is JSON where its header says so: Content-Type: application/json"
    return first["msg"].removeprefix("Value error, ")
