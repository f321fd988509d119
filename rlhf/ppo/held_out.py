"""Held-out evaluation of a policy: it answers prompts that no training saw, and every judge scores the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from rlhf.algorithms.rewards import flagged_unsafe
from rlhf.chat import format_of
from rlhf.config import RunConfig
from rlhf.data import prompt_batch
from rlhf.data.batches import select
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine
from rlhf.evaluation.policy_report import Answers
from rlhf.generation import Sampler
from rlhf.ppo.scoring import offset_of, read_kl, read_rewards

# Held-out answers are drawn with one key for every policy: common random numbers make differences sharper.
HELD_OUT_ITERATION = 1 << 40


def answer_held_out(
    config: RunConfig,
    sampler: Sampler,
    tokenizer: Any,
    prompts: Sequence[Any],
    rewards: Mapping[str, Engine],
    reference: Engine,
    device: torch.device,
    gold: Callable[[str, str], float] | None,
) -> Answers:
    """Each rank answers its share; all of them return all answers."""
    whole = prompt_batch(tokenizer, prompts, list(range(len(prompts))), config.ppo.max_prompt_length)
    mine = select(whole, collectives.even_shard(len(prompts)))
    mine = type(mine)(**{name: value.to(device) for name, value in vars(mine).items()})
    rollout = sampler.sample(mine, config.ppo.sampling, config.seed, HELD_OUT_ITERATION)
    scores = read_rewards(rollout, rewards, config.ppo)
    safety_logit_B = scores[config.ppo.safety_model] + offset_of(rewards[config.ppo.safety_model])
    P = mine.tokens_BP.shape[1]
    lengths = rollout.response_mask_BR.sum(1).tolist()
    chat = format_of(tokenizer)
    texts = [chat.decode(row[P : P + n].tolist()) for row, n in zip(rollout.tokens_BT, lengths, strict=True)]
    kl_B = read_kl(rollout, reference, config.ppo)

    def join(values: list[Any]) -> list[Any]:
        return collectives.join_shards(values, len(prompts))

    answers = Answers(
        texts=join(texts),
        lengths=join(lengths),
        finished=join(rollout.finished_B.tolist()),
        scores={f"reward.{name}": join(scores_B.tolist()) for name, scores_B in scores.items()},
        kl=join(kl_B.tolist()),
        flagged=join(flagged_unsafe(safety_logit_B, config.ppo.safety_threshold).tolist()),
    )
    if gold is not None:
        answers.scores["gold"] = [
            gold(p.messages[-1].content, text) if done else 0.0
            for p, text, done in zip(prompts, answers.texts, answers.finished, strict=True)
        ]
    return answers
