"""The sampler of training: `ppo.sampling.engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf.chat import format_of
from rlhf.config import RunConfig
from rlhf.generation.in_process import InProcessSampler
from rlhf.generation.sampler import Sampler
from rlhf.models import add_lora, load_causal


def open_sampler(config: RunConfig, folder: Path, tokenizer: Any, device: torch.device) -> Sampler:
    """A sampler for the model in `folder`, with adapters if the run trains them; the trainer loads its weights.

    All ranks must call it.
    """
    ppo, precision = config.ppo, config.hardware.precision
    ends = format_of(tokenizer).stop_ids, tokenizer.pad_token_id
    if ppo.sampling.engine == "vllm":
        from rlhf.generation.vllm import Capacity, VLLMSampler

        longest = ppo.max_prompt_length + ppo.sampling.max_new_tokens
        capacity = Capacity(ppo.sampling.batch_size, longest, ppo.sampling.tensor_parallel)
        return VLLMSampler(folder, *ends, precision, device, capacity)
    model: Any = load_causal(folder, attention=config.model.attention)
    if config.model.lora is not None:
        model = add_lora(model, config.model.lora, "causal", config.seed)
    return InProcessSampler(model, *ends, precision, device)


def sampler_of(path: Path, sampler: Sampler, config: RunConfig, tokenizer: Any, device: torch.device) -> Sampler:
    """A sampler with the model in `path`: `sampler` itself with these weights if the shape fits, else a new one in
    process after `sampler` has freed its weights, so that two never exist at once. All ranks must call it."""
    if sampler.take(path):
        return sampler
    sampler.close()
    model: Any = load_causal(path, attention=config.model.attention)
    ends = format_of(tokenizer).stop_ids, tokenizer.pad_token_id
    return InProcessSampler(model, *ends, config.hardware.precision, device)
