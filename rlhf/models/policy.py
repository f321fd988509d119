"""PolicyModel: logprobs of the response tokens in one forward pass of one module.

One module, because ZeRO-3 gathers a weight only inside the forward pass of the module that owns it.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from rlhf.kernels.logprobs import logprobs_and_entropy_from_hidden
from rlhf.models import hidden_states, lm_head


class PolicyModel(nn.Module):
    def __init__(self, causal: nn.Module, packing: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.packing = packing

    def forward(
        self,
        tokens_BT: Tensor,
        mask_BT: Tensor,
        response_length: int,
        temperature: float,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(logprobs_BR, entropy_BR) of the last `response_length` tokens, float32, at the sampling temperature.

        The token at position t is predicted at t - 1. The LM head runs on the N real response tokens only. Padding is
        0, and so are entropies without `with_entropy`.
        """
        hidden_BTH = hidden_states(self.causal, tokens_BT, mask_BT, self.packing, response_length)
        response_BR = mask_BT[:, -response_length:].bool()
        hidden_NH = hidden_BTH[:, -response_length - 1 : -1][response_BR]
        labels_N = tokens_BT[:, -response_length:][response_BR]
        weight_VH = cast(Tensor, lm_head(self.causal).weight)
        read_2N = logprobs_and_entropy_from_hidden(
            hidden_NH[None], weight_VH, labels_N[None], temperature, with_entropy=with_entropy
        )
        logprobs_BR, entropy_BR = (
            x_1N.new_zeros(response_BR.shape).masked_scatter(response_BR, x_1N) for x_1N in read_2N
        )
        return logprobs_BR, entropy_BR
