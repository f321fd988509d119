"""A real HTTP server that speaks chat completions, well or badly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple


class Reply(NamedTuple):
    body: bytes
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})


class Request(NamedTuple):
    body: dict[str, Any]
    key: str | None
    path: str
    number: int  # how many came before with the same messages


class ChatServer:
    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[Request] = []
        self.most_at_once = 0


def chat(text: str | None, tokens: int | None = 3, reason: str = "stop") -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    return Reply(json.dumps({"choices": [choice], **usage}).encode())


@contextmanager
def chat_server(answer: Callable[[Request], Reply]) -> Iterator[ChatServer]:
    lock, seen, state = threading.Lock(), {}, {"now": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                messages = json.dumps(body["messages"])
                request = Request(body, self.headers.get("Authorization"), self.path, seen.get(messages, 0))
                seen[messages] = request.number + 1
                server.requests.append(request)
                state["now"] += 1
                server.most_at_once = max(server.most_at_once, state["now"])
            reply = answer(request)
            with lock:
                state["now"] -= 1
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)
            except OSError:  # the client did not wait
                pass

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = ChatServer(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
