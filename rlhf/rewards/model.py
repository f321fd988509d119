"""A reward model as a reward: one score for the whole dialogue, read at its last token."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.data.batches import select, trim
from rlhf.distributed.engine import Engine
from rlhf.distributed.micro_batches import in_row_order, micro_batches_of_shards
from rlhf.distributed.sequence import group_of, rows_of_group
from rlhf.models import ScalarModel, last_value
from rlhf.rewards.base import Responses, Scored


class ModelReward:
    """The score of a reward model minus its mean over SFT responses. It never fails."""

    def __init__(self, engine: Engine, config: PPOConfig) -> None:
        self.engine, self._config = engine, config

    @property
    def offset(self) -> float:
        """The mean raw logit of SFT responses, which is subtracted."""
        return offset_of(self.engine)

    @torch.no_grad()
    def __call__(self, responses: Responses) -> Scored:
        rollout, own = rows_of_group(responses.rollout, group_of(self.engine.sequence_parallel))
        micro_batches, values = micro_batches_of_shards(rollout, self._config), []
        for index in micro_batches:
            part = trim(select(rollout, index))
            tokens_BT, mask_BT = part.tokens_BT.to(self.engine.device), part.mask_BT.to(self.engine.device)
            values.append(score(self.engine, tokens_BT, mask_BT, part.response_mask_BR.shape[1]))
        values_B = in_row_order(values, micro_batches)[own].float().cpu()
        return Scored(values_B, torch.zeros(len(values_B), dtype=torch.bool))


def score(engine: Engine, tokens_BT: Tensor, mask_BT: Tensor, response_length: int = 0) -> Tensor:
    """scores_B: the raw logit at the last real token minus the mean over SFT responses."""
    return last_value(engine(tokens_BT, mask_BT, response_length), mask_BT) - offset_of(engine)


def offset_of(engine: Engine) -> float:
    return cast(ScalarModel, engine.module).offset
