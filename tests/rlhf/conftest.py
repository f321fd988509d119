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
def iteration(make_llama, make_scalar, prompts, ppo_config):
    """Rollout, scores and experience of one iteration. Rows end after 1 to 9 tokens, and some do not end."""
    from rlhf.config import HardwareConfig
    from rlhf.distributed.engine import LocalEngine
    from rlhf.generation import InProcessSampler
    from rlhf.models.policy import PolicyModel
    from rlhf.ppo.experience import make_experience
    from rlhf.ppo.scoring import score_rollout

    def frozen(module):
        return LocalEngine(module, None, 1, HardwareConfig())

    policy, reference = frozen(PolicyModel(make_llama(0))), frozen(PolicyModel(make_llama(1)))
    critic, helpful, safety = frozen(make_scalar(2)), frozen(make_scalar(3, offset=0.5)), frozen(make_scalar(4))
    rollout = InProcessSampler(make_llama(0), [EOS], PAD).sample(prompts, ppo_config.sampling, seed=0, iteration=1)
    scores = score_rollout(rollout, policy, reference, critic, helpful, safety, ppo_config)
    experience, metrics = make_experience(rollout, scores, prompts.is_safety_B, ppo_config, kl_coef=0.1)
    return SimpleNamespace(rollout=rollout, scores=scores, experience=experience, metrics=metrics)
