"""A policy, scalar models, prompts and an iteration of PPO that run in milliseconds.

Heavy libraries are imported inside, so that tests which need none of them start at once.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

EOS, PAD, VOCAB = 2, 0, 12


@pytest.fixture(scope="session")
def make_llama():
    """make_llama(seed) → a Llama of 2 layers whose random weights are large enough to have opinions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )

    def make(seed: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def make_scalar(make_llama):
    """make_scalar(seed, offset) → a ScalarModel with a random head."""
    import torch

    from rlhf.models import ScalarModel

    def make(seed: int, offset: float = 0.0) -> ScalarModel:
        head_1H = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
        return ScalarModel(make_llama(seed).base_model, head_1H, offset)

    return make


@pytest.fixture(scope="session")
def prompts():
    """Eight prompts of 2 to 7 tokens, without pad and EOS."""
    import torch

    from rlhf.data import pad
    from rlhf.data.batches import PromptBatch

    generator = torch.Generator().manual_seed(5)
    lengths = [7, 2, 4, 3, 7, 5, 2, 6]
    tokens = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    tokens_BP, mask_BP = pad(tokens, PAD, left=True)
    return PromptBatch(tokens_BP, mask_BP, torch.arange(8) % 3 == 0, torch.arange(8) * 11)


@pytest.fixture(scope="session")
def ppo_config():
    """The whole batch is one minibatch and one micro-batch; answers of up to 9 tokens at a temperature of 0.7."""
    from rlhf.config import OptimConfig, PPOConfig, SamplingConfig

    return PPOConfig(
        batch_size=8,
        minibatch_size=8,
        micro_batch_size=8,
        sampling=SamplingConfig(temperature=0.7, max_new_tokens=9, batch_size=8),
        optim=OptimConfig(lr=1e-2),
        critic_optim=OptimConfig(lr=1e-2),
    )


@pytest.fixture(scope="session")
def models_of():
    """models_of(policy, reference, critic, name=reward model, …) of plain modules → Models of frozen engines."""
    from rlhf.config import HardwareConfig
    from rlhf.distributed.engine import LocalEngine
    from rlhf.ppo.models import Models

    def frozen(module: Any) -> Any:
        return module if module is None else LocalEngine(module, None, 1, HardwareConfig())

    def make(policy: Any, reference: Any, critic: Any = None, sampler: Any = None, **reward_models: Any) -> Models:
        scalars = {name: frozen(module) for name, module in reward_models.items()}
        return Models(frozen(policy), frozen(reference), frozen(critic), scalars, sampler, tokenizer=None)

    return make


@pytest.fixture(scope="session")
def scores_by():
    """scores_by(rollout, models, config) → Scores, with the reward models of `models` as rewards, in their order."""
    from rlhf.ppo.scoring import score_rollout
    from rlhf.rewards import ModelReward, Responses, RewardSet, weighted_sum

    def score(rollout: Any, models: Any, config: Any) -> Any:
        rewards = {name: ModelReward(engine, config) for name, engine in models.reward_models.items()}
        said = RewardSet(rewards, weighted_sum([1.0] * len(rewards)))(Responses(rollout, [], []))
        return score_rollout(rollout, models, said, config)

    return score


@pytest.fixture(scope="session")
def iteration(make_llama, make_scalar, models_of, scores_by, prompts, ppo_config):
    """Rollout, scores and experience of one iteration. Rows end after 1 to 9 tokens, and some do not end."""
    from rlhf.generation import InProcessSampler
    from rlhf.models.policy import PolicyModel
    from rlhf.ppo.advantage_setting import estimator_of
    from rlhf.ppo.experience import make_experience
    from rlhf.rewards import piecewise

    policy, reference = PolicyModel(make_llama(0)), PolicyModel(make_llama(1))
    models = models_of(policy, reference, make_scalar(2), helpful=make_scalar(3, offset=0.5), safety=make_scalar(4))
    rollout = InProcessSampler(make_llama(0), [EOS], PAD).sample(prompts, ppo_config.sampling, seed=0, iteration=1)
    scores = scores_by(rollout, models, ppo_config)
    rule = piecewise(0, 1, safety_offset=0.0, threshold=ppo_config.safety_threshold)
    combined = rule(scores.rewards_BN, scores.failed_BN, prompts.is_safety_B)
    experience, metrics = make_experience(rollout, scores, combined, estimator_of(ppo_config), ppo_config, kl_coef=0.1)
    return SimpleNamespace(rollout=rollout, scores=scores, experience=experience, metrics=metrics)
