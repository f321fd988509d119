"""Forms of published data sets, each with who wins and by how much worked out by hand from its card."""

from __future__ import annotations

import json

import pytest

from reward_data import DataError, Source, load


def write(folder, *rows):
    file = folder / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


PKU = {
    "prompt": "Q",
    "response_0": "good",
    "response_1": "bad",
    "better_response_id": 0,
    "safer_response_id": 1,
    "is_response_0_safe": False,
    "is_response_1_safe": True,
}
SHP = {"history": "Q", "human_ref_A": "bad", "human_ref_B": "good"}


@pytest.mark.parametrize(
    ("row", "rating"),
    [
        (PKU, "unrated"),
        ({"prompt": "Q", "response_1": "good", "response_2": "bad", "preference_strength": -2}, "better"),
        ({"prompt": "Q", "response_1": "bad", "response_2": "good", "preference_strength": 1}, "slightly"),
        (
            {
                "context": [{"role": "user", "content": "Q"}],
                "response1": "bad",
                "response2": "good",
                "overall_preference": 3,
            },
            "significantly",
        ),
        ({**SHP, "labels": 0}, "unrated"),
        ({"question": "Q", "response_j": "good", "response_k": "bad"}, "unrated"),
        (
            {"question": {"full_text": "Q"}, "answer_0": "bad", "answer_1": "good", "score_0": -0.5, "score_1": 0.5},
            "unrated",
        ),
        ({"system": "", "question": "Q", "chosen": "good", "rejected": "bad"}, "unrated"),
        (
            {
                "prompt": "\n\nHuman: Q\n\nAssistant: ",
                "answers": [{"answer": "bad", "rank": 3.0}, {"answer": "good", "rank": 1.0}],
            },
            "better",
        ),
        (
            {
                "instruction": "Q",
                "completions": [
                    {"response": "good", "overall_score": 8.5},
                    {"response": "bad", "overall_score": 5.0},
                ],
            },
            "significantly",
        ),
        ({"question": "Q", "answers": [{"text": "good", "pm_score": 2}, {"text": "bad", "pm_score": 1}]}, "slightly"),
    ],
)
def test_preference(tmp_path, row, rating):
    (read,) = load("preferences", write(tmp_path, row)).rows
    assert (read.prompt[-1].content, read.chosen, read.rejected, read.rating) == ("Q", "good", "bad", rating)


def test_the_safer_answer_is_chosen_for_safety(tmp_path):
    (read,) = load("preferences", Source(write(tmp_path, PKU), tag="safety")).rows
    assert (read.chosen, read.chosen_safety, read.rejected_safety) == ("bad", "safe", "unsafe")


def test_a_tie_makes_no_pair(tmp_path):
    tie = {"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": 0}
    assert len(load("preferences", write(tmp_path, tie, {**tie, "preference_strength": 1})).rows) == 1


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Q", "response": "A"}, "Q"),
        ({"question": "Q", "answer": "A"}, "Q"),
        ({"instruction": "Q", "context": "C", "response": "A", "category": "qa"}, "Q\n\nC"),
        ({"input": "Q", "output": "A"}, "Q"),
        ({"conversation": [{"input": "Q", "output": "A"}]}, "Q"),
    ],
)
def test_demonstration(tmp_path, row, prompt):
    (read,) = load("demonstrations", write(tmp_path, row)).rows
    assert [message.content for message in read.messages] == [prompt, "A"]


def test_columns_of_ones_own(tmp_path):
    file = write(tmp_path, {"ask": "Q", "up": "good", "down": "bad", "chosen": 7})
    columns = {"prompt": "ask", "chosen": "up", "rejected": "down"}
    (read,) = load("preferences", Source(file, columns=columns)).rows
    assert (read.prompt[0].content, read.chosen, read.rejected) == ("Q", "good", "bad")
    with pytest.raises(DataError, match=r"x.jsonl:1: .*no column 'no' .*the row has ask, up"):
        load("preferences", Source(file, columns={**columns, "prompt": "no"}))


def test_a_form_that_is_unknown_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(
        DataError, match=r"keys ask, up; name its columns .* convert to pairs: \{prompt, chosen, rejected"
    ):
        load("preferences", write(tmp_path, {"ask": "Q", "up": "good"}))
