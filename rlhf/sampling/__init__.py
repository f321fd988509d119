"""Samplers: prompts in, answers and their logprobs out."""

from rlhf.sampling.inprocess import InProcessSampler
from rlhf.sampling.keyed import keyed_uniform, pick_token

__all__ = ["InProcessSampler", "keyed_uniform", "pick_token"]
