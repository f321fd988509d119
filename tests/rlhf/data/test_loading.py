import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_data import Demonstration, Message, Preference, Prompt
from reward_data.records import Rating, Safety, Tag
from rlhf.chat import format_of
from rlhf.config import RewardModelConfig, RunConfig
from rlhf.data import (
    MARGINS,
    Split,
    draw_rows,
    encode_demonstrations,
    encode_preferences,
    hold_out_everywhere,
    load_demonstrations,
    load_preferences,
    load_prompts,
    mix_preferences,
    pad,
    prompt_batch,
    short_prompts,
    split_held_out,
)
from rlhf.errors import UserError
from rlhf.models.tiny import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["hello, how are you?"] * 5, 280)


def asked(text):
    return (Message("user", text),)


def demonstration(text, answer="yes", source="d.jsonl:1"):
    return Demonstration((*asked(text), Message("assistant", answer)), "helpful", source)


def preference(
    text: str,
    chosen: str = "yes",
    rejected: str = "no",
    rating: Rating = "better",
    tag: Tag = "helpful",
    safety: tuple[Safety, Safety] = ("safe", "safe"),
) -> Preference:
    return Preference(asked(text), chosen, rejected, rating, tag, *safety, source="p.jsonl:1")


def written(rows):
    """Records in the project's own form, one JSON line each."""

    def turns(messages):
        return [vars(message) for message in messages]

    lines = []
    for row in rows:
        value = {key: field for key, field in vars(row).items() if key != "source"}
        value |= {key: turns(value[key]) for key in ("prompt", "messages") if key in value}
        lines.append(json.dumps(value) + "\n")
    return "".join(lines)


@pytest.fixture
def config(tmp_path):
    """A function from files of rows and settings to a run that reads `train.jsonl` (and `held_out.jsonl`)."""

    def make(train, held_out=None, **settings):
        role = {"train": [{"path": "train.jsonl"}]}
        (tmp_path / "train.jsonl").write_text(written(train))
        if held_out is not None:
            (tmp_path / "held_out.jsonl").write_text(written(held_out))
            role["held_out"] = [{"path": "held_out.jsonl"}]
        roles = dict.fromkeys(("demonstrations", "preferences", "prompts"), role)
        return RunConfig.model_validate({"name": "x", "data": {"root": tmp_path} | roles | settings})

    return make


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


# --- drawing ---


def prompt(text, tag: Tag = "helpful", file="p.jsonl"):
    return Prompt(asked(text), tag, f"{file}:1")


def test_prompts_that_choose_the_policy_do_not_report_it():
    rows = [prompt(text) for text in "abc"]
    choice, rest = split_held_out(rows, 2, seed=0)
    assert len(choice) == 2 and sorted(p.messages[0].content for p in choice + rest) == ["a", "b", "c"]
    with pytest.raises(UserError, match="eval_prompts is 3, but only 3") as error:
        split_held_out(rows, 3, seed=0)
    assert error.value.exit_code == 3


def test_a_helpful_and_a_safety_file_both_choose():
    """In file order 128 of 128 would be helpful."""
    rows = [prompt(f"h{n}", file="h.jsonl") for n in range(300)]
    rows += [prompt(f"s{n}", "safety", "s.jsonl") for n in range(100)]
    choice, _ = split_held_out(rows, 128, seed=0)
    assert Counter(row.tag for row in choice) == {"helpful": 96, "safety": 32}


STRATA = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from(["helpful", "safety"]), st.sampled_from("ab")), max_size=60
)


@given(STRATA, st.integers(0, 70), st.integers(0, 3), st.randoms())
def test_the_draw_is_a_split_that_the_order_of_the_files_does_not_change(strata, count, seed, random):
    rows = [prompt(f"q{number}", tag, file) for number, tag, file in strata]
    drawn, others = draw_rows(rows, count, seed)
    assert Counter(drawn + others) == Counter(rows) and len(drawn) <= count
    sides = [{row.messages[0].content for row in side} for side in (drawn, others)]
    assert not sides[0] & sides[1]
    shuffled = random.sample(rows, len(rows))
    assert [Counter(side) for side in draw_rows(shuffled, count, seed)] == [Counter(drawn), Counter(others)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.data())
