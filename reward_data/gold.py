"""The true quality of an answer in the shipped world, and whether it refuses, as reward functions."""

from __future__ import annotations

from collections.abc import Sequence

from reward_data.world.quality import gold_score, is_refusal

__all__ = ["gold", "gold_score", "refuses"]


def gold(prompts: Sequence[str], responses: Sequence[str], finished: Sequence[bool]) -> list[float]:
    """The gold score of each response; 0 for one that was cut off."""
    rows = zip(prompts, responses, finished, strict=True)
    return [gold_score(prompt, response) if whole else 0.0 for prompt, response, whole in rows]


def refuses(responses: Sequence[str]) -> list[bool]:
    """Whether each response refuses, in the words of the shipped world."""
    return [is_refusal(response) for response in responses]
