"""Chat completions of an endpoint: a real server that is slow, refuses, breaks off, or asks to wait."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from launch.evaluate.policy import endpoint
from launch.evaluate.policy.endpoint import Completion, Endpoint, Failure
from rlhf.errors import UserError
from tests.launch.chat_server import ChatServer, Reply, Request, chat, chat_server

KEY = "sk-planted-key-1234567890"
BODIES = [{"messages": [{"role": "user", "content": str(n)}], "max_tokens": 7, "seed": n} for n in range(6)]


@pytest.fixture(autouse=True)
def key_and_short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)


def number(request: Request) -> int:
    return int(request.body["messages"][-1]["content"])


def ask(answer: Callable[[Request], Reply], count: int = 6, **settings) -> tuple[list, ChatServer]:
    with chat_server(answer) as server:
        found = Endpoint.parse(f"openai:some/model@{server.url}", "MODEL", **settings).complete(BODIES[:count])
    return found, server


def test_every_request_gets_its_own_answer() -> None:
    def answer(request: Request) -> Reply:
        time.sleep(0.02 * (6 - number(request)))  # the last comes back first
        return chat(f"number {number(request)}", number(request), "length" if number(request) == 2 else "stop")

    found, server = ask(answer)
    assert found == [Completion(f"number {n}", n, n != 2) for n in range(6)]
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    assert {request.key for request in server.requests} == {f"Bearer {KEY}"}
    assert all(request.body == {"model": "some/model", **BODIES[number(request)]} for request in server.requests)


@pytest.mark.parametrize("parallel", [1, 3])
def test_no_more_requests_than_allowed_are_under_way(parallel: int) -> None:
    def answer(_: Request) -> Reply:
        time.sleep(0.1)
        return chat("yes")

    _, server = ask(answer, parallel=parallel)
    assert server.most_at_once == parallel


@pytest.mark.parametrize(
    "bad",
    [
        Reply(b"busy", 429),
        Reply(b"oops", 500),
        Reply(b"oops", 503),
        Reply(chat("yes").body[:40]),
        Reply(b"{}"),
        Reply(b"[]"),
        Reply(chat("yes").body[:40], headers={"Content-Length": "5000"}),
    ],
    ids=["429", "500", "503", "truncated JSON", "no choices", "a list", "broken off"],
)
def test_what_may_pass_is_tried_again(bad: Reply) -> None:
    found, server = ask(lambda request: bad if number(request) == 1 and request.number < 2 else chat("yes"), 3)
    assert found == [Completion("yes", 3, True)] * 3
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("bad", "tries", "reason"),
    [
        (Reply(b"oops", 500), endpoint.TRIES, "status 500: oops"),
        (Reply(b"the prompt is too long", 400), 1, "status 400: the prompt is too long"),
        (Reply(b"", 307, {"Location": "http://127.0.0.1:1/"}), 1, "status 307"),
        (Reply(b"{"), endpoint.TRIES, "no chat completion"),
        (chat(None), 1, "a message without text"),
        (chat("", reason="content_filter"), 1, "content filter"),
    ],
)
def test_a_failure_is_told_after_a_bounded_number_of_tries(bad: Reply, tries: int, reason: str) -> None:
    found, server = ask(lambda request: bad if number(request) == 4 else chat("yes"))
    assert isinstance(found[4], Failure) and reason in found[4].reason
    assert [one for n, one in enumerate(found) if n != 4] == [Completion("yes", 3, True)] * 5
    assert sum(number(request) == 4 for request in server.requests) == tries


def test_a_slow_response_is_cut_off_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "TRIES", 2)

    def answer(request: Request) -> Reply:
        time.sleep(1.5 if number(request) == 1 else 0)
        return chat("yes")

    before = time.monotonic()
    found, server = ask(answer, 3, deadline_s=0.3)
    assert time.monotonic() - before < 5
    assert isinstance(found[1], Failure) and found[1].reason == "no response within 0.3 s"
    assert found[0] == found[2] == Completion("yes", 3, True)
    assert len(server.requests) == 4


def test_a_server_is_given_the_time_that_it_asks_for() -> None:
    wait = Reply(b"", 429, {"Retry-After": "1"})
    before = time.monotonic()
    found, _ = ask(lambda request: wait if request.number == 0 else chat("yes"), 1)
    assert found == [Completion("yes", 3, True)] and time.monotonic() - before >= 1


@pytest.mark.parametrize(
    ("status", "code", "what"), [(401, 2, "set the key in OPENAI_API_KEY"), (404, 4, "the model's name")]
)
def test_what_no_request_can_pass_ends_at_once_without_the_key(status: int, code: int, what: str) -> None:
    """Some servers repeat the key that they refuse."""
    with pytest.raises(UserError) as error:
        ask(lambda request: Reply(f"no such key: {request.key}".encode(), status))
    assert error.value.exit_code == code
    assert what in error.value.message and "no such key: Bearer ***" in error.value.message
    assert KEY not in error.value.message


def test_an_endpoint_that_is_not_there_is_told() -> None:
    with chat_server(lambda _: chat("yes")) as server:
        pass
    with pytest.raises(UserError) as error:
        Endpoint.parse(f"m@{server.url}", "MODEL").complete(BODIES)
    assert error.value.exit_code == 8 and "no response to 6 requests: ConnectError" in error.value.message


def test_nothing_is_expected_of_an_endpoint_after_eight_failures() -> None:
    with (
        pytest.raises(UserError, match="no response to 8 requests: status 400"),
        chat_server(lambda _: Reply(b"", 400)) as server,
    ):
        Endpoint.parse(f"m@{server.url}", "MODEL", parallel=1).complete(BODIES * 10)
    assert len(server.requests) == 8


def test_settings_that_an_endpoint_does_not_take_are_left_out() -> None:
    def answer(request: Request) -> Reply:
        if "max_tokens" in request.body:
            return Reply(b"'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", 400)
        return Reply(b"extra_forbidden: seed", 422) if "seed" in request.body else chat("yes")

    found, server = ask(answer, 1)
    assert found == [Completion("yes", 3, True)]
    assert server.requests[-1].body == {
        "model": "some/model",
        "messages": BODIES[0]["messages"],
        "max_completion_tokens": 7,
    }


def test_no_key_is_sent_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    _, server = ask(lambda _: chat("yes"), 1)
    assert server.requests[0].key is None


@pytest.mark.parametrize(
    "text",
    [
        "model",
        "model@localhost:8000",
        "@http://host",
        "m@http://",
        "m@ftp://host",
        "m@http://u:p@host",
        "m@http://h?key=1",
        "m@http://h:99999",
    ],
)
def test_what_is_no_endpoint_is_told(text: str) -> None:
    with pytest.raises(UserError, match="--judge: ") as error:
        Endpoint.parse(text, "--judge")
    assert error.value.exit_code == 2


def test_a_model_may_have_slashes_and_signs_in_its_name() -> None:
    found = Endpoint.parse("openai:meta-llama/Llama-3.1@8b@https://host:8000/v1/", "MODEL")
    assert (found.model, found.url) == ("meta-llama/Llama-3.1@8b", "https://host:8000/v1")
