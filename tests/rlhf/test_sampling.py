"""Sampling against plain forward passes, an own SplitMix64 and a chi-square test."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf.batches import rows
from rlhf.policy import PolicyModel
from rlhf.sampling import InProcessSampler, inprocess, keyed_uniform, pick_token

EOS, PAD, R = 2, 0, 9


@pytest.fixture
def sample(make_llama, prompts, ppo_config):
    """sample(…) answers the prompts; what is not given is the common case."""

    def sample(given=prompts, iteration=1, seed=0, eos=EOS, **settings):
        sampler = InProcessSampler(make_llama(0), eos, PAD)
        return sampler.sample(given, ppo_config.sampling.model_copy(update=settings), seed, iteration)

    return sample


def answers(rollout):
    """The answer tokens of each row."""
    tokens_BR = rollout.tokens_BT[:, -rollout.response_mask_BR.shape[1] :]
    return [row[mask].tolist() for row, mask in zip(tokens_BR, rollout.response_mask_BR, strict=True)]


# --- logprobs -------------------------------------------------------------------------------------------------------


def test_behaviour_logprobs_are_those_of_plain_forward_passes_without_padding(sample, make_llama, prompts):
    rollout, llama = sample(), make_llama(0)
    for i, answer in enumerate(answers(rollout)):
        prompt = prompts.tokens_BP[i][prompts.mask_BP[i]].tolist()
        with torch.no_grad():
            logits_TV = llama(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits_TV / 0.7, -1)[range(len(answer)), answer]
        torch.testing.assert_close(rollout.behaviour_logprobs_BR[i, : len(answer)], expected, atol=1e-5, rtol=0)


def test_positions_count_real_tokens(prompts, ppo_config):
    """In a model whose positions are absolute, padding would otherwise move them."""
    config = GPT2Config(vocab_size=12, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    model = GPT2LMHeadModel(config).eval()
    alone = [InProcessSampler(model, EOS, PAD).sample(rows(prompts, [i]), ppo_config.sampling, 0, 1) for i in range(8)]
    together = InProcessSampler(model, EOS, PAD).sample(prompts, ppo_config.sampling, 0, 1)
    assert answers(together) == [answers(rollout)[0] for rollout in alone]
    read_BR, _ = PolicyModel(model)(together.tokens_BT, together.mask_BT, R, 0.7)
    gap_BR = torch.where(together.response_mask_BR, read_BR - together.behaviour_logprobs_BR, 0.0)
    assert gap_BR.abs().max() < 1e-4


def test_the_training_model_reads_the_same_logprobs(sample, make_llama):
    rollout = sample()
    read_BR, _ = PolicyModel(make_llama(0))(rollout.tokens_BT, rollout.mask_BT, R, 0.7)
    gap_BR = torch.where(rollout.response_mask_BR, read_BR - rollout.behaviour_logprobs_BR, 0.0)
    assert gap_BR.abs().max() < 1e-5


def test_a_sampler_in_bf16_stays_near_and_reports_float32(make_llama, prompts, ppo_config):
    rollout = InProcessSampler(make_llama(0), EOS, PAD, "bf16").sample(prompts, ppo_config.sampling, 0, 1)
    read_BR, _ = PolicyModel(make_llama(0))(rollout.tokens_BT, rollout.mask_BT, R, 0.7)
    gap_BR = torch.where(rollout.response_mask_BR, read_BR - rollout.behaviour_logprobs_BR, 0.0).abs()
    assert rollout.behaviour_logprobs_BR.dtype == torch.float32
    assert 0 < gap_BR.max() < 0.1


def test_a_sampler_in_bf16_knows_where_a_token_stands(make_llama):
    """cos(position · θ^(-2i/d)) by hand; with rounded frequencies it is another angle after a few hundred tokens."""
    rotary: Any = InProcessSampler(make_llama(0), EOS, PAD, "bf16").model.model.rotary_emb  # type: ignore[union-attr]
    position, halves = 500, 4
    cos_BTH, _ = rotary(torch.zeros(1, 1, 1, dtype=torch.float32), torch.tensor([[position]]))
    expected = [math.cos(position * 10_000 ** (-i / halves)) for i in range(halves)]
    assert cos_BTH[0, 0, :halves].tolist() == pytest.approx(expected, abs=1e-3)


# --- answers --------------------------------------------------------------------------------------------------------


def test_cold_sampling_is_the_greedy_generation_of_transformers(sample, make_llama, prompts):
    generated = make_llama(0).generate(
        prompts.tokens_BP,
        attention_mask=prompts.mask_BP.long(),
        do_sample=False,
        max_new_tokens=R,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    rollout = sample(temperature=1e-4)
    width = min(generated.shape[1], rollout.tokens_BT.shape[1])
    assert generated[:, :width].tolist() == rollout.tokens_BT[:, :width].tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_number_of_rows_sampled_together_changes_no_answer(sample, batch_size):
    together, apart = sample(), sample(batch_size=batch_size)
    assert torch.equal(apart.tokens_BT, together.tokens_BT)
    torch.testing.assert_close(apart.behaviour_logprobs_BR, together.behaviour_logprobs_BR, atol=1e-5, rtol=0)


def test_the_order_of_rows_changes_no_answer(sample, prompts):
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    shuffled = answers(sample(rows(prompts, order)))
    assert shuffled == [answers(sample())[i] for i in order]


def test_padding_changes_no_answer(sample, prompts):
    wider = dataclasses.replace(
        prompts,
        tokens_BP=torch.nn.functional.pad(prompts.tokens_BP, (5, 0), value=PAD),
        mask_BP=torch.nn.functional.pad(prompts.mask_BP, (5, 0)),
    )
    assert answers(sample(wider)) == answers(sample())


def test_rows_that_leave_the_group_change_nothing_for_the_others(sample, monkeypatch):
    rollouts = []
    for share in (0.0, 2.0):  # they leave at once, they never leave
        monkeypatch.setattr(inprocess, "COMPACT_SHARE", share)
        rollouts.append(sample())
    assert torch.equal(rollouts[0].tokens_BT, rollouts[1].tokens_BT)
    torch.testing.assert_close(rollouts[0].behaviour_logprobs_BR, rollouts[1].behaviour_logprobs_BR, atol=1e-5, rtol=0)


def test_one_prompt_gets_varied_answers(sample, prompts):
    same = rows(prompts, [0] * 32)
    by_id = answers(sample(dataclasses.replace(same, ids_B=torch.arange(32))))
    assert len({tuple(answer) for answer in by_id}) > 20


@pytest.mark.parametrize("key", ["iteration", "seed"])
def test_another_iteration_and_another_seed_give_other_answers(sample, key):
    changed = [a != b for a, b in zip(answers(sample()), answers(sample(**{key: 7})), strict=True)]
    assert sum(changed) >= 6


# --- ends -----------------------------------------------------------------------------------------------------------


def test_eos_ends_an_answer_and_nothing_follows(sample):
    rollout = sample()
    tokens_BR = rollout.tokens_BT[:, -R:]
    assert 0 < rollout.finished_B.sum() < 8  # both kinds are there
    for tokens, mask, logprobs, finished in zip(
        tokens_BR, rollout.response_mask_BR, rollout.behaviour_logprobs_BR, rollout.finished_B, strict=True
    ):
        length = int(mask.sum())
        assert mask.tolist() == [True] * length + [False] * (R - length)
        assert (tokens[:length] == EOS).tolist() == [False] * (length - 1) + [bool(finished)]
        assert finished or length == R
        assert (tokens[length:] == PAD).all() and (logprobs[length:] == 0).all()
        assert (logprobs[:length] < 0).all()


def test_an_eos_in_the_very_last_place_counts_as_an_end(sample):
    whole = sample(eos=99)
    last = int(whole.tokens_BT[0, -1])
    place = answers(whole)[0].index(last) + 1
    assert sample(eos=last, max_new_tokens=place).finished_B[0]


def test_rows_that_never_end_are_cut_and_said_to_be_unfinished(sample):
    rollout = sample(eos=99)
    assert rollout.response_mask_BR.all()
    assert rollout.response_mask_BR.shape[1] == R
    assert not rollout.finished_B.any()


def test_the_prompt_stays_what_it_was(sample, prompts):
    rollout = sample()
    assert torch.equal(rollout.tokens_BT[:, :-R], prompts.tokens_BP)
    assert torch.equal(rollout.mask_BT[:, :-R], prompts.mask_BP)
    assert torch.equal(rollout.mask_BT[:, -R:], rollout.response_mask_BR)


def test_rows_are_reported_as_they_are_done(make_llama, prompts, ppo_config):
    done = []
    settings = ppo_config.sampling.model_copy(update={"batch_size": 3})
    InProcessSampler(make_llama(0), EOS, PAD).sample(prompts, settings, 0, 1, done.append)
    assert done == [3, 6, 8]


# --- weights --------------------------------------------------------------------------------------------------------


def test_new_weights_make_the_sampler_that_model(make_llama, prompts, ppo_config):
    sampler, other = InProcessSampler(make_llama(0), EOS, PAD), make_llama(1)
    moved = sampler.load_weights(other.named_parameters())
    got = sampler.sample(prompts, ppo_config.sampling, 0, 1)
    expected = InProcessSampler(other, EOS, PAD).sample(prompts, ppo_config.sampling, 0, 1)
    assert torch.equal(got.tokens_BT, expected.tokens_BT)
    assert moved == 4 * sum(p.numel() for p in other.parameters())


def test_a_weight_that_the_sampler_does_not_have_is_an_error(make_llama):
    with pytest.raises(KeyError, match="surplus"):
        InProcessSampler(make_llama(0), EOS, PAD).load_weights([("surplus", torch.zeros(1))])


# --- random numbers -------------------------------------------------------------------------------------------------


def splitmix64(x):
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


integers = st.integers(-(2**62), 2**62)


@given(integers, st.integers(0, 2**40), st.lists(integers, min_size=1, max_size=4), st.integers(0, 10_000))
def test_keyed_numbers_are_those_of_whole_number_arithmetic(seed, iteration, ids, position):
    got = keyed_uniform(seed, iteration, torch.tensor(ids), position).tolist()
    for number, row in zip(got, ids, strict=True):
        x = splitmix64(seed % 2**64)
        for key in (iteration, row % 2**64, position):
            x = splitmix64(x ^ key)
        assert number == (x >> 40) / 2**24
        assert 0 <= number < 1


def test_keyed_numbers_of_neighbouring_keys_are_not_correlated():
    ids = torch.arange(4096)
    keys = [(seed, iteration, position) for seed in (0, 1) for iteration in (0, 1, 2) for position in range(6)]
    numbers_KN = torch.stack([keyed_uniform(seed, iteration, ids, position) for seed, iteration, position in keys])
    correlation_KK = torch.corrcoef(numbers_KN) - torch.eye(len(keys))
    along_ids = torch.corrcoef(torch.stack([numbers_KN[0, :-1], numbers_KN[0, 1:]]))[0, 1]
    limit = 4.5 / math.sqrt(len(ids))  # of 630 pairs none is expected beyond 4.5 standard deviations
    assert correlation_KK.abs().max() < limit
    assert along_ids.abs() < limit
    assert (numbers_KN.mean(1) - 0.5).abs().max() < 4.5 / math.sqrt(12 * len(ids))


def test_tokens_follow_the_softmax():
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.0])
    N, counts = 40_000, torch.zeros(8)
    for position in (0, 5):
        tokens = pick_token(
            torch.log_softmax(logits_V, -1).expand(N, 8), keyed_uniform(3, 1, torch.arange(N), position)
        )
        counts += torch.bincount(tokens, minlength=8)
    expected = 2 * N * torch.softmax(logits_V.double(), -1)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


def test_what_rounding_leaves_falls_to_no_impossible_token():
    largest = 1 - 2**-24
    for n in range(2, 100):  # which n times float32(1/n) stay below depends on the processor; a tenth of them do
        logprobs = torch.log_softmax(torch.tensor([[0.0] * n + [-math.inf]]), -1)
        if logprobs.exp().cumsum(-1)[0, -1] < largest:
            break
    else:
        pytest.fail("no sum of equal probabilities is below the largest uniform number")
    assert pick_token(logprobs, torch.tensor([largest])).item() == n - 1


@given(
    st.lists(st.one_of(st.just(-math.inf), st.floats(-8, 3)), min_size=2, max_size=12).filter(
        lambda logits: max(logits) > -math.inf
    ),
    st.one_of(st.just(0.0), st.just(1 - 2**-24), st.floats(0, 1 - 2**-24, width=32)),
)
def test_a_picked_token_is_where_the_cumulative_distribution_passes_the_number(logits, uniform):
    logprobs = torch.log_softmax(torch.tensor([logits]), -1)
    token = int(pick_token(logprobs, torch.tensor([uniform])))
    probabilities = [math.exp(value) for value in logprobs[0].tolist()]
    total = sum(probabilities)
    assert probabilities[token] > 0
    assert sum(probabilities[:token]) / total <= uniform + 1e-5
    assert sum(probabilities[: token + 1]) / total >= uniform - 1e-5
