"""Demonstration and prompt forms, hand-written."""

from __future__ import annotations

from typing import Any

import pytest

from reward_data.converters import alpaca, messages, native, prompts, sharegpt
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Demonstration, Prompt

HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
PARTS = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
IMAGE = {"type": "image", "image": "x.png"}
SYSTEM = {"role": "system", "content": "Be brief."}


def turns(converter, value):
    (record,) = converter.convert(Row(value, "f:1"), "helpful")
    return type(record), [(m.role, m.content) for m in record.messages]


@pytest.mark.parametrize(
    ("converter", "row", "expected"),
    [
        (alpaca, {"instruction": "Add", "input": "1 2", "output": "3"}, [("user", "Add\n\n1 2"), ("assistant", "3")]),
        (alpaca, {"instruction": "Hi", "input": "", "output": "Yo"}, [("user", "Hi"), ("assistant", "Yo")]),
        (alpaca, {"instruction": "Hi", "instances": [{"input": "", "output": "Yo"}]}, [("user", "Hi"), ("assistant", "Yo")]),
        (
            alpaca,
            {"instruction": "c", "output": "d", "history": [["a", "b"]], "system": "s"},
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
        (sharegpt, {"conversations": [HUMAN, GPT]}, [("user", "Hi"), ("assistant", "Hello!")]),
        (sharegpt, {"conversations": [HUMAN, GPT], "system": "s"}, [("system", "s"), ("user", "Hi"), ("assistant", "Hello!")]),
        (messages, [SYSTEM, USER, ASSISTANT], [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!")]),
        (messages, {"messages": [USER, ASSISTANT]}, [("user", "Hi"), ("assistant", "Hello!")]),
        (messages, {"messages": [USER, ASSISTANT | {"role": "model"}]}, [("user", "Hi"), ("assistant", "Hello!")]),
        (messages, {"messages": [USER | {"role": "User"}, ASSISTANT | {"role": "AI"}]}, [("user", "Hi"), ("assistant", "Hello!")]),
        (messages, {"messages": [USER | {"content": PARTS}, ASSISTANT]}, [("user", "Hi there"), ("assistant", "Hello!")]),
        (messages, {"prompt": "Hi", "completion": "Hello!"}, [("user", "Hi"), ("assistant", "Hello!")]),
        (messages, {"prompt": [USER], "completion": [ASSISTANT]}, [("user", "Hi"), ("assistant", "Hello!")]),
        (native, {"messages": [USER, ASSISTANT], "tag": "safety"}, [("user", "Hi"), ("assistant", "Hello!")]),
    ],
)  # fmt: skip
def test_demonstration_forms(converter, row, expected):
    assert turns(converter, row) == (Demonstration, expected)


@pytest.mark.parametrize(
    ("converter", "row"),
    [
        (prompts, "Hi"),
        (prompts, {"prompt": "Hi", "domain": "greetings"}),
        (prompts, {"prompt": [USER]}),
        (messages, {"messages": [USER]}),
        (sharegpt, {"conversations": [HUMAN]}),
        (native, {"messages": [USER], "tag": "helpful"}),
    ],
)
def test_prompt_forms(converter, row):
    assert turns(converter, row) == (Prompt, [("user", "Hi")])


def test_self_instruct_task_gives_one_demonstration_per_instance():
    row = {"instruction": "Double", "instances": [{"input": "1", "output": "2"}, {"input": "2", "output": "4"}]}
    records: list[Any] = alpaca.convert(Row(row, "f:1"), "helpful")
    assert [r.messages[-1].content for r in records] == ["2", "4"]


@pytest.mark.parametrize(
    ("converter", "row", "reason"),
    [
        (alpaca, {"instruction": "Add", "output": 3}, "key 'output' must be text, but is 3"),
        (alpaca, {"instruction": True, "output": "3"}, "key 'instruction' must be text, but is true"),
        (alpaca, {"instruction": "Add", "output": " "}, "key 'output' is an empty reply"),
        (alpaca, {"instruction": "Add", "input": 4, "output": "3"}, "key 'input' must be text, but is 4"),
        (alpaca, {"instruction": "c", "output": "d", "history": [["a"]]}, r"key 'history\[0\]' must be a pair"),
        (messages, {"messages": [USER, USER]}, r"key 'messages\[1\]' is a turn of the user out of order"),
        (messages, {"messages": [ASSISTANT]}, r"key 'messages\[0\]' is a turn of the assistant out of order"),
        (messages, {"messages": [USER | {"content": [IMAGE, *PARTS]}, ASSISTANT]}, r"\[0\].content' must be text, but is \["),
        (messages, {"messages": []}, "must end with a turn of the assistant"),
        (messages, {"messages": "Hi"}, "must be a list of messages"),
        (messages, {"prompt": "Hi", "completion": [ASSISTANT, USER]}, "must be one message of the assistant"),
        (sharegpt, {"conversations": [HUMAN, {"from": "gpt"}]}, r"key 'conversations\[1\].value' is missing"),
        (sharegpt, {"conversations": [HUMAN, {"from": "bing", "value": "x"}]}, "is \"bing\", not one of system, user"),
        (sharegpt, {"conversations": [HUMAN, {"from": "gpt", "value": 1}]}, r"\[1\].value' must be text, but is 1"),
        (prompts, "  ", "key 'prompt' is an empty prompt"),
        (prompts, {"prompt": 4}, "key 'prompt' must be text, but is 4"),
    ],
)  # fmt: skip
def test_refused(converter, row, reason):
    with pytest.raises(BadRow, match=reason):
        converter.convert(Row(row, "f:1"), "helpful")
