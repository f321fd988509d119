"""Preference forms other than transcripts, hand-written."""

from __future__ import annotations

from typing import Any

import pytest

from reward_data.converters import helpsteer, native, oasst, pairs, pandalm, ultrafeedback
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Message

USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello!"), ("assistant", "What?"))
)
HI = (Message("user", "Hi"),)


def read(value, converter=pairs) -> Any:
    return converter.convert(Row(value, "f:1"), "helpful")


def said(records):
    return [(r.chosen, r.rejected, r.rating) for r in records]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"messages": [USER], "chosen": "Hello!", "rejected": "What?"},
        {"instruction": "Hi", "input": "", "chosen": "Hello!", "rejected": "What?"},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "What?"},
        },
    ],
    ids=["text", "messages", "text-and-dialogues", "implicit", "messages-and-text", "instruction", "one-message"],
)
def test_prompt_and_answers_in_every_form(row):
    (record,) = read(row)
    assert (record.prompt, record.chosen, record.rejected) == (HI, "Hello!", "What?")
    assert (record.chosen_safety, record.rejected_safety, record.rating) == ("unknown", "unknown", "unrated")


def test_instruction_input_system_and_history_make_the_prompt():
    row = {"instruction": "Sum", "input": "1 2", "system": "Be brief.", "history": [["Hi", "Hello!"]]}
    (record,) = read({**row, "chosen": "3", "rejected": "4"})
    assert [(m.role, m.content) for m in record.prompt] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello!"),
        ("user", "Sum\n\n1 2"),
    ]


def test_unequal_prompts_inside_the_answers_are_refused():
    other = {"role": "user", "content": "Bye"}
    with pytest.raises(BadRow, match="two different prompts") as bad:
        read({"chosen": [USER, GOOD], "rejected": [other, BAD]})
    assert bad.value.kind == "unequal_prompts"


def test_texts_without_a_prompt_are_refused():
    with pytest.raises(BadRow, match="no prompt: give one of prompt, messages"):
        read({"chosen": "The sky is blue.", "rejected": "The sky is green."})


@pytest.mark.parametrize(
    ("strength", "rating"),
    [(0, "negligibly"), (1, "slightly"), (2, "better"), (3, "significantly"), (7, "significantly")],
)
def test_strength_is_the_rating(strength, rating):
    (record,) = read({"prompt": "Hi", "chosen": "a", "rejected": "b", "strength": strength})
    assert record.rating == rating


@pytest.mark.parametrize("strength", [-1, True, "two", "", float("nan"), float("inf"), 10**400])
def test_no_strength_is_refused(strength):
    with pytest.raises(BadRow, match="key 'preference_strength' must be a number"):
        read({"prompt": "Hi", "chosen": "a", "rejected": "b", "preference_strength": strength})


@pytest.mark.parametrize("value", [3, True, None, ["a"]])
def test_no_text_is_refused_with_its_key(value):
    with pytest.raises(BadRow, match="key 'rejected"):
        read({"prompt": "Hi", "chosen": "a", "rejected": value})


def test_ranking_gives_every_pair_with_the_gap_of_ranks():
    assert said(read({"instruction": "Hi", "output": ["a", "b", "c"]})) == [
        ("a", "b", "slightly"),
        ("a", "c", "better"),
        ("b", "c", "slightly"),
    ]


def test_ranking_of_one_answer_is_refused():
    with pytest.raises(BadRow, match="'output' must rank two answers"):
        read({"instruction": "Hi", "output": ["a"]})


