"""Sampling one iteration ahead, in a world of which every answer is known: who sampled what, and what makes up for it."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.closed_form import LENGTH, settings
from benchmarks.small_world import PAD, PROMPTS, World, alone, open_models, world_config
from reward_data import Message, Prompt
from rlhf.ppo.step_profiler import PhaseTimer
from rlhf.runs import checkpoint
from stages import ppo

ITERATIONS = 4
GIVEN = [Prompt((Message("user", text),), "helpful", "small world") for text in PROMPTS]


@pytest.fixture(scope="module")
def world() -> World:
    return World(LENGTH)


def start(world: World, **sampling: Any) -> SimpleNamespace:
    """A run that has made no iteration yet; `sampling` over the ordinary settings."""
    given = settings(0.5, ITERATIONS)
    optim = given.optim.model_copy(update={"lr": 0.03, "schedule": "constant", "warmup_ratio": 0.0})
    changed = {"sampling": given.sampling.model_copy(update=sampling), "batch_size": 32, "minibatch_size": 16}
    config = world_config(given.model_copy(update=changed | {"optim": optim, "critic_optim": optim}), seed=0)
    return SimpleNamespace(
        config=config,
        context=alone(),
        models=open_models(world, config.ppo),
        state={"iteration": 0, "beta": config.ppo.kl_coef},
        metrics=[],
    )


def iterate(run: SimpleNamespace, count: int) -> None:
    for _ in range(count):
        run.state["iteration"] += 1
        timer = PhaseTimer(run.context.device)
        run.metrics.append(ppo.iterate(run.config, run.context, run.models, GIVEN, run.state, timer) | timer.close())


def policy(run: SimpleNamespace) -> Any:
    return run.models.policy.module.causal


def weights(run: SimpleNamespace) -> list[torch.Tensor]:
    engines = (run.models.policy, run.models.critic)
    return [tensor.clone() for engine in engines for tensor in engine.module.state_dict().values()]


def assert_same(run: SimpleNamespace, other: SimpleNamespace) -> None:
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights(run), weights(other), strict=True))


# --- who sampled what -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(world: World) -> SimpleNamespace:
    """A run with the policy before each of its updates, and the experience that it learned from."""
    run = start(world, ahead=True)
    run.before, run.rollouts, run.experience = [], [], []
    with pytest.MonkeyPatch.context() as patch:
        update, make_experience = ppo.update, ppo.make_experience

        def watch_update(*given: Any, **named: Any) -> Any:
            run.before.append(copy.deepcopy(policy(run)))
            run.experience.append(given[2])
            return update(*given, **named)

        def watch_rollout(rollout: Any, *rest: Any) -> Any:
            run.rollouts.append(rollout)
            return make_experience(rollout, *rest)

        patch.setattr(ppo, "update", watch_update)
        patch.setattr(ppo, "make_experience", watch_rollout)
        iterate(run, ITERATIONS)
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
    assert watched.models.ahead.rollout is None


# --- what comes in between --------------------------------------------------------------------------------------------


def test_an_evaluation_in_between_changes_nothing(world, watched):
    run = start(world, ahead=True)
    for _ in range(ITERATIONS):
        iterate(run, 1)
        ppo._sync(run.models)
        batch = ppo.next_prompts(run.models.tokenizer, GIVEN, run.config, 77)
        run.models.sampler.sample(batch, run.config.ppo.sampling, 0, 77)
    assert_same(run, watched)
    told = [[metrics["perf/tokens_sampling_dropped"] for metrics in each.metrics] for each in (run, watched)]
    assert told[0] == told[1]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_run_goes_on_bit_for_bit_from_a_checkpoint(world, tmp_path: Path, ahead):
    whole, first, second = (start(world, ahead=ahead) for _ in range(3))
    iterate(whole, ITERATIONS)
    iterate(first, 2)
    checkpoint.save(tmp_path, 2, ppo._parts(first.models), first.state)
    restored = checkpoint.restore(tmp_path, ppo._parts(second.models))
    assert restored is not None
    second.state = restored
    iterate(second, ITERATIONS - 2)
    assert_same(second, whole)
    assert second.metrics[0]["ppo/staleness"] == ahead
