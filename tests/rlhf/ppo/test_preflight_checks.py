"""Each check of rlhf/ppo/preflight_checks.py fails when the thing itself is broken, and passes when it is not."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from typing import Any

import pytest
import torch
import torch.distributed as dist

from reward_data import Message, Prompt
from rlhf.config import HardwareConfig, PPOConfig
from rlhf.distributed.engine import LocalEngine
from rlhf.errors import UserError
from rlhf.generation import InProcessSampler
from rlhf.models.policy import PolicyModel
from rlhf.ppo import preflight_checks
from rlhf.ppo.preflight_checks import CheckResult, agree
from rlhf.rewards import FunctionReward, ModelReward, Responses, RewardSet, weighted_sum

EOS, PAD = 2, 0
PROMPT = Prompt((Message("user", "hi"),), "helpful", "x:1")


def passes(result: CheckResult) -> bool:
    return result.figure <= result.limit


def engine(module):
    return LocalEngine(module, None, 1, HardwareConfig())


@pytest.fixture
def policy(make_llama):
    return engine(PolicyModel(make_llama(0)))


@pytest.fixture
def scores_of(iteration, make_llama, make_scalar, models_of, scores_by, ppo_config):
    """scores_of(policy, reference seed, temperature) of the iteration's rollout."""

    def read(policy, reference=0, temperature=0.7):
        models = models_of(policy.module, PolicyModel(make_llama(reference)), only=make_scalar(3))
        sampling = ppo_config.sampling.model_copy(update={"temperature": temperature})
        return scores_by(iteration.rollout, models, ppo_config.model_copy(update={"sampling": sampling}))

    return read


# --- the policy and itself ------------------------------------------------------------------------------------------


def test_the_first_ratio_is_one(iteration, policy, scores_of, ppo_config):
    result = preflight_checks.first_ratio(policy, iteration.rollout, scores_of(policy), ppo_config, "float32")
    assert passes(result) and result.limit == 1e-6


@pytest.mark.parametrize(("precision", "temperature"), [("float32", 0.70001), ("bf16", 0.8)])
def test_scoring_at_another_temperature_is_found(iteration, policy, scores_of, ppo_config, precision, temperature):
    scores = scores_of(policy, temperature=temperature)
    assert not passes(preflight_checks.first_ratio(policy, iteration.rollout, scores, ppo_config, precision))


def test_dropout_is_found(iteration, make_llama, scores_of, ppo_config):
    llama = make_llama(0)
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.1
    policy = engine(PolicyModel(llama.train()))
    assert not passes(preflight_checks.first_ratio(policy, iteration.rollout, scores_of(policy), ppo_config, "float32"))


def test_a_policy_of_nan_is_found(iteration, policy, scores_of, ppo_config):
    scores = dataclasses.replace(scores_of(policy), logprobs_BR=torch.full((8, 9), math.nan))
    assert not passes(preflight_checks.first_ratio(policy, iteration.rollout, scores, ppo_config, "float32"))


def test_the_policy_is_the_reference(iteration, policy, scores_of):
    assert passes(preflight_checks.same_as_reference(scores_of(policy), iteration.rollout, "float32"))


def test_another_reference_is_found(iteration, policy, scores_of):
    for precision in ("float32", "bf16"):
        assert not passes(
            preflight_checks.same_as_reference(scores_of(policy, reference=1), iteration.rollout, precision)
        )


def test_one_weight_that_moved_is_found(iteration, make_llama, scores_of):
    llama = make_llama(0)
    with torch.no_grad():
        llama.lm_head.weight[5, 3] += 1e-3
    scores = scores_of(engine(PolicyModel(llama)))
    assert not passes(preflight_checks.same_as_reference(scores, iteration.rollout, "float32"))


# --- masks ----------------------------------------------------------------------------------------------------------


