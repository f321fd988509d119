"""Held-out evaluation: the policy answers prompts that training does not use, and every reward scores the responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward_data import Prompt, normalised_prompt
from rlhf.config import RunConfig
from rlhf.data import prompt_batch
from rlhf.data.batches import select, to
from rlhf.distributed import collectives
from rlhf.errors import UserError
from rlhf.evaluation.policy_report import HeldOutResponses, policy_report
from rlhf.generation import Sampler
from rlhf.ppo.models import Models
from rlhf.ppo.scoring import sequence_kl
from rlhf.rewards import Combined, Responses, RewardSet, responses_of
from rlhf.runs.context import StageContext
from rlhf.tracking.jsonl import Lines

# All policies use the same random numbers for held-out responses, which makes their differences more precise.
HELD_OUT_ITERATION = 1 << 40
EVALUATIONS = "evaluations.jsonl"


class Evaluator:
    """Evaluates the policy that a sampler holds. All ranks must call each method."""

    def __init__(self, config: RunConfig, context: StageContext, models: Models, rewards: RewardSet) -> None:
        self._config, self._context, self._models, self._rewards = config, context, models, rewards

    def evaluate(self, prompts: Sequence[Prompt], sampler: Sampler | None = None) -> HeldOutResponses:
        """Responses to the prompts with their scores. Each rank samples its shard; every rank returns all."""
        return self._evaluate(prompts, sampler or self._models.sampler)[0]

    def reward(self, prompts: Sequence[Prompt], iteration: int) -> float:
        """Mean over prompts of the score that PPO maximises; all metrics go to the tracker under eval/.

        UserError (6) if all scores failed, because then nothing could select the best policy.
        """
        held_out, combined = self._evaluate(prompts, self._models.sampler)
        if combined.failed_B.all():
            raise UserError(
                f"evaluation after iteration {iteration}: the scores of all {len(prompts)} responses failed", 6
            )
        report = policy_report(held_out, prompts)
        metrics = {f"eval/{name.replace('.', '_')}": estimate.value for name, estimate in report.items()}
        metrics["eval/reward"] = float(combined.score_B[~combined.failed_B].mean())
        self._context.tracker.metrics(metrics, step=iteration)
        if self._context.is_writer:
            reward = {"reward": _or_none(combined.score_B, combined.failed_B)}
            keep_evaluation(self._context.folder, iteration, held_out, reward, prompts)
        # The first rank's value selects the best policy and decides when to stop.
        return collectives.broadcast_result(lambda: metrics["eval/reward"])

    def _evaluate(self, prompts: Sequence[Prompt], sampler: Sampler) -> tuple[HeldOutResponses, Combined]:
        config, tokenizer, count = self._config, self._models.tokenizer, len(prompts)
        whole = prompt_batch(tokenizer, prompts, list(range(count)), config.ppo.max_prompt_length)
        rows = collectives.even_shard(count)
        mine = to(select(whole, rows), self._context.device)
        rollout = sampler.sample(mine, config.ppo.sampling, config.seed, HELD_OUT_ITERATION)
        responses = responses_of(rollout, [prompts[row] for row in rows], tokenizer)
        rewards_BN, failed_BN = self._rewards(responses)
        kl_B = sequence_kl(rollout, self._models.reference, config.ppo)
        gold = _gold(config, responses)

        def join(values: list[Any]) -> list[Any]:
            return collectives.join_shards(values, count)

        rewards_BN, failed_BN = torch.tensor(join(rewards_BN.tolist())), torch.tensor(join(failed_BN.tolist()))
        combined = self._rewards.combine(rewards_BN, failed_BN, whole.is_safety_B)
        columns = zip(self._rewards.rewards, rewards_BN.T, failed_BN.T, strict=True)
        scores = {f"reward.{name}": _or_none(reward_B, failed_B) for name, reward_B, failed_B in columns}
        held_out = HeldOutResponses(
            texts=join(list(responses.texts)),
            lengths=join(rollout.response_mask_BR.sum(1).tolist()),
            finished=join(rollout.finished_B.tolist()),
            scores=scores | {name: join(values) for name, values in gold.items()},
            kl=join(kl_B.tolist()),
            flagged=None if combined.flagged_B is None else combined.flagged_B.tolist(),
        )
        return held_out, combined


def keep_evaluation(
    folder: Path,
    iteration: int,
    held_out: HeldOutResponses,
    reward: Mapping[str, Sequence[float | None]],
    prompts: Sequence[Prompt],
) -> None:
    """Appends what was measured on each prompt to evaluations.jsonl, for paired intervals between iterations. After a
    resume an iteration may stand there twice; the last line counts.
    """
    line = {
        "step": iteration,
        "prompts": [normalised_prompt(prompt.messages) for prompt in prompts],
        "values": {**reward, **held_out.scores, "kl": held_out.kl, "length": held_out.lengths},
    }
    with closing(Lines(folder / EVALUATIONS)) as lines:
        lines.append(line)


def _or_none(reward_B: Tensor, failed_B: Tensor) -> list[float | None]:
    return [None if failed else value for value, failed in zip(reward_B.tolist(), failed_B.tolist(), strict=True)]


def _gold(config: RunConfig, responses: Responses) -> dict[str, list[float]]:
    """The gold scores of this rank's responses, if the run has them."""
    if config.data.gold == "none":
        return {}
    from reward_data.gold import gold

    prompts = [prompt.messages[-1].content for prompt in responses.prompts]
    return {"gold": gold(prompts, responses.texts, responses.rollout.finished_B.tolist())}
