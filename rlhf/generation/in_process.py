"""Sampling in the training process from a full copy of the policy, refreshed once per iteration.

Continuous batching: a finished row leaves, and a waiting prompt takes its slot. Rows with equal prompts read it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.config import SamplingConfig
from rlhf.data.batches import PromptBatch, Rollout, first_with_prompt
from rlhf.errors import UserError
from rlhf.generation.counter_rng import keyed_uniform, pick_token
from rlhf.generation.decoder import CausalDecoder, Decoder
from rlhf.generation.kv_cache import SlotCache, rows_that_fit
from rlhf.generation.llama import LlamaDecoder, is_plain_llama
from rlhf.generation.sampler import is_stop, rollout_of
from rlhf.models import weights_that_fit
from rlhf.profiling.memory import free_bytes
from rlhf.profiling.roofline import ModelSize, size_of

# Prompts wait until this fraction of the slots is free, because each reading of prompts reads all weights.
ADMIT_FRACTION = 0.125
# Prompt tokens per forward pass, with padding: enough for the full rate of a matrix product.
PREFILL_TOKENS = 2048
# Fraction of free memory for keys and values; the rest is for forward passes and fragmentation. During an update less
# is free.
CACHE_FRACTION, CACHE_FRACTION_IN_BACKGROUND = 0.8, 0.4


class InProcessSampler:
    """Samples from `model`, any causal transformers model. `stop_ids` end a response; `pad_id` pads it."""

    def __init__(
        self,
        model: nn.Module,
        stop_ids: Sequence[int],
        pad_id: int,
        precision: str = "float32",
        device: torch.device | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        """`device` None: where the model is. `cache_bytes`: memory for keys and values; None: a fraction of free
        memory."""
        self.cache_bytes = cache_bytes
        self.model = model.eval().requires_grad_(False)
        self.stop_ids, self.pad_id = stop_ids, pad_id
        self.positions = (0, 0)  # tokens computed in the last `sample`: in prompts, in steps
        dtype = torch.bfloat16 if precision == "bf16" else None

        def placed(x: Tensor) -> Tensor:
            # Not the buffers: rounded rotary frequencies would shift positions. One weight at a time, so that main
            # memory never holds a copy of the model in bf16.
            return x.to(device=device, dtype=dtype if isinstance(x, nn.Parameter) else None)

        model._apply(placed)

    @property
    def size(self) -> ModelSize:
        return size_of(self.model)

    @torch.no_grad()
    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Copies whole parameters by name; returns the number of bytes copied."""
        own = dict(self.model.named_parameters())
        total = 0
        for name, tensor in named_tensors:
            own[name].copy_(tensor)
            total += tensor.numel() * tensor.element_size()
        return total

    def take(self, path: str | Path) -> bool:
        """Loads the weights of the model in `path`, tensor by tensor, without its own adapters. Returns False, and
        reads nothing, if that model has another shape."""
        if isinstance(self.model, PeftModel):
            self.model = self.model.unload()
        named = weights_that_fit(path, {name: p.shape for name, p in self.model.named_parameters()})
        if named is not None:
            own = dict(self.model.named_parameters())
            self.load_weights((name, tensor.to(own[name].dtype)) for name, tensor in named)
        return named is not None

    def close(self) -> None:
        """Frees the weights; nothing can be sampled afterwards."""
        self.model = nn.Module()

    @torch.no_grad()
    def sample(
        self,
        prompts: PromptBatch,
        settings: SamplingConfig,
        seed: int,
        iteration: int,
        go_on: Callable[[], None] | None = None,
    ) -> Rollout:
        """Responses for every prompt, sampling `settings.batch_size` rows at a time, or fewer if their keys and values
        do not fit into memory. R is `settings.max_new_tokens`. UserError (5) if one row does not fit.

        The random number of a token depends on (seed, iteration, prompt id, position) only. `go_on`: see `Sampler`.
        """
        alone = go_on is None  # otherwise an update runs at the same time
        decoder = decoder_of(self.model, alone)
        longest = int(prompts.mask_BP.sum(1).max()) if len(prompts.ids_B) else 0
        slots = self.rows_at_once(longest, settings, alone)
        run = _Run(decoder, self.stop_ids, self.pad_id, prompts, settings, (seed, iteration), slots)
        while run.unfinished:
            if go_on is not None:
                go_on()
            run.admit() if run.has_room else run.step()
        self.positions = (run.prompt_positions, run.step_positions)
        return rollout_of(prompts, run.tokens_BR, run.logprobs_BR, run.length_B, self.stop_ids)

    def rows_at_once(self, prompt_length: int, settings: SamplingConfig, alone: bool = True) -> int:
        """The number of rows with prompts up to this length that are sampled together. UserError (5) if one does not
        fit.

        `alone`: nothing else uses memory while it samples.
        """
        free = self.cache_bytes
        if free is None:
            fraction = CACHE_FRACTION if alone else CACHE_FRACTION_IN_BACKGROUND
            free = int(fraction * free_bytes(next(self.model.parameters()).device, alone))
        columns = prompt_length + settings.max_new_tokens
        config: Any = next(part for part in self.model.modules() if isinstance(part, PreTrainedModel)).config
        tensors = 2 * config.get_text_config().num_hidden_layers
        each = self.size.cache_bytes
        fit = rows_that_fit(free, each, tensors, columns)
        if not fit:
            most = int(free * tensors // (each * (tensors + 1)))
            raise UserError(
                f"keys and values of one row of {columns} tokens (prompt {prompt_length}, answer "
                f"{settings.max_new_tokens}) need {each * columns * (tensors + 1) / tensors / 1e9:.3g} GB, and there are "
                f"{free / 1e9:.3g} GB for them, enough for {most} tokens: lower ppo.max_prompt_length or "
                "ppo.sampling.max_new_tokens, or shard over more workers (hardware.workers)",
                5,
            )
        return min(fit, settings.batch_size)


def decoder_of(model: nn.Module, alone: bool = False) -> Decoder:
    """The tuned forward pass if it computes the same as the model, else the model's own."""
    return LlamaDecoder(model, alone) if is_plain_llama(model) else CausalDecoder(model)


class _Run:
    """The state of one call of `sample`: growing responses, waiting prompts, and the rows (S) in the cache."""

    def __init__(
        self,
        decoder: Decoder,
        stop_ids: Sequence[int],
        pad_id: int,
        prompts: PromptBatch,
        settings: SamplingConfig,
        key: tuple[int, int],
        slots: int,
    ) -> None:
        B, R, device = len(prompts.ids_B), settings.max_new_tokens, prompts.tokens_BP.device
        self.decoder, self.prompts, self.key = decoder, prompts, key
        self.stop_ids, self.temperature, self.R = stop_ids, settings.temperature, R
        self.tokens_BR = torch.full((B, R), pad_id, dtype=torch.int64, device=device)
        self.logprobs_BR = torch.zeros((B, R), dtype=torch.float32, device=device)
        self.length_B = torch.zeros(B, dtype=torch.int64, device=device)
        # Longest prompts first, so that little of a forward pass is padding; equal prompts are neighbours and read once.
        self.prompt_length_B = prompts.mask_BP.sum(1)
        self.prompt_B = first_with_prompt(prompts.tokens_BP, prompts.mask_BP)
        by_prompt = self.prompt_B.argsort(stable=True)
        self.waiting = by_prompt[self.prompt_length_B[by_prompt].argsort(descending=True, stable=True)]
        most_columns = int(self.prompt_length_B.max()) + R if B else None
        self.cache = SlotCache(min(B, slots), device, most_columns)
        self.index_S = self.waiting[:0]  # the row of the batch in each slot
        self.token_S = self.index_S  # its last token, not yet read by the model
        self.prompt_positions = self.step_positions = 0  # that the model computed so far

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + self.cache.rows

    @property
    def has_room(self) -> bool:
        free = self.cache.slots - self.cache.rows
        return free >= min(len(self.waiting), max(1, round(ADMIT_FRACTION * self.cache.slots))) > 0

    def admit(self) -> None:
        """Puts the next prompts into free slots, reads each distinct one once, and draws every row's first token."""
        width = int(self.prompt_length_B[self.waiting[0]])
        count = self._newcomers(max(1, PREFILL_TOKENS // width))
        index_G, self.waiting = self.waiting[:count], self.waiting[count:]
        is_copy_G = _is_as_before(self.prompt_B[index_G])
        source_G = (~is_copy_G).cumsum(0) - 1  # index of the row's prompt among those that are read
        index_G, source_G = (torch.cat([x[~is_copy_G], x[is_copy_G]]) for x in (index_G, source_G))
        D, slot = count - int(is_copy_G.sum()), self.cache.rows
        tokens_DW, mask_DW = (x[index_G[:D], -width:] for x in (self.prompts.tokens_BP, self.prompts.mask_BP))
        logits_DV = self.decoder.prefill(tokens_DW, mask_DW, self.cache)
        self.cache.fork(slot + source_G[D:])
        token_G = self._draw(logits_DV[source_G], index_G)
        self.prompt_positions += int(mask_DW.sum()) if self.decoder.packs else mask_DW.numel()
        self.index_S, self.token_S = torch.cat([self.index_S, index_G]), torch.cat([self.token_S, token_G])
        self._release()

    def _newcomers(self, prompts: int) -> int:
        """How many waiting rows join: at most this many prompts, and all rows of a prompt unless it is the first."""
        free = self.cache.slots - self.cache.rows
        number_W = (~_is_as_before(self.prompt_B[self.waiting[: free + 1]])).cumsum(0)  # 1 for rows of the first prompt
        if len(number_W) > free:  # the row after the last free slot, whose prompt waits
            prompts = min(prompts, max(int(number_W[free]) - 1, 1))
        return min(int((number_W <= prompts).sum()), free)

    def step(self) -> None:
        """Samples one token for every row."""
        self.step_positions += len(self.token_S)
        self.token_S = self._draw(self.decoder.step(self.token_S, self.cache), self.index_S)
        self._release()

    def _draw(self, logits_GV: Tensor, index_G: Tensor) -> Tensor:
        """Draws and records the next token of each row with its logprob."""
        t_G = self.length_B[index_G]
        probs_GV = torch.softmax(logits_GV.float().div_(self.temperature), -1)
        token_G = pick_token(probs_GV, keyed_uniform(*self.key, self.prompts.ids_B[index_G], t_G))
        self.tokens_BR[index_G, t_G] = token_G
        self.logprobs_BR[index_G, t_G] = probs_GV.gather(1, token_G[:, None])[:, 0].log()
        self.length_B[index_G] = t_G + 1
        return token_G

    def _release(self) -> None:
        """Removes rows that have ended or reached the maximum length."""
        alive_S = ~is_stop(self.token_S, self.stop_ids) & (self.length_B[self.index_S] < self.R)
        if not alive_S.all():
            from_S = self.cache.keep(alive_S)
            self.index_S, self.token_S = self.index_S[from_S], self.token_S[from_S]


def _is_as_before(prompt_N: Tensor) -> Tensor:
    """True where a prompt equals the one before it."""
    return torch.cat([torch.zeros_like(prompt_N[:1], dtype=torch.bool), prompt_N[1:] == prompt_N[:-1]])
