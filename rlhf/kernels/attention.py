"""Causal attention in bf16 for the cases in which transformers' `sdpa` is slow. `sdpa` still does everything else:
float32, masks (except those of packed rows), dropout, sampling steps.

On a CPU, whole rows are computed as matrix products over all rows and heads, one block of queries at a time. Torch's
kernel uses separate products for each row, head and block, and takes twice as long. On a GPU, packed rows go to flash
attention; with a mask every token would be compared with the tokens of all other rows.

B rows, A query heads, K key heads, T tokens, D head size; N = B · K, G query heads of a key head, Q queries of a block,
L keys that they see, X = G · Q.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

BLOCK = 128  # queries whose scores exist at a time: few enough for a CPU's cache


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: query_BATD, key_BKTD, value_BKTD → (out_BTAD, None).

    Packed rows are a batch of one, and `cu_seq_lens_q` and `max_length_q` (names of transformers) say where they end.
    The mask says the same and is not read.
    """
    scale = settings.get("scaling") or query.shape[-1] ** -0.5
    if reads_row_ends(module, query, key, value, settings):
        return packed_attention(query, key, value, settings["cu_seq_lens_q"], settings["max_length_q"], scale), None
    if _is_ours(module, query, key, value, settings) and attention_mask is None and query.device.type == "cpu":
        return causal_attention(query, key, value, scale).transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)  # type: ignore[return-value]


def reads_row_ends(module: Any, query: Tensor, key: Tensor, value: Tensor, settings: Mapping[str, Any]) -> bool:
    """Whether `attend` goes by the ends of packed rows and reads no mask."""
    given = settings.get("cu_seq_lens_q") is not None
    return given and _is_ours(module, query, key, value, settings) and _is_for_flash(module, query)


def _is_ours(module: Any, query: Tensor, key: Tensor, value: Tensor, settings: Mapping[str, Any]) -> bool:
    """Whether this is plain causal attention in bf16 over whole rows."""
    causal = getattr(module, "is_causal", True) and settings.get("is_causal") is not False
    plain = not settings.get("dropout") and settings.get("position_bias") is None
    whole = query.shape[2] == key.shape[2] > 1 and value.shape == key.shape
    return causal and plain and whole and computed_in(query) is torch.bfloat16


def computed_in(x: Tensor) -> torch.dtype:
    """The precision of matrix products with `x`, which autocast decides where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def has_windows(config: Any) -> bool:
    """Whether attention is limited to a window of tokens."""
    return any(getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size"))


def _is_for_flash(module: Any, query_BATD: Tensor) -> bool:
    """Whether torch's flash attention can compute this layer on packed rows."""
    B, D = query_BATD.shape[0], query_BATD.shape[-1]
    return B == 1 and D % 8 == 0 and D <= 256 and not has_windows(module.config) and _has_flash(query_BATD.device)


def _has_flash(device: torch.device) -> bool:
    """Whether this GPU is Ampere or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def packed_attention(
    q_1ATD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, ends: Tensor, longest: int, scale: float
) -> Tensor:
    """out_1TAD of concatenated rows: row i is `ends[i]` to `ends[i + 1]`, int32."""
    q_TAD, k_TKD, v_TKD = (x[0].transpose(0, 1).to(torch.bfloat16).contiguous() for x in (q_1ATD, k_1KTD, v_1KTD))
    out_TAD: Any = varlen_attn(
        q_TAD, k_TKD, v_TKD, ends, ends, longest, longest, scale=scale, window_size=(-1, 0), enable_gqa=True
    )
    return out_TAD[None]


def causal_attention(q_BATD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, scale: float) -> Tensor:
    """out_BATD = softmax(scale · q kᵀ) v, where a token sees itself and the tokens before it; softmax in float32.

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
        """With weights w = softmax(s): ds = w · (dw − Σ w dw), and Σ w dw = grad · out (Dao et al. 2022, appendix
        B.2)."""
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
    """(block of queries, number L of keys that its last query sees, bias_1XL that masks later keys for the others)."""
    _, G, T, _ = q_NGTD.shape
    for first in range(0, T, BLOCK):
        L = min(first + BLOCK, T)
        Q = L - first
        bias_QL = torch.zeros(Q, L, dtype=q_NGTD.dtype)
        bias_QL[:, first:] = torch.full((Q, Q), float("-inf")).triu(1)
        yield slice(first, L), L, bias_QL.repeat(G, 1)[None]


def _weights(q_NGQD: Tensor, k_NLD: Tensor, bias_1XL: Tensor, scale: float) -> Tensor:
    """weight_NXL; the softmax is computed in float32 and then rounded."""
    return torch.baddbmm(bias_1XL, q_NGQD.flatten(1, 2), k_NLD.transpose(1, 2), alpha=scale).softmax(-1)
