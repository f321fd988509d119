"""RMS norms of a Llama's layers in bf16, as one operation.

Under autocast, transformers' norm returns float32, which every following matrix product casts and keeps for its
gradient; autograd also keeps the intermediate tensors. Here the result is cast once and only the input is kept. On a
CPU the values are the same bits; a GPU has a kernel for it. The gradients of its readers are summed in bf16, the
precision of each of them. The last norm of a model stays float32, because heads read it.

N tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.kernels.attention import computed_in

OF_LAYERS = ("input_layernorm", "post_attention_layernorm")


class RMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype is not torch.float32 or computed_in(hidden_states) is not torch.bfloat16:
            return super().forward(hidden_states)
        if hidden_states.device.type != "cpu":
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon).to(torch.bfloat16)
        normed: Any = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return normed


def tune_norms(model: nn.Module) -> None:
    """Turns the norms of all Llama layers into `RMSNorm`; weights and names stay."""
    for name, part in model.named_modules():
        if type(part) is LlamaRMSNorm and name.endswith(OF_LAYERS):
            part.__class__ = RMSNorm


class _RMSNorm(torch.autograd.Function):
    """y = w · x̂ in bf16, where x̂ = x / √(mean x² + eps)  (Zhang & Sennrich 2019, eq. 4)."""

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        scale_N1 = torch.rsqrt(x_NH.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x_NH, weight_H, scale_N1)
        return (x_NH * scale_N1).mul_(weight_H).to(torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, grad_NH: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """dx = (w · dy - x̂ · mean(w · dy · x̂)) / √(mean x² + eps)."""
        x_NH, weight_H, scale_N1 = ctx.saved_tensors
        dy_NH, x_hat_NH = grad_NH.float(), x_NH * scale_N1
        product_NH = dy_NH * x_hat_NH
        dweight_H = product_NH.flatten(0, -2).sum(0)
        mean_N1 = product_NH.mul_(weight_H).mean(-1, keepdim=True)
        dx_NH = dy_NH.mul_(weight_H).sub_(x_hat_NH.mul_(mean_N1)).mul_(scale_N1)
        return dx_NH, dweight_H, None
