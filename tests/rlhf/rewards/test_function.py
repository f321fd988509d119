"""A Python function as a reward: what it is called with, and what is made of what it returns."""

from __future__ import annotations

import functools
import math
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from reward_data import Message, Prompt
from rlhf.data.batches import Rollout
from rlhf.errors import UserError
from rlhf.rewards import FunctionReward, Responses

TEXTS = ["four", "five, I think", "no"]
FINISHED = [True, False, True]
HISTORY = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello!"))
ROWS = [{"answer": "4", "level": 1}, {"answer": "6"}, {}]


def responses(rows: list[dict[str, Any]] = ROWS) -> Responses:
    ones = torch.ones(len(rows), 1)
    rollout = Rollout(ones.long(), ones.bool(), ones.bool(), ones, torch.tensor(FINISHED[: len(rows)]))
    prompts = [
        Prompt((*HISTORY, Message("user", f"question {i}")), "helpful", f"p:{i}", columns)
        for i, columns in enumerate(rows)
    ]
    return Responses(rollout, prompts, TEXTS[: len(rows)])


def call(function: Any, timeout_s: float = 60.0, rows: list[dict[str, Any]] = ROWS) -> tuple[list[float], list[bool]]:
    """What is made of its scores: values, and which failed."""
    scored = FunctionReward("mine", function, timeout_s)(responses(rows))
    assert scored.values_B.dtype == torch.float32 and scored.failed_B.dtype == torch.bool
    return scored.values_B.tolist(), scored.failed_B.tolist()


def given(function_of: Any) -> dict[str, Any]:
    """The arguments that a function is called with. `function_of` makes one that notes them."""
    seen: list[dict[str, Any]] = []
    FunctionReward("mine", function_of(seen))(responses())
    (arguments,) = seen
    return arguments


def noting(seen: list[Any], **arguments: Any) -> list[float]:
    seen.append(arguments)
    return [0.0] * 3


# --- arguments --------------------------------------------------------------------------------------------------------


def test_it_is_given_what_it_names_and_no_more():
    named = given(lambda seen: lambda responses, level: noting(seen, responses=responses, level=level))
    assert named == {"responses": TEXTS, "level": [1, None, None]}


def test_everything_that_it_may_name():
    def make(seen: list[Any]) -> Any:
        return lambda prompts, responses, messages, finished: noting(
            seen, prompts=prompts, responses=responses, messages=messages, finished=finished
        )

    arguments = given(make)
    history = [{"role": m.role, "content": m.content} for m in HISTORY]
    assert arguments == {
        "prompts": ["question 0", "question 1", "question 2"],
        "responses": TEXTS,
        "messages": [[*history, {"role": "user", "content": f"question {i}"}] for i in range(3)],
        "finished": FINISHED,
    }


def test_two_stars_take_all_columns():
    arguments = given(lambda seen: lambda responses, **columns: noting(seen, **columns))
    assert sorted(arguments) == ["answer", "finished", "level", "messages", "prompts"]
    assert (arguments["answer"], arguments["level"]) == (["4", "6", None], [1, None, None])


def test_an_argument_with_a_default_keeps_it_where_no_row_has_that_column():
    def make(seen: list[Any]) -> Any:
        return lambda *, answer, strict=True, level=7: noting(seen, answer=answer, strict=strict, level=level)

    assert given(make) == {"answer": ["4", "6", None], "strict": True, "level": [1, None, None]}


def test_a_column_cannot_take_the_name_of_what_everyone_is_given():
    rows: list[dict[str, Any]] = [{"prompts": "x", "finished": "y"}] * 3
    values, _ = call(lambda prompts, finished: [len(p) + f for p, f in zip(prompts, finished, strict=True)], rows=rows)
    assert values == [11.0, 10.0, 11.0]


def test_rows_of_one_call_may_lack_a_column_that_others_of_the_run_have():
    assert call(lambda unit_test: [0.0 if t is None else 1.0 for t in unit_test]) == ([0.0] * 3, [False] * 3)


