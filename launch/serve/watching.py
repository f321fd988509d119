"""What the dashboard shows: metrics over time, drift and alarms, as JSON."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import DBAPIError
from starlette.concurrency import run_in_threadpool

from launch.serve.errors import ApiError
from launch.serve.service import Service
from launch.watch.look import Look, look
from rlhf.serving.watch.spans import seconds

Span = Literal["1h", "24h", "7d", "30d"]
BUCKETS: dict[str, int] = {"1h": 12, "24h": 24, "7d": 28, "30d": 30}
FRESH_S = 10.0  # many pages that look at once cost one look


def add_watching(app: FastAPI, service: Service) -> None:
    looks = Looks(service)

    @app.get("/v1/watch")
    async def watch(span: Span = "24h") -> Response:
        return JSONResponse(await run_in_threadpool(looks.newest, span))


class Looks:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._looking = threading.Lock()
        self._kept: dict[str, tuple[float, dict[str, Any]]] = {}

    def newest(self, span: str) -> dict[str, Any]:
        """ApiError (404, 503) where nothing is kept, and while the store does not answer."""
        writer = self._service.writer
        if writer is None:
            raise ApiError(404, "this server keeps nothing (--store none)", "no_store")
        with self._looking:
            when, found = self._kept.get(span, (float("-inf"), {}))
            if time.monotonic() - when > FRESH_S:
                try:
                    found = as_json(
                        look(writer.store, time.time(), seconds(span), BUCKETS[span], self._service.baseline)
                    )
                except DBAPIError:
                    raise ApiError(503, "the store does not answer; try again later", "no_store") from None
                self._kept[span] = (time.monotonic(), found)
        return found


def as_json(found: Look) -> dict[str, Any]:
    buckets = [
        {"start": each.start, "end": each.end, "metrics": {name: one.as_dict() for name, one in each.metrics.items()}}
        for each in found.buckets
    ]
    return {
        "buckets": buckets,
        "whole": {name: one.as_dict() for name, one in found.whole.items()},
        "drift": {name: one._asdict() for name, one in found.drifts.items()},
        "alarms": [asdict(alarm) for alarm in found.alarms],
    }