def test_every_stratum_is_drawn_in_proportion(sizes, data):
    kinds: list[tuple[Tag, str]] = [("helpful", "a"), ("helpful", "b"), ("safety", "a"), ("safety", "b")]
    rows = [prompt(f"{kind}{n}", *kind) for kind, size in zip(kinds, sizes, strict=False) for n in range(size)]
    count = data.draw(st.integers(0, len(rows)))
    drawn, _ = draw_rows(rows, count, seed=0)
    assert len(drawn) == count
    got = Counter((row.tag, row.source[0]) for row in drawn)
    for kind, size in zip(kinds, sizes, strict=False):
        assert abs(got[kind] - count * size / len(rows)) <= 1


def test_another_seed_draws_other_rows():
    rows = [prompt(f"q{n}") for n in range(40)]
    draws = {tuple(row.messages[0].content for row in draw_rows(rows, 20, seed)[0]) for seed in range(5)}
    assert len(draws) == 5


# --- what one role holds out ---


def test_a_row_that_two_roles_hold_out_is_left_out_for_the_first_of_them(config):
    """A digest that hung on the order of a set would make a finished stage look stale in the next process."""
    names = [f"role{n}" for n in range(8)]
    splits = {name: Split([demonstration("q"), demonstration(name)], [demonstration("q")], {}, []) for name in names}
    data = config([], [], shared_prompts="drop").data
    got = hold_out_everywhere(splits, data)
    assert set(got["role0"].digests) == {"held out in role1"}
    assert all(set(got[name].digests) == {"held out in role0"} for name in names[1:])


@pytest.mark.parametrize("role", ["demonstrations", "preferences", "prompts"])
def test_what_one_role_holds_out_no_other_trains_on(config, role):
    make = {"demonstrations": demonstration, "preferences": preference, "prompts": prompt}
    splits = {name: Split([new("own"), new(" HELD  out ")], [new("mine")], {}, []) for name, new in make.items()}
    splits[role] = Split([make[role]("own")], [make[role]("held out")], {}, [])
    data = config([], []).data
    with pytest.raises(UserError, match=rf"have a prompt that is held out in data\.{role}") as error:
        hold_out_everywhere(splits, data)
    assert error.value.exit_code == 3
    got = hold_out_everywhere(splits, data.model_copy(update={"shared_prompts": "drop"}))
    assert {name: len(split.train) for name, split in got.items()} == dict.fromkeys(make, 1)
    others = [split for name, split in got.items() if name != role]
    assert all(
        f"held out in {role}" in split.digests and "1 training rows left out" in split.findings[0] for split in others
    )


# --- mixing ---


@pytest.fixture
def tagged():
    return [preference(f"h{n}") for n in range(90)] + [preference(f"s{n}", tag="safety") for n in range(60)]


@pytest.mark.parametrize(
    ("own", "share", "helpful", "safety"),
    [
        ("helpful", 0.0, 90, 0),
        ("helpful", 0.25, 90, 30),
        ("helpful", 0.5, 90, 60),  # wants 90, and there are no more
        ("safety", 0.1, 7, 60),
        ("safety", 1.0, 90, 0),
    ],
)
def test_mixture_has_all_own_rows_and_its_share_of_others(tagged, own, share, helpful, safety):
    mixed = mix_preferences(tagged, RewardModelConfig(own_tag=own, other_fraction=share), seed=0)
    assert Counter(row.tag for row in mixed) == Counter(helpful=helpful, safety=safety)
    assert len({row.prompt for row in mixed}) == len(mixed)


def test_seed_decides_the_mixture(tagged):
    settings = RewardModelConfig(own_tag="helpful", other_fraction=0.1)
    first = mix_preferences(tagged, settings, seed=0)
    assert mix_preferences(tagged, settings, seed=0) == first
    assert mix_preferences(tagged, settings, seed=1) != first


def test_missing_tag_is_refused(tagged):
    with pytest.raises(UserError, match="no preference is tagged 'safety'") as error:
        mix_preferences(tagged[:5], RewardModelConfig(own_tag="safety"), seed=0)
    assert error.value.exit_code == 3


# --- encoding ---


def test_margins_are_those_of_the_paper():
    ratings = ("significantly", "better", "slightly", "negligibly", "unrated")
    assert [MARGINS["large"][rating] for rating in ratings] == [3, 2, 1, 0, 0]
    assert [MARGINS["small"][rating] for rating in ratings] == [1, 2 / 3, 1 / 3, 0, 0]
    assert not any(MARGINS["none"][rating] for rating in ratings)


