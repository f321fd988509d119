"""A reward of one's own: a Python function that compares the response with the row's reference response.

In a run:       rlhf run quickstart --name short --ppo.rewards "{short: {function: examples/my_reward.py:short}}"
In a notebook:  PPOTrainer(model, rewards={"correct": correct}, prompts=[{"prompt": "2 + 2?", "answer": "4"}])
"""

from __future__ import annotations


def correct(responses: list[str], answer: list[str | None]) -> list[float | None]:
    """1 where the response holds the row's `answer`, else 0. None, for a row without one, leaves it out of the update."""
    pairs = zip(responses, answer, strict=True)
    return [None if wanted is None else float(wanted.lower() in response.lower()) for response, wanted in pairs]


def short(responses: list[str], finished: list[bool]) -> list[float]:
    """Fewer characters are better; a response that was cut off is the worst."""
    pairs = zip(responses, finished, strict=True)
    return [-len(response) / 100 if ended else -10.0 for response, ended in pairs]
