"""Votes as data for training: what becomes of each vote, and that nothing is on both sides of the split."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from reward_data import load
from rlhf.serving.store.export import export, groups_of


def exchange(name: str, prompt: str = "q", response: str | None = None, kind: str = "chat") -> Any:
    messages = [{"role": "user", "content": prompt}]
    return SimpleNamespace(
        id=name,
        kind=kind,
        model="m",
        digest="d",
        messages=messages,
        response=f"response {name}" if response is None else response,
    )


def vote(number: int, first: str, second: str | None = None, **more: Any) -> Any:
    usual = {"chosen": "first", "rating": "better"} if second else {"chosen": None, "rating": None}
    values = {"thumb": None, "edit": None, "labels": {}, "user": None, "created": 5.0, **usual, **more}
    return SimpleNamespace(id=number, first=first, second=second, **values)


EXCHANGES: Mapping[str, Any] = {name: exchange(name) for name in "abc"} | {
    "x": exchange("x", "other"),
    "e": exchange("e", response="response a "),
    "n": exchange("n", response=" \n"),
}


def test_a_vote_becomes_a_preference_with_its_provenance() -> None:
    labels = {"first": ["unsafe", "helpful"], "second": ["safe"]}
    found = export([vote(3, "a", "b", chosen="second", rating="slightly", labels=labels, user="ann")], EXCHANGES, 0)
    (row,) = found.preferences["train"]
    assert row == {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": "response b",
        "rejected": "response a",
        "rating": "slightly",
        "tag": "safety",
        "chosen_safety": "safe",
        "rejected_safety": "unsafe",
        "provenance": {
            "vote": 3,
            "voted": 5.0,
            "rater": "49915e0d7d4b402e",  # printf ann | sha256sum
            "chosen_place": "second",
            "responses": [{"id": "a", "model": "m", "digest": "d"}, {"id": "b", "model": "m", "digest": "d"}],
        },
    }


def test_an_edit_becomes_a_demonstration() -> None:
    found = export([vote(1, "a", edit="better so")], EXCHANGES, 0)
    (row,) = found.demonstrations["train"]
    assert [turn["content"] for turn in row["messages"]] == ["q", "better so"]
    assert row["tag"] == "helpful"


def test_what_says_nothing_is_counted() -> None:
    votes = [vote(1, "a", thumb="up"), vote(2, "a", "x"), vote(3, "a", "e"), vote(4, "t")]
    votes += [vote(5, "a", "n"), vote(6, "n", "b")]
    exchanges = {**EXCHANGES, "t": exchange("t", kind="completion")}
    found = export(votes, exchanges, 0)
    once = {"a thumb or labels alone": 1, "two prompts": 1, "equal responses": 1, "not a chat": 1}
    assert found.left_out == once | {"an empty response": 2}
    assert found.preferences == {"train": [], "held_out": []}


def test_the_last_vote_of_a_person_counts() -> None:
    votes = [
        vote(1, "a", "b", user="ann"),
        vote(2, "b", "a", user="ann"),  # the other way round: shown in another order, and she changed her mind
        vote(3, "a", "b", user="bob"),
        vote(4, "a", "b"),
        vote(5, "a", "b"),
        vote(6, "a", "c", user="ann"),
    ]
    found = export(votes, EXCHANGES, 0)
    assert [row["provenance"]["vote"] for row in found.preferences["train"]] == [2, 3, 4, 5, 6]
    assert found.left_out == {"voted again": 1}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(10, 15)), max_size=12))
def test_pairs_that_share_a_key_are_in_one_group(pairs: list[tuple[int, int]]) -> None:
    """Oracle: names spread along shared keys until nothing changes."""
    names = list(range(len(pairs)))
    for _ in pairs:
        for i, one in enumerate(pairs):
            for j, other in enumerate(pairs):
                if set(one) & set(other):
                    names[i] = names[j] = min(names[i], names[j])
    found = groups_of([(a, str(b)) for a, b in pairs])
    same = [[found[i] == found[j] for j in range(len(pairs))] for i in range(len(pairs))]
    assert same == [[names[i] == names[j] for j in range(len(pairs))] for i in range(len(pairs))]


@given(st.lists(st.tuples(st.sampled_from([None, "ann", "bob", "cid"]), st.integers(0, 30)), max_size=40))
def test_neither_a_person_nor_a_prompt_is_on_both_sides(said: list[tuple[str | None, int]]) -> None:
    exchanges = {f"{n}{side}": exchange(f"{n}{side}", f"prompt {n}") for n in range(31) for side in "ab"}
    votes = [vote(place, f"{n}a", f"{n}b", user=user) for place, (user, n) in enumerate(said)]
    found = export(votes, exchanges, 0.5)
    sides = [found.preferences[side] for side in ("train", "held_out")]
    raters, prompts = ([{_key(row, what) for row in rows} - {None} for rows in sides] for what in ("rater", "prompt"))
    assert not raters[0] & raters[1]
    assert not prompts[0] & prompts[1]


def _key(row: dict[str, Any], what: str) -> Any:
    return row["provenance"]["rater"] if what == "rater" else row["prompt"][0]["content"]


def test_a_fraction_is_held_out() -> None:
    """2,000 groups at 0.1: 200 ± 4 standard deviations of 13.4."""
    exchanges = {f"{n}{side}": exchange(f"{n}{side}", f"prompt {n}") for n in range(2000) for side in "ab"}
    found = export([vote(n, f"{n}a", f"{n}b") for n in range(2000)], exchanges, 0.1)
    assert 146 < len(found.preferences["held_out"]) < 254
    assert len(found.preferences["held_out"]) + len(found.preferences["train"]) == 2000


def test_the_pipeline_reads_it(tmp_path: Path) -> None:
    found = export([vote(1, "a", "b"), vote(2, "a", edit="so")], EXCHANGES, 0)
    for kind in ("preferences", "demonstrations"):
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in getattr(found, kind)["train"]))
        (record,) = load(kind, file).rows
        assert vars(record)["tag"] == "helpful"
