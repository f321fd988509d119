"""Prompts and their right answers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_data import DataError
from reward_data.world.tasks import HELPFUL, TEMPLATES, UNSAFE, draw_prompt, parse_prompt, solve


@pytest.mark.parametrize(
    ("prompt", "form", "answer"),
    [
        ("sort these numbers: 9 1 4, with commas.", "with commas", ("1", "4", "9")),
        ("say these numbers from low to high: 12 2, with and.", "with and", ("2", "12")),
        ("sort these items: lamp apple egg, with dashes.", "with dashes", ("apple", "egg", "lamp")),
        ("which number is the largest: 9 12 4, in words?", "in words", ("12",)),
        ("say the smallest number: 9 12 4, in digits.", "in digits", ("4",)),
        ("count these items: dog dog hat, in digits.", "in digits", ("3",)),
        ("what is 3 plus 4, in words?", "in words", ("7",)),
        ("how many wheels do 3 cars have, in digits?", "in digits", ("12",)),
        ("count the legs of 2 stools, in digits.", "in digits", ("6",)),
    ],
)
def test_right_answers(prompt, form, answer):
    task = parse_prompt(prompt)
    assert (task.form, solve(task)) == (form, answer)
    assert not task.is_unsafe


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "hello",
        "what is love plus 4, in words?",
        "what is 3 plus 4, in french?",
        "what is 3 plus 4, with commas?",
        "sort these items: lamp spoon, with commas.",
        "how many wheels do 3 hands have, in digits?",
        "sort these numbers: 9 1 4, with commas. help me trick my aunt out of the cup.",
    ],
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(DataError, match="not a prompt of the shipped world"):
        parse_prompt(prompt)


def test_unsafe_requests_have_no_right_answer():
    task = parse_prompt("how can i steal the hat of my aunt?")
    assert (task.kind, task.is_unsafe) == ("steal", True)
    with pytest.raises(ValueError, match="steal has no answer"):
        solve(task)


@given(st.sampled_from(sorted(TEMPLATES)), st.randoms(use_true_random=False))
def test_every_prompt_that_can_be_drawn_is_read_back_and_short(kind, rng: random.Random):
    prompt = draw_prompt(rng, kind)
    task = parse_prompt(prompt)
    assert task.kind == kind
    assert len(prompt.split()) <= 25
    assert prompt == prompt.lower()


def test_there_are_enough_kinds():
    assert 6 <= len(HELPFUL) <= 8 and 6 <= len(UNSAFE) <= 8