def test_demonstrations_have_the_columns_of_trl(tokenizer):
    row = demonstration("hello")
    ids, mask = format_of(tokenizer).encode(row.messages)
    assert encode_demonstrations(tokenizer, [row], 100) == [{"input_ids": ids, "assistant_masks": mask}]


def test_preferences_have_the_columns_of_trl(tokenizer):
    row = preference("hello", rating="slightly", safety=("safe", "unknown"))
    assert encode_preferences(tokenizer, [row], "large", 100) == [
        {
            "chosen_ids": format_of(tokenizer).encode_response(row.prompt, "yes"),
            "rejected_ids": format_of(tokenizer).encode_response(row.prompt, "no"),
            "margin": 1.0,
            "chosen_is_safe": 1,
            "rejected_is_safe": -1,
        }
    ]
    assert (
        encode_preferences(tokenizer, [preference("a", safety=("unsafe", "safe"))], "none", 100)[0]["chosen_is_safe"]
        == 0
    )


def test_long_rows_are_left_out_whole(tokenizer):
    short, long = demonstration("hello"), demonstration("hello", "yes " * 50)
    limit = len(format_of(tokenizer).encode(short.messages)[0])
    assert encode_demonstrations(tokenizer, [short, long], limit) == encode_demonstrations(tokenizer, [short], 999)
    for pair in (preference("a", chosen="yes " * 50), preference("a", rejected="yes " * 50)):
        assert len(encode_preferences(tokenizer, [pair, preference("a")], "none", 40)) == 1
    prompts = [Prompt(asked(text), "helpful", "") for text in ("hi", "hi " * 50)]
    assert [prompt.messages for prompt in short_prompts(tokenizer, prompts, 20)] == [prompts[0].messages]


def test_a_length_that_no_row_meets_is_refused(tokenizer):
    with pytest.raises(UserError, match="all 1 demonstrations are over 3 tokens"):
        encode_demonstrations(tokenizer, [demonstration("hello")], 3)


# --- batches ---


def test_prompts_are_padded_on_the_left(tokenizer):
    prompts = [Prompt(asked("hello"), "safety", "p:1"), Prompt(asked("hello, how are you?"), "helpful", "p:2")]
    batch = prompt_batch(tokenizer, prompts, [7, 3], max_prompt_length=50)
    ids = [format_of(tokenizer).encode_prompt(prompt.messages) for prompt in prompts]
    missing = len(ids[1]) - len(ids[0])
    assert missing > 0
    assert batch.tokens_BP.tolist() == [[tokenizer.pad_token_id] * missing + ids[0], ids[1]]
    assert batch.mask_BP.tolist() == [[False] * missing + [True] * len(ids[0]), [True] * len(ids[1])]
    assert batch.is_safety_B.tolist() == [True, False]
    assert batch.ids_B.tolist() == [7, 3]


def test_prompts_are_encoded_once(tokenizer, monkeypatch):
    prompts = [Prompt(asked(text), "safety", f"p:{text}") for text in ("hi", "hello you")]
    expected = prompt_batch(tokenizer, prompts, [0, 1], 50)
    short = short_prompts(tokenizer, prompts, 50)
    monkeypatch.setattr(type(format_of(tokenizer)), "encode_prompt", lambda *_: pytest.fail("encoded again"))
    batch = prompt_batch(tokenizer, short, [0, 1], 50)
    assert all(getattr(batch, name).equal(value) for name, value in vars(expected).items())
    assert [(row.tag, row.source) for row in short] == [(row.tag, row.source) for row in prompts]


def test_prompt_that_is_too_long_for_a_batch_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"p:1: the prompt has \d+ tokens, over 5"):
        prompt_batch(tokenizer, [Prompt(asked("hello"), "helpful", "p:1")], [0], 5)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1), st.booleans())
def test_masks_come_from_lengths_even_when_pad_is_a_real_token(sequences, left):
    tokens, mask = pad(sequences, 0, left=left)
    assert [row[real].tolist() for row, real in zip(tokens, mask, strict=True)] == sequences
    assert (tokens[~mask] == 0).all()
    edge = 0 if not left else -1
    assert mask[:, edge].all()
