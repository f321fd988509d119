"""What models say of a rollout, against plain forward passes of one unpadded row."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from rlhf.config import HardwareConfig, PPOConfig, SamplingConfig
from rlhf.data.batches import Rollout
from rlhf.distributed.engine import LocalEngine
from rlhf.models.policy import PolicyModel
from rlhf.ppo.scoring import read_kl, read_rewards, score_rollout

TEMPERATURE = 0.7
CONFIG = PPOConfig(micro_batch_size=8, sampling=SamplingConfig(temperature=TEMPERATURE))


@pytest.fixture
def engines(make_llama, make_scalar):
    modules = {
        "policy": PolicyModel(make_llama(0)),
        "reference": PolicyModel(make_llama(1)),
        "critic": make_scalar(2),
        "helpful": make_scalar(3, offset=0.5),
        "safety": make_scalar(4, offset=-2.0),
    }
    return {name: LocalEngine(module, None, 1, HardwareConfig()) for name, module in modules.items()}


def read(rollout, engines, **settings):
    return score_rollout(rollout, **engines, config=CONFIG.model_copy(update=settings))


def unpadded(rollout, i):
    """(tokens of row i, length of its prompt, length of its answer)."""
    answer = int(rollout.response_mask_BR[i].sum())
    tokens = rollout.tokens_BT[i][rollout.mask_BT[i]]
    return tokens, len(tokens) - answer, answer


@pytest.mark.parametrize(("name", "seed"), [("logprobs_BR", 0), ("ref_logprobs_BR", 1)])
@torch.no_grad()
def test_logprobs_are_of_the_answers_tokens_at_the_sampling_temperature(iteration, engines, make_llama, name, seed):
    got = getattr(read(iteration.rollout, engines), name)
    for i in range(8):
        tokens, prompt, answer = unpadded(iteration.rollout, i)
        logits = make_llama(seed)(tokens[None]).logits[0]
        expected = [
            float(torch.log_softmax(logits[t - 1] / TEMPERATURE, -1)[tokens[t]]) for t in range(prompt, len(tokens))
        ]
        assert got[i, :answer].tolist() == pytest.approx(expected, abs=1e-5)


def test_padding_has_no_logprobs(iteration, engines):
    got = read(iteration.rollout, engines)
    assert not got.logprobs_BR[~iteration.rollout.response_mask_BR].any()


@torch.no_grad()
def test_a_value_comes_from_the_position_before_its_token(iteration, engines, make_scalar):
    got, critic = read(iteration.rollout, engines).values_BR, make_scalar(2)
    for i in range(8):
        tokens, prompt, answer = unpadded(iteration.rollout, i)
        for t in range(answer):
            before = tokens[None, : prompt + t]  # causal: what comes later cannot matter
            expected = float(critic(before, torch.ones_like(before))[0, -1])
            assert float(got[i, t]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "seed", "offset"), [("helpful_B", 3, 0.5), ("safety_B", 4, -2.0), ("safety_logit_B", 4, 0.0)]
)
@torch.no_grad()
def test_a_score_is_read_at_the_last_token_less_the_offset(iteration, engines, make_scalar, name, seed, offset):
    got, model = getattr(read(iteration.rollout, engines), name), make_scalar(seed)
    for i in range(8):
        tokens, _, _ = unpadded(iteration.rollout, i)
        expected = float(model(tokens[None], torch.ones_like(tokens[None]))[0, -1]) - offset
        assert float(got[i]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "limit", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"micro_batch_tokens": 25}, {"micro_batch_tokens": 1}]
)
@pytest.mark.parametrize("packing", [False, True])
def test_neither_the_size_of_forward_passes_nor_packing_changes_anything(iteration, engines, limit, packing):
    together = read(iteration.rollout, engines)
    for engine in engines.values():
        engine.module.packing = packing
    apart = read(iteration.rollout, engines, **limit, packing=packing)
    for name, expected in vars(together).items():
        gap = getattr(apart, name) - expected
        assert (gap if gap.dim() == 1 else gap[iteration.rollout.response_mask_BR]).abs().max() < 1e-5


def test_padding_on_both_sides_changes_nothing(iteration, engines):
    given = iteration.rollout
    wide = Rollout(
        tokens_BT=F.pad(given.tokens_BT, (2, 3), value=5),
        mask_BT=F.pad(given.mask_BT, (2, 3)),
        response_mask_BR=F.pad(given.response_mask_BR, (0, 3)),
        behaviour_logprobs_BR=F.pad(given.behaviour_logprobs_BR, (0, 3)),
        finished_B=given.finished_B,
    )
    got, expected = read(wide, engines), read(given, engines)
    for name in ("helpful_B", "safety_B"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-5, rtol=0)
    for name in ("logprobs_BR", "ref_logprobs_BR", "values_BR"):
        gap = (getattr(got, name)[:, :9] - getattr(expected, name))[given.response_mask_BR]
        assert gap.abs().max() < 1e-5


def test_scores_carry_no_gradient_even_from_models_that_learn(iteration, engines):
    for engine in engines.values():
        engine.module.requires_grad_(True)
    scores = read(iteration.rollout, engines)
    assert not any(value.requires_grad for value in vars(scores).values())


def test_one_reward_model_in_both_roles_reads_once(iteration, engines):
    calls = []
    engines["safety"] = engines["helpful"]
    engines["helpful"].module.register_forward_hook(lambda *_: calls.append(1))
    scores = read(iteration.rollout, engines)
    assert torch.equal(scores.safety_B, scores.helpful_B)
    assert len(calls) == 1


def test_rewards_of_every_judge(iteration, engines):
    config = CONFIG.model_copy(update={"micro_batch_size": 3})
    rewards = read_rewards(iteration.rollout, {"h": engines["helpful"], "s": engines["safety"]}, config)
    expected = read(iteration.rollout, engines)
    torch.testing.assert_close(rewards["h"], expected.helpful_B, atol=1e-5, rtol=0)
    torch.testing.assert_close(rewards["s"], expected.safety_B, atol=1e-5, rtol=0)


def test_kl_is_the_sum_over_the_real_tokens_of_an_answer(iteration, engines):
    given = iteration.rollout
    filled = torch.where(given.response_mask_BR, given.behaviour_logprobs_BR, float("nan"))
    kl = read_kl(dataclasses.replace(given, behaviour_logprobs_BR=filled), engines["reference"], CONFIG)
    reference = read(given, engines).ref_logprobs_BR
    for i in range(8):
        n = int(given.response_mask_BR[i].sum())
        expected = sum((given.behaviour_logprobs_BR[i, :n] - reference[i, :n]).tolist())
        assert float(kl[i]) == pytest.approx(expected, abs=1e-4)


def test_kl_of_a_policy_against_itself_is_zero(iteration, engines):
    assert read_kl(iteration.rollout, engines["policy"], CONFIG).abs().max() < 1e-4
