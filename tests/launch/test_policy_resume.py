"""Sampling of `rlhf evaluate policy` goes on after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.evaluate.policy.evaluate import evaluate, load_prompts
from launch.evaluate.policy.policies import ModelPolicy, Settings
from tests.launch.chat_server import Reply, Request, chat, chat_server
from tests.launch.small_policies import make_folders

SETTINGS = Settings(max_new_tokens=8, batch_size=1, more_temperatures=(0.5,))  # windows of 4 rows: three for 12 prompts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("models"))


class Killed(Exception):
    pass


def test_only_what_is_missing_is_sampled(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the fifth window, while a line is written; the end is that of a run without a kill."""
    prompts, asked, usual = load_prompts([folders["prompts"]]), [], ModelPolicy.respond

    def respond(self, rows, ids, temperature, advance):
        if len(asked) == limit:
            raise Killed
        asked.append((temperature, list(ids)))
        return usual(self, rows, ids, temperature, advance)

    def run(out: Path) -> dict:
        return evaluate({"one": folders["one"]}, prompts, {"words": f"{folders['code']}:words"}, SETTINGS, out)

    monkeypatch.setattr(ModelPolicy, "respond", respond)
    limit = 4
    with pytest.raises(Killed):
        run(tmp_path / "out")
    with (tmp_path / "out/samples.jsonl").open("a") as stream:
        stream.write('{"model": "one at 0.5", "row": 4, "text": "ha')
    limit, before = 99, list(asked)
    report = run(tmp_path / "out")
    assert asked[len(before) :] == [(0.5, [4, 5, 6, 7]), (0.5, [8, 9, 10, 11])]
    assert report == run(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "out/responses.jsonl").read_text().splitlines()]
    assert lines == [json.loads(line) for line in (tmp_path / "whole/responses.jsonl").read_text().splitlines()]
    assert len(lines) == 24
    count = len(asked)
    run(tmp_path / "out")
    assert len(asked) == count


def test_other_samples_are_made_anew(folders: dict[str, str], tmp_path: Path) -> None:
    """The folder of an earlier evaluation may be given again."""
    prompts = load_prompts([folders["prompts"]])
    texts = []
    for name, seed in (("one", 0), ("two", 0), ("two", 1)):
        evaluate({"x": folders[name]}, prompts, {}, Settings(max_new_tokens=8, seed=seed), tmp_path)
        lines = (tmp_path / "responses.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["response"] for line in lines])
    assert texts[0] != texts[1] != texts[2]


def test_failures_at_the_end_of_an_endpoint_s_responses_are_left_out(tmp_path: Path) -> None:
    """The last window has one prompt, which the server refuses; it has answered the others."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"p{n}"}) + "\n" for n in range(5)))
    prompts = load_prompts([str(tmp_path / "prompts.jsonl")])

    def answer(request: Request) -> Reply:
        last = request.body["messages"][-1]["content"] == "p4"
        return Reply(b"", 400) if last else chat("yes")

    with chat_server(answer) as server:
        policy = {"far": f"openai:far@{server.url}"}
        report = evaluate(policy, prompts, {}, Settings(batch_size=1), tmp_path / "out")
        requests = len(server.requests)
        assert report == evaluate(policy, prompts, {}, Settings(batch_size=1), tmp_path / "out")
    assert report["models"]["far"]["responses"] == 4 and report["models"]["far"]["left_out"]["responses"] == 1
    assert len(server.requests) == requests
