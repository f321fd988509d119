"""Which rows are for what: the draw by hash, what one kind holds out, mixtures."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_data import Prompt
from reward_data.records import Tag
from rlhf.config import RewardModelConfig
from rlhf.data import (
    Split,
    draw_rows,
    hold_out_everywhere,
    mix_preferences,
    split_held_out,
)
from rlhf.errors import UserError
from tests.rlhf.data.rows import asked, demonstration, preference

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
