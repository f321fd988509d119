"""The recipes of examples/uses, on a served model with random weights: what is asked, kept and counted."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.serving.store import Store, Writer
from rlhf.user_code import load_object
from tests.launch.serve.servers import Running, running, until
from tests.rlhf.serving.models import make_folder

USES = Path(__file__).parents[2] / "examples/uses"
NAMES = ["sentiment", "story", "summary", "support"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("uses")
    writer = Writer(Store(f"sqlite:///{folder}/feedback.db"))
    with running(make_folder(folder / "model"), writer=writer) as found:
        yield found


def recipe(name: str):
    return load_object(f"{USES}/uses.py:{name}", "test")


def written(server: Running) -> int:
    assert server.service.writer
    return server.service.writer.written


def newest(server: Running, before: int, count: int) -> list[list[dict]]:
    """The messages of the exchanges after the first `before`, when all `count` are kept."""
    until(lambda: written(server) >= before + count)
    assert server.service.writer
    found = [list(each.messages) for each in server.service.writer.store.exchanges().values()][before:]
    assert len(found) == count
    return found


def test_each_use_has_a_prompt() -> None:
    assert sorted(file.stem for file in USES.glob("*.txt")) == NAMES
    for name in NAMES:
        (system, turn) = recipe("messages")(name, {"role": "user", "content": "hi"})
        assert system["role"] == "system" and len(system["content"]) > 50 and turn["content"] == "hi"


def test_support_keeps_the_dialogue(server: Running) -> None:
    before, dialogue = written(server), []
    first = recipe("support")(server.openai(), dialogue, "hello")
    recipe("support")(server.openai(), dialogue, "and now?")
    assert [turn["role"] for turn in dialogue] == ["user", "assistant"] * 2 and dialogue[1]["content"] == first
    (_, kept) = newest(server, before, 2)
    assert kept[1:] == dialogue[:3] and "support assistant" in kept[0]["content"]


def test_a_long_text_is_summarised_in_parts(server: Running) -> None:
    before, text = written(server), "hello there, " * 700  # 9,100 characters
    assert isinstance(recipe("summary")(server.openai(), text), str)
    *parts, last = newest(server, before, 4)
    assert "".join(part[1]["content"] for part in parts) == text
    assert len(last[1]["content"]) <= 4000


def test_probabilities_of_sentiment_are_those_of_the_first_token(server: Running) -> None:
    before = written(server)
    found = recipe("sentiment")(server.openai(), "i like it")
    newest(server, before, 1)
    assert list(found) == ["positive", "negative", "neutral"]
    assert math.isclose(sum(found.values()), 1) and all(p > 0 for p in found.values())


def test_a_story_comes_in_pieces(server: Running) -> None:
    before = written(server)
    pieces = list(recipe("story")(server.openai(), "once upon a time"))
    (kept,) = newest(server, before, 1)
    assert kept[1] == {"role": "user", "content": "once upon a time"}
    assert len(pieces) > 10


@pytest.mark.parametrize("name", NAMES)
def test_each_use_is_a_command(
    server: Running, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHF_SERVE_TOKEN", server.service.token)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    recipe("main")(name, f"{server.url}/v1")
    said = capsys.readouterr().out
    assert said.endswith("\n") and (name != "sentiment" or said.startswith("positive "))
