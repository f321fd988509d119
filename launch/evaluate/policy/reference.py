"""The KL of policies to a reference model, response by response."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from launch.evaluate.policy.policies import Response, Settings, device
from launch.model_folder import model_folder
from rlhf.data import pad
from rlhf.errors import UserError
from rlhf.models import load_causal, load_tokenizer
from rlhf.models.policy import PolicyModel


class Reference:
    """Reads the tokens of responses; the policies must have its tokenizer."""

    def __init__(self, model: str, settings: Settings) -> None:
        folder = model_folder(model)
        self._model, self._vocabulary = model, load_tokenizer(folder).get_vocab()
        causal: Any = load_causal(folder)
        if settings.precision == "bf16":
            causal = causal.to(torch.bfloat16)
        self._policy = PolicyModel(causal.to(device())).eval()
        self._batch_size = settings.batch_size

    @torch.inference_mode()
    def kl(self, responses: Sequence[Response | None], temperature: float, model: str) -> list[float | None]:
        """Σ log π - log π_ref over the tokens of each response, in nats: k1, whose mean over samples of π is unbiased for
        KL(π ‖ π_ref). Both log-probabilities are float32 and at the sampling temperature. UserError (2) for a policy with
        another tokenizer, or without tokens.
        """
        self._check(model)
        there = [(row, response) for row, response in enumerate(responses) if response is not None]
        there.sort(key=lambda one: -len(one[1].prompt_ids) - len(one[1].tokens))
        found: list[float | None] = [None] * len(responses)
        waiting = iter(there)
        while part := list(islice(waiting, self._batch_size)):
            of_reference = self._logprobs([response for _, response in part], temperature)
            for (row, response), logprob in zip(part, of_reference, strict=True):
                assert response.logprob is not None
                found[row] = response.logprob - logprob
        return found

    def _check(self, model: str) -> None:
        if load_tokenizer(model_folder(model)).get_vocab() != self._vocabulary:
            raise UserError(
                f"--reference {self._model}: {model} has another tokenizer, so there is no KL between them; name a "
                "reference with the tokenizer of every policy, or leave --reference out"
            )

    def _logprobs(self, responses: Sequence[Response], temperature: float) -> list[float]:
        prompt_BP, prompt_mask_BP = pad([response.prompt_ids for response in responses], 0, left=True)
        tokens_BR, mask_BR = pad([response.tokens for response in responses], 0)
        tokens_BT = torch.cat([prompt_BP, tokens_BR], 1).to(device())
        mask_BT = torch.cat([prompt_mask_BP, mask_BR], 1).to(device())
        logprobs_BR, _ = self._policy(tokens_BT, mask_BT, tokens_BR.shape[1], temperature)
        return logprobs_BR.sum(1).tolist()
