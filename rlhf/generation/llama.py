"""Forward passes of a plain Llama over a cache whose rows join and leave, with as few operations as possible.

The same mathematics as transformers' LlamaForCausalLM (softmax and norms in float32), computed differently: prompts are
packed without padding; query, key and value are one matrix product; the query heads of one key head are rows of one
product, so keys and values are not repeated.

N tokens, H hidden size, S rows in the cache, C its columns, A query heads, K key heads, Q = A / K, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from rlhf.generation.cuda_graph import StepGraphs, StepInput
from rlhf.generation.kv_cache import SlotCache
from rlhf.kernels.attention import attend as causal
from rlhf.kernels.linear import Linear


def is_plain_llama(model: nn.Module) -> bool:
    """Whether `LlamaDecoder` computes the same as this model: no adapters, no biases, standard rotary positions."""
    if type(model) is not LlamaForCausalLM:
        return False
    config = model.config
    linears = [
        m for m in model.modules() if hasattr(m, "weight") and m.weight.ndim == 2 and type(m) is not nn.Embedding
    ]
    return (
        config.hidden_act == "silu"
        and not config.attention_bias
        and not config.mlp_bias
        and (config.rope_parameters or {}).get("rope_type") == "default"
        and all(type(m) is nn.Linear for m in linears)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    )


@dataclass
class _Layer:
    qkv: Linear
    out: Linear
    gate: Linear
    up: Linear
    down: Linear
    norm_H: Tensor
    mlp_norm_H: Tensor


class LlamaDecoder:
    """A `Decoder` with packed copies of the model's weights. Make one per call of `sample` and drop it afterwards."""

    packs = True

    def __init__(self, model: Any, alone: bool = False) -> None:
        """`alone`: nothing else uses the device meanwhile."""
        self.model, self.alone, config = model, alone, model.config
        self.A, self.K = config.num_attention_heads, config.num_key_value_heads
        self.D = model.model.layers[0].self_attn.head_dim
        self.eps = config.rms_norm_eps
        self.layers = [_pack(layer) for layer in model.model.layers]
        self.head = Linear(model.lm_head.weight)
        self.graphs: StepGraphs | None = None

    def prefill(self, tokens_GW: Tensor, mask_GW: Tensor, cache: SlotCache) -> Tensor:
        length_G = mask_GW.sum(1)
        cache.admit(length_G)
        position_N = (mask_GW.cumsum(1) - 1)[mask_GW]
        runs = _runs(length_G.tolist(), cache.span.rows.start)

        def attend(number: int, q_NAD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
            layer, place, out_NAD = cache.layer(number), 0, torch.empty_like(q_NAD)
            for rows, count, length in runs:
                part = slice(place, place + count * length)
                q, k, v = (x[part].unflatten(0, (count, length)).transpose(1, 2) for x in (q_NAD, k_NKD, v_NKD))
                layer.write(rows, cache.end - length, k, v)
                attention = self.model.model.layers[number].self_attn
                out_NAD[part] = causal(attention, q, k, v, None, is_causal=True)[0].flatten(0, 1)
                place = part.stop
            return out_NAD

        hidden_NH = self._forward(tokens_GW[mask_GW], position_N, attend)
        return self._logits(hidden_NH[length_G.cumsum(0) - 1])

    def step(self, token_S: Tensor, cache: SlotCache) -> Tensor:
        cache.step()
        if self.alone and token_S.device.type == "cuda":
            return self._by_graph(token_S, cache)
        mask_SC, rows, at = cache.mask_SC(), cache.span.rows, cache.span.at
        bias_SC = torch.zeros(mask_SC.shape, dtype=self.model.dtype, device=mask_SC.device)
        bias_SC = bias_SC.masked_fill_(~mask_SC, float("-inf"))
        bias_SKQC = bias_SC[:, None, None].expand(-1, self.K, self.A // self.K, -1).contiguous()

        def attend(number: int, q_SAD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
            layer = cache.layer(number)
            layer.write(rows, at, k_SKD[:, :, None], v_SKD[:, :, None])
            q_SKQD = q_SAD.unflatten(1, (self.K, -1))
            return _attention(q_SKQD, layer.keys[rows], layer.values[rows], bias_SKQC).flatten(1, 2)

        return self._logits(self._forward(token_S, cache.position_S(), attend))

    def _by_graph(self, token_S: Tensor, cache: SlotCache) -> Tensor:
        if self.graphs is None or self.graphs.cache is not cache:
            self.graphs = StepGraphs(cache, (self.K, self.A // self.K), self.model.dtype)
        return self.graphs(partial(self._whole_step, cache), token_S)

    def _whole_step(self, cache: SlotCache, given: StepInput) -> Tensor:
        """`step` on tensors only, as CUDA graphs need it."""

        def attend(number: int, q_SAD: Tensor, k_SKD: Tensor, v_SKD: Tensor) -> Tensor:
            layer, S = cache.layer(number), len(q_SAD)
            layer.write_column(given.at_1, k_SKD, v_SKD)
            q_SKQD = q_SAD.unflatten(1, (self.K, -1))
            return _attention(q_SKQD, layer.keys[:S], layer.values[:S], given.bias_SKQC).flatten(1, 2)

        return self._logits(self._forward(given.token_S, given.position_S, attend))

    def _forward(
        self, token_N: Tensor, position_N: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        x_NH = F.embedding(token_N, self.model.model.embed_tokens.weight)
        turn = self._rotation(position_N, x_NH.dtype)
        for number, layer in enumerate(self.layers):
            qkv_NCD = layer.qkv(self._norm(x_NH, layer.norm_H)).unflatten(1, (-1, self.D))
            qk_NCD, v_NKD = qkv_NCD.split([self.A + self.K, self.K], 1)
            q_NAD, k_NKD = _rotate(qk_NCD, *turn).split([self.A, self.K], 1)
            x_NH = layer.out.combined(attend(number, q_NAD, k_NKD, v_NKD).flatten(1), x_NH, "add")
            y_NH = self._norm(x_NH, layer.mlp_norm_H)
            x_NH = layer.down.combined(layer.up.combined(y_NH, layer.gate(y_NH, "swish"), "mul"), x_NH, "add")
        return x_NH

    def _logits(self, hidden_NH: Tensor) -> Tensor:
        return self.head(self._norm(hidden_NH, self.model.model.norm.weight))

    def _norm(self, x_NH: Tensor, weight_H: Tensor) -> Tensor:
        return F.rms_norm(x_NH, weight_H.shape, weight_H, self.eps)

    def _rotation(self, position_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos_N1D and sin_N1D; the sine of the first half is negative."""
        angle_NF = position_N[:, None].float() * self.model.model.rotary_emb.inv_freq.float()
        cos_NF, sin_NF = angle_NF.cos(), angle_NF.sin()
        return torch.cat([cos_NF, cos_NF], 1)[:, None].to(dtype), torch.cat([-sin_NF, sin_NF], 1)[:, None].to(dtype)


def _attention(q_SKQD: Tensor, k_SKCD: Tensor, v_SKCD: Tensor, bias_SKQC: Tensor) -> Tensor:
    """Softmax(q kᵀ / √D + bias) v, softmax in float32.

    On a CPU torch's kernel computes two tiny products for each row and head; two over all rows and heads take half the
    time if keys and values need no copy. So the whole buffer is read, and the bias masks other columns.
    """
    if q_SKQD.device.type != "cpu":
        return F.scaled_dot_product_attention(q_SKQD, k_SKCD, v_SKCD, attn_mask=bias_SKQC)
    q_NQD, k_NCD, v_NCD, bias_NQC = (x.flatten(0, 1) for x in (q_SKQD, k_SKCD, v_SKCD, bias_SKQC))
    scores_NQC = torch.baddbmm(bias_NQC, q_NQD, k_NCD.transpose(1, 2), alpha=q_SKQD.shape[-1] ** -0.5)
    return torch.bmm(scores_NQC.softmax(-1), v_NCD).view(q_SKQD.shape)


def _rotate(x_NCD: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) in transformers' order: the halves of a head are the two coordinates."""
    halves_swapped = x_NCD.roll(x_NCD.shape[-1] // 2, -1)
    return (x_NCD * cos_N1D).addcmul_(halves_swapped, sin_N1D)


def _pack(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        qkv=Linear(torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])),
        out=Linear(attention.o_proj.weight),
        gate=Linear(mlp.gate_proj.weight),
        up=Linear(mlp.up_proj.weight),
        down=Linear(mlp.down_proj.weight),
        norm_H=layer.input_layernorm.weight,
        mlp_norm_H=layer.post_attention_layernorm.weight,
    )


def _runs(lengths: list[int], first_slot: int) -> list[tuple[slice, int, int]]:
    """Runs of neighbours with equal lengths, as (slots, number, length): each is one attention without padding."""
    runs: list[tuple[slice, int, int]] = []
    for slot, length in enumerate(lengths, first_slot):
        if runs and runs[-1][2] == length:
            rows, count, _ = runs.pop()
            runs.append((slice(rows.start, slot + 1), count + 1, length))
        else:
            runs.append((slice(slot, slot + 1), 1, length))
    return runs
