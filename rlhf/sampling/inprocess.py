"""Sampling in the training process from a full copy of the policy, refreshed once per iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlhf.batches import PromptBatch, Rollout
from rlhf.config import SamplingConfig
from rlhf.sampling.keyed import keyed_uniform, pick_token

# Leaving out finished rows copies the cache; it pays once this share of the rows is done.
COMPACT_SHARE = 0.25


class _Responses:
    """The answers as they grow."""

    def __init__(self, B: int, R: int, pad_id: int, device: torch.device) -> None:
        self.tokens_BR = torch.full((B, R), pad_id, dtype=torch.int64, device=device)
        self.logprobs_BR = torch.zeros((B, R), dtype=torch.float32, device=device)
        self.length_B = torch.zeros(B, dtype=torch.int64, device=device)

    def write(self, index: Tensor, t: int, tokens: Tensor, logprobs: Tensor) -> None:
        self.tokens_BR[index, t] = tokens
        self.logprobs_BR[index, t] = logprobs
        self.length_B[index] = t + 1


class InProcessSampler:
    """Samples from `model`, any causal language model of transformers. `eos_id` ends an answer, `pad_id` fills it up."""

    def __init__(self, model: nn.Module, eos_id: int, pad_id: int, precision: str = "float32") -> None:
        self.model = model.eval().requires_grad_(False)
        self.eos_id, self.pad_id = eos_id, pad_id
        self.bf16 = precision == "bf16"
        if self.bf16:
            for parameter in model.parameters():  # not the buffers: rounded rotary frequencies misplace every token
                parameter.data = parameter.data.to(torch.bfloat16)

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Copies whole parameters by name; returns the number of bytes copied."""
        own = dict(self.model.named_parameters())
        total = 0
        for name, tensor in named_tensors:
            own[name].copy_(tensor)
            total += tensor.numel() * tensor.element_size()
        return total

    @torch.no_grad()
    def sample(
        self,
        prompts: PromptBatch,
        settings: SamplingConfig,
        seed: int,
        iteration: int,
        on_rows: Callable[[int], None] = lambda done: None,
    ) -> Rollout:
        """Answers for every prompt, `settings.batch_size` rows at a time. R is `settings.max_new_tokens`.

        The number drawn for a token depends on (seed, iteration, prompt id, position) alone.
        """
        B = len(prompts.ids_B)
        out = _Responses(B, settings.max_new_tokens, self.pad_id, prompts.tokens_BP.device)
        # Long prompts together, so that little of a group is padding.
        order_B = prompts.mask_BP.sum(1).argsort(descending=True, stable=True)
        for start in range(0, B, settings.batch_size):
            index = order_B[start : start + settings.batch_size]
            self._sample_group(prompts, index, settings, seed, iteration, out)
            on_rows(min(start + settings.batch_size, B))
        mask_BR = torch.arange(settings.max_new_tokens, device=out.length_B.device) < out.length_B[:, None]
        return Rollout(
            tokens_BT=torch.cat([prompts.tokens_BP, out.tokens_BR], 1),
            mask_BT=torch.cat([prompts.mask_BP, mask_BR], 1),
            response_mask_BR=mask_BR,
            behaviour_logprobs_BR=out.logprobs_BR,
            finished_B=((out.tokens_BR == self.eos_id) & mask_BR).any(1),
        )

    def _sample_group(
        self,
        prompts: PromptBatch,
        index: Tensor,
        settings: SamplingConfig,
        seed: int,
        iteration: int,
        out: _Responses,
    ) -> None:
        """Fills the rows `index` of `out` token by token. G: the rows still in the group; finished ones leave it."""
        width = int(prompts.mask_BP[index].sum(1).max())
        tokens = prompts.tokens_BP[index, -width:]
        mask = prompts.mask_BP[index, -width:].long()
        position = (mask.cumsum(1) - 1).clamp(min=0)
        done_G = torch.zeros_like(index, dtype=torch.bool)
        cache = DynamicCache()
        for t in range(settings.max_new_tokens):
            logits_GV = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            logprobs_GV = torch.log_softmax(logits_GV.float() / settings.temperature, -1)
            token_G = pick_token(logprobs_GV, keyed_uniform(seed, iteration, prompts.ids_B[index], t))
            out.write(index[~done_G], t, token_G[~done_G], logprobs_GV.gather(1, token_G[:, None])[~done_G, 0])
            done_G = done_G | (token_G == self.eos_id)
            if done_G.all():
                return
            tokens, position = token_G[:, None], position[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            if done_G.float().mean() >= COMPACT_SHARE:
                keep = (~done_G).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                index, tokens, mask, position, done_G = (x[keep] for x in (index, tokens, mask, position, done_G))
