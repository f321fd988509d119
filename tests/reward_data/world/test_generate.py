"""The shipped files are what the generator makes, and what CARD.md says of them is so."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest

from reward_data import Source, load
from reward_data.gold import gold_score
from reward_data.load import SHIPPED
from reward_data.world.generate import generate, main, rating_of


@cache
def shipped(kind, split="train"):
    return load(kind, Source("shipped", split=split)).rows


@pytest.fixture(scope="module")
def made():
    return generate(seed=0)


def test_shipped_files_are_made_by_the_generator(made):
    assert {file.name for file in SHIPPED.iterdir()} == made.keys()
    for name, text in made.items():
        assert (SHIPPED / name).read_bytes() == text.encode(), f"{name}: run python -m reward_data.world.generate"


def test_another_seed_makes_other_files(made):
    assert not set(made.values()) & set(generate(seed=1).values())


def test_command_writes_the_files(tmp_path, monkeypatch, made):
    monkeypatch.setattr("sys.argv", ["generate", str(tmp_path / "new"), "--seed", "7"])
    monkeypatch.setattr("reward_data.world.generate.generate", lambda seed: made if seed == 7 else {})
    main()
    assert {file.name: file.read_text() for file in (tmp_path / "new").iterdir()} == made


@pytest.mark.parametrize(
    ("difference", "rating"),
    [(1.0, "significantly"), (0.5, "significantly"), (0.49, "better"), (0.25, "better"), (0.1, "slightly"), (0.09, "negligibly")],
)  # fmt: skip
def test_rating_of(difference, rating):
    assert rating_of(difference) == rating


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_preferences_follow_the_gold_score(split):
    for row in shipped("preferences", split):
        prompt = row.prompt[0].content
        difference = gold_score(prompt, row.chosen) - gold_score(prompt, row.rejected)
        assert difference > 0, row.source
        assert row.rating == rating_of(difference), row.source


def test_preferences_have_all_ratings_and_both_tags():
    rows = shipped("preferences")
    ratings, tags = Counter(row.rating for row in rows), Counter(row.tag for row in rows)
    assert min(ratings[r] / len(rows) for r in ("significantly", "better", "slightly", "negligibly")) > 0.02
    assert tags["safety"] / len(rows) == pytest.approx(0.4, abs=0.03)


def test_an_unsafe_answer_is_one_that_complies_and_is_never_chosen():
    for row in shipped("preferences"):
        assert row.chosen_safety == "safe"
        if row.rejected_safety == "unsafe":
            assert row.tag == "safety" and gold_score(row.prompt[0].content, row.rejected) == 0.0


def test_length_does_not_tell_the_better_answer():
    rows = shipped("preferences")
    assert 0.35 < sum(len(row.chosen) > len(row.rejected) for row in rows) / len(rows) < 0.65


def test_demonstrations_leave_room_for_improvement():
    scores = [gold_score(row.messages[0].content, row.messages[1].content) for row in shipped("demonstrations")]
    assert 0.35 < sum(score > 0.999 for score in scores) / len(scores) < 0.55
    assert 0.6 < sum(scores) / len(scores) < 0.85


def test_the_vocabulary_is_small_and_the_texts_are_short():
    words, longest = set(), 0
    for row in shipped("demonstrations"):
        for message in row.messages:
            words.update(re.findall(r"\w+", message.content))
            longest = max(longest, len(message.content.split()))
    assert len(words) <= 250
    assert longest <= 40
