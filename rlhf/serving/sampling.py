"""The next token of each row, by its own temperature, top_p and random numbers. S rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.generation import keyed_uniform, pick_token
from rlhf.serving.rows import Row, TokenLogprob

STREAM = 1 << 42  # of the random numbers: training and evaluation use others
COLDEST = 1e-4  # below it logits divided by the temperature overflow


@dataclass
class Drawing:
    """How the rows in the cache draw, as tensors."""

    key_S: Tensor
    position_S: Tensor
    temperature_S: Tensor
    top_p_S: Tensor
    logprobs: dict[int, int]
    """Row → how many of the likeliest tokens it wants to know."""
    narrowed: bool
    """Some row has a top_p."""

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Drawing:
        settings = [row.sampling for row in rows]

        def floats(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        return cls(
            key_S=torch.tensor([row.key for row in rows], dtype=torch.int64, device=device),
            position_S=torch.tensor([row.length for row in rows], dtype=torch.int64, device=device),
            temperature_S=floats([each.temperature for each in settings]),
            top_p_S=floats([each.top_p for each in settings]),
            logprobs={n: each.top_logprobs for n, each in enumerate(settings) if each.top_logprobs is not None},
            narrowed=any(each.top_p < 1 for each in settings),
        )

    def tokens(self, logits_SV: Tensor) -> Tensor:
        """token_S; nothing of a row depends on the others."""
        logits_SV = logits_SV.float()
        # The largest becomes 0, so that no temperature makes it infinite.
        shifted_SV = logits_SV - logits_SV.amax(-1, keepdim=True)
        probs_SV = torch.softmax(shifted_SV / self.temperature_S.clamp(min=COLDEST)[:, None], -1)
        if self.narrowed:
            probs_SV = torch.where(self.top_p_S[:, None] < 1, nucleus(probs_SV, self.top_p_S), probs_SV)
        token_S = pick_token(probs_SV, keyed_uniform(0, STREAM, self.key_S, self.position_S))
        return torch.where(self.temperature_S > 0, token_S, logits_SV.argmax(-1))

    def known(self, logits_SV: Tensor, tokens: Sequence[int]) -> list[TokenLogprob | None]:
        """The logprob of each row's token, where it is asked for."""
        found: list[TokenLogprob | None] = [None] * len(tokens)
        for row, count in self.logprobs.items():
            logprobs_V = torch.log_softmax(logits_SV[row].float(), -1)
            top = logprobs_V.topk(min(count, len(logprobs_V)))
            likeliest = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
            found[row] = TokenLogprob(tokens[row], float(logprobs_V[tokens[row]]), likeliest)
        return found


def nucleus(probs_SV: Tensor, top_p_S: Tensor) -> Tensor:
    """`probs_SV` with 0 outside the smallest set of the likeliest tokens that has probability `top_p_S` or more
    (Holtzman et al. 2020); not divided by their sum, which drawing does."""
    sorted_SV, order_SV = torch.sort(probs_SV, dim=-1, descending=True, stable=True)
    before_SV = sorted_SV.cumsum(-1) - sorted_SV
    keep_SV = before_SV < top_p_S[:, None]
    keep_SV[:, 0] = True
    return torch.zeros_like(probs_SV).scatter(-1, order_SV, sorted_SV.where(keep_SV, 0))
