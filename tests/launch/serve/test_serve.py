"""Token, limits, failures and stop of `rlhf serve`, over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launch.serve.gate import Limits, Rate
from rlhf.serving import engine as engine_module
from rlhf.serving.batch import Batch
from tests.launch.serve.servers import TOKEN, Running, running, until

ENDLESS = {"prompt": "hello", "max_tokens": 1000, "stream": True}


# --- routes


def test_predict_answers_a_text(server: Running) -> None:
    with server.http() as http:
        found = http.post("/predict", json={"text": "hello", "max_tokens": 4, "seed": 1})
        assert found.status_code == 200
        assert found.json().keys() == {"id", "text", "model", "finish_reason", "prompt_tokens", "completion_tokens"}
        assert found.json()["completion_tokens"] == 4
        again = http.post("/predict", json={"text": "hello", "max_tokens": 4, "seed": 1})
        assert again.json()["text"] == found.json()["text"]


def test_the_system_prompt_is_said_where_a_dialogue_has_none(folder: Path) -> None:
    user = {"role": "user", "content": "hello"}
    with running(folder, system="be brief") as server, server.http() as http:

        def tokens(*messages: dict[str, str]) -> int:
            asked = {"messages": messages, "max_tokens": 1}
            return http.post("/v1/chat/completions", json=asked).json()["usage"]["prompt_tokens"]

        said = tokens({"role": "system", "content": "be brief"}, user)
        assert (
            tokens(user)
            == said
            == http.post("/predict", json={"text": "hello", "max_tokens": 1}).json()["prompt_tokens"]
        )
        assert tokens({"role": "developer", "content": "b"}, user) < said


def test_metrics_count_requests_and_tokens(folder: Path) -> None:
    with running(folder) as server, server.http() as http:
        for n in (3, 5):
            http.post("/predict", json={"text": "hello", "max_tokens": n})
        http.post("/predict", json={"text": 1})
        found = _metrics(http)
        assert found["rlhf_serve_completion_tokens_total"] == 8
        assert found["rlhf_serve_request_seconds_count"] == found["rlhf_serve_first_token_seconds_count"] == 2
        assert found["rlhf_serve_requests_total", "/predict", "422"] == 1
        assert found["rlhf_serve_requests_total", "/predict", "200"] == 2
        assert found["rlhf_serve_running_rows"] == found["rlhf_serve_waiting_rows"] == 0
        assert "hello" not in http.get("/metrics").text


def _metrics(http: Any) -> dict[Any, float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    found: dict[Any, float] = {}
    for sample in (sample for family in families for sample in family.samples):
        labels = [sample.labels[key] for key in ("route", "status") if key in sample.labels]
        found[(sample.name, *labels) if labels else sample.name] = sample.value
    return found


# --- token


def test_only_health_answers_without_the_token(server: Running) -> None:
    routes = set(server.http().get("/openapi.json").json()["paths"])
    for token in ("", "wrong", TOKEN[:-1], "é"):
        headers = {b"Authorization": f"Bearer {token}".encode()} if token else {}
        with server.http("") as http:
            for path in sorted(routes | {"/", "/openapi.json", "/nothing"}):
                for method in ("GET", "POST"):
                    status = http.request(method, path, headers=headers).status_code
                    assert status == (401 if path != "/health" else 200 if method == "GET" else 405), (method, path)


def test_a_browser_gets_a_cookie_for_the_token(server: Running) -> None:
    with server.http("") as http:
        assert http.get("/?token=wrong").status_code == 401
        welcome = http.get(f"/?token={TOKEN}")
        assert (welcome.status_code, welcome.headers["location"]) == (303, "/")
        assert {"HttpOnly", "SameSite=strict"} <= {part.strip() for part in welcome.headers["set-cookie"].split(";")}
        assert http.get("/v1/models").status_code == 200
    with server.http("") as http:
        assert http.get(f"/v1/models?token={TOKEN}").status_code == 401


# --- limits


@pytest.fixture(scope="module")
def narrow(folder: Path) -> Iterator[Running]:
    with running(folder, queue=2, limits=Limits(body=1000, per_minute=0)) as found:
        yield found


def test_a_body_that_is_too_large_is_not_read(narrow: Running) -> None:
    with narrow.http() as http:
        assert http.post("/predict", json={"text": "a" * 1000}).status_code == 413
        pieces = (b"a" * 300 for _ in range(10))
        found = http.post("/predict", content=pieces, headers={"Content-Type": "application/json"})
        assert (found.status_code, found.json()["error"]["type"]) == (413, "invalid_request_error")
        assert http.post("/predict", json={"text": "a" * 10, "max_tokens": 1}).status_code == 200


def test_a_prompt_of_a_million_characters_is_refused(server: Running) -> None:
    with server.http() as http:
        found = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "ab " * 333_334}]})
    assert (found.status_code, found.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_full_queue_says_when_to_come_again(narrow: Running) -> None:
    asked = {"prompt": ["hello"] * 5, "n": 14, "max_tokens": 2}  # 70 responses for 64 slots and 2 places
    with narrow.http() as http:
        found = http.post("/v1/completions", json=asked)
        assert (found.status_code, found.headers["retry-after"]) == (429, "1")
        assert http.post("/v1/completions", json={**asked, "stream": True}).status_code == 429
        assert http.post("/v1/completions", json={**asked, "n": 13}).status_code == 200


def test_who_asks_too_often_waits(folder: Path) -> None:
    with running(folder, limits=Limits(per_minute=3)) as server, server.http() as http:
        statuses = [http.get("/v1/models").status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        last = http.get("/v1/models")
        assert 1 <= int(last.headers["retry-after"]) <= 20
        assert http.get("/health").status_code == http.get("/metrics").status_code == 200


def test_a_bucket_fills_evenly() -> None:
    """60 in a minute: all at once, then one a second."""
    rate = Rate(60)
    assert [rate.wait("a", 0.0) for _ in range(61)] == [0] * 60 + [1]
    assert rate.wait("b", 0.0) == 0
    assert (rate.wait("a", 0.9), rate.wait("a", 1.01), rate.wait("a", 1.02)) == (1, 0, 1)
    assert [rate.wait("a", 1000.0) for _ in range(61)] == [0] * 60 + [1]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b'{"text": "a"', 400),
        (b"[" * 100_000, 400),
        (b"\xff\xfe", 400),
        (b'{"text": "\\ud800"}', 422),
        (b'{"text": "a", "temperature": NaN}', 422),
        (b'{"text": "a", "temperature": 1e999}', 422),
        (b'{"text": "a", "seed": 99999999999999999999}', 422),
        (b'{"text": "a", "seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"text": "a", "tmperature": 1}', 422),
        (b'{"text": "[INST] a"}', 400),
        (b'{"text": "\\u0000", "max_tokens": 1}', 200),
        (b'{"text": "", "max_tokens": 1}', 200),
        (b'{"text": "a", "temperature": 1e-300, "max_tokens": 2}', 200),
    ],
)
def test_malformed_bodies_have_their_status(server: Running, content: bytes, status: int) -> None:
    with server.http() as http:
        found = http.post("/predict", content=content, headers={"Content-Type": "application/json"})
    assert found.status_code == status, found.text
    assert status == 200 or found.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_path_that_is_not_there(server: Running) -> None:
    with server.http() as http:
        found = http.get("/nothing")
    assert (found.status_code, found.json()["error"]["type"]) == (404, "not_found_error")


@pytest.mark.parametrize(
    ("path", "asked", "help"),
    [
        ("/predict", {"content": b'{"text": "a"}'}, "Content-Type: application/json"),
        ("/predict", {"json": {"text": "a", "top_k": 3}}, "top_k: this server has no such thing: leave it out"),
        ("/v1/votes", {"json": {"first": "a"}}, "the body: say something about the response"),
        ("/chat/completions", {"json": {}}, "ends with /v1"),
    ],
)
def test_an_error_says_what_to_do(server: Running, path: str, asked: dict[str, Any], help: str) -> None:
    with server.http() as http:
        assert help in http.post(path, **asked).json()["error"]["message"]


def test_a_page_without_a_token_says_how_to_open_it(server: Running) -> None:
    with server.http(token="") as http:
        assert "open /dashboard?token=TOKEN" in http.get("/dashboard").json()["error"]["message"]
        assert "Authorization: Bearer TOKEN" in http.get("/metrics").json()["error"]["message"]


# --- failures


def test_a_client_that_leaves_in_mid_stream_frees_its_row(server: Running) -> None:
    with server.http() as http:
        with http.stream("POST", "/v1/completions", json=ENDLESS) as stream:
            next(stream.iter_lines())
            assert server.model.engine.running == 1
        until(lambda: server.model.engine.running == 0 and server.service.active == 0)
        assert _metrics(http)["rlhf_serve_clients_gone_total"] == 1


def test_a_client_that_does_not_wait_for_its_response_frees_its_row(server: Running) -> None:
    with server.http() as http, pytest.raises(Exception, match="timed out"):
        http.post("/v1/completions", json={**ENDLESS, "stream": False}, timeout=0.3)
    until(lambda: server.model.engine.running == 0 and server.service.active == 0)


def test_an_engine_that_dies_is_503_and_comes_back(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "FIRST_PAUSE_S", 0.5)
    with server.http() as http:
        with http.stream("POST", "/v1/completions", json=ENDLESS) as stream:
            lines = stream.iter_lines()
            next(lines)
            with monkeypatch.context() as broken:
                broken.setattr(Batch, "step", lambda _: 1 / 0)
                rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "not_ready"
        down = http.post("/predict", json={"text": "a"})
        assert (down.status_code, down.headers["retry-after"]) == (503, "1")
        assert (http.get("/ready").status_code, http.get("/health").status_code) == (503, 200)
        until(lambda: http.get("/ready").status_code == 200)
        assert http.post("/predict", json={"text": "a", "max_tokens": 1}).status_code == 200
        assert _metrics(http)["rlhf_serve_engine_restarts_total"] == 1


def test_a_stop_answers_those_who_wait_and_refuses_others(folder: Path) -> None:
    with running(folder) as server, server.http() as http, server.http() as other:
        rest: list[str] = []
        with http.stream("POST", "/v1/completions", json=ENDLESS | {"max_tokens": 300}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.service.stopping = True
            reading = threading.Thread(target=lambda: rest.extend(line for line in lines if line))
            reading.start()
            refused = other.post("/predict", json={"text": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
            assert (other.get("/ready").status_code, other.get("/health").status_code) == (503, 200)
            reading.join(60)
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
