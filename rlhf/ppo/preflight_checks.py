"""Checks before PPO's first step. Each result has a limit; beyond it the run stops on every rank.

Every function except `broken_ends`, `rewards_work` and `agree` makes forward passes or gathers shards, so all ranks
must call it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_data import Message
from rlhf.chat import format_of
from rlhf.config import PPOConfig
from rlhf.data import next_prompts
from rlhf.data.batches import Rollout, Scores, select, to, trim
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine, full_parameters
from rlhf.distributed.micro_batches import micro_batches_of_shards
from rlhf.distributed.sequence import group_of, rows_of_group
from rlhf.errors import UserError
from rlhf.generation import InProcessSampler, Sampler
from rlhf.generation.sampler import is_stop
from rlhf.models import check_slices, load_scalar
from rlhf.ppo.models import Models
from rlhf.ppo.rollout_source import records_of
from rlhf.ppo.scoring import score_responses
from rlhf.ppo.setup import Setup
from rlhf.ppo.update import recompute_logprobs
from rlhf.rewards import FunctionReward, RewardSet
from rlhf.rewards.model import score

SAME_LOGPROBS = {"float32": 1e-6, "bf16": 5e-2}
"""Equal forward passes give equal bits, unless a backend chooses another kernel for one of them; a bf16 logprob of 10
nats is then rounded in steps of .06."""
SAME_SCORES = {"float32": 1e-3, "bf16": 1e-1}
"""Other padding, shards and devices sum in another order. In float32 scores differ by 1e-5; in bf16 hidden states have
three digits. A wrong head or offset changes a score by tenths."""

SAMPLER_GAP = {"float32": 1e-2, "bf16": 1.0}
"""Another engine sums in another order: logprobs differ by 1e-5 in float32, and by tenths at a token of 10 nats in
bf16. A sampler without the trainer's weights differs by whole nats."""

FIXED_TEXT = ("What is 2 + 2?", "2 + 2 is 4.")
PADDING = 5
ROWS, NEW_TOKENS = 16, 64  # of the small rollout, on each rank


def run(setup: Setup, fresh: bool) -> dict[str, str]:
    """Runs all checks on a small rollout and returns their results as tags. UserError (6) if one fails.

    `fresh`: no step was made yet, so the policy must equal the reference.
    """
    config, models, ppo = setup.config, setup.models, setup.config.ppo
    precision, tokenizer = config.hardware.precision, models.tokenizer
    _check_memory(models.sampler, ppo)
    check_slices(models.policy.module)
    batch = next_prompts(tokenizer, setup.prompts, config, 1)
    mine = select(batch, collectives.shard(ppo.batch_size, collectives.rank(), collectives.world_size()))
    few = select(mine, slice(ROWS))
    short = {"max_new_tokens": min(NEW_TOKENS, ppo.sampling.max_new_tokens)}
    rollout = models.sampler.sample(
        to(few, setup.context.device), ppo.sampling.model_copy(update=short), config.seed, 0
    )
    rows = records_of(few, setup.prompts, ppo.group_size)
    scores = score_responses(rollout, rows, models, setup.rewards, ppo)
    results = [
        first_ratio(models.policy, rollout, scores, ppo, precision),
        broken_ends(rollout, models.sampler.stop_ids, tokenizer.pad_token_id),
        _sampler_check(models, rollout, scores, precision),
        *rewards_work(setup.rewards),
    ]
    if fresh:
        results.append(same_as_reference(scores, rollout, precision))
    for name, engine in models.reward_models.items():
        folder = setup.context.inputs[f"reward/{name}"].path
        results.append(fixed_score(name, engine, folder, tokenizer, precision))
    return agree(results)


def _check_memory(sampler: Sampler, ppo: PPOConfig) -> None:
    """UserError (5) on every rank if one of them lacks the memory to sample the longest possible row."""
    refusal = None
    if isinstance(sampler, InProcessSampler):
        try:
            sampler.rows_at_once(ppo.max_prompt_length, ppo.sampling)
        except UserError as error:
            refusal = error
    if refused := [error for error in collectives.gather_objects(refusal) if error is not None]:
        raise refused[0]


def _sampler_check(models: Models, rollout: Rollout, scores: Scores, precision: str) -> CheckResult:
    """Whether weights can be compared; vLLM changes their layout."""
    if isinstance(models.sampler, InProcessSampler):
        return synced(models.policy, models.sampler.model)
    return sampler_agrees(rollout, scores, precision)


