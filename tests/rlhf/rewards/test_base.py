"""Which callables are rewards on tensors, by what they say that they return."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf import rewards
from rlhf.rewards import FunctionReward, Responses, Scored, is_reward


def annotated_later(responses: Responses) -> Scored:  # as a text: annotations are not evaluated here
    raise NotImplementedError


def annotated_in_full(responses: Responses) -> rewards.Scored:
    raise NotImplementedError


def annotated_now(responses: Responses):
    raise NotImplementedError


annotated_now.__annotations__["return"] = Scored


class Server:
    def __call__(self, responses: Responses) -> Scored:
        raise NotImplementedError


def plain(responses: list[str]) -> list[float]:
    raise NotImplementedError


@pytest.mark.parametrize(
    "reward",
    [annotated_later, annotated_in_full, annotated_now, Server(), FunctionReward("x", plain)],
    ids=["text", "full text", "class", "object", "ours"],
)
def test_a_callable_that_returns_scored_is_a_reward(reward):
    assert is_reward(reward)


@pytest.mark.parametrize(
    "other", [plain, lambda responses: [], max, Responses, 3], ids=["plain", "lambda", "max", "class", "3"]
)
def test_nothing_else_is(other: Any):
    assert not is_reward(other)
