"""Tables of prompts and responses for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.chat import format_of
from rlhf.data.batches import Rollout, Scores
from rlhf.evaluation.policy_report import HeldOutResponses


def before_and_after(
    prompts: Sequence[Any], responses: Mapping[str, HeldOutResponses], count: int = 10
) -> list[dict[str, Any]]:
    """The first prompts with the responses and scores of the SFT model and of the final policy."""
    table = []
    for i, prompt in enumerate(prompts[:count]):
        row: dict[str, Any] = {"prompt": prompt.messages[-1].content}
        for name in ("sft", "ppo"):
            row[name] = responses[name].texts[i]
            row |= {f"{key}_{name}": values[i] for key, values in responses[name].scores.items()}
        table.append(row)
    return table


def sampled(
    tokenizer: Any, rollout: Rollout, scores: Scores, rewards: Sequence[str], count: int, iteration: int
) -> list[dict[str, Any]]:
    """The first rows of an iteration's rollout, as text, with the score of each reward; None where it failed."""
    R = rollout.response_mask_BR.shape[1]
    chat, table = format_of(tokenizer), []
    for i in range(min(count, len(rollout.tokens_BT))):
        prompt = rollout.tokens_BT[i, :-R][rollout.mask_BT[i, :-R]].tolist()
        response = rollout.tokens_BT[i, -R:][rollout.response_mask_BR[i]].tolist()
        values = zip(rewards, scores.rewards_BN[i].tolist(), scores.failed_BN[i].tolist(), strict=True)
        table.append(
            {
                "iteration": iteration,
                "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
                "answer": chat.decode(response),
                **{name: None if failed else value for name, value, failed in values},
            }
        )
    return table
