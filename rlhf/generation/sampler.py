"""The interface of samplers, and how sampled responses become a rollout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rlhf.config import SamplingConfig
from rlhf.data.batches import PromptBatch, Rollout
from rlhf.profiling.roofline import ModelSize


class Sampler(Protocol):
    stop_ids: Sequence[int]
    """The ids that end a response, as its last token."""
    positions: tuple[int, int]
    """Tokens computed in the last `sample`: in prompts, in steps."""

    @property
    def size(self) -> ModelSize:
        """Parameters of the model that it samples from."""
        ...

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Takes weights with their names in transformers; each tensor may be freed after its turn. Returns bytes
        copied."""
        ...

    def take(self, path: str | Path) -> bool:
        """Loads the weights of the model in `path`. Returns False if that model has another shape."""
        ...

    def sample(
        self,
        prompts: PromptBatch,
        settings: SamplingConfig,
        seed: int,
        iteration: int,
        go_on: Callable[[], None] | None = None,
    ) -> Rollout:
        """Responses for every prompt of up to R = `settings.max_new_tokens` tokens, EOS included.

        Random numbers depend on (seed, iteration, prompt id, position) only. `go_on` is given if something else uses
        the device at the same time. It is called repeatedly, and what it raises ends the sampling.
        """
        ...

    def close(self) -> None:
        """Frees the weights; nothing can be sampled afterwards."""
        ...


def rollout_of(
    prompts: PromptBatch, tokens_BR: Tensor, logprobs_BR: Tensor, length_B: Tensor, stop_ids: Sequence[int]
) -> Rollout:
    """The rollout of prompts with their responses, whose tokens are the first `length_B` of a row."""
    mask_BR = torch.arange(tokens_BR.shape[1], device=length_B.device) < length_B[:, None]
    return Rollout(
        tokens_BT=torch.cat([prompts.tokens_BP, tokens_BR], 1),
        mask_BT=torch.cat([prompts.mask_BP, mask_BR], 1),
        response_mask_BR=mask_BR,
        behaviour_logprobs_BR=logprobs_BR,
        finished_B=(is_stop(tokens_BR, stop_ids) & mask_BR).any(1),
    )


def is_stop(tokens: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """True where a token ends a response; there is at least one stop id."""
    return reduce(torch.logical_or, (tokens == stop for stop in stop_ids))