def test_a_column_that_no_prompt_has_is_told_before_training():
    reward = FunctionReward("mine", lambda responses, anwser, level, x=1: [])
    with pytest.raises(UserError, match=r"^the reward mine asks for anwser, .* the columns answer, level; .*messages"):
        reward.check_columns(responses().prompts)
    with pytest.raises(UserError, match=r"asks for anwser, level, but the prompts have no columns of their own"):
        reward.check_columns(responses([{}]).prompts)
    FunctionReward("mine", lambda prompts, finished, level, **other: []).check_columns(responses().prompts)


def test_a_column_of_the_run_is_given_also_where_no_row_of_this_call_has_it():
    """Else a rank would get a default where another gets values."""
    seen: list[dict[str, Any]] = []
    reward = FunctionReward("mine", lambda responses, level=7, **others: noting(seen, level=level, **others))
    reward.check_columns(responses().prompts)
    reward(responses([{}, {}, {}]))
    assert (seen[0]["level"], seen[0]["answer"]) == ([None] * 3, [None] * 3)


# --- what can be called -----------------------------------------------------------------------------------------------


class Judge:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, responses: list[str]) -> list[float]:
        return [self.factor * len(text) for text in responses]

    def score(self, responses: list[str]) -> list[float]:
        return self(responses)


def scaled(factor: float, responses: list[str], plus: float = 0.0) -> list[float]:
    return [factor * len(text) + plus for text in responses]


def scaled_twice(responses: list[str]) -> list[float]:
    return scaled(2.0, responses)


LENGTHS = [4.0, 13.0, 2.0]


@pytest.mark.parametrize(
    "function",
    [
        Judge(2.0),
        Judge(2.0).score,
        functools.partial(scaled, 2.0),
        functools.partial(scaled, factor=2.0),
        functools.wraps(scaled_twice)(lambda *args, **kwargs: scaled_twice(*args, **kwargs)),  # pyright: ignore[reportCallIssue]
    ],
    ids=["object", "method", "partial", "partial by name", "wrapped"],
)
def test_whatever_can_be_called_by_names(function):
    assert call(function)[0] == [2 * length for length in LENGTHS]


def test_a_partial_keeps_what_was_bound():
    assert call(functools.partial(scaled, 1.0, plus=0.5))[0] == [length + 0.5 for length in LENGTHS]


@pytest.mark.parametrize("function", [max, 3, "json:loads", None], ids=str)
def test_what_has_no_arguments_to_read_is_refused(function):
    with pytest.raises(UserError, match=r"^the reward mine is .*, whose arguments cannot be read: "):
        FunctionReward("mine", function)


@pytest.mark.parametrize(
    "function",
    [lambda *args: [0.0] * len(args[0]), lambda: [0.0] * 3, lambda responses, /: [0.0] * len(responses), len],
    ids=["*args", "nothing", "by position", "len"],
)
def test_a_function_that_takes_nothing_by_name_is_refused(function):
    with pytest.raises(UserError, match=r"^the reward mine takes .*; it is called with names"):
        FunctionReward("mine", function)


def test_stars_beside_names_do_no_harm():
    assert call(lambda responses, *args, **kwargs: [len(args)] * len(responses)) == ([0.0] * 3, [False] * 3)


# --- what it returns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5, True],
        (1, 2.5, 1.0),
        np.array([1.0, 2.5, 1.0]),
        np.array([1.0, 2.5, 1.0], dtype=np.float16),
        [np.float32(1.0), np.float64(2.5), np.int64(1)],
        torch.tensor([1.0, 2.5, 1.0]),
        torch.tensor([1.0, 2.5, 1.0], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1.0), torch.tensor([2.5]), 1],
    ],
    ids=["list", "tuple", "numpy", "numpy half", "numpy scalars", "torch", "torch with gradient", "torch scalars"],
)
def test_numbers_of_every_kind_are_scores(returned):
    assert call(lambda responses: returned) == ([1.0, 2.5, 1.0], [False] * 3)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (None, "it returned None"),
        (math.nan, "it returned nan"),
        (math.inf, "it returned inf"),
        (-math.inf, "it returned -inf"),
        (1e300, "it returned 1e+300"),
        (np.float32("nan"), "it returned nan"),
    ],
)
def test_a_score_that_is_no_number_of_float32_has_failed_and_the_others_have_not(bad, why):
    reward = FunctionReward("mine", lambda responses: [1.0, bad, -2.0])
    scored = reward(responses())
    assert (scored.values_B.tolist(), scored.failed_B.tolist()) == ([1.0, 0.0, -2.0], [False, True, False])
    assert reward.last_failure == why and not reward.call_failed


