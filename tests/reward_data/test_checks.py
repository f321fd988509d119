"""`check` finds what `load` cannot refuse."""

from __future__ import annotations

from reward_data import Demonstration, Finding, Message, Preference, Prompt, check, normalised_prompt


def pair(prompt, chosen, rejected, source="f:1"):
    return Preference((Message("user", prompt),), chosen, rejected, "unrated", "helpful", "unknown", "unknown", source)


def test_nothing_to_find():
    assert check([pair("a", "b", "c")], [pair("d", "b", "c")]) == []


def test_identical_pair():
    assert check([pair("a", "b", "c"), pair("d", "b ", "b", "f:2")]) == [Finding("identical_pair", 1, ("f:2",))]


def test_empty_reply():
    silent = Demonstration((Message("user", "a"), Message("assistant", " ")), "helpful", "f:3")
    assert check([silent], [pair("b", "", "c", "g:1")]) == [Finding("empty_reply", 2, ("f:3", "g:1"))]


def test_prompt_shared_between_train_and_held_out_in_spite_of_case_and_space():
    train = [pair("Say  hi.", "b", "c", "f:1"), pair("Say bye.", "b", "c", "f:2")]
    held_out = [Prompt((Message("user", "say hi.\n"),), "helpful", "g:1")]
    assert check(train, held_out) == [Finding("shared_prompt", 1, ("f:1",))]


def test_examples_are_a_few():
    (finding,) = check([pair("a", "b", "b", f"f:{n}") for n in range(9)])
    assert (finding.count, len(finding.examples)) == (9, 5)


def test_normalised_prompt_tells_speakers_apart():
    one = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert normalised_prompt(one) != normalised_prompt([Message("user", "a b c")])
