"""Samplers: prompts in, responses and their logprobs out."""

from rlhf.generation.counter_rng import keyed_uniform, pick_token
from rlhf.generation.in_process import InProcessSampler
from rlhf.generation.open import open_sampler, sampler_of
from rlhf.generation.sampler import Sampler

__all__ = ["InProcessSampler", "Sampler", "keyed_uniform", "open_sampler", "pick_token", "sampler_of"]
