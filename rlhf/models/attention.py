"""Causal attention of whole rows on a CPU in bf16: products over all rows and heads at once, a block of queries at a time.

torch's kernel takes products of its own for each row, head and block; these take half of its time. They stand in for
what transformers calls `sdpa`, which still does all else: other devices, float32, masks, dropout, a step of sampling.
On a GPU that is torch's kernels but for cuDNN's, which this module switches off.

N rows times key heads, G query heads of a key head, T tokens, D head size, Q queries of a block, L keys that they see,
X = G · Q.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# On Hopper torch prefers cuDNN's attention in bf16, which makes a plan for every new shape, and answers are of ever other
# lengths: on an H100 a pass over new lengths took twice as long, sampling three times. The other kernels need no plan.
torch.backends.cuda.enable_cudnn_sdp(False)

BLOCK = 128  # queries whose scores exist at a time: few enough for a processor's cache


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """What transformers asks of an attention: query_BATD, key_BKTD, value_BKTD → (out_BTAD, None)."""
    whole = attention_mask is None and query.shape[2] == key.shape[2] > 1 and value.shape == key.shape
    causal = getattr(module, "is_causal", True) and settings.get("is_causal") is not False
    if not whole or not causal or settings.get("dropout") or computed_in(query) is not torch.bfloat16:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)  # type: ignore[return-value]
    scale = settings.get("scaling")
    out_BATD = causal_attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return out_BATD.transpose(1, 2).contiguous(), None


def computed_in(query: Tensor) -> torch.dtype | None:
    """The precision of products on a CPU, as autocast decides it where it is on; None on other devices."""
    if query.device.type != "cpu":
        return None
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype


def causal_attention(q_BATD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
    """out_BATD = softmax(scale · q kᵀ) v, where a token sees itself and those before it; softmax in float32.

    A / K query heads share a key head.
    """
    dtype, (B, K) = computed_in(q_BATD), k_BKTD.shape[:2]
    q_NGTD = q_BATD.to(dtype).reshape(B * K, -1, *q_BATD.shape[2:])
    k_NTD, v_NTD = (x.to(dtype).flatten(0, 1) for x in (k_BKTD, v_BKTD))
    out_NGTD: Any = _CausalAttention.apply(q_NGTD, k_NTD, v_NTD, scale)
    return out_NGTD.view(q_BATD.shape)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NGTD: Tensor, k_NTD: Tensor, v_NTD: Tensor, scale: float) -> Tensor:
        q_NGTD, k_NTD, v_NTD = q_NGTD.contiguous(), k_NTD.contiguous(), v_NTD.contiguous()
        out_NGTD = torch.empty_like(q_NGTD)
        for block, L, bias_1XL in _blocks(q_NGTD):
            weight_NXL = _weights(q_NGTD[:, :, block], k_NTD[:, :L], bias_1XL, scale)
            out_NGTD[:, :, block] = torch.bmm(weight_NXL, v_NTD[:, :L]).unflatten(1, (q_NGTD.shape[1], -1))
        ctx.save_for_backward(q_NGTD, k_NTD, v_NTD, out_NGTD)
        ctx.scale = scale
        return out_NGTD

    @staticmethod
    def backward(ctx: Any, grad_NGTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """With weights w = softmax(s): ds = w · (dw − Σ w dw), and Σ w dw = grad · out (Dao et al. 2022, appendix B.2)."""
        q_NGTD, k_NTD, v_NTD, out_NGTD = ctx.saved_tensors
        dtype, G = q_NGTD.dtype, q_NGTD.shape[1]
        dq_NGTD = torch.empty_like(q_NGTD)
        dk_NTD, dv_NTD = (torch.zeros(k_NTD.shape, dtype=torch.float32) for _ in range(2))
        minus_mean_NGT1 = (grad_NGTD.float() * out_NGTD).sum(-1, keepdim=True).neg_().to(dtype)
        for block, L, bias_1XL in _blocks(q_NGTD):
            q_NXD, grad_NXD, minus_mean_NX1 = (
                x[:, :, block].flatten(1, 2) for x in (q_NGTD, grad_NGTD, minus_mean_NGT1)
            )
            weight_NXL = _weights(q_NGTD[:, :, block], k_NTD[:, :L], bias_1XL, ctx.scale)
            dv_NTD[:, :L] += torch.bmm(weight_NXL.transpose(1, 2), grad_NXD)
            dscore_NXL = torch.baddbmm(minus_mean_NX1, grad_NXD, v_NTD[:, :L].transpose(1, 2)).mul_(weight_NXL)
            dq_NGTD[:, :, block] = torch.bmm(dscore_NXL, k_NTD[:, :L]).unflatten(1, (G, -1))
            dk_NTD[:, :L] += torch.bmm(dscore_NXL.transpose(1, 2), q_NXD)
        return dq_NGTD.mul_(ctx.scale), dk_NTD.mul_(ctx.scale).to(dtype), dv_NTD.to(dtype), None


def _blocks(q_NGTD: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Each block of queries, how many keys its last one sees, and bias_1XL, which hides the others from the rest."""
    _, G, T, _ = q_NGTD.shape
    for first in range(0, T, BLOCK):
        L = min(first + BLOCK, T)
        Q = L - first
        bias_QL = torch.zeros(Q, L, dtype=q_NGTD.dtype)
        bias_QL[:, first:] = torch.full((Q, Q), float("-inf")).triu(1)
        yield slice(first, L), L, bias_QL.repeat(G, 1)[None]


def _weights(q_NGQD: Tensor, k_NLD: Tensor, bias_1XL: Tensor, scale: float) -> Tensor:
    """weight_NXL; the softmax is computed in float32, and its result rounded."""
    return torch.baddbmm(bias_1XL, q_NGQD.flatten(1, 2), k_NLD.transpose(1, 2), alpha=scale).softmax(-1)
