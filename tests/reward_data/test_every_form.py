"""What holds for every source form: it is told by its keys, and a spoiled row gives a refusal and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reward_data
from reward_data.converters import FORMATS, converter_for
from reward_data.errors import BadRow, DataError
from reward_data.files import Row
from reward_data.load import Table, records_of_table
from reward_data.records import prompt_of

DIALOGUE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
REPLIES = [{"text": f"Reply {n}", "role": "assistant", "rank": n, "replies": []} for n in range(2)]
ROWS: dict[str, Any] = {
    "native": {
        "prompt": DIALOGUE[:1],
        "chosen": "Hello!",
        "rejected": "What?",
        "rating": "better",
        "tag": "safety",
        "chosen_safety": "safe",
        "rejected_safety": "unsafe",
    },
    "hh": {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: What?"},
    "ultrafeedback": {
        "prompt": "Hi",
        "chosen": DIALOGUE,
        "rejected": [*DIALOGUE[:1], {"role": "assistant", "content": "What?"}],
        "score_chosen": 8.5,
        "score_rejected": 6.0,
    },
    "helpsteer": {"prompt": "Hi", "response": "Hello!", "helpfulness": 4, "verbosity": 1},
    "oasst": {"message_tree_id": "1", "prompt": {"text": "Hi", "role": "prompter", "replies": REPLIES}},
    "pandalm": {
        "instruction": "Greet",
        "input": "Ann",
        "response1": "What?",
        "response2": "Hello Ann!",
        "annotator1": 2,
        "annotator2": 2,
        "annotator3": 0,
    },
    "compared": {"prompt": "Hi", "response_0": "Hello!", "response_1": "What?", "better_response_id": 0},
    "ranked": {"prompt": "Hi", "answers": [{"answer": "Hello!", "rank": 1}, {"answer": "What?", "rank": 2}]},
    "pairs": {"prompt": "Hi", "chosen": "Hello!", "rejected": "What?", "strength": 2},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
    "alpaca": {"instruction": "Greet", "input": "Ann", "output": "Hello Ann!", "history": [["Hi", "Hello!"]]},
    "messages": {"messages": DIALOGUE},
    "answers": {"question": "Hi", "answer": "Hello!", "system_prompt": "Be brief."},
    "prompts": {"prompt": "Hi", "system": "Be brief."},
}
SPOILS = st.sampled_from(
    [True, None, 7, 0.5, float("nan"), "", " ", "text", [], [1], ["a"], {}, {"role": "user"}, [[]]]
)


def test_every_form_has_a_sample():
    assert ROWS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_form_is_told_by_the_keys(name):
    assert converter_for("auto", Row(ROWS[name], "f:1")) is FORMATS[name]


def test_a_file_without_a_row_that_can_be_read_is_refused_for_its_rows_and_not_for_its_columns(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{'prompt': 'Hi'}\n{'prompt': 'Ho'}\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: no row of the file can be read; this one: not JSON: [^;]*\Z"):
        reward_data.load("prompts", file)


def test_unknown_form_is_named_with_its_keys():
    with pytest.raises(DataError, match=r"rows.jsonl:1: cannot tell the format of a row with the keys left, right"):
        converter_for("auto", Row({"left": "?", "right": "!"}, "rows.jsonl:1"))


def test_unknown_format_name_lists_the_known_ones():
    with pytest.raises(DataError, match="unknown format 'hhh'; known: auto, native, hh"):
        converter_for("hhh", Row({}, "f:1"))


@pytest.mark.parametrize("name", ROWS)
@given(data=st.data())
def test_spoiled_row_is_refused_or_read_but_never_breaks(name, data):
    value = copy.deepcopy(ROWS[name])
    places = list(_places(value))
    holder, key = data.draw(st.sampled_from(places))
    holder[key] = data.draw(SPOILS)
    refused: list[BadRow] = []
    row = Row(value, "f:1")
    for record in records_of_table("prompts", Table(row, [row]), name, "helpful", refused):
        assert all(isinstance(message.content, str) and message.content.strip() for message in prompt_of(record))
    assert all(bad.place == "f:1" and bad.reason for bad in refused)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("value", [None, 3, True, "", [], [3]], ids=repr)
def test_row_that_is_no_object_is_refused(name, value):
    refused: list[BadRow] = []
    row = Row(value, "f:2")
    assert list(records_of_table("prompts", Table(Row(ROWS[name], "f:1"), [row]), name, "helpful", refused)) == []
    assert [bad.place for bad in refused] == ["f:2"]


def _places(value):
    """Every (container, key) inside the value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
