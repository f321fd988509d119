"""One step off-policy, in a world of which every answer is known: who sampled what, and what makes up for it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.closed_form import LENGTH, settings
from benchmarks.small_world import PAD, World, trainer_of
from benchmarks.worker_group import one_iteration
from rlhf.config import PPOConfig
from rlhf.data import next_prompts
from rlhf.ppo import trainer as trainer_module
from rlhf.ppo.trainer import PPOTrainer
from rlhf.ppo.weight_sync import sync_weights

ITERATIONS = 4
GROUPS: dict[str, Any] = {"advantage": "grpo", "group_size": 4}


@pytest.fixture(scope="module")
def world() -> World:
    return World(LENGTH)


def settings_of(off_policy: bool, **changed: Any) -> PPOConfig:
    given = settings(0.5, ITERATIONS)
    optim = given.optim.model_copy(update={"lr": 0.03, "schedule": "constant", "warmup_ratio": 0.0})
    sampling = given.sampling.model_copy(update={"one_step_off_policy": off_policy})
    small = {"sampling": sampling, "batch_size": 32, "minibatch_size": 16, "optim": optim, "critic_optim": optim}
    return given.model_copy(update=small | changed)


def start(world: World, off_policy: bool = True, **changed: Any) -> PPOTrainer:
    """A trainer that has made no iteration yet; `changed` over the ordinary settings."""
    return trainer_of(world, settings_of(off_policy, **changed))


def iterate(trainer: PPOTrainer, count: int) -> list[dict[str, float]]:
    return [one_iteration(trainer) for _ in range(count)]


def policy(trainer: PPOTrainer) -> Any:
    return trainer.models.policy.module.causal


def weights(trainer: PPOTrainer) -> list[torch.Tensor]:
    engines = trainer.models.engines().values()
    return [tensor.clone() for engine in engines for tensor in engine.module.state_dict().values()]


def assert_same(one: PPOTrainer, other: PPOTrainer) -> None:
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights(one), weights(other), strict=True))


# --- who sampled what -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(world: World) -> SimpleNamespace:
    """A run with the policy before each of its updates, and the experience that it learned from."""
    run = SimpleNamespace(trainer=start(world), before=[], rollouts=[], experience=[])
    with pytest.MonkeyPatch.context() as patch:
        update, make_experience = trainer_module.update, trainer_module.make_experience

        def watch_update(*given: Any, **named: Any) -> Any:
            run.before.append(copy.deepcopy(policy(run.trainer)))
            run.experience.append(given[2])
            return update(*given, **named)

        def watch_rollout(rollout: Any, *rest: Any) -> Any:
            run.rollouts.append(rollout)
            return make_experience(rollout, *rest)

        patch.setattr(trainer_module, "update", watch_update)
        patch.setattr(trainer_module, "make_experience", watch_rollout)
        run.metrics = iterate(run.trainer, ITERATIONS)
    return run


@torch.no_grad()
def by_transformers(model: Any, rollout: Any) -> torch.Tensor:
    """logprobs_BR of the answers, row by row without padding; 0 behind their ends."""
    out_BR = torch.zeros(rollout.response_mask_BR.shape)
    for row, (tokens_T, mask_T) in enumerate(zip(rollout.tokens_BT, rollout.mask_BT, strict=True)):
        n, tokens = int(rollout.response_mask_BR[row].sum()), tokens_T[mask_T]
        logprobs_TV = torch.log_softmax(model(tokens[None]).logits[0], -1)
        out_BR[row, :n] = logprobs_TV[-n - 1 : -1].gather(1, tokens[-n:, None])[:, 0]
    return out_BR


def test_answers_come_from_the_policy_of_one_update_earlier(watched):
    assert [metrics["ppo/staleness"] for metrics in watched.metrics] == [0.0] + [1.0] * (ITERATIONS - 1)
    for number, rollout in enumerate(watched.rollouts):
        told_BR = torch.where(rollout.response_mask_BR, rollout.behaviour_logprobs_BR, 0.0)
        torch.testing.assert_close(
            told_BR, by_transformers(watched.before[max(number - 1, 0)], rollout), atol=1e-5, rtol=0
        )
        assert not (rollout.tokens_BT[:, -LENGTH:][~rollout.response_mask_BR] != PAD).any()


def test_the_update_starts_from_the_policy_of_now_and_weighs_each_token(watched):
    """w = min(π / μ, 2): μ sampled the token, π is the policy that the update begins with."""
    cut = 0
    for number, (rollout, experience) in enumerate(zip(watched.rollouts, watched.experience, strict=True)):
        now_BR = by_transformers(watched.before[number], rollout)
        torch.testing.assert_close(experience.old_logprobs_BR, now_BR, atol=1e-5, rtol=0)
        ratio_BR = (now_BR - by_transformers(watched.before[max(number - 1, 0)], rollout)).exp()
        expected_BR = torch.where(rollout.response_mask_BR, ratio_BR.clamp(max=2.0), 0.0)
        torch.testing.assert_close(experience.importance_BR, expected_BR, atol=1e-4, rtol=0)
        if number:
            share = float((ratio_BR > 2).sum() / rollout.response_mask_BR.sum())
            assert watched.metrics[number]["ppo/tis_clip_fraction"] == pytest.approx(share)
            gap_BR = ratio_BR.log().abs()[rollout.response_mask_BR]
            assert watched.metrics[number]["ppo/rollout_logprob_diff_mean"] == pytest.approx(
                float(gap_BR.mean()), abs=1e-4
            )
            assert gap_BR.mean() > 0.05  # an update moves these policies by far more than rounding
            cut += share > 0
    assert cut


def test_its_seconds_are_told_apart(watched):
    for number, metrics in enumerate(watched.metrics, 1):
        assert (metrics["perf/overlapped_seconds_sampling"] > 0) == (number < ITERATIONS)
        assert metrics["perf/overlapped_seconds_scoring"] == metrics["perf/overlapped_seconds_update"] == 0


def test_nothing_is_sampled_for_an_iteration_that_does_not_come(watched):
    assert watched.trainer.source.prefetched.rollout is None


# --- what comes in between --------------------------------------------------------------------------------------------


def test_an_evaluation_in_between_changes_nothing(world, watched):
    trainer, metrics = start(world), []
    for _ in range(ITERATIONS):
        metrics += iterate(trainer, 1)
        sync_weights(trainer.models.policy, trainer.models.sampler)
        batch = next_prompts(trainer.models.tokenizer, trainer._setup.prompts, trainer.config, 77)
        trainer.models.sampler.sample(batch, trainer.config.ppo.sampling, 0, 77)
    assert_same(trainer, watched.trainer)
    told = [[one["perf/tokens_sampling_dropped"] for one in each] for each in (metrics, watched.metrics)]
    assert told[0] == told[1]


@pytest.mark.parametrize("changed", [{}, GROUPS], ids=["gae", "grpo"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint(world, tmp_path: Path, off_policy, changed):
    whole, first, second = (start(world, off_policy, **changed) for _ in range(3))
    for trainer in (first, second):
        trainer.context = dataclasses.replace(trainer.context, folder=tmp_path)
    expected = iterate(whole, ITERATIONS)
    iterate(first, 2)
    first._save_checkpoint()
    second._restore()
    assert second.state == first.state
    found = iterate(second, ITERATIONS - 2)
    assert_same(second, whole)
    assert [untimed(one) for one in found] == [untimed(one) for one in expected[2:]]
    assert found[0]["ppo/staleness"] == off_policy


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("ppo/")}
