"""A server of this process, on a port of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import uvicorn
from openai import OpenAI

from launch.serve.app import make_app
from launch.serve.gate import Limits
from launch.serve.server import SETTINGS, Server
from launch.serve.service import Service
from rlhf.serving.model import ServedModel

TOKEN = "a-token-of-this-test"
PATIENCE_S = 60


class Running(NamedTuple):
    service: Service
    url: str

    @property
    def model(self) -> ServedModel:
        return self.service.model(None)

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=PATIENCE_S)

    def http(self, token: str = TOKEN) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=PATIENCE_S)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextmanager
def running(folder: Path, queue: int = 100, **settings: Any) -> Iterator[Running]:
    model = ServedModel("tiny", folder, queue)
    model.stop_ids = frozenset()  # random weights end a response anywhere
    service = Service({"tiny": model}, TOKEN, **{"limits": Limits(per_minute=0), **settings})
    del model  # it may be replaced, and nothing else must hold it
    port = free_port()
    server = Server(uvicorn.Config(make_app(service), host="127.0.0.1", port=port, **SETTINGS), service, grace_s=60)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Running(service, f"http://127.0.0.1:{port}")
    finally:
        service.stopping = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def until(condition: Any, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
