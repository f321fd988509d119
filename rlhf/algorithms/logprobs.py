"""Log-probabilities of given tokens and entropies, at the sampling temperature, always in float32.

Sampling, reference and update must divide by the same temperature, or the KL penalty rises for no reason.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def logprobs_from_logits(logits_BRV: Tensor, labels_BR: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the labels, float32 [B, R]."""
    scaled_BRV = logits_BRV.float() / temperature
    label_BR = scaled_BRV.gather(-1, labels_BR.unsqueeze(-1)).squeeze(-1)
    return label_BR - scaled_BRV.logsumexp(-1)


def entropy(logits_BRV: Tensor, temperature: float = 1.0) -> Tensor:
    """-Σ p log p of softmax(logits / temperature), in nats, float32 [B, R]."""
    probs_BRV = torch.softmax(logits_BRV.float() / temperature, dim=-1)
    return torch.special.entr(probs_BRV).sum(-1)


def logprobs_from_hidden(
    hidden_BRH: Tensor, weight_VH: Tensor, labels_BR: Tensor, temperature: float = 1.0, chunk: int = 512
) -> Tensor:
    """`logprobs_from_logits` of hidden @ weight^T without the [B, R, V] logits: float32 [B, R].

    `hidden_BRH[:, t]` is the state that predicts `labels_BR[:, t]`. At most `chunk` positions have logits at a time;
    with gradient they are computed again in the backward pass instead of being kept.
    """
    return _in_chunks(hidden_BRH, weight_VH, labels_BR, temperature, chunk, with_entropy=False)[0]


def logprobs_and_entropy_from_hidden(
    hidden_BRH: Tensor, weight_VH: Tensor, labels_BR: Tensor, temperature: float = 1.0, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """`logprobs_from_hidden`, and from the same logits the entropies [B, R], which carry no gradient."""
    logprobs_BR, entropy_BR = _in_chunks(hidden_BRH, weight_VH, labels_BR, temperature, chunk, with_entropy=True)
    return logprobs_BR, entropy_BR


def _in_chunks(
    hidden_BRH: Tensor, weight_VH: Tensor, labels_BR: Tensor, temperature: float, chunk: int, *, with_entropy: bool
) -> list[Tensor]:
    """Logprobs [B, R] and, if asked for, entropies [B, R]."""

    def one_chunk(hidden_NH: Tensor, labels_N: Tensor) -> tuple[Tensor, ...]:
        logits_NV = F.linear(hidden_NH, weight_VH)  # autocast may make this bfloat16; all that follows is float32
        logprobs_N = logprobs_from_logits(logits_NV, labels_N, temperature)
        return (logprobs_N, entropy(logits_NV.detach(), temperature)) if with_entropy else (logprobs_N,)

    trains = torch.is_grad_enabled() and (hidden_BRH.requires_grad or weight_VH.requires_grad)
    parts = []
    for hidden_NH, labels_N in zip(
        hidden_BRH.flatten(0, 1).split(chunk), labels_BR.flatten().split(chunk), strict=True
    ):
        if trains:
            part = checkpoint(one_chunk, hidden_NH, labels_N, use_reentrant=False, preserve_rng_state=False)
        else:
            part = one_chunk(hidden_NH, labels_N)
        parts.append(part)
    return [torch.cat(column).view_as(labels_BR) for column in zip(*parts, strict=True)]