def with_masks(rollout, mask_BR):
    P = rollout.mask_BT.shape[1] - mask_BR.shape[1]
    return dataclasses.replace(
        rollout, response_mask_BR=mask_BR, mask_BT=torch.cat([rollout.mask_BT[:, :P], mask_BR], 1)
    )


def test_sampled_masks_end_with_eos(iteration):
    assert iteration.rollout.finished_B.any() and not iteration.rollout.finished_B.all()
    assert passes(preflight_checks.broken_ends(iteration.rollout, [EOS], PAD))


def test_masks_made_by_comparing_with_a_pad_that_is_eos_are_found(iteration):
    rollout = iteration.rollout
    without_eos_BR = rollout.response_mask_BR & (rollout.tokens_BT[:, -9:] != EOS)
    found = preflight_checks.broken_ends(with_masks(rollout, without_eos_BR), [EOS], PAD)
    assert found.figure == rollout.finished_B.sum()


def test_a_token_after_eos_is_found(iteration):
    rollout = iteration.rollout
    length_B = rollout.response_mask_BR.sum(1)
    one_more_BR = torch.arange(9) < (length_B + 1)[:, None]
    longer = rollout.finished_B & (length_B < 9)
    assert preflight_checks.broken_ends(with_masks(rollout, one_more_BR), [EOS], PAD).figure >= longer.sum() > 0


def test_an_end_that_nobody_noted_is_found(iteration):
    rollout = dataclasses.replace(iteration.rollout, finished_B=torch.zeros(8, dtype=torch.bool))
    assert preflight_checks.broken_ends(rollout, [EOS], PAD).figure == iteration.rollout.finished_B.sum()


def test_a_mask_that_the_models_do_not_see_is_found(iteration):
    mask_BT = iteration.rollout.mask_BT.clone()
    mask_BT[2, -9] = False
    rollout = dataclasses.replace(iteration.rollout, mask_BT=mask_BT)
    assert preflight_checks.broken_ends(rollout, [EOS], PAD).figure == 1


def test_a_pad_token_that_is_eos_is_found(iteration):
    assert not passes(preflight_checks.broken_ends(iteration.rollout, [EOS], EOS))
    assert not passes(preflight_checks.broken_ends(iteration.rollout, [EOS, PAD], PAD))


def test_another_stop_id_inside_an_answer_is_found(iteration):
    rollout = iteration.rollout
    inside = int(rollout.tokens_BT[0, -9])  # the first token of an answer
    found = preflight_checks.broken_ends(rollout, [EOS, inside], PAD).figure
    answers = [row[-9:][mask].tolist() for row, mask in zip(rollout.tokens_BT, rollout.response_mask_BR, strict=True)]
    ended = zip(answers, rollout.finished_B.tolist(), strict=True)
    assert found == sum(inside in (answer[:-1] if done else answer) for answer, done in ended) > 0


# --- weights of the sampler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_synced_sampler_passes_also_in_bf16(make_llama, policy, precision):
    assert passes(preflight_checks.synced(policy, InProcessSampler(make_llama(0), [EOS], PAD, precision).model))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_one_weight_that_differs_by_one_bit_is_found(make_llama, policy, precision):
    sampler = InProcessSampler(make_llama(0), [EOS], PAD, precision)
    model: Any = sampler.model
    weight = model.lm_head.weight
    with torch.no_grad():
        weight[7, 9] = torch.nextafter(weight[7, 9], torch.ones(()).to(weight.dtype) * 9)
    found = preflight_checks.synced(policy, model)
    assert found.figure == 1 and "lm_head.weight" in found.look_at


def test_a_weight_that_only_one_of_them_has_is_found(make_llama, policy):
    model = make_llama(0)
    model.extra = torch.nn.Parameter(torch.zeros(1))
    assert preflight_checks.synced(policy, model).figure == 1
    assert preflight_checks.synced(engine(PolicyModel(model)), make_llama(0)).figure == 1


