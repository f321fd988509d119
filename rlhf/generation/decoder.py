"""Forward passes of any causal transformers model over a cache whose rows join and leave."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from rlhf.generation.kv_cache import SlotCache


class Decoder(Protocol):
    """The interface between sampler and model. G: joining rows, W: their longest prompt, S: rows in the cache, V:
    vocabulary."""

    packs: bool  # reads prompts without the padding between them

    def prefill(self, tokens_GW: Tensor, mask_GW: Tensor, cache: SlotCache) -> Tensor:
        """Adds left-padded prompts to the cache; returns the logits_GV after their last tokens."""
        ...

    def step(self, token_S: Tensor, cache: SlotCache) -> Tensor:
        """One more token per row; returns the logits_SV after it."""
        ...


class CausalDecoder:
    """Uses the model's own forward pass, with adapters."""

    packs = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def prefill(self, tokens_GW: Tensor, mask_GW: Tensor, cache: SlotCache) -> Tensor:
        cache.admit(mask_GW.sum(1))
        return self._logits(tokens_GW, mask_GW, (mask_GW.cumsum(1) - 1).clamp(min=0), cache)

    def step(self, token_S: Tensor, cache: SlotCache) -> Tensor:
        cache.step()
        return self._logits(token_S[:, None], cache.mask_SL(), cache.position_S()[:, None], cache)

    def _logits(self, tokens: Tensor, mask: Tensor, position: Tensor, cache: SlotCache) -> Tensor:
        return self.model(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
