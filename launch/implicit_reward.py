"""The reward that a DPO policy stands for: β · (log π - log π_SFT), summed over the tokens of a response.

Rafailov et al. 2023 (arXiv 2305.18290), equation 5 without the term that all responses to a prompt share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.kernels.logprobs import logprobs_from_hidden
from rlhf.models import hidden_states, lm_head, load_causal
from rlhf.runs import artifacts


class ImplicitReward(nn.Module):
    def __init__(self, policy: nn.Module, reference: nn.Module, beta: float) -> None:
        super().__init__()
        self.policy, self.reference, self.beta = policy, reference, beta
        self.config: Any = policy.config

    def score(self, tokens_BT: Tensor, mask_BT: Tensor, prompts_B: Tensor) -> Tensor:
        """rewards_B, float32. `prompts_B`: tokens before each response."""
        response_BT = mask_BT.bool() & (torch.arange(tokens_BT.shape[1], device=tokens_BT.device) >= prompts_B[:, None])
        policy_B, reference_B = (
            _logprobs(model, tokens_BT, mask_BT, response_BT) for model in (self.policy, self.reference)
        )
        return self.beta * (policy_B - reference_B)


def _logprobs(model: nn.Module, tokens_BT: Tensor, mask_BT: Tensor, response_BT: Tensor) -> Tensor:
    hidden_BTH, said_BT = hidden_states(model, tokens_BT, mask_BT)[:, :-1], response_BT[:, 1:]
    weight_VH: Any = lm_head(model).weight
    logprobs_N = logprobs_from_hidden(hidden_BTH[said_BT][None], weight_VH, tokens_BT[:, 1:][said_BT][None])[0]
    return logprobs_N.new_zeros(said_BT.shape).masked_scatter(said_BT, logprobs_N).sum(1)


def load_implicit_reward(folder: Path) -> ImplicitReward | None:
    """The reward of the DPO artifact in `folder`; None where that is something else.

    UserError (4) where the SFT model that the policy started from is no longer in the same run.
    """
    if not (folder / artifacts.MANIFEST).is_file() or (artifact := artifacts.load(folder)).kind != "dpo":
        return None
    sft = folder.absolute().parents[1] / "sft" / "artifact"
    if not (sft / artifacts.MANIFEST).is_file() or artifacts.load(sft).digest != artifact.parents["sft"]:
        raise UserError(
            f"a DPO policy scores responses by how far it has moved from the SFT model it started from, and {sft} is not "
            "that model; keep both in the folder of their run",
            4,
        )
    return ImplicitReward(load_causal(folder), load_causal(sft), artifact.metrics["beta"])
