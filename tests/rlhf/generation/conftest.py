"""One call that samples, and what every test asks of its result."""

from __future__ import annotations

import pytest
import torch

from rlhf.generation import InProcessSampler

EOS, PAD = 2, 0


@pytest.fixture
def sample(make_llama, prompts, ppo_config):
    """sample(…) answers the prompts; what is not given is the common case."""

    def sample(given=prompts, iteration=1, seed=0, eos=EOS, model=None, precision="float32", **settings):
        sampler = InProcessSampler(model or make_llama(0), [eos], PAD, precision)
        return sampler.sample(given, ppo_config.sampling.model_copy(update=settings), seed, iteration)

    return sample


@pytest.fixture(scope="session")
def answers():
    """answers(rollout) → the answer tokens of each row."""

    def answers(rollout):
        tokens_BR = rollout.tokens_BT[:, -rollout.response_mask_BR.shape[1] :]
        return [row[mask].tolist() for row, mask in zip(tokens_BR, rollout.response_mask_BR, strict=True)]

    return answers


@pytest.fixture(scope="session")
def expect_same_rollout():
    """The same tokens, and logprobs within what the order of float32 additions moves."""

    def expect_same_rollout(got, expected):
        assert torch.equal(got.tokens_BT, expected.tokens_BT)
        assert torch.equal(got.mask_BT, expected.mask_BT)
        torch.testing.assert_close(got.behaviour_logprobs_BR, expected.behaviour_logprobs_BR, atol=1e-5, rtol=0)

    return expect_same_rollout


@pytest.fixture(scope="session")
def plain_logprobs(answers):
    """plain_logprobs(model, rollout, temperature) → for each row, the model's own logprobs of the answer tokens.

    One forward pass per row over prompt and answer: no padding, no cache.
    """

    def plain_logprobs(model, rollout, temperature):
        expected = []
        for tokens_T, mask_T, answer in zip(rollout.tokens_BT, rollout.mask_BT, answers(rollout), strict=True):
            row = tokens_T[mask_T]
            with torch.no_grad():
                logits_RV = model(row[None]).logits[0, len(row) - len(answer) - 1 : -1].float()
            expected.append(torch.log_softmax(logits_RV / temperature, -1)[range(len(answer)), answer])
        return expected

    return plain_logprobs
