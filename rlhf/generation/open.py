"""The sampler of training: `ppo.sampling.engine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.chat import format_of
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.generation.in_process import InProcessSampler
from rlhf.generation.sampler import Sampler
from rlhf.models import add_lora, load_causal


def open_sampler(
    config: RunConfig,
    folder: Path,
    tokenizer: Any,
    device: torch.device,
    open_pool: Callable[[Path, tuple[Sequence[int], int], Any], Sampler] | None = None,
) -> Sampler:
    """A sampler for the model in `folder`, with adapters if the run trains them; the trainer loads its weights.

    All ranks must call it. `open_pool`: as in StageContext. UserError (2) where it is missing.
    """
    ppo, precision = config.ppo, config.hardware.precision
    ends = format_of(tokenizer).stop_ids, tokenizer.pad_token_id
    if ppo.sampling.engine == "vllm":
        from rlhf.generation.vllm import Capacity, VLLMSampler

        longest = ppo.max_prompt_length + ppo.sampling.max_new_tokens
        capacity = Capacity(ppo.sampling.batch_size, longest, ppo.sampling.tensor_parallel)
        if not ppo.sampling.workers:
            return VLLMSampler(folder, *ends, precision, device, capacity)
        if open_pool is None:
            raise UserError(
                "ppo.sampling.workers: Ray starts samplers beside the workers: leave out --local and torchrun"
            )
        return open_pool(folder, ends, capacity)
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