def test_the_largest_float32_is_a_score():
    largest = torch.finfo(torch.float32).max
    assert call(lambda responses: [largest, -largest, 0.0]) == ([largest, -largest, 0.0], [False] * 3)


@pytest.mark.parametrize(
    ("returned", "shape"),
    [
        ([1.0, 2.0], "2 values"),
        ([1.0] * 4, "4 values"),
        (np.ones(2), "2 values"),
        (torch.tensor(1.0), "a float"),
        (1.0, "a float"),
        (None, "a NoneType"),
        ("abc", "a str"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "a dict"),
        (iter([1.0, 2.0, 3.0]), "a list_iterator"),
    ],
    ids=["too few", "too many", "array", "no dimension", "number", "None", "text", "dict", "iterator"],
)
def test_another_number_of_scores_is_the_users_mistake(returned, shape):
    with pytest.raises(UserError, match=rf"^the reward mine returned {shape} for 3 responses") as caught:
        call(lambda responses: returned)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "bad", ["good", [1.0, 2.0], {}, 1j, object()], ids=["text", "list", "dict", "complex", "object"]
)
def test_what_is_no_number_is_the_users_mistake(bad):
    with pytest.raises(UserError, match=r"^the reward mine returned .*, which is no number$"):
        call(lambda responses: [1.0, bad, 2.0])


def test_an_array_of_rows_is_no_score_each():
    with pytest.raises(UserError, match="which is no number"):
        call(lambda responses: np.ones((3, 2)))


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [ValueError("no key"), UserError("own"), TimeoutError("slow"), ZeroDivisionError("0")]
)
def test_an_exception_fails_all_scores_and_is_told(error, caplog):
    def broken(responses: list[str]) -> list[float]:
        raise error

    reward = FunctionReward("mine", broken)
    scored = reward(responses())
    assert (scored.values_B.tolist(), scored.failed_B.tolist()) == ([0.0] * 3, [True] * 3)
    assert reward.call_failed and reward.last_failure == f"{type(error).__name__}: {error}"
    (record,) = caplog.records
    assert record.getMessage() == "the reward mine failed" and record.exc_info[1] is error


def test_a_call_that_is_late_fails_all_scores_and_nobody_waits_for_it():
    release = threading.Event()

    def slow(responses: list[str]) -> list[float]:
        release.wait(10)
        return [1.0] * 3

    reward, start = FunctionReward("mine", slow, timeout_s=0.05), time.monotonic()
    scored = reward(responses())
    assert time.monotonic() - start < 5
    assert scored.failed_B.tolist() == [True] * 3 and not scored.values_B.any()
    assert reward.last_failure == "TimeoutError: no result within 0.05 s"
    release.set()


def test_a_late_answer_is_not_taken_for_that_of_the_next_call():
    release, calls = threading.Event(), []

    def slow_once(responses: list[str]) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            release.wait(10)
            return [-9.0] * 3
        release.set()
        time.sleep(0.05)
        return [1.0] * 3

    reward = FunctionReward("mine", slow_once, timeout_s=1.0)
    assert reward(responses()).failed_B.all() and reward.call_failed
    assert reward(responses()).values_B.tolist() == [1.0] * 3 and not reward.call_failed


def test_a_request_to_stop_is_no_failed_score():
    def stop(responses: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(stop)