@pytest.mark.parametrize(
    ("scores", "rating"),
    [((8.5, 8.0), "negligibly"), ((8, 7), "slightly"), ((9, 7), "better"), ((9, 2), "significantly")],
)
def test_ultrafeedback_rates_by_the_gap_of_scores(scores, rating):
    row = {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    (record,) = read({**row, "score_chosen": scores[0], "score_rejected": scores[1]}, ultrafeedback)
    assert (record.prompt, record.chosen, record.rejected, record.rating) == (HI, "Hello!", "What?", rating)


def test_helpsteer_pairs_the_answers_to_one_prompt_wherever_their_helpfulness_differs():
    grades = [("Hi", "a", 1), ("Hi", "b", 4), ("Hi", "c", 1), ("Bye", "d", 2), ("Bye", "e", 2)]
    rows = [Row({"prompt": p, "response": r, "helpfulness": h}, f"f:{n}") for n, (p, r, h) in enumerate(grades, 1)]
    records: list[Any] = [record for row in helpsteer.group(rows) for record in helpsteer.convert(row, "helpful")]
    assert said(records) == [("b", "a", "significantly"), ("b", "c", "significantly")]
    assert {record.prompt for record in records} == {HI}


def test_helpsteer_splits_the_turns_inside_the_prompt():
    prompt = "One?\n<extra_id_1>Assistant\nTwo.\n<extra_id_1>User\nThree?"
    rows = [Row({"prompt": prompt, "response": str(h), "helpfulness": h}, "f:1") for h in (1, 2)]
    (record,) = read(rows, helpsteer)
    assert [(m.role, m.content) for m in record.prompt] == [("user", "One?"), ("assistant", "Two."), ("user", "Three?")]


def test_helpsteer_names_the_line_of_the_bad_answer():
    rows = [Row({"prompt": "Hi", "response": r, "helpfulness": 1}, f"f:{n}") for n, r in ((1, "a"), (2, 5))]
    with pytest.raises(BadRow, match="'response' must be text") as bad:
        helpsteer.convert(Row(rows, "f:1"), "helpful")
    assert bad.value.place == "f:2"


def test_oasst_pairs_ranked_replies_at_every_depth():
    def node(role, text, rank=None, replies=(), **more):
        return {"role": role, "text": text, "rank": rank, "replies": list(replies), **more}

    deep = node("prompter", "More?", replies=[node("assistant", "x", 2), node("assistant", "y", 0)])
    gone = node("assistant", "gone", 2, deleted=True)
    root = node("prompter", "Hi", replies=[node("assistant", "b", 1), node("assistant", "a", 0, [deep]), gone])
    records = read({"message_tree_id": "1", "prompt": root}, oasst)
    assert said(records) == [("a", "b", "slightly"), ("y", "x", "better")]
    assert [m.content for m in records[1].prompt] == ["Hi", "a", "More?"]


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ((1, 1, 1), [("one", "two", "significantly")]),
        ((2, 0, 2), [("two", "one", "better")]),
        ((1, 2, 2), [("two", "one", "slightly")]),
        ((0, 0, 0), []),
        ((0, 1, 2), []),
    ],
)
def test_pandalm_follows_the_majority(votes, expected):
    row = {"instruction": "Hi", "input": "", "response1": "one", "response2": "two"}
    assert said(read({**row, **{f"annotator{n}": v for n, v in enumerate(votes, 1)}}, pandalm)) == expected


def test_native_keeps_rating_tag_and_safety():
    row = {"prompt": [USER], "chosen": "a", "rejected": "b", "rating": "slightly", "tag": "safety"}
    (record,) = read({**row, "chosen_safety": "safe", "rejected_safety": "unsafe"}, native)
    assert (record.rating, record.tag, record.chosen_safety, record.rejected_safety) == (
        "slightly",
        "safety",
        "safe",
        "unsafe",
    )


@pytest.mark.parametrize(("key", "value"), [("rating", "much"), ("tag", "harm"), ("chosen_safety", True)])
def test_native_refuses_unknown_words(key, value):
    row = {"prompt": [USER], "chosen": "a", "rejected": "b", "rating": "slightly", "tag": "safety"}
    with pytest.raises(BadRow, match=f"key '{key}' is .* not one of"):
        read({**row, key: value}, native)
