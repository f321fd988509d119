"""What models say of a rollout, against plain forward passes of one unpadded row."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from rlhf.config import PPOConfig, SamplingConfig
from rlhf.data.batches import Rollout
from rlhf.models.policy import PolicyModel
from rlhf.ppo.scoring import sequence_kl

TEMPERATURE = 0.7
CONFIG = PPOConfig(micro_batch_size=8, sampling=SamplingConfig(temperature=TEMPERATURE))


@pytest.fixture
def models(make_llama, make_scalar, models_of):
    helpful, safety = make_scalar(3, offset=0.5), make_scalar(4, offset=-2.0)
    return models_of(
        PolicyModel(make_llama(0)), PolicyModel(make_llama(1)), make_scalar(2), helpful=helpful, safety=safety
    )


@pytest.fixture
def scored(scores_by):
    """scored(rollout, models, …) → Scores"""
    return lambda rollout, models, **settings: scores_by(rollout, models, CONFIG.model_copy(update=settings))


def unpadded(rollout, i):
    """(tokens of row i, length of its prompt, length of its answer)."""
    answer = int(rollout.response_mask_BR[i].sum())
    tokens = rollout.tokens_BT[i][rollout.mask_BT[i]]
    return tokens, len(tokens) - answer, answer


@pytest.mark.parametrize(("name", "seed"), [("logprobs_BR", 0), ("ref_logprobs_BR", 1)])
@torch.no_grad()
def test_logprobs_are_of_the_answers_tokens_at_the_sampling_temperature(
    iteration, models, scored, make_llama, name, seed
):
    got = getattr(scored(iteration.rollout, models), name)
    for i in range(8):
        tokens, prompt, answer = unpadded(iteration.rollout, i)
        logits = make_llama(seed)(tokens[None]).logits[0]
        expected = [
            float(torch.log_softmax(logits[t - 1] / TEMPERATURE, -1)[tokens[t]]) for t in range(prompt, len(tokens))
        ]
        assert got[i, :answer].tolist() == pytest.approx(expected, abs=1e-5)


def test_padding_has_no_logprobs(iteration, models, scored):
    got = scored(iteration.rollout, models)
    assert not got.logprobs_BR[~iteration.rollout.response_mask_BR].any()


@torch.no_grad()
def test_a_value_comes_from_the_position_before_its_token(iteration, models, scored, make_scalar):
    got, critic = scored(iteration.rollout, models).values_BR, make_scalar(2)
    for i in range(8):
        tokens, prompt, answer = unpadded(iteration.rollout, i)
        for t in range(answer):
            before = tokens[None, : prompt + t]  # causal: what comes later cannot matter
            expected = float(critic(before, torch.ones_like(before))[0, -1])
            assert float(got[i, t]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("column", "seed", "offset"), [(0, 3, 0.5), (1, 4, -2.0)])
@torch.no_grad()
def test_a_score_is_read_at_the_last_token_less_the_offset(
    iteration, models, scored, make_scalar, column, seed, offset
):
    scores, model = scored(iteration.rollout, models), make_scalar(seed)
    for i in range(8):
        tokens, _, _ = unpadded(iteration.rollout, i)
        expected = float(model(tokens[None], torch.ones_like(tokens[None]))[0, -1]) - offset
        assert float(scores.rewards_BN[i, column]) == pytest.approx(expected, abs=1e-5)
    assert not scores.failed_BN.any()


@torch.no_grad()
def test_without_a_critic_values_are_zero_and_all_else_is_as_it_was(iteration, models, scored):
    expected, got = (scored(iteration.rollout, m) for m in (models, dataclasses.replace(models, critic=None)))
    assert got.values_BR.shape == expected.values_BR.shape and not got.values_BR.any()
    assert expected.values_BR.any()
    for name in ("logprobs_BR", "ref_logprobs_BR", "rewards_BN"):
        assert torch.equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize(
    "limit", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"micro_batch_tokens": 25}, {"micro_batch_tokens": 1}]
)
@pytest.mark.parametrize("packing", [False, True])
def test_neither_the_size_of_forward_passes_nor_packing_changes_anything(iteration, models, scored, limit, packing):
    together = scored(iteration.rollout, models)
    for module in models.all_scoring:
        module.packing = packing
    apart = scored(iteration.rollout, models, **limit, packing=packing)
    for name, expected in vars(together).items():
        gap = getattr(apart, name).float() - expected.float()
        assert (gap[iteration.rollout.response_mask_BR] if name.endswith("_BR") else gap).abs().max() < 1e-5


def test_padding_on_both_sides_changes_nothing(iteration, models, scored):
    given = iteration.rollout
    wide = Rollout(
        tokens_BT=F.pad(given.tokens_BT, (2, 3), value=5),
        mask_BT=F.pad(given.mask_BT, (2, 3)),
        response_mask_BR=F.pad(given.response_mask_BR, (0, 3)),
        behaviour_logprobs_BR=F.pad(given.behaviour_logprobs_BR, (0, 3)),
        finished_B=given.finished_B,
    )
    got, expected = scored(wide, models), scored(given, models)
    torch.testing.assert_close(got.rewards_BN, expected.rewards_BN, atol=1e-5, rtol=0)
    for name in ("logprobs_BR", "ref_logprobs_BR", "values_BR"):
        gap = (getattr(got, name)[:, :9] - getattr(expected, name))[given.response_mask_BR]
        assert gap.abs().max() < 1e-5


def test_scores_carry_no_gradient_even_from_models_that_learn(iteration, models, scored):
    for module in models.all_scoring:
        module.requires_grad_(True)
    scores = scored(iteration.rollout, models)
    assert not any(value.requires_grad for value in vars(scores).values())


def test_kl_is_the_sum_over_the_real_tokens_of_an_answer(iteration, models, scored):
    given = iteration.rollout
    filled = torch.where(given.response_mask_BR, given.behaviour_logprobs_BR, float("nan"))
    kl = sequence_kl(dataclasses.replace(given, behaviour_logprobs_BR=filled), models.reference, CONFIG)
    reference = scored(given, models).ref_logprobs_BR
    for i in range(8):
        n = int(given.response_mask_BR[i].sum())
        expected = sum((given.behaviour_logprobs_BR[i, :n] - reference[i, :n]).tolist())
        assert float(kl[i]) == pytest.approx(expected, abs=1e-4)


def test_kl_of_a_policy_against_itself_is_zero(iteration, models):
    assert sequence_kl(iteration.rollout, models.policy, CONFIG).abs().max() < 1e-4
