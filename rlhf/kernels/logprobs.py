"""Log-probabilities of given tokens and entropies, at the sampling temperature, always in float32.

Sampling, reference and update must use the same temperature, or the KL penalty is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Float32 logits processed at a time; on a CPU few enough for its cache.
BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
# Vocabulary entries whose gradients are summed at a time; on a CPU few enough for its cache.
BLOCK_WORDS = {"cpu": 2048, "cuda": 1 << 30}


def logprobs_from_hidden(
    hidden_BRH: Tensor, weight_VH: Tensor, labels_BR: Tensor, temperature: float = 1.0, chunk: int = 512
) -> Tensor:
    """log softmax(hidden @ weight^T / temperature) at the labels without the [B, R, V] logits: float32 [B, R].

    `hidden_BRH[:, t]` is the state that predicts `labels_BR[:, t]`. Logits exist for at most
    `chunk` positions at a time; with gradient, those of the last chunk are kept for the backward pass, which recomputes
    the others.
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
    """`logprobs_from_hidden`, and the entropies -Σ p log p [B, R] in nats without gradient, or zeros without
    `with_entropy`."""
    read_2N: Any = _Logprobs.apply(
        hidden_BRH.flatten(0, 1), weight_VH, labels_BR.flatten(), temperature, chunk, with_entropy
    )
    logprobs_BR, entropy_BR = (x_N.view_as(labels_BR) for x_N in read_2N)
    return logprobs_BR, entropy_BR


class _Logprobs(torch.autograd.Function):
    """(logprobs_N, entropy_N) of N positions.

    Autograd would keep and read several [N, V] tensors. Here logits become their gradient in place, and the gradient of
    the weight is accumulated in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.dtypes = temperature, (hidden_NH.dtype, weight_VH.dtype)
        device = hidden_NH.device.type
        if torch.is_autocast_enabled(device):  # cast once here instead of in every chunk
            dtype = torch.get_autocast_dtype(device)
            hidden_NH, weight_VH = hidden_NH.to(dtype), weight_VH.to(dtype)
        logprobs_N = hidden_NH.new_zeros(labels_N.shape, dtype=torch.float32)
        entropy_N = torch.zeros_like(logprobs_N)
        ctx.mark_non_differentiable(entropy_N)
        ctx.chunks = [slice(start, start + chunk) for start in range(0, len(labels_N), chunk)]
        logits_CV = None
        for rows in ctx.chunks:
            logits_CV = None  # free them before the next are made
            logits_CV = F.linear(hidden_NH[rows], weight_VH)
            _read(logits_CV, labels_N[rows], temperature, logprobs_N[rows], entropy_N[rows] if with_entropy else None)
        ctx.last_CV = logits_CV
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, labels_N = ctx.saved_tensors
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        dhidden_NH = torch.empty_like(hidden_NH, dtype=ctx.dtypes[0]) if of_hidden else None
        make = torch.empty_like if ctx.chunks else torch.zeros_like
        dweight_VH = make(weight_VH, dtype=ctx.dtypes[1]) if of_weight else None
        for number, rows in enumerate(reversed(ctx.chunks)):
            logits_CV = F.linear(hidden_NH[rows], weight_VH) if ctx.last_CV is None else ctx.last_CV
            ctx.last_CV = None  # it is overwritten below
            dlogits_CV = _to_gradient(logits_CV, labels_N[rows], ctx.temperature, gradients[0][rows])
            if dhidden_NH is not None:
                dhidden_NH[rows] = dlogits_CV @ weight_VH
            if dweight_VH is not None:
                _add_product(dweight_VH, dlogits_CV, hidden_NH[rows], is_first=number == 0)
            del logits_CV, dlogits_CV  # free them before the next are made
        return dhidden_NH, dweight_VH, None, None, None, None


def _read(
    logits_CV: Tensor, labels_C: Tensor, temperature: float, logprobs_C: Tensor, entropy_C: Tensor | None
) -> None:
    """Writes logprobs, and entropies if they are wanted."""
    for rows in _blocks(logits_CV):
        all_logprobs_GV = _scaled(logits_CV[rows], temperature).log_softmax(-1)
        logprobs_C[rows] = all_logprobs_GV.gather(-1, labels_C[rows, None])[:, 0]
        if entropy_C is not None:
            entropy_C[rows] = -all_logprobs_GV.exp().mul_(all_logprobs_GV).sum(-1)


def _to_gradient(logits_CV: Tensor, labels_C: Tensor, temperature: float, gradient_C: Tensor) -> Tensor:
    """In place: gradient · d logprob / d logits = gradient · (one-hot of the label - softmax) / temperature."""
    gradient_C1 = gradient_C[:, None] / temperature
    for rows in _blocks(logits_CV):
        probs_GV = _scaled(logits_CV[rows], temperature).softmax(-1)
        logits_CV[rows] = probs_GV.mul_(-gradient_C1[rows]).scatter_add_(1, labels_C[rows, None], gradient_C1[rows])
    return logits_CV


def _add_product(sum_VH: Tensor, dlogits_CV: Tensor, hidden_CH: Tensor, is_first: bool) -> None:
    """sum += dlogitsᵀ hidden; the first product replaces the content of `sum`."""
    words = BLOCK_WORDS[sum_VH.device.type]
    for sum_WH, dlogits_CW in zip(sum_VH.split(words), dlogits_CV.split(words, 1), strict=True):
        product_WH = (dlogits_CW.T @ hidden_CH).to(sum_WH.dtype)
        sum_WH.copy_(product_WH) if is_first else sum_WH.add_(product_WH)


def _blocks(logits_NV: Tensor) -> list[slice]:
    N, V = logits_NV.shape
    size = max(1, BLOCK_BYTES[logits_NV.device.type] // (4 * V))
    return [slice(start, start + size) for start in range(0, N, size)]


def _scaled(logits_GV: Tensor, temperature: float) -> Tensor:
    """logits / temperature in float32."""
    return logits_GV.float() if temperature == 1.0 else logits_GV.float() / temperature