def test_a_sampler_of_other_weights_or_another_temperature_is_found(iteration, policy, make_llama, scores_of):
    assert passes(preflight_checks.sampler_agrees(iteration.rollout, scores_of(policy), "float32"))
    other = engine(PolicyModel(make_llama(7)))
    for precision in ("float32", "bf16"):
        assert not passes(preflight_checks.sampler_agrees(iteration.rollout, scores_of(other), precision))
    assert not passes(
        preflight_checks.sampler_agrees(iteration.rollout, scores_of(policy, temperature=0.72), "float32")
    )


def test_what_a_sampler_says_of_padding_does_not_count(iteration, policy, scores_of):
    scores = scores_of(policy)
    wild_BR = torch.where(iteration.rollout.response_mask_BR, scores.logprobs_BR, 99.0)
    wild = dataclasses.replace(scores, logprobs_BR=wild_BR)
    assert passes(preflight_checks.sampler_agrees(iteration.rollout, wild, "float32"))


def test_a_checksum_is_of_the_bits_and_their_order():
    tensor = torch.randn(3, 5)
    assert preflight_checks.checksum(tensor) == preflight_checks.checksum(tensor.clone(), piece=4)
    assert preflight_checks.checksum(tensor) != preflight_checks.checksum(tensor.flip(0))
    assert preflight_checks.checksum(torch.zeros(3)) != preflight_checks.checksum(torch.tensor([0.0, -0.0, 0.0]))
    by_hand = torch.tensor([7, -3, 5], dtype=torch.int16)
    assert preflight_checks.checksum(by_hand.view(torch.bfloat16)) == 7 * 1 - 3 * 3 + 5 * 5


# --- rewards --------------------------------------------------------------------------------------------------------


def of_rewards(**rewards):
    return preflight_checks.rewards_work(RewardSet(rewards, weighted_sum([1.0] * len(rewards))))


def test_a_function_may_leave_out_rows(make_scalar, iteration):
    """A reward model cannot fail, so it is not among the checks."""
    model = ModelReward(engine(make_scalar(3)), PPOConfig())
    works = FunctionReward("works", lambda responses: [None] * len(responses))
    works(Responses(iteration.rollout, [PROMPT] * 8, ["a"] * 8))
    (result,) = of_rewards(model=model, works=works)
    assert passes(result) and (result.name, result.figure) == ("reward.works", 0.0)


def test_a_function_that_raises_is_found_with_its_failure(iteration):
    broken = FunctionReward("broken", lambda responses: 1 / 0)
    broken(Responses(iteration.rollout, [PROMPT] * 8, ["a"] * 8))
    (result,) = of_rewards(broken=broken)
    assert not passes(result)
    with pytest.raises(UserError, match=r"reward\.broken: .* is 1, .*ZeroDivisionError: division by zero"):
        agree([result])


# --- verdict --------------------------------------------------------------------------------------------------------


def result(figure: float, name: str = "x") -> CheckResult:
    return CheckResult(name, figure, 0.5, "the distance", "Look there.")


def test_results_within_their_limits_become_tags():
    assert agree([result(0.5), result(0.0, "y")]).keys() == {"check.x", "check.y"}


@pytest.mark.parametrize("figure", [0.51, math.inf, math.nan])
def test_a_result_past_its_limit_stops_with_its_name_and_what_to_look_at(figure):
    with pytest.raises(UserError, match=r"x: the distance is .*, at most 0\.5 is allowed\. Look there\.") as caught:
        agree([result(0.0, "y"), result(figure)])
    assert caught.value.exit_code == 6
    assert "y:" not in caught.value.message


def on_a_rank(rank, store, results):
    """Only the second rank finds something."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        agree([result(0.0, "y"), result(math.nan if rank else 0.0)])
        results.put("passed")
    except UserError as error:
        results.put(error.message)
    dist.destroy_process_group()


@pytest.mark.integration
def test_all_ranks_stop_for_what_one_of_them_found(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=on_a_rank, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for process in processes:
        process.start()
    first, second = (results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert first == second and "x: the distance is nan" in first