@dataclass(frozen=True)
class CheckResult:
    name: str
    figure: float  # the deviation on this rank; NaN is the worst
    limit: float
    what: str  # what the value measures, with its unit
    look_at: str


def agree(results: Sequence[CheckResult]) -> dict[str, str]:
    """The worst results of all ranks as tags. UserError (6) on every rank if one is beyond its limit."""
    everywhere = zip(*collectives.gather_objects(list(results)), strict=True)
    worst = [max(same, key=lambda f: _distance(f.figure)) for same in everywhere]
    failed = [f for f in worst if not f.figure <= f.limit]
    if failed:
        lines = [f"{f.name}: {f.what} is {f.figure:.3g}, at most {f.limit:g} is allowed. {f.look_at}" for f in failed]
        raise UserError("\n".join(["PPO did not start, because a check before its first step failed.", *lines]), 6)
    return {f"check.{f.name}": f"passed: {f.what} is {f.figure:.3g}, at most {f.limit:g} is allowed" for f in worst}


def _distance(figure: float) -> float:
    return math.inf if math.isnan(figure) else figure


@torch.no_grad()
def first_ratio(policy: Engine, rollout: Rollout, scores: Scores, ppo: PPOConfig, precision: str) -> CheckResult:
    """The ratio π/π_old of the first minibatch, computed as the update computes it, must be 1."""
    far, group = [], group_of(policy.sequence_parallel)
    (rollout, _), (scores, _) = rows_of_group(rollout, group), rows_of_group(scores, group)
    for index in micro_batches_of_shards(rollout, ppo):
        part = trim(select(rollout, index))
        mask_BR = part.response_mask_BR
        logprobs_BR, _ = recompute_logprobs(policy, part, ppo)
        ratio_BR = (logprobs_BR.cpu() - scores.logprobs_BR[index.cpu(), : mask_BR.shape[1]]).exp()
        far.append(float((ratio_BR[mask_BR.cpu()] - 1).abs().max()))
    return CheckResult(
        "first_ratio",
        max(far, key=_distance),
        SAME_LOGPROBS[precision],
        "the largest |ratio - 1| of the policy to itself",
        "The update reads the policy otherwise than scoring does: look at dropout, modules in training mode and the "
        "temperature.",
    )


def same_as_reference(scores: Scores, rollout: Rollout, precision: str) -> CheckResult:
    """Before the first step the policy equals the reference, so their KL is 0 at every token."""
    gap_BR = (scores.logprobs_BR - scores.ref_logprobs_BR)[rollout.response_mask_BR.cpu()]
    return CheckResult(
        "policy_is_reference",
        float(gap_BR.abs().max()),
        SAME_LOGPROBS[precision],
        "the largest |log π - log π_SFT| at a token",
        "Policy and reference do not hold the same weights, or are read differently: look at the SFT artifact, at an "
        "adapter that does not start at zero, and at embeddings that were resized.",
    )


def broken_ends(rollout: Rollout, stop_ids: Sequence[int], pad_id: int) -> CheckResult:
    """A stop id is the last real token of every finished response and of no other."""
    mask_BR = rollout.response_mask_BR
    R = mask_BR.shape[1]
    tokens_BR, length_B = rollout.tokens_BT[:, -R:], mask_BR.sum(1)
    is_stop_BR = is_stop(tokens_BR, stop_ids)
    stops_last_B = is_stop_BR.gather(1, (length_B - 1).clamp(min=0)[:, None])[:, 0]
    contiguous_B = (mask_BR == (torch.arange(R, device=mask_BR.device) < length_B[:, None])).all(1)
    seen_by_models_B = (rollout.mask_BT[:, -R:] == mask_BR).all(1)
    stops_inside_B = (is_stop_BR & mask_BR).sum(1)
    right_end_B = torch.where(rollout.finished_B, stops_last_B & (stops_inside_B == 1), stops_inside_B == 0)
    wrong_B = ~(contiguous_B & seen_by_models_B & right_end_B & (length_B > 0))
    same = pad_id in stop_ids
    return CheckResult(
        "eos_in_mask",
        float(len(wrong_B) if same else wrong_B.sum()),
        0,
        f"the number of responses whose mask does not end as they do ({int(rollout.finished_B.sum())} of {len(wrong_B)} end with EOS)",
        "pad and EOS are the same token: look at the tokenizer."
        if same
        else "Look at how the sampler makes masks: they must come from lengths, EOS inside.",
    )


