"""What PPO asks of a causal model: logprobs of the response tokens, as one forward pass of one module.

One module, because ZeRO-3 gathers a weight only inside the forward pass of the module that owns it.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from rlhf.algorithms.logprobs import logprobs_and_entropy_from_hidden
from rlhf.models import hidden_states, lm_head


class PolicyModel(nn.Module):
    def __init__(self, causal: nn.Module) -> None:
        super().__init__()
        self.causal = causal

    def forward(
        self, tokens_BT: Tensor, mask_BT: Tensor, response_length: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(logprobs_BR, entropy_BR) of the last `response_length` tokens, float32, at the sampling temperature.

        The token at position t is predicted at t - 1; the LM head runs on no other position.
        """
        hidden_BTH = hidden_states(self.causal, tokens_BT, mask_BT)
        hidden_BRH = hidden_BTH[:, -response_length - 1 : -1]
        labels_BR = tokens_BT[:, -response_length:]
        weight_VH = cast(Tensor, lm_head(self.causal).weight)
        return logprobs_and_entropy_from_hidden(hidden_BRH, weight_VH, labels_BR, temperature)
