"""Requests that schemathesis makes from /openapi.json, and bodies of random bytes: no crash, right status codes, nothing lost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi import checks

from rlhf.serving.store import Store, Writer
from tests.launch.serve.servers import TOKEN, Running, running, until

SHORT, LONG = 300, 10_000
MOST_EVENTS = 10_000  # of a stream
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[Running]:
    writer = Writer(Store(f"sqlite:///{tmp_path}/feedback.db"))
    with running(folder, queue=1000, max_output=8, writer=writer) as found:
        yield found


@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=[pytest.mark.proof, pytest.mark.timeout(3600)])])
def test_fuzzed_requests_break_nothing_and_lose_nothing(server: Running, count: int) -> None:
    fuzz = Fuzz(server)
    operations = [found.ok() for found in fuzz.schema.get_all_operations() if isinstance(found, Ok)]
    assert len(operations) > 8
    bodies = [each for each in operations if each.body]
    fuzz.some_responses()
    for operation in operations:
        if operation in bodies:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                fuzz.operation(operation, count // (2 * len(bodies) + 2), mode)
        else:
            fuzz.operation(operation, count // 50, GenerationMode.POSITIVE)
    fuzz.bytes([each.path for each in bodies], max(0, count - fuzz.sent))
    assert fuzz.sent >= count
    print(f"{fuzz.sent} requests: {dict(sorted(fuzz.statuses.items()))}")
    assert {200, 400, 404, 422} <= set(fuzz.statuses) <= {200, 400, 404, 405, 413, 415, 422}
    assert server.model.engine.restarts == 0 and server.model.engine.running == 0
    kept = server.service.writer
    assert kept
    until(lambda: not kept.queued and kept.written == fuzz.exchanges + fuzz.votes)
    assert (len(kept.store.exchanges()), len(kept.store.votes())) == (fuzz.exchanges, fuzz.votes)
    assert kept.dropped == 0
    with server.http() as http:
        assert http.post("/predict", json={"text": "a", "max_tokens": 1}).status_code == 200


class Fuzz:
    def __init__(self, server: Running) -> None:
        self.server, self.session = server, requests.Session()
        self.session.headers.update(HEADERS)
        with server.http() as http:
            self.schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
        # By default it hangs up after 64 events of a stream, and the server rightly keeps nothing of that response.
        self.schema.config.max_stream_events = MOST_EVENTS
        self.sent = self.exchanges = self.votes = 0
        self.statuses: Counter[int] = Counter()
        self._ids: list[str] = []
        self._random = random.Random(0)

    def some_responses(self) -> None:
        """Which votes can be about."""
        asked = {"messages": [{"role": "user", "content": "hello"}], "n": 8, "max_tokens": 4}
        with self.server.http() as http:
            found = http.post("/v1/chat/completions", json=asked).json()
        self._ids = [f"{found['id']}:{number}" for number in range(8)]
        self.exchanges += 8

    def operation(self, operation: APIOperation, count: int, mode: GenerationMode) -> None:
        @seeded(0)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=SLOW,
        )
        @given(case=operation.as_strategy(mode))
        def run(case: Any) -> None:
            if mode is GenerationMode.POSITIVE:  # the id may be what is wrong
                self._aim(case)
            self._told(case.call(base_url=self.server.url, session=self.session), operation.path, case)

        run()

    def _aim(self, case: Any) -> None:
        """Votes at responses that are there, mostly."""
        if case.operation.path == "/v1/votes" and isinstance(case.body, dict) and self._random.random() < 0.8:
            for place in {"first", "second"} & case.body.keys():
                if isinstance(case.body[place], str):
                    case.body[place] = self._random.choice(self._ids)

    def _told(self, response: Any, path: str, case: Any) -> None:
        self.sent += 1
        self.statuses[response.status_code] += 1
        case.validate_response(response, checks=CHECKS)
        if response.status_code == 200:
            self._count(path, response.text, case.body)

    def _count(self, path: str, text: str, body: Any) -> None:
        """What the store must have of it."""
        if path == "/v1/votes":
            self.votes += 1
        elif path == "/predict":
            self.exchanges += 1
        elif path.endswith("completions"):
            prompts = body["prompt"] if path == "/v1/completions" else ""
            several = isinstance(prompts, list) and not isinstance(prompts[0], int)
            self.exchanges += (body.get("n") or 1) * (len(prompts) if several else 1)
            assert not body.get("stream") or text.endswith("data: [DONE]\n\n")

    def bytes(self, paths: list[str], count: int) -> None:
        """Bodies that are no JSON, or none of ours."""

        @seeded(0)
        @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate])
        @given(
            path=st.sampled_from(paths),
            body=st.binary(max_size=2000),
            kind=st.sampled_from(["application/json", "text/plain", ""]),
        )
        def run(path: str, body: bytes, kind: str) -> None:
            found = httpx2.post(self.server.url + path, content=body, headers=HEADERS | {"Content-Type": kind})
            self.sent += 1
            self.statuses[found.status_code] += 1
            assert found.status_code in (400, 422) and found.json()["error"]["type"] == "invalid_request_error"

        if count:
            run()
