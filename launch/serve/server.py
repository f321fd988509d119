"""uvicorn, and how it stops: the first signal ends the server when all running requests are answered, the second at once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import FrameType
from typing import Any

import uvicorn

from launch.serve.app import make_app
from launch.serve.service import Service

LOOK_S = 0.05
SETTINGS: dict[str, Any] = {
    "log_level": "warning",
    "access_log": False,  # an address may hold a token, and texts are nobody's business
    "server_header": False,
    "proxy_headers": False,
    "timeout_keep_alive": 30,
    "timeout_graceful_shutdown": 5,
}


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, grace_s: float) -> None:
        super().__init__(config)
        self._service, self._grace_s = service, grace_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of SIGTERM and Ctrl-C. New requests are refused with 503 while the others are answered."""
        self.force_exit = self.should_exit or self._service.stopping
        self.should_exit = self.force_exit
        self._service.stopping = True

    async def main_loop(self) -> None:
        draining = asyncio.create_task(self._drain())
        await super().main_loop()
        draining.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await draining

    async def _drain(self) -> None:
        while not self._service.stopping:
            await asyncio.sleep(LOOK_S)
        deadline = time.monotonic() + self._grace_s
        while self._service.active and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_S)
        self.should_exit = True


def serve(service: Service, host: str, port: int, grace_s: float = 60.0) -> None:
    """Until it is told to stop."""
    config = uvicorn.Config(make_app(service), host=host, port=port, **SETTINGS)
    Server(config, service, grace_s).run()
