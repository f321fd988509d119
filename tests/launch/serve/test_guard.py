"""What becomes of prompts and responses that the safety model calls unsafe, over HTTP."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.serve.guard import COMPLIANCE, REFUSAL, Action, Guard
from launch.serve.scoring import Score
from rlhf.errors import UserError
from rlhf.serving.store import Store, Writer
from tests.launch.serve.servers import Running, free_port, running

SAFE, UNSAFE = 3.0, -3.0  # logits
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "seed": 1}
Says = Callable[[str], float]


class SafetyModel:
    """Says what it is told to say of each response, and remembers what it was asked."""

    def __init__(self, says: Says) -> None:
        self.says, self.asked = says, []

    def submit(self, messages: Sequence[Mapping[str, str]], response: str) -> Future[Score]:
        self.asked.append((messages[-1], response))
        future: Future[Score] = Future()
        logit = self.says(response)
        future.set_result(Score(logit, logit))
        return future

    def close(self) -> None:
        pass


@contextmanager
def guarded(folder: Path, action: Action, says: Says, **settings: Any) -> Iterator[tuple[Running, SafetyModel]]:
    model = SafetyModel(says)
    with running(folder, guard=Guard(model, 0.15, action), **settings) as server:  # type: ignore[arg-type]
        yield server, model


def of_responses(*logits: float) -> Says:
    """These of the responses in turn, the last one again and again; prompts are safe."""
    left = list(logits)

    def says(response: str) -> float:
        if response == COMPLIANCE:
            return SAFE
        return left.pop(0) if len(left) > 1 else left[0]

    return says


def chat(server: Running, **asked: Any) -> list[dict[str, Any]]:
    with server.http() as http:
        return http.post("/v1/chat/completions", json=CHAT | asked).raise_for_status().json()["choices"]


def streamed(server: Running, **asked: Any) -> list[dict[str, Any]]:
    with server.http() as http:
        lines = http.post("/v1/chat/completions", json=CHAT | {"stream": True} | asked).text.splitlines()
    return [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]


@pytest.fixture(scope="module")
def plain(server: Running) -> str:
    """The response without a guard."""
    return chat(server)[0]["message"]["content"]


# --- annotate


def test_annotate_changes_nothing_and_says_how_safe_it_is(folder: Path, plain: str) -> None:
    with guarded(folder, "annotate", of_responses(UNSAFE)) as (server, _):
        (choice,) = chat(server)
        assert (choice["message"]["content"], choice["finish_reason"]) == (plain, "length")
        assert choice["guard"]["input"] == {"flagged": False, "safe": pytest.approx(1 / (1 + math.exp(-3)))}
        assert choice["guard"]["output"] == {"flagged": True, "safe": pytest.approx(1 / (1 + math.exp(3)))}
        with server.http() as http:
            found = http.post("/predict", json={"text": "hello", "max_tokens": 6, "seed": 1}).json()
        assert (found["text"], found["guard"]["output"]["flagged"]) == (plain, True)


def test_annotate_streams_before_the_response_is_judged(folder: Path, plain: str) -> None:
    some_text = threading.Event()

    def says(response: str) -> float:
        assert response == COMPLIANCE or some_text.wait(60)
        return UNSAFE

    with guarded(folder, "annotate", says) as (server, _), server.http() as http:
        told = ""
        with http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    told += choice["delta"]["content"]
                    if told:
                        some_text.set()
        assert told == plain and choice["guard"]["output"]["flagged"] and choice["guard"]["input"]["flagged"]


# --- refuse


def test_an_unsafe_response_is_refused_and_nothing_of_it_is_told(folder: Path, tmp_path: Path, plain: str) -> None:
    store = f"sqlite:///{tmp_path}/f.db"
    with guarded(folder, "refuse", of_responses(UNSAFE), writer=Writer(Store(store))) as (server, model):
        (choice,) = chat(server)
        assert (choice["message"]["content"], choice["finish_reason"]) == (REFUSAL, "content_filter")
        told = streamed(server)
        assert [each["delta"]["content"] for each in told] == ["", REFUSAL]
        assert told[-1]["finish_reason"] == "content_filter" and told[-1]["guard"]["output"]["flagged"]
        assert [response for _, response in model.asked] == [COMPLIANCE, plain] * 2
        of_client = server.openai().chat.completions.create(model="tiny", messages=CHAT["messages"], max_tokens=3)
        assert of_client.choices[0].finish_reason == "content_filter"
        with server.http() as http:
            assert 'guarded_total{model="tiny",result="refused",where="output"} 3.0' in http.get("/metrics").text
    kept = list(Store(store).exchanges().values())
    assert {(row.response, row.finish, row.sampling["guard"]["output"]["flagged"]) for row in kept} == {
        (REFUSAL, "content_filter", True)
    }


def test_a_safe_response_is_told_in_one_piece(folder: Path, plain: str) -> None:
    with guarded(folder, "refuse", of_responses(SAFE)) as (server, _):
        told = streamed(server)
        assert [each["delta"]["content"] for each in told] == ["", plain]
        assert told[-1]["finish_reason"] == "length" and not told[-1]["guard"]["output"]["flagged"]


def test_an_unsafe_prompt_is_not_sampled(folder: Path) -> None:
    with guarded(folder, "refuse", lambda _: UNSAFE) as (server, model):
        for asked in (chat(server)[0], streamed(server)[-1]):
            assert asked["finish_reason"] == "content_filter" and asked["guard"]["input"]["flagged"]
        assert server.model.engine.tokens == 0
        with server.http() as http:
            asked = {"prompt": server.model.encode_text("hello there"), "n": 2, "max_tokens": 3}
            found = http.post("/v1/completions", json=asked).json()
        assert [each["text"] for each in found["choices"]] == [REFUSAL] * 2 and found["usage"]["completion_tokens"] == 0
        assert {text for _, text in model.asked} == {COMPLIANCE}
        said, _ = model.asked[-1]  # a plain prompt, given as tokens
        assert said["role"] == "user" and said["content"].endswith("hello there")


def test_of_several_responses_and_prompts_the_unsafe_ones_are_refused(folder: Path) -> None:
    with guarded(folder, "refuse", of_responses(SAFE)) as (server, model):
        texts = [each["message"]["content"] for each in chat(server, n=3)]
        model.says = lambda response: UNSAFE if response == texts[1] else SAFE
        assert [each["message"]["content"] for each in chat(server, n=3)] == [texts[0], REFUSAL, texts[2]]
        judged = iter([SAFE, UNSAFE])
        model.says = lambda response: next(judged) if response == COMPLIANCE else SAFE
        with server.http() as http:
            found = http.post("/v1/completions", json={"prompt": ["hello", "there"], "max_tokens": 3}).json()["choices"]
        assert [each["finish_reason"] for each in found] in (["length", "content_filter"], ["content_filter", "length"])


@pytest.mark.parametrize("error", [UserError("too long", 3), ArithmeticError()])
def test_what_cannot_be_judged_is_unsafe(folder: Path, error: Exception) -> None:
    def says(response: str) -> float:
        if response == COMPLIANCE:
            return SAFE
        raise error

    with guarded(folder, "refuse", says) as (server, _):
        (choice,) = chat(server)
        assert choice["finish_reason"] == "content_filter"
        assert choice["guard"]["output"] == {"flagged": True, "safe": None}


# --- regenerate


def test_regenerate_tells_the_first_safe_sample(folder: Path, plain: str) -> None:
    with guarded(folder, "regenerate", of_responses(UNSAFE, UNSAFE, SAFE)) as (server, model):
        (choice,) = chat(server)
        assert choice["finish_reason"] == "length" and choice["guard"]["tries"] == 3
        judged = [response for _, response in model.asked if response != COMPLIANCE]
        assert len(set(judged)) == 3 and judged[0] == plain and choice["message"]["content"] == judged[2]
        model.says = of_responses(UNSAFE, UNSAFE, SAFE)
        assert streamed(server)[-1]["delta"]["content"] == judged[2]  # the seed's tries are the same


@pytest.mark.parametrize(("temperature", "tries"), [(1.0, 4), (0.0, 1)])
def test_regenerate_refuses_in_the_end(folder: Path, temperature: float, tries: int) -> None:
    with guarded(folder, "regenerate", of_responses(UNSAFE)) as (server, model):
        (choice,) = chat(server, temperature=temperature)
        assert choice["finish_reason"] == "content_filter" and choice["guard"]["tries"] == tries
        assert len([text for _, text in model.asked if text != COMPLIANCE]) == tries


# --- the threshold, and the command


@pytest.mark.parametrize(("logit", "finish"), [(-1.7347, "content_filter"), (-1.7345, "length")])
def test_the_threshold_is_a_probability(folder: Path, logit: float, finish: str) -> None:
    """ln(.15 / .85) = -1.734601."""
    with guarded(folder, "refuse", of_responses(logit)) as (server, _):
        assert chat(server)[0]["finish_reason"] == finish


def test_a_guard_is_named_by_its_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["serve", str(folder), "--port", str(free_port()), "--store", "none"]
    assert cli.main([*command, "--guard-action", "refuse"]) == 2
    assert "--guard" in capsys.readouterr().err
    assert cli.main([*command, "--guard", str(folder)]) == 4  # a policy
    assert "no reward model" in capsys.readouterr().err
