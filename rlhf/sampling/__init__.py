"""Samplers: prompts in, answers and their logprobs out."""

from rlhf.sampling.choose import open_sampler, sampler_of
from rlhf.sampling.inprocess import InProcessSampler
from rlhf.sampling.keyed import keyed_uniform, pick_token
from rlhf.sampling.sampler import Sampler

__all__ = ["InProcessSampler", "Sampler", "keyed_uniform", "open_sampler", "pick_token", "sampler_of"]