def rewards_work(rewards: RewardSet) -> list[CheckResult]:
    """A function must neither raise nor be late. It may give single rows no score: there is an alarm for too many."""
    return [
        CheckResult(
            f"reward.{name}",
            float(reward.call_failed),
            0,
            "the number of calls that raised or were late",
            f"The last failure: {reward.last_failure}." if reward.last_failure else "",
        )
        for name, reward in rewards.rewards.items()
        if isinstance(reward, FunctionReward)
    ]


def synced(policy: Engine, sampler: nn.Module) -> CheckResult:
    """The sampler must hold the trainer's weights, cast to its precision. Shards are gathered in buckets."""
    own = dict(sampler.named_parameters())
    wrong = set(own)
    for name, tensor in full_parameters(policy.module):
        name = name.removeprefix("causal.")
        if name in own and checksum(tensor.to(own[name].dtype)) == checksum(own[name]):
            wrong.remove(name)
        else:
            wrong.add(name)
    return CheckResult(
        "sampler_weights",
        len(wrong),
        0,
        "the number of tensors whose checksums in sampler and trainer differ",
        f"The sync left out or changed {', '.join(sorted(wrong)[:3])}: look at the names of the weights and at which of "
        "them learn.",
    )


def sampler_agrees(rollout: Rollout, scores: Scores, precision: str) -> CheckResult:
    """A sampler with its own layout of weights must report the trainer's logprobs."""
    gap_BR = rollout.behaviour_logprobs_BR.cpu() - scores.logprobs_BR.cpu()
    return CheckResult(
        "sampler_logprobs",
        float(gap_BR[rollout.response_mask_BR.cpu()].abs().max()),
        SAMPLER_GAP[precision],
        "the largest difference between sampler and trainer in the logprob of a token",
        "The sampler does not hold the trainer's weights, or reads them at another temperature: look at the names of the "
        "weights that it was given.",
    )


def checksum(tensor: Tensor, piece: int = 1 << 22) -> int:
    """A checksum: the bits of a tensor as wrapping int64, each times an odd number of its place. Exact on every
    device."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(-1).view(kind)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), piece):
        part = bits[start : start + piece].long()
        total += (part * (2 * torch.arange(start, start + len(part), device=part.device) + 1)).sum()
    return int(total)


def fixed_score(name: str, engine: Engine, folder: Path, tokenizer: Any, precision: str) -> CheckResult:
    """One fixed text must get one score from the (sharded) reward model, padded or not, and from `rlhf score`.

    The latter is `ScalarModel.score` of the whole model in `folder`, which the first rank loads on its CPU.
    """
    scores = fixed_text_scores(engine, tokenizer)
    of_folder = collectives.rank_zero_only(lambda: _score_of_folder(folder, tokenizer, precision), f"loading {folder}")
    scores["by rlhf score"] = of_folder
    gaps = [abs(score - scores["unpadded"]) for score in scores.values()]
    return CheckResult(
        f"score.{name}",
        max(gaps, key=_distance),
        SAME_SCORES[precision],
        "the largest difference between scores of one text",
        f"It is {', '.join(f'{score:.4g} {how}' for how, score in scores.items())}: look at attention masks and "
        f"positions where padding matters, else at the head and the offset of {folder}.",
    )


@torch.no_grad()
def fixed_text_scores(engine: Engine, tokenizer: Any) -> dict[str, float]:
    """What a reward model gives for FIXED_TEXT, by the side on which it is padded."""
    tokens_1T, mask_1T = _fixed_text(tokenizer)
    scores = {}
    for how, side in {"unpadded": (0, 0), "padded left": (PADDING, 0), "padded right": (0, PADDING)}.items():
        tokens_BT, mask_BT = F.pad(tokens_1T, side, value=tokenizer.pad_token_id), F.pad(mask_1T, side)
        scores[how] = float(score(engine, tokens_BT.to(engine.device), mask_BT.to(engine.device)))
    return scores


@torch.no_grad()
def _score_of_folder(folder: Path, tokenizer: Any, precision: str) -> float:
    whole = load_scalar(folder).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return float(whole.score(*_fixed_text(tokenizer)))


def _fixed_text(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """(tokens_1T, mask_1T)"""
    ids = format_of(tokenizer).encode_response([Message("user", FIXED_TEXT[0])], FIXED_TEXT[1])
    return torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)
