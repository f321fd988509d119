"""What a row says is read, refused or warned of, and never silently taken for something else."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_data import DataError, load
from reward_data.meaning import turns_in
from reward_data.records import Kind

USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "Two plus two?"), ("assistant", "Four."), ("assistant", "Nine."))
)
SYSTEM = {"role": "system", "content": "Be a sailor."}
DIALOGUES = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}
PAIR = {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Nine."}


def read(folder, rows, kind: Kind = "preferences", **options):
    file = folder / "x.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load(kind, file, **options)


def asked(folder, row):
    return [(m.role, m.content) for m in read(folder, [row]).rows[0].prompt]


SAILOR = [("system", "Be a sailor."), ("user", "Two plus two?")]
EARLIER = [("user", "Hi"), ("assistant", "Ahoy"), ("user", "Two plus two?")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system": "Be a sailor.", **DIALOGUES}, SAILOR),
        ({"prompt": [SYSTEM, USER], **DIALOGUES}, SAILOR),
        ({"history": [["Hi", "Ahoy"]], **DIALOGUES}, EARLIER),
        ({"prompt": "Two plus two?", **DIALOGUES}, SAILOR[1:]),
        ({"prompt": "Two plus two?", "messages": [USER, GOOD], **DIALOGUES}, SAILOR[1:]),
    ],
    ids=["system", "system-turn", "history", "same", "messages-with-answer"],
)
def test_context_beside_whole_dialogues_joins_the_prompt(tmp_path, row, expected):
    assert asked(tmp_path, row) == expected


@pytest.mark.parametrize(
    ("kind", "row", "key"),
    [
        ("preferences", {"conversations": [{"from": "human", "value": "I am Ann."}], **DIALOGUES}, "conversations"),
        ("preferences", {"instruction": "Add", "input": "2 2", **DIALOGUES}, "instruction"),
        ("preferences", {"context": "I am Ann.", **PAIR}, "context"),
        ("preferences", {"input": "I am Ann.", **PAIR}, "input"),
        ("demonstrations", {"system_prompt": "Be kind.", "messages": [USER, GOOD]}, "system_prompt"),
        ("prompts", {"prompt": "Two plus two?", "context": [USER, {"role": "user", "content": "Ann"}]}, "context"),
        ("demonstrations", {"System": "Be kind.", "messages": [USER, GOOD]}, "System"),
        (
            "demonstrations",
            {"chat_history": [{"role": "user", "content": "Ann"}], "messages": [USER, GOOD]},
            "chat_history",
        ),
        ("demonstrations", {"question": "Two plus two?", "answer": "Four.", "passage": "It is four."}, "passage"),
        ("preferences", {"documents": ["Two and two make four."], **PAIR}, "documents"),
        ("demonstrations", {"tools": [{"function": {"name": "add"}}], "messages": [USER, GOOD]}, "tools"),
        ("demonstrations", {"tools": '[{"name": "add"}]', "messages": [USER, GOOD]}, "tools"),
    ],
)
def test_context_that_no_prompt_holds_is_refused_with_its_key(tmp_path, kind, row, key):
    with pytest.raises(DataError, match=f"key '{key}' holds context that the prompt does not"):
        read(tmp_path, [row], kind)


def test_the_material_of_a_prompt_is_a_column_for_its_rewards(tmp_path):
    (row,) = read(
        tmp_path, [{"prompt": "Two plus two?", "documents": ["It is four."], "tools": ["add"]}], "prompts"
    ).rows
    assert row.columns["documents"] == ["It is four."]


def test_tools_that_the_system_message_describes_are_read(tmp_path):
    system = {"role": "system", "content": "You can call add(a, b)."}
    row = {"tools": [{"function": {"name": "add"}}], "messages": [system, USER, GOOD]}
    assert len(read(tmp_path, [row], "demonstrations").rows) == 1


@pytest.mark.parametrize("kind", ["preferences", "demonstrations"])
def test_transcripts_of_both_sides_are_read(tmp_path, kind):
    turns = (
        "\n\nHuman: what is one plus two?\n\nAssistant: it is three.\n\nHuman: and two plus two?\n\nAssistant: it is "
    )
    row = {"chosen": f"{turns}four, of course.", "rejected": f"{turns}five, of course."}
    assert read(tmp_path, [row, row], kind).findings == []


def test_sentences_under_other_keys_are_said_to_be_unread(tmp_path):
    row = {
        **PAIR,
        "source": "web",
        "reason": "Two plus two is four",
        "again": "so: Two plus  two?",
        "question": "Two plus two?",
    }
    (found,) = read(tmp_path, [row, row]).findings
    assert "texts under 'reason', 'again' are not read" in found
    assert read(tmp_path, [row, PAIR, PAIR]).findings == read(tmp_path, [row], "prompts").findings == []


def test_sentences_that_are_split_into_turns_or_share_a_line_are_read(tmp_path):
    asks = "\n\nHuman: What is two plus two?\n\nAssistant: "
    ranked = {"prompt": asks, "answers": [{"answer": "Four.", "rank": 1}, {"answer": "Nine.", "rank": 2}]}
    file = tmp_path / "list.json"
    file.write_text(json.dumps([{**PAIR, "chosen": f"This is answer number {n}"} for n in range(3)]))
    assert read(tmp_path, [ranked]).findings == load("preferences", file).findings == []


def test_the_system_key_beside_messages_is_read(tmp_path):
    (row,) = read(tmp_path, [{"system": "Be a sailor.", "messages": [USER, GOOD]}], "demonstrations").rows
    assert row.messages[0].role == "system"


def numpy_text(turns):
    return str(np.array(turns, dtype=object))


def json_in_json(turns):
    return json.dumps(json.dumps(turns))


def as_object(turns):
    return json.dumps({"id": 1, "messages": turns})


@pytest.mark.parametrize("write", [json.dumps, repr, numpy_text, json_in_json, as_object])
def test_a_text_that_is_wholly_a_dialogue_is_read_as_one(tmp_path, write):
    row = {"prompt": "Two plus two?", "chosen": write([USER, GOOD]), "rejected": write([USER, BAD])}
    (pair,) = read(tmp_path, [row]).rows
    assert (len(pair.prompt), pair.chosen, pair.rejected) == (1, "Four.", "Nine.")
    (prompt,) = read(tmp_path, [{"prompt": write([USER])}], "prompts").rows
    assert [m.content for m in prompt.messages] == ["Two plus two?"]


@pytest.mark.parametrize("key", ["output", "instruction"])
def test_a_dialogue_where_text_belongs_is_refused(tmp_path, key):
    row = {"instruction": "Add", "output": "4", key: json.dumps([USER, GOOD])}
    with pytest.raises(DataError, match=f"key '{key}' must be text"):
        read(tmp_path, [row], "demonstrations")


@given(
    st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text()}),
        min_size=1,
    )
)
def test_what_json_or_python_writes_of_messages_is_read_back(turns):
    assert turns_in(json.dumps(turns)) == turns_in(repr(turns)) == turns
    assert turns_in(numpy_text(turns)) in (turns, None)  # None: a text holds what stands between two messages
    assert turns_in(f"For example: {json.dumps(turns)}") is None


@given(st.text() | st.text(alphabet="[]{}'\":,ab0 \\"))
def test_other_texts_are_no_dialogue(text):
    assert turns_in(text) is None


@pytest.mark.parametrize(
    "answer",
    [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\nFour.",
        "Four.<|eot_id|>",
        "USER: Two plus two? ASSISTANT: Four.",
        "### Instruction:\nAdd.\n\n### Response:\nFour.",
        "Human: Two plus two?\n\nAssistant: Four.",
        "<s>[INST] Two plus two? [/INST] Four.</s>",
        "Four.</s>",
        "Four.<|endoftext|>\n",
        "Four.\n### Human: Thanks",
        "<｜User｜>Two plus two?<｜Assistant｜>Four.",
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Two plus two?",
        "<|start|>user<|message|>Two plus two?",
        "<|prompter|>Two plus two?",
        "[|Human|] Two plus two?\n[|AI|] Four.",
        "<human>: Two plus two?\n<bot>: Four.",
    ],
)
def test_tags_of_another_format_inside_an_answer_are_refused(tmp_path, answer):
    with pytest.raises(DataError, match="text of the assistant .* holds a dialogue of its own"):
        read(tmp_path, [{**PAIR, "chosen": answer}])


@pytest.mark.parametrize(
    "answer",
    [
        "In HH files a line begins with 'Human: ' or 'Assistant: '.",
        'Send [{"role": "user", "content": "Hi"}] to the server.',
        "The tag <|im_start|> opens a turn.",
        "GPT-2 ends a text with <|endoftext|>, Llama with </s>.",
        "It costs <s>nine</s>",
        "Llama 2 reads [INST] question [/INST].",
        "### Humans\nAll of us.",
        "# Human rights\n\nHumans: all of us.",
        "User: Hi\nBot: Hello",
        "Models are prompted so:\n\nHuman: hello",
        "This fills Alpaca's form:\n\n### Instruction:\nAdd.\n\n### Response:\nFour.",
    ],
)
def test_an_answer_may_speak_of_tags(tmp_path, answer):
    loaded = read(tmp_path, [{**PAIR, "chosen": answer}, PAIR, PAIR])
    assert (loaded.rows[0].chosen, loaded.findings) == (answer, [])


def test_a_transcript_that_ends_with_the_human_is_refused(tmp_path):
    start = "\n\nHuman: Two plus two?\n\nAssistant: "
    row = {"chosen": start + "Four.\n\nHuman: Thanks", "rejected": start + "Nine.\n\nHuman: Thanks"}
    with pytest.raises(DataError, match="key 'chosen' ends with a turn of the human"):
        read(tmp_path, [row])


def test_answers_that_mostly_go_on_with_the_human_are_warned_of(tmp_path):
    more = {answer: f"{PAIR[answer]}\n\nHuman: Thanks" for answer in ("chosen", "rejected")}
    (warning,) = read(tmp_path, [PAIR | more]).findings
    assert "2 of 2 answers have lines that begin with a speaker" in warning


def test_a_reward_of_a_model_may_differ_from_the_choice_of_people(tmp_path):
    assert len(read(tmp_path, [{**PAIR, "chosen_reward": -6.5, "rejected_reward": -6}]).rows) == 1


def test_a_transcript_that_the_answers_repeat_is_taken_out(tmp_path):
    asks = "Human: Two plus two?\n\nAssistant:"
    (row,) = read(tmp_path, [{"prompt": asks, "chosen": f"{asks} Four.", "rejected": f"{asks} Nine."}]).rows
    assert ([m.content for m in row.prompt], row.chosen, row.rejected) == (["Two plus two?"], "Four.", "Nine.")


def test_a_transcript_as_prompt_of_a_demonstration_is_split(tmp_path):
    (row,) = read(
        tmp_path, [{"prompt": "Human: Two plus two?\n\nAssistant:", "completion": "Four."}], "demonstrations"
    ).rows
    assert [m.content for m in row.messages] == ["Two plus two?", "Four."]


def test_answers_that_mostly_begin_with_their_prompt_are_warned_of(tmp_path):
    again = {"prompt": "Two plus two?", "completion": "Two plus two? Four."}
    (warning,) = read(tmp_path, [again] * 3, "demonstrations").findings
    assert "3 of 3 answers begin with their prompt" in warning


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        *(({"label": g}, {"label": b}) for g, b in ((True, False), (1, 0), ("1", "-1"), ("good", "bad"))),
        ({"thumbs": "up"}, {"thumbs": "down"}),
        ({"is_safe": True}, {"is_safe": False}),
        ({"is_correct": "True"}, {"is_correct": "False"}),
        ({"score": 1.5}, {"score": -0.5}),
    ],
)
def test_answers_with_a_bad_verdict_are_not_learnt_but_can_be_scored(tmp_path, good, bad):
    row = {"prompt": "Two plus two?", "completion": "Four."}
    rows = [row | good, row | bad]
    ((key, value),) = bad.items()
    with pytest.raises(DataError, match=f"x.jsonl:2: key '{key}' is {json.dumps(value)}: a response that should not"):
        read(tmp_path, rows, "demonstrations")
    assert read(tmp_path, rows, "demonstrations", bad_rows="skip").refused_kinds == {"unwanted_answer": 1}
    assert len(read(tmp_path, rows, "answers").rows) == 2


@pytest.mark.parametrize(("part", "value"), [("weight", 0), ("train", False)])
def test_a_response_without_weight_is_not_learnt(tmp_path, part, value):
    row = {"messages": [USER, BAD | {part: value}, USER, GOOD | {part: 1}]}
    with pytest.raises(
        DataError, match=rf"key 'messages\[1\].{part}' is {json.dumps(value)}: a response that should not"
    ):
        read(tmp_path, [row], "demonstrations")
    assert len(read(tmp_path, [row], "prompts").rows) == 1
    assert len(read(tmp_path, [{"messages": [USER | {part: value}, GOOD]}], "demonstrations").rows) == 1


def test_a_label_that_is_a_class_is_no_verdict(tmp_path):
    rows = [{"prompt": "Two plus two?", "completion": "Four.", "label": n} for n in range(3)]
    assert len(read(tmp_path, rows, "demonstrations").rows) == 3


def test_graded_demonstrations_are_warned_of(tmp_path):
    rows = [{"prompt": "Two plus two?", "completion": str(n), "score": n} for n in (1, 5)]
    (warning,) = read(tmp_path, rows, "demonstrations").findings
    assert "key 'score' grades the answers from 1 to 5" in warning


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("score_chosen", "score_rejected"),
        ("chosen_rating", "rejected_rating"),
        ("chosen_avg_rating", "rejected_avg_rating"),
        ("chosen-score", "rejected-score"),
    ],
)
def test_a_rejected_answer_with_the_higher_score_is_refused_in_the_numbers_of_the_file(tmp_path, chosen, rejected):
    with pytest.raises(DataError, match=r"rejected scores higher than chosen: .* \(4.5 > 3.0\)"):
        read(tmp_path, [{**PAIR, chosen: 3.0, rejected: 4.5}])
    assert len(read(tmp_path, [{**PAIR, chosen: -1.0, rejected: -2.5}]).rows) == 1
    assert len(read(tmp_path, [{**PAIR, chosen: 3, rejected: 3}]).rows) == 1


def graded(prompt, answer, grade):
    return {"prompt": prompt, "response": answer, "helpfulness": grade}


def test_graded_answers_need_not_be_neighbours(tmp_path):
    rows = [graded("a", "good", 4), graded("b", "fine", 3), graded("a", "bad", 1), graded("b", "poor", 2)]
    assert [(r.chosen, r.rejected) for r in read(tmp_path, rows).rows] == [("good", "bad"), ("fine", "poor")]


def test_no_usable_row_gives_the_reason(tmp_path):
    with pytest.raises(DataError, match="no usable row: 2 rows were read, but no two answers to one prompt differ"):
        read(tmp_path, [graded("a", "good", 4), graded("b", "bad", 1)])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 0},
            "no row says that one response",
        ),
        (
            {"prompt": "a", "answers": [{"answer": "b", "rank": 1}, {"answer": "c", "rank": 1}]},
            "no row has two responses of different rank or score",
        ),
    ],
)
def test_nothing_but_ties_gives_the_reason(tmp_path, row, reason):
    with pytest.raises(DataError, match=f"no usable row: 2 rows were read, but {reason}"):
        read(tmp_path, [row, row])
