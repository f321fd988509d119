"""PolicyModel: logprobs of the response tokens in one forward pass of one module.

One module, because ZeRO-3 gathers a weight only inside the forward pass of the module that owns it.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from rlhf.kernels.logprobs import logprobs_and_entropy_from_hidden
from rlhf.models import lm_head, read_states


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
        states = read_states(self.causal, tokens_BT, mask_BT, self.packing, response_length)
        response_BR = mask_BT[:, -response_length:].bool()
        before_BR = states.place_BT[:, -response_length - 1 : -1].masked_fill(~response_BR, -1)
        weight_VH = cast(Tensor, lm_head(self.causal).weight)

        def read(hidden_NH: Tensor, here_BR: Tensor) -> tuple[Tensor, Tensor]:
            labels_N = tokens_BT[:, -response_length:][here_BR]
            return logprobs_and_entropy_from_hidden(
                hidden_NH[None], weight_VH, labels_N[None], temperature, with_entropy=with_entropy
            )

        logprobs_BR, entropy_BR = states.values(before_BR, read)
        return logprobs_BR, entropy_BR
