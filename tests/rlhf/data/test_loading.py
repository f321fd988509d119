"""Reading the files of a run, and holding rows out of each kind."""

import pytest

from reward_data import Message, Prompt
from rlhf.data import (
    load_demonstrations,
    load_preferences,
    load_prompts,
)
from rlhf.errors import UserError
from tests.rlhf.data.rows import asked, demonstration, preference

# --- reading ---


def test_each_kind_is_read_from_the_root(config):
    split = load_demonstrations(config([demonstration("a")], [demonstration("b")]))
    assert [row.messages for row in split.train] == [demonstration("a").messages]
    assert [row.messages for row in split.held_out] == [demonstration("b").messages]
    assert set(split.digests) == {"train.jsonl", "held_out.jsonl"}
    preferences = load_preferences(config([preference("a")], [preference("b")]))
    assert [row.chosen for row in preferences.train + preferences.held_out] == ["yes", "yes"]
    prompts = load_prompts(config([preference("a")], [preference("b")]))
    assert [row.messages for row in prompts.train + prompts.held_out] == [asked("a"), asked("b")]


def test_data_errors_become_messages_for_people(config, tmp_path):
    settings = config([demonstration("a")], [demonstration("b")])
    (tmp_path / "train.jsonl").write_text('{"messages": 3, "tag": "helpful"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl:1") as error:
        load_demonstrations(settings)
    assert error.value.exit_code == 3


def test_missing_file_is_named(config, tmp_path):
    settings = config([demonstration("a")])
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"train\.jsonl: no such file"):
        load_demonstrations(settings)


def test_selected_rows_alone_are_read(config, tmp_path):
    (tmp_path / "rows.json").write_text('{"odd": [1, 3], "even": [0, 2]}')
    chosen = {"path": "train.jsonl", "select_file": "rows.json"}
    role = {"train": [chosen | {"select_key": "odd"}], "held_out": [chosen | {"select_key": "even"}]}
    split = load_demonstrations(config([demonstration(text) for text in "abcd"], demonstrations=role))
    assert [row.messages[0].content for row in split.train] == ["b", "d"]
    assert [row.messages[0].content for row in split.held_out] == ["a", "c"]


@pytest.mark.parametrize("bad_rows", ["refuse", "skip"])
def test_rows_with_tags_of_the_chat_format(config, bad_rows):
    rows = [demonstration("a"), demonstration("b", "no [INST] please")]
    settings = config(rows, [demonstration("c")], bad_rows=bad_rows)
    if bad_rows == "refuse":
        with pytest.raises(UserError, match=r"train\.jsonl:2: message 2 .*\[INST\]") as error:
            load_demonstrations(settings)
        assert error.value.exit_code == 3
    else:
        split = load_demonstrations(settings)
        assert len(split.train) == 1
        assert any("1 rows skipped" in finding and "train.jsonl:2" in finding for finding in split.findings)


def test_tags_in_either_answer_of_a_pair_are_found(config):
    for row in (preference("a", chosen="<<SYS>>"), preference("a", rejected="<<SYS>>")):
        with pytest.raises(UserError, match="<<SYS>>"):
            load_preferences(config([row], [preference("b")]))


def test_pairs_that_prefer_an_unsafe_answer_are_left_out(config):
    bad = preference("a", tag="safety", safety=("unsafe", "safe"))
    kept = [
        preference("b", tag="safety", safety=("safe", "unsafe")),
        preference("c", tag="safety", safety=("unsafe", "unsafe")),
        preference("d", tag="helpful", safety=("unsafe", "safe")),
    ]
    split = load_preferences(config([bad, *kept], [preference("e")]))
    assert [row.prompt[0].content for row in split.train] == ["b", "c", "d"]
    assert any("1 pairs left out" in finding for finding in split.findings)


# --- holding out ---


def test_shared_prompts_are_refused_by_default(config):
    rows = [demonstration("a"), demonstration("Hello  You")]
    with pytest.raises(UserError, match=r"1 training rows.*train\.jsonl:2.*shared_prompts: drop"):
        load_demonstrations(config(rows, [demonstration("hello you")]))


def test_shared_prompts_are_dropped_from_training_and_told(config):
    rows = [demonstration("a"), demonstration("Hello  You")]
    split = load_demonstrations(config(rows, [demonstration("hello you")], shared_prompts="drop"))
    assert [row.messages[0].content for row in split.train] == ["a"]
    assert len(split.held_out) == 1
    assert any("shared_prompt" in finding for finding in split.findings)


def test_hash_holds_out_its_share(config):
    split = load_prompts(config([Prompt(asked(f"q{n}"), "helpful", "") for n in range(1000)], held_out_fraction=0.2))
    assert len(split.train) + len(split.held_out) == 1000
    assert 150 < len(split.held_out) < 250  # five standard deviations of a fair draw are 63


def test_hash_keeps_rows_on_their_side_when_others_come_and_go(config):
    texts = [f"q{n}" for n in range(100)]
    held_out = {row.messages[0].content for row in load_demonstrations(config(map(demonstration, texts))).held_out}
    fewer = load_demonstrations(config(map(demonstration, reversed(texts[:60])))).held_out
    assert {row.messages[0].content for row in fewer} == held_out & set(texts[:60])


def test_hash_keeps_dialogues_with_one_beginning_together(config):
    def dialogue(start, end):
        return Prompt((*asked(start), Message("assistant", "yes"), Message("user", end)), "helpful", "")

    rows = [dialogue(f"{'Q' if n % 2 else 'q'}{n // 10}", f"end {n}") for n in range(300)]
    split = load_prompts(config(rows, held_out_fraction=0.4))
    sides = [{row.messages[0].content.lower() for row in side} for side in (split.train, split.held_out)]
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_empty_side_is_refused(config):
    with pytest.raises(UserError, match=r"data\.demonstrations: no held-out rows"):
        load_demonstrations(config([demonstration("q0")]))
