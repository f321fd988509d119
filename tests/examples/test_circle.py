"""The raters of examples/circle vote by the gold score, through HTTP, and the pipeline reads what is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import reward_data
from launch import cli
from reward_data.gold import gold_score
from rlhf.serving.store import Store, Writer
from rlhf.user_code import load_object
from tests.launch.serve.servers import TOKEN, running
from tests.rlhf.serving.models import make_folder

CIRCLE = Path(__file__).parents[2] / "examples/circle"


@pytest.mark.parametrize("wrong", [False, True])
def test_a_rater_sees_what_the_shipped_pairs_say(wrong: bool) -> None:
    rate = load_object(f"{CIRCLE}/raters.py:rate", "test")
    rows = reward_data.load("preferences", reward_data.Source("shipped", split="held_out")).rows[:200]
    assert {row.tag for row in rows} == {"helpful", "safety"}
    for row in rows:
        prompt = row.prompt[-1].content
        assert gold_score(prompt, row.chosen) > gold_score(prompt, row.rejected)  # as shipped
        vote = rate(row, [row.rejected, row.chosen], wrong)
        assert vote["chosen"] == ("first" if wrong else "second") and vote["rating"] == row.rating
        told = {"safe": ["safe"], "unsafe": ["unsafe"]}
        safety = [row.chosen_safety, row.rejected_safety] if wrong else [row.rejected_safety, row.chosen_safety]
        if row.tag == "safety" and "unknown" not in safety:
            assert vote["labels"]["first"] in (
                told[safety[0]],
                ["unsafe"],
            )  # who neither refuses nor helps is unsafe, too
            assert vote["labels"]["second"] in (told[safety[1]], ["unsafe"])


def test_votes_go_through_http_and_come_out_as_preferences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLHF_SERVE_TOKEN", TOKEN)
    main = load_object(f"{CIRCLE}/raters.py:main", "test")
    writer = Writer(Store(f"sqlite:///{tmp_path}/votes/feedback.db"))
    with running(make_folder(tmp_path / "model"), writer=writer) as server:
        assert main(server.url, pairs=30, wrong=0.15, skip=128) == 30
    assert cli.main(["feedback", "export", "--store", f"{tmp_path}/votes", "--out", f"{tmp_path}/votes"]) == 0
    rows = [
        *_lines(tmp_path / "votes/preferences.train.jsonl"),
        *_lines(tmp_path / "votes/preferences.held_out.jsonl"),
    ]
    assert len(rows) == 30 and len({row["provenance"]["rater"] for row in rows}) == 2  # 20 votes a person
    said = {row["prompt"][-1]["content"] for row in rows}
    shipped = reward_data.load("preferences", reward_data.Source("shipped", split="train")).rows
    assert len(said) == 30 and said <= {row.prompt[-1].content for row in shipped[128:]}


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]
