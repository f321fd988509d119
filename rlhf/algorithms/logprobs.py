"""Log-probabilities of given tokens and entropies, at the sampling temperature, always in float32.

Sampling, reference and update must divide by the same temperature, or the KL penalty rises for no reason.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Of float32 logits that are worked on at a time. On a CPU so few that they stay in its cache.
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


def logprobs_from_hidden(
    hidden_BRH: Tensor, weight_VH: Tensor, labels_BR: Tensor, temperature: float = 1.0, chunk: int = 512
) -> Tensor:
    """log softmax(hidden @ weight^T / temperature) at the labels without the [B, R, V] logits: float32 [B, R].

    `hidden_BRH[:, t]` is the state that predicts `labels_BR[:, t]`. At most `chunk` positions have logits at a time;
    with gradient they are computed again in the backward pass instead of being kept.
    """
    return logprobs_and_entropy_from_hidden(hidden_BRH, weight_VH, labels_BR, temperature, chunk, with_entropy=False)[0]


def logprobs_and_entropy_from_hidden(
    hidden_BRH: Tensor,
    weight_VH: Tensor,
    labels_BR: Tensor,
    temperature: float = 1.0,
    chunk: int = 512,
    *,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """`logprobs_from_hidden`, and from the same logits the entropies -Σ p log p [B, R] in nats, without a gradient;
    zeros in their place where they are not asked for."""
    device = hidden_BRH.device.type
    if torch.is_autocast_enabled(device):  # here, because inside it would be done for every chunk
        dtype = torch.get_autocast_dtype(device)
        hidden_BRH, weight_VH = hidden_BRH.to(dtype), weight_VH.to(dtype)
    parts = [
        _Chunk.apply(hidden_NH, weight_VH, labels_N, temperature, with_entropy)
        for hidden_NH, labels_N in zip(
            hidden_BRH.flatten(0, 1).split(chunk), labels_BR.flatten().split(chunk), strict=True
        )
    ]
    logprobs_BR, entropy_BR = (torch.cat(column).view_as(labels_BR) for column in zip(*parts, strict=True))
    return logprobs_BR, entropy_BR


class _Chunk(torch.autograd.Function):
    """(logprobs_N, entropy_N) of N positions.

    By hand, because autograd would keep several [N, V] tensors and pass over each: here the logits are made once more
    in the backward pass, and turned into their gradient in place.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature = temperature
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N)
        logprobs_N = hidden_NH.new_zeros(labels_N.shape, dtype=torch.float32)
        entropy_N = torch.zeros_like(logprobs_N)
        ctx.mark_non_differentiable(entropy_N)
        logits_NV = F.linear(hidden_NH, weight_VH)
        for rows in _blocks(logits_NV):
            all_logprobs_GV = _scaled(logits_NV[rows], temperature).log_softmax(-1)
            logprobs_N[rows] = all_logprobs_GV.gather(-1, labels_N[rows, None])[:, 0]
            if with_entropy:
                entropy_N[rows] = -all_logprobs_GV.exp().mul_(all_logprobs_GV).sum(-1)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, labels_N = ctx.saved_tensors
        gradient_N1 = gradients[0][:, None] / ctx.temperature
        of_logits_NV = F.linear(hidden_NH, weight_VH)
        for rows in _blocks(of_logits_NV):
            # d logprob / d logits = (one-hot of the label - softmax) / temperature
            probs_GV = _scaled(of_logits_NV[rows], ctx.temperature).softmax(-1)
            probs_GV.mul_(-gradient_N1[rows]).scatter_add_(1, labels_N[rows, None], gradient_N1[rows])
            of_logits_NV[rows] = probs_GV
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        return (
            of_logits_NV @ weight_VH if of_hidden else None,
            of_logits_NV.T @ hidden_NH if of_weight else None,
            None,
            None,
            None,
        )


def _blocks(logits_NV: Tensor) -> list[slice]:
    N, V = logits_NV.shape
    size = max(1, BLOCK_BYTES[logits_NV.device.type] // (4 * V))
    return [slice(start, start + size) for start in range(0, N, size)]


def _scaled(logits_GV: Tensor, temperature: float) -> Tensor:
    """logits / temperature in float32; what it is given may be overwritten."""
    scaled_GV = logits_GV.float()
    return scaled_GV if temperature == 1.0 else scaled_GV.div_(temperature)
