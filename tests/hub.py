"""A server that stands for the model hub, as huggingface_hub sees it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

TREE = re.compile(r"/api/models/(\w+/\w+)/tree/(\w+)\?")
INFO = re.compile(r"/api/models/(\w+/\w+)/revision/(\w+)")
FILE = re.compile(r"/(\w+/\w+)/resolve/(\w+)/(.+)")


class Hub:
    """Its models by name: a folder, and the number of the commit that `main` is."""

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.commits: dict[str, int] = {}
        self.requests: list[str] = []  # method and path
        self.refuses: tuple[int, str] | None = None  # status and X-Error-Code of every answer
        self.lacks = ""  # a file that it cannot give away today
        self.breaks_off = ""  # a file that it announces, and then cannot give away
        self.url = ""

    def add(self, name: str, folder: Path) -> None:
        """A model, or a new commit of it."""
        self.models[name], self.commits[name] = folder, self.commits.get(name, 0) + 1

    def commit(self, name: str, number: int | None = None) -> str:
        return hashlib.sha1(f"{name} {number or self.commits[name]}".encode()).hexdigest()

    def downloads(self, file: str) -> int:
        """How often a file was given away."""
        return sum(request.startswith("GET ") and request.endswith(f"/{file}") for request in self.requests)

    def __call__(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if self.lacks and path.endswith(self.lacks):
            return 503, {}, b""
        if self.refuses:
            return self.refuses[0], {"X-Error-Code": self.refuses[1]}, b""
        for pattern in (INFO, TREE, FILE):
            if found := pattern.match(path):
                name, revision, *file = found.groups()
                if name not in self.models:
                    return 404, {"X-Error-Code": "RepoNotFound"}, b""
                known = {self.commit(name, number): number for number in range(1, self.commits[name] + 1)}
                if revision != "main" and revision not in known:
                    return 404, {"X-Error-Code": "RevisionNotFound"}, b""
                return self._answer(pattern, name, self.commit(name) if revision == "main" else revision, file)
        return 404, {}, b""

    def _answer(
        self, pattern: re.Pattern[str], name: str, commit: str, file: list[str]
    ) -> tuple[int, dict[str, str], bytes]:
        files = {path.name: path.read_bytes() for path in sorted(self.models[name].iterdir()) if path.is_file()}
        if pattern is INFO:
            siblings = [{"rfilename": path} for path in files]
            return 200, {}, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()
        if pattern is TREE:
            tree = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        if file[0] not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = files[file[0]]
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content


@contextmanager
def served(hub: Hub, address: str = "127.0.0.1") -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            status, headers, body = hub(self.path)
            if hub.breaks_off and self.command == "GET" and self.path.endswith(hub.breaks_off):
                status, headers, body = 503, {}, b""
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer((address, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://{address}:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of this process and of those that it starts, with an empty cache."""
    from huggingface_hub import constants

    import rlhf.hub

    with served(Hub()) as one:
        monkeypatch.setenv("HF_ENDPOINT", one.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.delenv("HF_HUB_CACHE", raising=False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", one.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", one.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
        without_waits = SimpleNamespace(**vars(time) | {"sleep": lambda _: None})  # between its tries
        monkeypatch.setattr("huggingface_hub.utils._http.time", without_waits)
        rlhf.hub._commit_now.cache_clear()
        yield one
        rlhf.hub._commit_now.cache_clear()
